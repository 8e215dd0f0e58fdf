"""Windows over row groups and files: less padding, the same bytes after any kill, one row group lost at most."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kills import Killed, kill_at
from rehearsal import WORDS, compare
from test_data import inspected
from whole_job import outputs, run, write

from embed import saving
from embed.data import windows
from embed.data.chunks import PENDING, Coverage, Encoded, RowRange, file_key, partial_key_of, partial_to_bytes, to_bytes
from embed.data.partials import read_partial
from embed.data.rows import RangeLimits
from embed.data.table import Table
from embed.data.windows import tasks_of, text_windows, window_rows
from embed.events import FileBroken
from embed.model import Encoder
from embed.saved_partials import SavedPartials
from embed.state import JobState
from estiba.checkpoint import ChunkStore
from estiba.errors import DataError
from estiba.storage import FileStore


def texts_of(rows: int, seed: int, words: int = 60) -> list[str | None]:
    dice = random.Random(seed)
    texts: list[str | None] = [" ".join(dice.choices(WORDS, k=dice.randint(1, words))) for _ in range(rows)]
    texts[rows // 2] = None
    return texts


def small_files(folder: Path) -> int:
    """Files of one to nine row groups, some of them empty. Returns the rows of the largest row group."""
    shapes = {"a": (230, 30), "b": (1, 1), "c": (90, 90), "d": (0, 10), "e": (60, 7), "x/f": (25, 25), "x/g": (70, 33)}
    for seed, (name, (rows, row_group)) in enumerate(shapes.items()):
        texts = texts_of(rows, seed) if rows else []
        path = folder / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"texto": pa.array(texts, pa.string())}), path, row_group_size=row_group)
    return 90


# --- which rows share a window -------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_windows_do_not_depend_on_what_is_finished_and_every_missing_row_is_in_one(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("windows")
    lengths = st.lists(st.integers(0, 200), max_size=60)
    files = data.draw(st.lists(lengths, min_size=1, max_size=4), "lengths of the texts")
    limits = RangeLimits(
        rows=data.draw(st.integers(4, 40), "rows"), characters=data.draw(st.integers(50, 4000)), row_characters=100
    )
    tables = []
    for number, file in enumerate(files):
        texts = pa.array([f"{number} {row} " + "x" * length for row, length in enumerate(file)], pa.string())
        size = data.draw(st.integers(1, 60), "row group")
        pq.write_table(pa.table({"texto": texts}), folder / f"{number}.parquet", row_group_size=size)
        tables.append(inspected(folder, f"{number}.parquet"))

    def found(coverages: dict[str, Coverage]) -> list[windows.TextWindow]:
        tasks = tasks_of(tables, coverages, limits.rows)
        return [
            window
            for task in tasks
            for window in text_windows(FileStore(folder), task, "texto", limits, lambda *_: pytest.fail("broken"))
        ]

    whole = found({table.path: Coverage(table) for table in tables})
    assert [text for window in whole for text in window.texts] == [
        f"{number} {row} " + "x" * length for number, file in enumerate(files) for row, length in enumerate(file)
    ]
    for window in whole:
        assert sum(part.row_range.rows for part in window.parts) == len(window.texts) <= limits.rows
        assert len(window.parts) == 1 or sum(min(len(text), 100) for text in window.texts) <= limits.characters
    parts = [part for window in whole for part in window.parts]
    saved = data.draw(st.sets(st.integers(0, max(0, len(parts) - 1))), "saved") if parts else set()
    coverages = {table.path: Coverage(table) for table in tables}
    for index in saved:
        assert coverages[parts[index].table.path].add(parts[index].row_range)
    left = {path: coverage for path, coverage in coverages.items() if not coverage.is_complete}
    resumed = found(left)
    assert [part.row_range for window in resumed for part in window.parts] == [
        part.row_range for index, part in enumerate(parts) if index not in saved
    ]
    texts = [window.texts for window in whole]
    for window in resumed:
        assert window.texts in texts


def test_a_job_of_few_rows_has_windows_enough_for_several_gpus():
    assert window_rows("cpu", 10**6) == window_rows("cpu", 10) == 1024
    assert window_rows("cuda:0", 10) == 1024 and window_rows("cuda:0", 10**6) == 8192
    assert window_rows("cuda", 8192 * 32) == 4096


@pytest.mark.parametrize("shape", ["row groups of 100 to 200 rows", "files of 50 rows"])
def test_small_row_groups_and_small_files_share_their_padding(root, inputs, tiny_model, monkeypatch, shape):
    if shape == "files of 50 rows":
        for index in range(20):
            write(inputs / f"f{index:02d}.parquet", texts_of(50, index, 200))
    else:
        pq.write_table(pa.table({"texto": texts_of(1000, 1, 200)}), inputs / "a.parquet", row_group_size=150)
    padding = run(tiny_model)["tokens"]["padding_ratio"]
    assert padding < 1.05
    monkeypatch.setattr(windows, "window_rows", lambda *_: 1)
    monkeypatch.setattr("embed.state.window_rows", lambda *_: 1)
    alone = run(tiny_model, output_path=str(root / "alone"), checkpoint_path=str(root / "other"))
    assert alone["tokens"]["padding_ratio"] - 1 > 2 * (padding - 1)


# --- kills ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_new_host", [False, True], ids=["same host", "only checkpoints kept"])
@pytest.mark.parametrize("rows", [1024, 100], ids=["one window", "many windows"])
def test_a_job_killed_at_any_batch_ends_with_the_same_bytes_and_computes_a_row_group_again_at_most(
    root, inputs, tiny_model, monkeypatch, rows, is_new_host
):
    largest = small_files(inputs)
    monkeypatch.setattr(windows, "CPU_LIMITS", (rows, 2**19))
    with monkeypatch.context() as patched:
        whole = kill_at(patched, -1)
        run(tiny_model, batch_size=6, output_path=str(root / "whole"), checkpoint_path=str(root / "other"))
    started: list[int] = []
    kills = 0
    while sum(started) < 2 * sum(whole):
        with monkeypatch.context() as patched:
            sizes = kill_at(patched, 16 + kills % 4, slow_s=0.003 * (kills % 3))
            try:
                run(tiny_model, batch_size=6)
                ended = True
            except Killed:
                ended = False
        started += sizes
        if ended:
            break
        kills += 1
        if is_new_host:
            shutil.rmtree(root / "output")
    assert ended and kills > 2
    assert compare(root / "whole", root / "output/data") == []
    assert sum(started) - sum(whole) <= kills * largest


def test_what_is_at_risk_is_never_more_than_the_largest_row_group_of_the_window(root, inputs, tiny_model, monkeypatch):
    """Each kill by itself, with a slow disk: what was started before it and is started again."""
    pq.write_table(pa.table({"texto": texts_of(300, 7)}), inputs / "a.parquet", row_group_size=40)
    with monkeypatch.context() as patched:
        whole = kill_at(patched, -1)
        run(tiny_model, output_path=str(root / "whole"), checkpoint_path=str(root / "other"))
    assert max(whole) <= 40
    for batch in range(1, len(whole), 2):
        place = {"output_path": str(root / f"out{batch}"), "checkpoint_path": str(root / f"ck{batch}")}
        with monkeypatch.context() as patched:
            before = kill_at(patched, batch, slow_s=0.02)
            with pytest.raises(Killed):
                run(tiny_model, **place)
        with monkeypatch.context() as patched:
            after = kill_at(patched, -1)
            run(tiny_model, **place)
        assert 0 <= sum(before) + sum(after) - sum(whole) <= 40
        assert compare(root / "whole", root / f"out{batch}") == []


def test_nothing_but_chunks_is_left_at_the_end(root, inputs, tiny_model, monkeypatch):
    small_files(inputs)
    for batch in (5, 9):
        with monkeypatch.context() as patched:
            kill_at(patched, batch)
            with pytest.raises(Killed):
                run(tiny_model, batch_size=12)
    assert list((root / "checkpoints").rglob("*-partial.*.piece"))
    run(tiny_model)
    assert not list((root / "checkpoints").rglob("*-partial.*.piece"))


def test_a_partial_chunk_with_rows_of_another_hosts_file_is_left_to_that_host(root, inputs, tiny_model, monkeypatch):
    """Hosts that share a checkpoint prefix on S3, after an attempt on another number of hosts."""
    three_files(inputs)
    with monkeypatch.context() as patched:
        kill_at(patched, 6)
        with pytest.raises(Killed):
            run(tiny_model, batch_size=12)
    (folder,) = (root / "checkpoints").glob("embed-*")
    found = list(folder.rglob("*-partial.*.piece"))
    files = [file_key(table) for table in tables_of(inputs)]

    def opened(known: list[str]) -> list[Path]:
        chunks = ChunkStore(FileStore(root / "checkpoints"), f"{folder.name}/pieces")
        SavedPartials(chunks, has_passages=False).open(known, {})  # all their files are complete
        return list(folder.rglob("*-partial.*.piece"))

    assert found and opened(files[:1]) == found
    assert opened(files) == []


def test_a_partial_chunk_that_another_host_replaced_since_it_was_listed_is_no_fault(tmp_path, caplog):
    chunks = ChunkStore(FileStore(tmp_path), "pieces")
    name = chunks.commit("windows/0123456789abcdef-partial", b"x")
    (tmp_path / name).unlink()
    SavedPartials(chunks, has_passages=False).open([], {})
    assert "quarantined" not in caplog.text and chunks.keys() == []
    chunks.adopt("a", name)
    assert chunks.load("a") is None and "quarantined" in caplog.text


def test_a_partial_chunk_is_read_for_its_own_windows_only(root, inputs, tiny_model, monkeypatch):
    pq.write_table(pa.table({"texto": texts_of(1000, 1)}), inputs / "a.parquet")
    monkeypatch.setattr(windows, "CPU_LIMITS", (100, 2**19))
    with monkeypatch.context() as patched:
        patched.setattr(saving, "PARTIAL_S", 0.0)
        kill_at(patched, 8, after_a_save=True)
        with pytest.raises(Killed):
            run(tiny_model, batch_size=12)
    read: list[str] = []
    load = ChunkStore.load

    def loaded(self, key, **options):
        read.append(key)
        return load(self, key, **options)

    monkeypatch.setattr(ChunkStore, "load", loaded)
    assert run(tiny_model, batch_size=12)["rows"]["resumed"] > 0
    times = Counter(key for key in read if key.startswith("windows/"))
    assert times and max(times.values()) <= 3  # to find its rows, its engine, and for its window


def test_files_that_are_complete_share_the_windows_of_the_others_in_a_resumed_job(
    root, inputs, tiny_model, monkeypatch
):
    small_files(inputs)
    run(tiny_model, output_path=str(root / "whole"), checkpoint_path=str(root / "other"))
    run(tiny_model)
    for name in ("c.parquet", "x/g.parquet"):
        (root / "output/data" / name).unlink()
    for path in (root / "checkpoints").rglob("*.piece"):
        if "/pieces/" in str(path):
            path.unlink()
    results = run(tiny_model)
    assert results["rows"]["computed_in_this_attempt"] == 160
    assert compare(root / "whole", root / "output/data") == []


@pytest.mark.slow
def test_two_workers_share_small_files_and_end_with_the_bytes_of_one(root, inputs, tiny_model, monkeypatch):
    import torch

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for index in range(60):
        write(inputs / f"f{index:02d}.parquet", texts_of(50, index))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run(tiny_model, engine="torch", output_path=str(root / "solo"), checkpoint_path=str(root / "ck1"))
    finally:
        torch.set_num_threads(threads)
    results = run(tiny_model, engine="torch", workers=2)
    assert results["rows"]["embedded"] == 3000 - 60 and results["rows"]["resumed"] == 0
    assert compare(root / "solo", root / "output/data") == []
    assert not list((root / "checkpoints").rglob("*-partial.*.piece"))


def test_partial_chunks_of_earlier_versions_are_used(root, inputs, tiny_model, monkeypatch):
    """They hold all finished rows of one row range, under a key of the range."""
    write(inputs / "a.parquet", [f"barco {index}" for index in range(20)])
    encoder = Encoder(config_of(tiny_model))
    window = encoder.tokenize([f"barco {index}" for index in range(20)])
    encoded = encoder.encode(window)
    status = encoded.status.copy()
    status[10:] = PENDING
    vectors = np.roll(encoded.vectors, 1, axis=1)  # so that they can be recognised
    old = Encoded(
        vectors=np.where((status == 0)[:, None], vectors, 0),
        status=status,
        n_tokens=encoded.n_tokens,
        truncated=encoded.truncated,
        padded_tokens=0,
    )
    original = JobState.open

    def opened(self, tables, threads):
        (table,) = tables
        key = partial_key_of(file_key(table), RowRange(row_group=0, start=0, rows=20))
        self.chunks.commit(key, to_bytes(old, "float32"))
        original(self, tables, threads)

    monkeypatch.setattr(JobState, "open", opened)
    results = run(tiny_model)
    assert results["rows"]["resumed"] == 10 and results["rows"]["computed_in_this_attempt"] == 10
    found = np.array(outputs(root)["embeddings"].to_pylist(), np.float32)
    assert np.array_equal(found[:10], vectors[:10]) and np.allclose(found[10:], encoded.vectors[10:], atol=1e-6)
    assert not list((root / "checkpoints").rglob("*-partial.*.piece"))


def test_a_partial_chunk_of_an_earlier_version_without_a_finished_row_stands_beside_others():
    def saved(status: int) -> bytes:
        rows = {"vectors": np.ones((2, 4), np.float32), "n_tokens": np.full(2, 3, np.int32)}
        flags = {"status": np.full(2, status, np.uint8), "truncated": np.zeros(2, bool)}
        return bytes(partial_to_bytes(Encoded(**rows, **flags, padded_tokens=0)))

    keys = [f"0123456789abcdef/000000-{start:012d}-00000002-partial" for start in (0, 2)]
    partials = [read_partial(key, saved(status)) for key, status in zip(keys, (PENDING, 0), strict=True)]
    assert partials[0].batch.schema == partials[1].batch.schema
    assert [partial.batch.num_rows for partial in partials] == [0, 2]


def config_of(model: Path):
    from embed.config import EmbedConfig

    return EmbedConfig(model=str(model))


# --- files at fault ------------------------------------------------------------------------------------------------


def corrupt(path: Path, row_group: int) -> None:
    """Destroy the text of one row group."""
    column = pq.read_metadata(path).row_group(row_group).column(0)
    raw = bytearray(path.read_bytes())
    start = column.data_page_offset
    raw[start : start + column.total_compressed_size] = bytes(column.total_compressed_size)
    path.write_bytes(raw)


def three_files(inputs: Path) -> None:
    plain = {"compression": "none", "use_dictionary": False}
    for seed, name in enumerate("abc"):
        table = pa.table({"texto": texts_of(120, seed)})
        pq.write_table(table, inputs / f"{name}.parquet", row_group_size=40, **plain)


@pytest.mark.parametrize("row_group", [0, 1, 2])
def test_a_file_that_is_corrupt_in_the_middle_of_a_window_costs_the_others_nothing(
    root, inputs, tiny_model, monkeypatch, row_group
):
    three_files(inputs)
    corrupt(inputs / "b.parquet", row_group)
    options = {"on_bad_file": "skip", "batch_size": 12}
    whole = run(tiny_model, **options, output_path=str(root / "whole"), checkpoint_path=str(root / "other"))
    assert [item["path"] for item in whole["files"]["bad"]] == ["b.parquet"]
    assert whole["rows"]["total"] == 240
    for batch in (3, 5, 2):
        with monkeypatch.context() as patched:
            kill_at(patched, batch)
            with pytest.raises(Killed):
                run(tiny_model, **options)
    results = run(tiny_model, **options)
    assert [item["path"] for item in results["files"]["bad"]] == ["b.parquet"]
    assert compare(root / "whole", root / "output/data") == []


def test_a_file_that_changes_while_its_window_is_read_costs_the_others_nothing(root, inputs, tiny_model, monkeypatch):
    three_files(inputs)
    change_before(monkeypatch, "c.parquet", lambda: write(inputs / "b.parquet", ["otra cosa"] * 120))
    with pytest.raises(DataError, match=r"b\.parquet: changed while the job ran"):
        run(tiny_model)
    assert outputs(root, "a.parquet").num_rows == outputs(root, "c.parquet").num_rows == 120
    assert not (root / "output/data/b.parquet").exists()


def change_before(monkeypatch: pytest.MonkeyPatch, name: str, action: Callable[[], object]) -> None:
    """Run `action` when the row groups before the last one of b.parquet are read."""
    original, seen = windows.text_ranges, []

    def text_ranges(store, rows, column, limits):
        if (rows.table.path, rows.row_group) == ("b.parquet", 2) and not seen:
            seen.append(name)
            action()
        return original(store, rows, column, limits)

    monkeypatch.setattr(windows, "text_ranges", text_ranges)


def test_a_complete_file_that_can_no_longer_be_read_stays_complete(root, inputs, tiny_model, monkeypatch):
    """Its rows only shared batches with those of another file."""
    three_files(inputs)
    run(tiny_model)
    (root / "output/data/c.parquet").unlink()
    for path in (root / "checkpoints").rglob("*.piece"):
        if "/pieces/" in str(path):
            path.unlink()
    broken: list[str] = []
    original = JobState.on_event

    def on_event(self, event):
        if isinstance(event, FileBroken):
            broken.append(event.path)
        original(self, event)

    monkeypatch.setattr(JobState, "on_event", on_event)
    change_before(monkeypatch, "b.parquet", (inputs / "b.parquet").unlink)
    results = run(tiny_model)
    assert broken == [] and results["files"]["done"] == 3
    assert results["rows"]["computed_in_this_attempt"] == 120


def tables_of(folder: Path) -> list[Table]:
    return [inspected(folder, path.name) for path in sorted(folder.glob("*.parquet"))]


def test_a_task_holds_the_row_groups_that_fit_into_a_window_or_one_that_does_not(inputs):
    for name, rows in (("a", 70), ("b", 20), ("c", 130), ("d", 10)):
        pq.write_table(pa.table({"texto": texts_of(rows, 1)}), inputs / f"{name}.parquet", row_group_size=200)
    tables = tables_of(inputs)
    tasks = tasks_of(tables, {table.path: Coverage(table) for table in tables}, 100)
    assert [[item.table.path[0] for item in task.row_groups] for task in tasks] == [["a", "b"], ["c"], ["d"]]
    assert [task.is_shared for task in tasks] == [True, False, True]
    only = tasks_of(tables, {"b.parquet": Coverage(tables[1])}, 100)
    assert [[len(item.missing) for item in task.row_groups] for task in only] == [[0, 1]]
