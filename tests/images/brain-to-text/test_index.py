"""The index finds the bytes that h5py would, is kept, and is refused where its object changed."""

from __future__ import annotations

import json
import os
import tempfile
import zlib
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import xxhash
from files import LAYOUTS, SESSIONS, write_folder, write_session, write_trial
from hypothesis import given, settings
from hypothesis import strategies as st

from brain_to_text.generator import make_dataset
from brain_to_text.indexing.hdf5 import decode, fletcher32, locate, ranges_of
from brain_to_text.indexing.index import FOLDER, MAGIC, ObjectIndex, find_objects, loads, open_indexes
from brain_to_text.indexing.paged import PagedFile
from estiba.errors import ConfigError, DataError
from estiba.stop import Stop
from estiba.store import open_store


@pytest.fixture(autouse=True)
def kept(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this machine keeps indexes of local files."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def indexes_of(location: str | Path, **options: Any) -> list[ObjectIndex]:
    store = open_store(location)
    usual: dict[str, Any] = {"index_path": None, "rebuild": False, "workers": 0, "stop": Stop()}
    return open_indexes(str(location), find_objects(store), store=store, **{**usual, **options})


def read_by_ranges(path: Path, index: ObjectIndex, number: int) -> np.ndarray:
    placement = index.trials[number].features
    assert placement is not None
    data = path.read_bytes()
    return decode(placement, [data[start : start + length] for start, length in ranges_of(placement)])


@st.composite
def storages(draw: st.DrawFn) -> dict[str, Any]:
    """Any shape, kind of number, chunking, filters, holes, and block before the file's own."""
    shape = (draw(st.integers(0, 40)), draw(st.integers(1, 12)))
    options: dict[str, Any] = {
        "shape": shape,
        "dtype": draw(st.sampled_from(["<f4", ">f4", "<f2", "<f8", "<i2", ">i4", "u1"])),
    }
    if draw(st.booleans()) and shape[0]:
        options["chunks"] = (draw(st.integers(1, shape[0])), draw(st.integers(1, shape[1])))
        options["shuffle"] = draw(st.booleans())
        options["fletcher32"] = draw(st.booleans())
        options["compression"] = draw(st.sampled_from([None, "gzip", "lzf"]))
        options["maxshape"] = draw(st.sampled_from([None, (None, shape[1])]))
    if draw(st.booleans()):
        options["fillvalue"] = 3
    return options


@settings(max_examples=150, deadline=None)
@given(
    storage=storages(),
    written=st.sampled_from(["all", "half", "nothing"]),
    library=st.sampled_from(["earliest", "latest", "v110"]),
    userblock=st.sampled_from([0, 512]),
    seed=st.integers(0, 2**16),
)
def test_values_by_ranges_are_those_of_h5py_bit_for_bit(
    storage: dict[str, Any], written: str, library: str, userblock: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file.hdf5"
        with h5py.File(path, "w", libver=(library, "latest"), userblock_size=userblock) as file:
            for name in ("before", "values"):
                dataset = file.create_dataset(name, **storage)
                rows = {"all": dataset.shape[0], "half": dataset.shape[0] // 2, "nothing": 0}[written]
                if rows:
                    kind = dataset.dtype
                    raw = random.integers(0, 256, rows * dataset.shape[1] * kind.itemsize, np.uint8)
                    dataset[:rows] = raw.view(kind).reshape(rows, -1)
        with h5py.File(path, "r") as file:
            placement, expected = locate(file["values"]), file["values"][()]
        data = path.read_bytes()
    found = decode(placement, [data[start : start + length] for start, length in ranges_of(placement)])
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_session_of_each_layout_is_read_as_h5py_reads_it(tmp_path: Path, layout: str) -> None:
    path = write_session(tmp_path, layout=layout, trials=5)
    (index,) = indexes_of(tmp_path)
    assert [trial.name for trial in index.trials] == [f"trial_{number:04d}" for number in range(5)]
    with h5py.File(path) as file:
        for number, trial in enumerate(index.trials):
            group = file[trial.name]
            assert read_by_ranges(path, index, number).tobytes() == group["input_features"][()].tobytes()
            assert trial.labels is not None and trial.label_length == group.attrs["seq_len"]
            np.testing.assert_array_equal(trial.labels, group["seq_class_ids"][: trial.label_length])
            assert (trial.transcription, trial.sentence) == ("hello", "hello.")
            assert trial.n_time_steps == group.attrs["n_time_steps"]
            assert (trial.block, trial.number) == (group.attrs["block_num"], group.attrs["trial_num"])


def test_a_compact_dataset_is_read_out_of_the_index(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.float32).reshape(6, 2)
    with h5py.File(tmp_path / "f.hdf5", "w") as file:
        created = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        created.set_layout(h5py.h5d.COMPACT)
        space = h5py.h5s.create_simple(values.shape)
        h5py.Dataset(h5py.h5d.create(file.id, b"x", h5py.h5t.IEEE_F32LE, space, created))[...] = values
        placement = locate(file["x"])
    assert ranges_of(placement) == []
    np.testing.assert_array_equal(decode(placement, []), values)


def test_chunks_that_lie_side_by_side_are_one_request(tmp_path: Path) -> None:
    write_session(tmp_path, layout="shuffle", trials=3)
    (index,) = indexes_of(tmp_path)
    for trial in index.trials:
        assert trial.features is not None and len(trial.features.chunks) > 3
        # HDF5 fills an older gap with one of them now and then.
        assert len(ranges_of(trial.features)) <= 2


@pytest.mark.parametrize("damage", ["deflate", "checksum"])
def test_a_damaged_chunk_is_an_error_and_no_values(tmp_path: Path, damage: str) -> None:
    layout = {"deflate": "gzip", "checksum": "fletcher32"}[damage]
    path = write_session(tmp_path, layout=layout, trials=1)
    (index,) = indexes_of(tmp_path)
    placement = index.trials[0].features
    assert placement is not None
    data = bytearray(path.read_bytes())
    data[placement.chunks[0][1] + 9] ^= 0xFF
    with pytest.raises(ValueError, match=r"decompress|checksum"):
        decode(placement, [bytes(data)[start : start + length] for start, length in ranges_of(placement)])


@given(st.binary(max_size=4000))
@settings(max_examples=60, deadline=None)
def test_the_checksum_is_hdf5s_own(data: bytes) -> None:
    a = b = 0  # as H5_checksum_fletcher32 goes through it, word by word
    padded = data + b"\0" * (len(data) % 2)
    for at in range(0, len(padded), 2):
        a += int.from_bytes(padded[at : at + 2], "big")
        b += a
        if at % 720 == 718 or at + 2 >= len(padded):
            a, b = (a & 0xFFFF) + (a >> 16), (b & 0xFFFF) + (b >> 16)
    a, b = (a & 0xFFFF) + (a >> 16), (b & 0xFFFF) + (b >> 16)
    assert fletcher32(memoryview(data)) == (b << 16 | a)


def test_an_index_is_made_once_and_used_again(tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path)
    first = indexes_of(tmp_path)
    assert len(list(kept.rglob("*.index"))) == 6
    assert not (tmp_path / FOLDER).exists(), "a job does not write to its input"
    monkeypatch.setattr("brain_to_text.indexing.index.survey_all", lambda *_, **__: pytest.fail("made again"))
    again = indexes_of(tmp_path)
    assert [index.digest for index in first] == [index.digest for index in again]


def test_processes_make_the_same_index_as_this_one(tmp_path: Path) -> None:
    write_folder(tmp_path)
    here = indexes_of(tmp_path, index_path=tmp_path / "one")
    there = indexes_of(tmp_path, index_path=tmp_path / "other", workers=2)
    assert [index.digest for index in here] == [index.digest for index in there]
    assert [index.path for index in here] == [index.path for index in there]


def test_a_file_that_changed_is_refused_with_both_versions_and_what_to_do(tmp_path: Path) -> None:
    path = write_session(tmp_path)
    indexes_of(tmp_path)
    with h5py.File(path, "r+") as file:
        write_trial(file, 99)
    os.utime(path, ns=(1, 1))
    with pytest.raises(
        DataError, match=r"data_train.hdf5: is not the object that was indexed: expected .*; found .*"
    ) as told:
        indexes_of(tmp_path)
    assert "--rebuild" in str(told.value)
    assert len(indexes_of(tmp_path, rebuild=True)[0].trials) == 13
    assert len(indexes_of(tmp_path)[0].trials) == 13


def test_a_copy_of_the_folder_with_its_index_is_indexed_anew_and_says_the_same(tmp_path: Path) -> None:
    write_folder(tmp_path / "a")
    first = indexes_of(tmp_path / "a")
    import shutil

    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copy)
    assert [index.digest for index in indexes_of(tmp_path / "b")] == [index.digest for index in first]


def test_a_damaged_index_is_made_again(tmp_path: Path, kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_session(tmp_path)
    (first,) = indexes_of(tmp_path)
    (path,) = kept.rglob("*.index")
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)
    (second,) = indexes_of(tmp_path)
    assert second.digest == first.digest and path.read_bytes() != bytes(data)
    assert "does not match" in capsys.readouterr().err.replace("do not match", "does not match")


def test_an_index_beside_local_data_is_used_where_this_machine_has_none(
    tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_session(tmp_path)
    indexes_of(tmp_path, index_path=tmp_path / FOLDER)
    monkeypatch.setattr("brain_to_text.indexing.index.survey_all", lambda *_, **__: pytest.fail("made again"))
    indexes_of(tmp_path)
    assert not list(kept.rglob("*.index"))


def test_data_that_is_generated_anew_is_indexed_anew(tmp_path: Path) -> None:
    small = {"sessions": 1, "features": 4, "longest_words": 2}
    for trials in (3, 5):
        make_dataset(tmp_path / "data", trials=trials, overwrite=True, **small)
        assert max(len(index.trials) for index in indexes_of(tmp_path / "data")) == trials


def test_what_is_no_hdf5_and_what_was_cut_short_are_named(tmp_path: Path) -> None:
    path = write_session(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"data_train.hdf5: cut short: it has [\d,]+ bytes"):
        indexes_of(tmp_path)
    path.write_bytes(b"PK" + b"x" * 9000)
    with pytest.raises(DataError, match=r"not an HDF5 file"):
        indexes_of(tmp_path)


def test_a_place_without_sessions_says_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing there"):
        indexes_of(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"no SESSION/data_train.hdf5 below it .*notes.txt"):
        indexes_of(tmp_path)


def test_trials_come_by_number_and_other_groups_are_no_trials(tmp_path: Path) -> None:
    path = tmp_path / SESSIONS[0] / "data_train.hdf5"
    path.parent.mkdir()
    with h5py.File(path, "w") as file:
        for number in (11, 2, 10000, 9):
            write_trial(file, number)
        file.create_group("about")
    (index,) = indexes_of(tmp_path)
    assert [trial.name for trial in index.trials] == ["trial_0002", "trial_0009", "trial_0011", "trial_10000"]


def test_a_file_over_pages_reads_as_the_file(tmp_path: Path) -> None:
    path = write_session(tmp_path, trials=60)
    data = path.read_bytes()
    asked: list[tuple[int, int]] = []

    def read(start: int, length: int) -> bytes:
        asked.append((start, length))
        assert start + length <= len(data)
        return data[start : start + length]

    pages = PagedFile(read, len(data))
    pages.prefetch([0, len(data) - 1])
    with h5py.File(pages, "r") as file, h5py.File(path, "r") as plain:
        for name in plain:
            assert file[name]["input_features"][()].tobytes() == plain[name]["input_features"][()].tobytes()
    assert sum(length for _, length in asked) <= len(data), "no page is fetched twice"


@pytest.mark.parametrize("key", ["trials", "path"])
def test_an_index_of_another_making_is_made_again(tmp_path: Path, kept: Path, key: str) -> None:
    write_session(tmp_path)
    (first,) = indexes_of(tmp_path)
    (path,) = kept.rglob("*.index")
    document = json.loads(zlib.decompress(path.read_bytes().partition(b"\n")[2]))
    del document["body"][key]
    packed = zlib.compress(json.dumps(document).encode())
    path.write_bytes(MAGIC + xxhash.xxh3_128_hexdigest(packed).encode() + b"\n" + packed)
    assert indexes_of(tmp_path)[0].digest == first.digest == loads(path.read_bytes()).digest


def test_folders_whose_names_look_alike_have_an_index_each(tmp_path: Path, kept: Path) -> None:
    for folder in ("a.b", "a/b", "a%2Fb"):
        write_session(tmp_path / Path(folder).parent, Path(folder).name, trials=3)
    indexes_of(tmp_path)
    assert len(list(kept.rglob("*.index"))) == 3
    assert [index.path for index in indexes_of(tmp_path)] == [
        f"{name}/data_train.hdf5" for name in ("a%2Fb", "a.b", "a/b")
    ]


def test_an_index_made_anew_counts_where_the_published_one_cannot_be_replaced(
    tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_session(tmp_path)
    indexes_of(tmp_path)
    (old,) = kept.rglob("*.index")
    os.utime(path, ns=(1, 1))
    indexes_of(tmp_path, index_path=tmp_path / FOLDER)
    (index,) = indexes_of(tmp_path)
    assert index.pin.mark == "1" != loads(old.read_bytes()).pin.mark


def test_a_folder_of_data_is_not_written_to_even_where_nothing_else_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_session(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert len(indexes_of(tmp_path)[0].trials) == 12
    assert not (tmp_path / FOLDER).exists() and "kept nowhere" in capsys.readouterr().err


def test_a_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    os.rename(write_session(tmp_path).parent, os.fsencode(tmp_path) + b"/t15\xff")
    with pytest.raises(DataError, match="a name with bytes that are no text; rename it"):
        indexes_of(tmp_path)
