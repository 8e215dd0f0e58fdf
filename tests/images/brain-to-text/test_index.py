"""The index finds the same bytes as h5py, is kept for later runs, and is refused if its object changed."""

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
from hdf5_files import LAYOUTS, SESSIONS, write_folder, write_session, write_trial
from hypothesis import given, settings
from hypothesis import strategies as st

from brain_to_text.data.indexing.hdf5 import byte_ranges, decode, fletcher32, locate
from brain_to_text.data.indexing.index import FOLDER, find_objects, open_indexes
from brain_to_text.data.indexing.index_file import MAGIC, ObjectIndex, loads
from brain_to_text.data.indexing.paged_file import PagedFile
from brain_to_text.synthetic.generator import make_dataset
from estiba.errors import ConfigError, DataError
from estiba.platform.stop import Stop
from estiba.storage import open_store


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where this machine keeps indexes of local files."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def indexes_of(location: str | Path, **options: Any) -> list[ObjectIndex]:
    store = open_store(location)
    defaults: dict[str, Any] = {"index_path": None, "rebuild": False, "workers": 0, "stop": Stop()}
    return open_indexes(str(location), find_objects(store), store=store, **{**defaults, **options})


def read_by_ranges(path: Path, index: ObjectIndex, number: int) -> np.ndarray:
    layout = index.trials[number].features
    assert layout is not None
    data = path.read_bytes()
    return decode(layout, [data[start : start + length] for start, length in byte_ranges(layout)])


@st.composite
def storages(draw: st.DrawFn) -> dict[str, Any]:
    """Draw any shape, number format, chunking, filters and fill value."""
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
def test_values_read_by_byte_ranges_equal_h5pys_bit_for_bit(
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
            layout, expected = locate(file["values"]), file["values"][()]
        data = path.read_bytes()
    decoded = decode(layout, [data[start : start + length] for start, length in byte_ranges(layout)])
    assert decoded.dtype == expected.dtype and decoded.shape == expected.shape
    assert decoded.tobytes() == expected.tobytes()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_session_in_each_layout_is_read_as_by_h5py(tmp_path: Path, layout: str) -> None:
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


@pytest.mark.parametrize("name", ["Bitshuffle", "Blosc", "LZ4", "Zstd"])
def test_a_filter_of_a_plugin_is_undone_by_the_plugin(tmp_path: Path, name: str) -> None:
    """bitshuffle puts three values of its own before those that it is given, when a dataset is created."""
    plugins = pytest.importorskip("hdf5plugin", reason="without hdf5plugin, these filters are refused by name")
    path = write_session(tmp_path, trials=2)
    with h5py.File(path, "r+") as file:
        for group in file.values():
            values = group["input_features"][()]
            del group["input_features"]
            group.create_dataset("input_features", data=values, chunks=(6, 8), **getattr(plugins, name)())
    (index,) = indexes_of(tmp_path)
    assert not index.problems
    with h5py.File(path) as file:
        for number, trial in enumerate(index.trials):
            expected = file[trial.name]["input_features"][()]
            assert read_by_ranges(path, index, number).tobytes() == expected.tobytes()


def test_a_compact_dataset_is_read_from_the_index(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.float32).reshape(6, 2)
    with h5py.File(tmp_path / "f.hdf5", "w") as file:
        created = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        created.set_layout(h5py.h5d.COMPACT)
        space = h5py.h5s.create_simple(values.shape)
        h5py.Dataset(h5py.h5d.create(file.id, b"x", h5py.h5t.IEEE_F32LE, space, created))[...] = values
        layout = locate(file["x"])
    assert byte_ranges(layout) == []
    np.testing.assert_array_equal(decode(layout, []), values)


def test_adjacent_chunks_are_one_request(tmp_path: Path) -> None:
    write_session(tmp_path, layout="shuffle", trials=3)
    (index,) = indexes_of(tmp_path)
    for trial in index.trials:
        assert trial.features is not None and len(trial.features.chunks) > 3
        # HDF5 sometimes puts a chunk into an earlier gap.
        assert len(byte_ranges(trial.features)) <= 2


@pytest.mark.parametrize("damage", ["deflate", "checksum"])
def test_a_damaged_chunk_is_an_error(tmp_path: Path, damage: str) -> None:
    storage = {"deflate": "gzip", "checksum": "fletcher32"}[damage]
    path = write_session(tmp_path, layout=storage, trials=1)
    (index,) = indexes_of(tmp_path)
    layout = index.trials[0].features
    assert layout is not None
    data = bytearray(path.read_bytes())
    data[layout.chunks[0][1] + 9] ^= 0xFF
    with pytest.raises(ValueError, match=r"decompress|checksum"):
        decode(layout, [bytes(data)[start : start + length] for start, length in byte_ranges(layout)])


@given(st.binary(max_size=4000))
@settings(max_examples=60, deadline=None)
def test_the_checksum_equals_hdf5s(data: bytes) -> None:
    a = b = 0  # word by word, as in H5_checksum_fletcher32
    padded = data + b"\0" * (len(data) % 2)
    for at in range(0, len(padded), 2):
        a += int.from_bytes(padded[at : at + 2], "big")
        b += a
        if at % 720 == 718 or at + 2 >= len(padded):
            a, b = (a & 0xFFFF) + (a >> 16), (b & 0xFFFF) + (b >> 16)
    a, b = (a & 0xFFFF) + (a >> 16), (b & 0xFFFF) + (b >> 16)
    assert fletcher32(memoryview(data)) == (b << 16 | a)


def test_an_index_is_built_once_and_used_again(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path)
    first = indexes_of(tmp_path)
    assert len(list(cache.rglob("*.index"))) == 6
    assert not (tmp_path / FOLDER).exists(), "a job does not write to its input"
    monkeypatch.setattr("brain_to_text.data.indexing.index.scan_all", lambda *_, **__: pytest.fail("built again"))
    again = indexes_of(tmp_path)
    assert [index.digest for index in first] == [index.digest for index in again]


def test_worker_processes_build_the_same_index(tmp_path: Path) -> None:
    write_folder(tmp_path)
    expected = indexes_of(tmp_path, index_path=tmp_path / "in-process")
    indexes = indexes_of(tmp_path, index_path=tmp_path / "workers", workers=2)
    assert [index.digest for index in indexes] == [index.digest for index in expected]
    assert [index.path for index in indexes] == [index.path for index in expected]


def test_a_file_that_changed_is_refused_with_both_versions_and_the_remedy(tmp_path: Path) -> None:
    path = write_session(tmp_path)
    indexes_of(tmp_path)
    with h5py.File(path, "r+") as file:
        write_trial(file, 99)
    os.utime(path, ns=(1, 1))
    with pytest.raises(
        DataError, match=r"data_train.hdf5: is not the object that was indexed: expected .*; found .*"
    ) as raised:
        indexes_of(tmp_path)
    assert "--rebuild" in str(raised.value)
    assert len(indexes_of(tmp_path, rebuild=True)[0].trials) == 13
    assert len(indexes_of(tmp_path)[0].trials) == 13


def test_a_copy_of_the_folder_is_indexed_again_with_the_same_digests(tmp_path: Path) -> None:
    write_folder(tmp_path / "a")
    first = indexes_of(tmp_path / "a")
    import shutil

    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copy)
    assert [index.digest for index in indexes_of(tmp_path / "b")] == [index.digest for index in first]


def test_a_damaged_index_is_built_again(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_session(tmp_path)
    (first,) = indexes_of(tmp_path)
    (path,) = cache.rglob("*.index")
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)
    (second,) = indexes_of(tmp_path)
    assert second.digest == first.digest and path.read_bytes() != bytes(data)
    assert "does not match" in capsys.readouterr().err.replace("do not match", "does not match")


def test_an_index_next_to_local_data_is_used_where_this_machine_has_none(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_session(tmp_path)
    indexes_of(tmp_path, index_path=tmp_path / FOLDER)
    monkeypatch.setattr("brain_to_text.data.indexing.index.scan_all", lambda *_, **__: pytest.fail("built again"))
    indexes_of(tmp_path)
    assert not list(cache.rglob("*.index"))


def test_regenerated_data_is_indexed_again(tmp_path: Path) -> None:
    small = {"sessions": 1, "features": 4, "longest_words": 2}
    for trials in (3, 5):
        make_dataset(tmp_path / "data", trials=trials, overwrite=True, **small)
        assert max(len(index.trials) for index in indexes_of(tmp_path / "data")) == trials


def test_truncated_files_and_files_that_are_not_hdf5_are_named(tmp_path: Path) -> None:
    path = write_session(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"data_train.hdf5: is truncated: it has [\d,]+ bytes"):
        indexes_of(tmp_path)
    path.write_bytes(b"PK" + b"x" * 9000)
    with pytest.raises(DataError, match=r"is not an HDF5 file"):
        indexes_of(tmp_path)


def test_the_error_for_a_folder_without_sessions_says_what_it_contains(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is empty or does not exist"):
        indexes_of(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"no SESSION/data_train.hdf5 below it .*notes.txt"):
        indexes_of(tmp_path)


def test_trials_are_sorted_by_number_and_other_groups_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / SESSIONS[0] / "data_train.hdf5"
    path.parent.mkdir()
    with h5py.File(path, "w") as file:
        for number in (11, 2, 10000, 9):
            write_trial(file, number)
        file.create_group("about")
    (index,) = indexes_of(tmp_path)
    assert [trial.name for trial in index.trials] == ["trial_0002", "trial_0009", "trial_0011", "trial_10000"]


def test_a_paged_file_reads_like_the_file(tmp_path: Path) -> None:
    path = write_session(tmp_path, trials=60)
    data = path.read_bytes()
    reads: list[tuple[int, int]] = []

    def read(start: int, length: int) -> bytes:
        reads.append((start, length))
        assert start + length <= len(data)
        return data[start : start + length]

    pages = PagedFile(read, len(data))
    pages.prefetch([0, len(data) - 1])
    with h5py.File(pages, "r") as file, h5py.File(path, "r") as plain:
        for name in plain:
            assert file[name]["input_features"][()].tobytes() == plain[name]["input_features"][()].tobytes()
    assert sum(length for _, length in reads) <= len(data), "no page is fetched twice"


@pytest.mark.parametrize("key", ["trials", "path"])
def test_an_index_in_another_format_is_built_again(tmp_path: Path, cache: Path, key: str) -> None:
    write_session(tmp_path)
    (first,) = indexes_of(tmp_path)
    (path,) = cache.rglob("*.index")
    document = json.loads(zlib.decompress(path.read_bytes().partition(b"\n")[2]))
    del document["body"][key]
    packed = zlib.compress(json.dumps(document).encode())
    path.write_bytes(MAGIC + xxhash.xxh3_128_hexdigest(packed).encode() + b"\n" + packed)
    assert indexes_of(tmp_path)[0].digest == first.digest == loads(path.read_bytes()).digest


def test_folders_with_similar_names_have_separate_indexes(tmp_path: Path, cache: Path) -> None:
    for folder in ("a.b", "a/b", "a%2Fb"):
        write_session(tmp_path / Path(folder).parent, Path(folder).name, trials=3)
    indexes_of(tmp_path)
    assert len(list(cache.rglob("*.index"))) == 3
    assert [index.path for index in indexes_of(tmp_path)] == [
        f"{name}/data_train.hdf5" for name in ("a%2Fb", "a.b", "a/b")
    ]


def test_a_rebuilt_index_is_used_if_the_published_one_cannot_be_replaced(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_session(tmp_path)
    indexes_of(tmp_path)
    (old,) = cache.rglob("*.index")
    os.utime(path, ns=(1, 1))
    indexes_of(tmp_path, index_path=tmp_path / FOLDER)
    (index,) = indexes_of(tmp_path)
    assert index.version.tag == "1" != loads(old.read_bytes()).version.tag


def test_a_data_folder_is_not_written_to_even_if_no_other_folder_is_writable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_session(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert len(indexes_of(tmp_path)[0].trials) == 12
    assert not (tmp_path / FOLDER).exists() and "cannot be stored anywhere" in capsys.readouterr().err


def test_a_name_that_is_not_valid_text_is_refused(tmp_path: Path) -> None:
    os.rename(write_session(tmp_path).parent, os.fsencode(tmp_path) + b"/t15\xff")
    with pytest.raises(DataError, match="is not valid text; rename it"):
        indexes_of(tmp_path)
