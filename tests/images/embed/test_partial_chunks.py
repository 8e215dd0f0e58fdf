"""Work inside a row range: progress and durable results after every few batches, and the same bytes after a resume."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from kills import after_batches, run_killed
from rehearsal import compare, make_input
from whole_job import run

from embed.config import EmbedConfig
from embed.job import embed
from embed.model import engines
from estiba.errors import Interrupted
from estiba.platform.contract import Job
from estiba.platform.stop import Stop

ROWS = 1000
"""One row group, two row ranges, some thirty batches of 32 rows."""


def one_large_row_group(inputs: Path) -> None:
    texts: list[str | None] = [f"barco {index} " * (1 + index % 40) for index in range(ROWS)]
    texts[3], texts[ROWS // 2 + 7] = None, " "
    pq.write_table(pa.table({"texto": texts}), inputs / "a.parquet")


def test_a_stop_in_the_middle_of_a_row_range_keeps_its_finished_batches(root, inputs, tiny_model, monkeypatch):
    one_large_row_group(inputs)
    run(tiny_model, batch_size=32, output_path=str(root / "whole"), checkpoint_path=str(root / "other"))
    stop = Stop()
    with monkeypatch.context() as patched:
        sizes = after_batches(patched, 8, lambda: stop.request("SIGTERM", signum=15))
        with pytest.raises(Interrupted, match=r"(\d+) of 1000 rows are saved") as caught:
            embed(EmbedConfig(model=str(tiny_model), batch_size=32), Job.read(), stop)
    saved = int(str(caught.value).split(" of 1000 rows")[0].rsplit(" ", 1)[1])
    assert saved == sum(sizes) > 0
    results = run(tiny_model, batch_size=32)
    assert results["rows"]["resumed"] == saved
    assert results["rows"]["computed_in_this_attempt"] == ROWS - saved
    assert compare(root / "whole", root / "output/data") == []


def test_a_kill_in_the_middle_of_a_row_range_keeps_what_was_computed_seconds_before(
    root, inputs, tiny_model, monkeypatch
):
    one_large_row_group(inputs)
    run(tiny_model, batch_size=32, output_path=str(root / "whole"), checkpoint_path=str(root / "other"))

    for _ in range(3):
        run_killed(monkeypatch, tiny_model, 6, batch_size=32)
    results = run(tiny_model, batch_size=32)
    assert results["rows"]["resumed"] >= 3 * 7
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


@pytest.mark.parametrize("kind", ["torch", "openvino"])
def test_each_row_group_says_which_engine_computed_it(root, inputs, tiny_model, kind):
    import torch

    make_input(inputs, files=1, rows=40, seed=1)
    pq.write_table(pa.table({"texto": [f"mar {i}" for i in range(30)]}), inputs / "a.parquet", row_group_size=10)
    results = run(tiny_model, engine=kind)
    (engine,) = engines_of(root, [0, 3])
    assert engine["engine"] == f"{kind} {version(kind)}" and engine["dtype"] == "float32"
    assert results["engine"] == f"{kind} {version(kind)}, float32"
    assert engine["threads"] == (1 if kind == "openvino" else torch.get_num_threads()) and engine["hardware"]


def engines_of(root: Path, row_groups: list[int]) -> list[dict[str, Any]]:
    metadata = pq.read_metadata(root / "output/data/a.parquet").metadata
    entry = next(item for item in json.loads(metadata[b"estiba.computed_by"]) if item["row_groups"] == row_groups)
    return entry["engines"]


@pytest.mark.parametrize("first", ["torch", "openvino"])
def test_a_resume_keeps_its_engine_where_that_runs(root, inputs, tiny_model, monkeypatch, first):
    """Interrupted with one engine and resumed with auto: the same bytes as without an interruption."""
    texts = [f"barco {index} " * (1 + index % 40) for index in range(400)]
    pq.write_table(pa.table({"texto": texts}), inputs / "a.parquet", row_group_size=100)
    whole = {"output_path": str(root / "whole"), "checkpoint_path": str(root / "other")}
    run(tiny_model, batch_size=32, engine=first, **whole)
    interrupt(monkeypatch, tiny_model, engine=first)
    results = run(tiny_model, batch_size=32, engine="auto")
    assert results["rows"]["resumed"] > 0
    assert compare(root / "whole", root / "output/data") == []
    assert [engine["engine"].split()[0] for engine in engines_of(root, [0, 4])] == [first]


def interrupt(monkeypatch: pytest.MonkeyPatch, model: Path, **options: Any) -> None:
    stop = Stop()
    with monkeypatch.context() as patched:
        after_batches(patched, 8, lambda: stop.request("SIGTERM", signum=15))
        with pytest.raises(Interrupted):
            embed(EmbedConfig(model=str(model), batch_size=32, **options), Job.read(), stop)


def test_where_the_engine_of_a_resume_does_not_run_the_other_rows_use_another_one(
    root, inputs, tiny_model, monkeypatch
):
    texts = [f"barco {index} " * (1 + index % 40) for index in range(400)]
    pq.write_table(pa.table({"texto": texts}), inputs / "a.parquet", row_group_size=100)
    interrupt(monkeypatch, tiny_model, engine="openvino")
    monkeypatch.setattr(engines, "is_installed", lambda: False)
    results = run(tiny_model, batch_size=32, engine="auto")
    assert results["rows"]["resumed"] > 0 and results["rows"]["embedded"] == 400
    entries = json.loads(pq.read_metadata(root / "output/data/a.parquet").metadata[b"estiba.computed_by"])
    kinds = {engine["engine"].split()[0] for entry in entries for engine in entry["engines"]}
    assert kinds == {"openvino", "torch"}
