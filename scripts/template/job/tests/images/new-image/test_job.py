"""The whole job, in this process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from estiba.errors import ConfigError, Interrupted
from estiba.platform.contract import Job
from estiba.platform.stop import Stop
from new_image.config import CountConfig
from new_image.job import count


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ESTIBA_ROOT", str(tmp_path))
    (tmp_path / "input/data/dataset").mkdir(parents=True)
    (tmp_path / "input/data/dataset/a.txt").write_text("el barco zarpa\n\nal alba\n" * 10)
    return tmp_path


def output(root: Path) -> list[dict[str, int]]:
    return [json.loads(line) for line in (root / "output/data/a.txt.jsonl").read_text().splitlines()]


def results(root: Path) -> dict[str, dict[str, int]]:
    content: dict[str, dict[str, int]] = json.loads((root / "output/data/results.json").read_text())
    return content


def test_every_line_has_a_record(root: Path) -> None:
    count(CountConfig(), Job.read(), Stop())
    assert output(root) == [{"words": 3}, {"words": 0}, {"words": 2}] * 10


def test_a_second_run_computes_nothing(root: Path) -> None:
    for _ in range(2):
        count(CountConfig(chunk_lines=4), Job.read(), Stop())
    assert results(root)["chunks"]["computed_in_this_attempt"] == 0


def test_a_flipped_bit_in_a_chunk_costs_that_chunk(root: Path) -> None:
    count(CountConfig(chunk_lines=20), Job.read(), Stop())
    expected = output(root)
    chunk = next((root / "checkpoints").rglob("*.piece"))
    chunk.write_bytes(bytes([chunk.read_bytes()[0] ^ 1]) + chunk.read_bytes()[1:])
    count(CountConfig(chunk_lines=20), Job.read(), Stop())
    assert results(root)["chunks"]["computed_in_this_attempt"] == 1
    assert output(root) == expected


def test_a_stop_leaves_no_unfinished_output(root: Path) -> None:
    stop = Stop()
    stop.request("SIGTERM", signum=15)
    with pytest.raises(Interrupted, match="0 chunks are saved"):
        count(CountConfig(), Job.read(), stop)
    assert list((root / "output/data").iterdir()) == []


def test_a_missing_input_is_refused_with_the_remedy(root: Path) -> None:
    with pytest.raises(ConfigError, match="--input-path"):
        CountConfig(input_path=str(root / "nothing")).preflight()
