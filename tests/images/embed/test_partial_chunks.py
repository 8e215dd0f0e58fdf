"""Work inside a row range: progress and durable results after every few batches, and the same bytes after a resume."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rehearsal import compare, make_input
from whole_job import run

from embed import pipeline
from embed.config import EmbedConfig
from embed.job import embed
from embed.model import forward
from estiba.errors import Interrupted
from estiba.platform.contract import Job
from estiba.platform.stop import Stop

ROWS = 1000
"""One row group, two row ranges, some thirty batches of 32 rows."""


def one_large_row_group(inputs: Path) -> None:
    texts: list[str | None] = [f"barco {index} " * (1 + index % 40) for index in range(ROWS)]
    texts[3], texts[ROWS // 2 + 7] = None, " "
    pq.write_table(pa.table({"texto": texts}), inputs / "a.parquet")


class Killed(BaseException):
    pass


def after_batches(monkeypatch: pytest.MonkeyPatch, count: int, action) -> list[int]:
    """Call `action` when the model has run `count` batches; returns the number of rows of each batch."""
    sizes: list[int] = []
    original = forward.Engine.launch

    def launch(self, features, rows):
        if len(rows) <= 32 and len(sizes) == count:
            action()
        sizes.append(len(rows))
        return original(self, features, rows)

    monkeypatch.setattr(forward.Engine, "launch", launch)
    return sizes


def test_a_stop_in_the_middle_of_a_row_range_keeps_its_finished_batches(root, inputs, tiny_model, monkeypatch):
    one_large_row_group(inputs)
    run(tiny_model, batch_size=32, output_path=str(root / "whole"), checkpoint_path=str(root / "other"))
    stop = Stop()
    with monkeypatch.context() as patched:
        sizes = after_batches(patched, 8, lambda: stop.request("SIGTERM", signum=15))
        with pytest.raises(Interrupted, match=r"(\d+) of 1000 rows are saved") as caught:
            embed(EmbedConfig(model=str(tiny_model), batch_size=32), Job.read(), stop)
    saved = int(str(caught.value).split(" of 1000 rows")[0].rsplit(" ", 1)[1])
    computed = sum(sizes) - 3  # the self-test's sentences
    assert saved == computed > 0
    results = run(tiny_model, batch_size=32)
    assert results["rows"]["resumed"] == saved
    assert results["rows"]["computed_in_this_attempt"] == ROWS - saved
    assert compare(root / "whole", root / "output/data") == []


def test_a_kill_in_the_middle_of_a_row_range_keeps_what_was_computed_seconds_before(
    root, inputs, tiny_model, monkeypatch
):
    one_large_row_group(inputs)
    run(tiny_model, batch_size=32, output_path=str(root / "whole"), checkpoint_path=str(root / "other"))

    def kill() -> None:
        raise Killed

    for _ in range(3):
        with monkeypatch.context() as patched:
            patched.setattr(pipeline, "PARTIAL_S", 0.0)
            after_batches(patched, 6, kill)
            with pytest.raises(Killed):
                run(tiny_model, batch_size=32)
    results = run(tiny_model, batch_size=32)
    assert results["rows"]["resumed"] >= 3 * 32
    assert results["rows"]["resumed"] + results["rows"]["computed_in_this_attempt"] == ROWS
    assert compare(root / "whole", root / "output/data") == []


def test_progress_is_told_within_a_row_range(root, inputs, tiny_model, monkeypatch, capfd):
    one_large_row_group(inputs)
    monkeypatch.setenv("ESTIBA_LOG_INTERVAL_S", "0.000001")
    run(tiny_model, batch_size=32)
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("rows=")]
    rows = [int(line.split()[0].removeprefix("rows=")) for line in lines]
    assert len(rows) >= 30 and rows == sorted(rows) and rows[-1] == ROWS


def test_damaged_chunks_count_as_computed_and_no_longer_as_resumed(root, inputs, tiny_model):
    texts = [f"barco {index}" for index in range(500)]
    pq.write_table(pa.table({"texto": texts}), inputs / "a.parquet", row_group_size=50)
    run(tiny_model)
    for path in (root / "output/data").iterdir():
        path.unlink()
    damaged = 0
    for path in sorted((root / "checkpoints").rglob("pieces/*/*.piece"))[:2]:
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)
        damaged += int(path.name.split(".")[0].split("-")[2])
    results = run(tiny_model)
    assert results["rows"]["computed_in_this_attempt"] == damaged == 100
    assert results["rows"]["resumed"] == 400 and results["rows"]["total"] == 500


def test_each_row_group_says_which_engine_computed_it(root, inputs, tiny_model, monkeypatch):
    import torch

    make_input(inputs, files=1, rows=40, seed=1)
    pq.write_table(pa.table({"texto": [f"mar {i}" for i in range(30)]}), inputs / "a.parquet", row_group_size=10)
    run(tiny_model)
    metadata = pq.read_metadata(root / "output/data/a.parquet").metadata
    (entry,) = json.loads(metadata[b"estiba.computed_by"])
    assert entry["row_groups"] == [0, 3]
    (engine,) = entry["engines"]
    assert engine["engine"] == f"torch {torch.__version__}" and engine["dtype"] == "float32"
    assert engine["threads"] == torch.get_num_threads() and engine["hardware"]
