"""A file that changes while the job runs, or between two runs, never gets the vectors of its old text."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from whole_job import outputs, run

from embed.config import EmbedConfig
from embed.data import windows
from embed.data.files import inspect
from embed.data.table import InputFile
from embed.job import embed
from embed.model import Encoder
from estiba.errors import DataError
from estiba.platform.contract import Job
from estiba.platform.stop import Stop
from estiba.storage import FileStore, open_store

PLAIN = {"compression": "none", "use_dictionary": False, "write_statistics": False}


def fixed_width(path: Path, word: str, rows: int = 3000) -> None:
    """A file whose layout does not depend on `word`, if that has five letters."""
    assert len(word) == 5
    texts = [f"{word} {index:06d}" for index in range(rows)]
    pq.write_table(pa.table({"texto": texts}), path, row_group_size=500, **PLAIN)


def after_ranges(monkeypatch: pytest.MonkeyPatch, count: int, action: Callable[[], object]) -> None:
    """Run `action` when `count` row ranges have been computed, each as a window of its own."""
    monkeypatch.setattr(windows, "CPU_LIMITS", (250, 2**19))
    original, seen = Encoder.encode, []

    def encode(self, *arguments, **more):
        seen.append(1)
        if len(seen) == count + 1:
            action()
        return original(self, *arguments, **more)

    monkeypatch.setattr(Encoder, "encode", encode)


def in_place(new: Path, path: Path) -> None:
    with open(path, "r+b") as file:
        file.write(new.read_bytes())


def renamed(new: Path, path: Path) -> None:
    os.rename(new, path)


def with_its_old_time(new: Path, path: Path) -> None:
    found = path.stat()
    shutil.copyfile(new, path)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


@pytest.mark.parametrize("replace", [in_place, renamed, with_its_old_time], ids=lambda item: item.__name__)
def test_a_file_that_is_replaced_while_the_job_runs_is_named_and_gets_no_output(
    root, inputs, tiny_model, monkeypatch, replace
):
    fixed_width(inputs / "a.parquet", "barco")
    fixed_width(inputs / "b.parquet", "ancla", 100)
    fixed_width(root / "new.parquet", "trigo")
    assert (root / "new.parquet").stat().st_size == (inputs / "a.parquet").stat().st_size
    after_ranges(monkeypatch, 3, lambda: replace(root / "new.parquet", inputs / "a.parquet"))
    with pytest.raises(DataError, match=r"a\.parquet: changed while the job ran; run the job again"):
        run(tiny_model)
    assert not (root / "output/data/a.parquet").exists()
    assert outputs(root, "b.parquet").num_rows == 100
    monkeypatch.undo()
    monkeypatch.setenv("ESTIBA_ROOT", str(root))
    assert run(tiny_model)["rows"]["embedded"] == 3100
    fresh = run(tiny_model, output_path=str(root / "fresh"), checkpoint_path=str(root / "other"))
    assert fresh["rows"]["resumed"] == 0
    assert outputs(root).equals(pq.read_table(root / "fresh/a.parquet"))
    assert outputs(root)["texto"][0].as_py() == "trigo 000000"


def test_a_file_that_gets_another_layout_while_the_job_runs_is_called_changed_and_not_corrupt(
    root, inputs, tiny_model, monkeypatch
):
    fixed_width(inputs / "a.parquet", "barco")
    pq.write_table(pa.table({"texto": ["x" * 900] * 4000}), root / "new.parquet", compression="gzip")
    after_ranges(monkeypatch, 3, lambda: renamed(root / "new.parquet", inputs / "a.parquet"))
    with pytest.raises(DataError, match=r"a\.parquet: changed while the job ran"):
        run(tiny_model)


def test_a_file_that_is_deleted_while_the_job_runs_is_a_bad_file(root, inputs, tiny_model, monkeypatch):
    fixed_width(inputs / "a.parquet", "barco")
    fixed_width(inputs / "b.parquet", "ancla", 100)
    after_ranges(monkeypatch, 3, lambda: (inputs / "a.parquet").unlink())
    results = run(tiny_model, on_bad_file="skip")
    assert [item["path"] for item in results["files"]["bad"]] == ["a.parquet"]
    assert results["rows"]["total"] == 100


def test_a_file_that_is_only_touched_or_copied_over_itself_is_not_changed(root, inputs, tiny_model, monkeypatch):
    fixed_width(inputs / "a.parquet", "barco")
    shutil.copyfile(inputs / "a.parquet", root / "same.parquet")
    after_ranges(monkeypatch, 3, lambda: renamed(root / "same.parquet", inputs / "a.parquet"))
    assert run(tiny_model)["rows"]["embedded"] == 3000


@pytest.mark.parametrize("new", ["trigo", None], ids=["replaced", "deleted"])
def test_an_object_that_changes_while_the_job_runs_is_named_and_gets_no_output(
    root, inputs, tiny_model, s3, monkeypatch, new
):
    client = s3.client()
    fixed_width(root / "old.parquet", "barco")
    client.upload_file(str(root / "old.parquet"), s3.bucket, "in/a.parquet")

    def change() -> None:
        if new is None:
            client.delete_object(Bucket=s3.bucket, Key="in/a.parquet")
        else:
            fixed_width(root / "new.parquet", new)
            client.upload_file(str(root / "new.parquet"), s3.bucket, "in/a.parquet")

    after_ranges(monkeypatch, 3, change)
    config = EmbedConfig(model=str(tiny_model), input_path=f"s3://{s3.bucket}/in", output_path=f"s3://{s3.bucket}/out")
    with pytest.raises(DataError, match=r"a\.parquet: changed while the job ran"):
        embed(config, Job.read(), Stop())
    assert [item.path for item in open_store(config.output_path).list()] == ["results.json"]


def test_one_row_changed_in_place_in_a_file_of_any_size_is_computed_again(root, inputs, tiny_model):
    """80 MiB, whose footer stays the same: a column that the model does not read makes up most of it."""
    rows, wide = 80, 2**20
    noise = np.random.default_rng(0).integers(0, 256, (rows, wide), np.uint8)
    path = inputs / "a.parquet"
    table = pa.table({"x": [bytes(row) for row in noise], "texto": [f"barco {row:02d}" for row in range(rows)]})
    pq.write_table(table, path, **PLAIN)
    first = run(tiny_model)
    raw = path.read_bytes()
    at = raw.index(b"barco 41")
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(b"ancla")
    again = run(tiny_model)
    assert first["rows"]["computed_in_this_attempt"] == again["rows"]["computed_in_this_attempt"] == rows
    assert outputs(root)["texto"][41].as_py() == "ancla 41"
    fresh = run(tiny_model, output_path=str(root / "fresh"), checkpoint_path=str(root / "other"))
    assert fresh["files"]["done_in_this_attempt"] == 1
    assert outputs(root)["embeddings"].equals(pq.read_table(root / "fresh/a.parquet")["embeddings"])


def test_the_identity_of_a_large_file_covers_every_byte(tmp_path):
    pq.write_table(pa.table({"texto": ["a" * 2**20] * 70}), tmp_path / "a.parquet", **PLAIN)
    store = FileStore(tmp_path)

    def identity() -> str:
        size = (tmp_path / "a.parquet").stat().st_size
        return inspect(store, InputFile(path="a.parquet", size_bytes=size, etag=None)).identity

    before = identity()
    with open(tmp_path / "a.parquet", "r+b") as file:
        file.seek(2**20 + 1_234_567)
        file.write(b"b")
    assert identity() != before
