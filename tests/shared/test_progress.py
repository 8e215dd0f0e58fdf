"""One line that a person and a metric regex both read, the same numbers as JSON lines, a bar on a terminal."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import time
from pathlib import Path
from typing import Any

import pytest

from estiba.progress import Progress, peak_memory_bytes


def fields_of(line: str) -> dict[str, str]:
    """As a metric definition of a job file reads them: name=value, separated by spaces."""
    return dict(re.findall(r"(\w+)=(\S+)", line))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_a_line_is_name_value_pairs_with_rate_and_eta(clock: list[float]) -> None:
    stream = io.StringIO()
    progress = Progress(total=1000, unit="rows", stream=stream)
    clock[0] += 2
    progress.advance(250, tokens_per_s=8123.4, padding=0.0312, file="a.parquet")
    progress.line(tokens_per_s=8123.4, padding=0.0312, file="a.parquet")
    found = fields_of(stream.getvalue())
    assert found.pop("memory_mb").isdigit()
    assert found == {
        "rows": "250",
        "of": "1000",
        "rows_per_s": "125",
        "tokens_per_s": "8123",
        "padding": "0.0312",
        "file": "a.parquet",
        "eta_s": "6",
    }
    assert stream.getvalue().count("\n") == 1


def test_a_loss_keeps_its_decimals(clock: list[float]) -> None:
    stream = io.StringIO()
    progress = Progress(total=10, unit="steps", stream=stream)
    clock[0] += 1
    progress.line(loss=12.3456, perplexity=812.46, learning_rate=1e-5, big=123456.7)
    found = fields_of(stream.getvalue())
    assert (found["loss"], found["perplexity"], found["learning_rate"]) == ("12.35", "812.5", "1e-05")
    assert found["big"] == "123457"


def test_lines_come_at_intervals_and_not_at_every_step(clock: list[float]) -> None:
    stream = io.StringIO()
    progress = Progress(total=100, unit="steps", stream=stream, interval_s=10)
    for _ in range(100):
        clock[0] += 0.5
        progress.advance(1)
    assert [fields_of(line)["steps"] for line in stream.getvalue().splitlines()] == ["20", "40", "60", "80", "100"]


def test_work_of_earlier_attempts_counts_in_the_total_and_not_in_the_rate(clock: list[float]) -> None:
    stream = io.StringIO()
    progress = Progress(total=1000, unit="rows", done=900, stream=stream)
    clock[0] += 10
    progress.advance(50)
    found = fields_of(stream.getvalue())
    assert (found["rows"], found["rows_per_s"], found["eta_s"]) == ("950", "5", "10")


def test_there_is_no_eta_before_the_first_progress(clock: list[float]) -> None:
    stream = io.StringIO()
    Progress(total=10, unit="rows", stream=stream).line()
    assert "eta_s" not in fields_of(stream.getvalue())


def test_the_metrics_file_has_the_same_numbers_as_json_lines(tmp_path: Path, clock: list[float]) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"rows": 1}\n')  # an earlier attempt's
    stream = io.StringIO()
    progress = Progress(total=100, unit="rows", stream=stream, metrics_path=path)
    clock[0] += 1
    progress.advance(10)
    progress.line(loss=0.25)
    clock[0] += 1
    progress.line(loss=float("nan"), worst=float("inf"))
    first, second, third = path.read_text().splitlines()
    assert json.loads(first) == {"rows": 1}
    record = json.loads(second)
    assert abs(record.pop("time") - time.time()) < 60
    assert record.pop("memory_mb") > 0
    assert record == {"rows": 10, "of": 100, "rows_per_s": 10.0, "loss": 0.25, "eta_s": 9}

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    strict = json.loads(third, parse_constant=refuse)
    assert (strict["loss"], strict["worst"]) == (None, None)
    assert fields_of(stream.getvalue().splitlines()[1])["loss"] == "nan"


def test_a_full_disk_ends_the_metrics_file_and_not_the_job(clock: list[float]) -> None:
    stream = io.StringIO()
    progress = Progress(total=10, unit="rows", stream=stream, metrics_path=Path("/dev/full"))
    progress.line()
    progress.line()
    assert stream.getvalue().count("warning: /dev/full: metrics not written (No space left on device)") == 1
    assert len(stream.getvalue().splitlines()) == 3


def test_a_terminal_gets_a_bar_and_no_lines(tmp_path: Path) -> None:
    main, terminal = pty.openpty()
    with os.fdopen(terminal, "w") as stream:
        progress = Progress(
            total=100, unit="rows", done=40, stream=stream, metrics_path=tmp_path / "m.jsonl", interval_s=1e-6
        )
        time.sleep(0.15)  # the bar redraws ten times a second at most
        progress.advance(10, loss=0.5)
        progress.close()
    drawn = b""
    with contextlib.suppress(OSError):  # all read and the other end closed: EIO
        while chunk := os.read(main, 65536):
            drawn += chunk
    os.close(main)
    shown = drawn.decode()
    assert "\r" in shown
    assert "50%" in shown
    assert "50.0/100 [" in shown
    assert "rows/s" in shown
    assert "loss=0.5" in shown
    assert "rows=" not in shown
    assert json.loads((tmp_path / "m.jsonl").read_text())["rows"] == 50


def test_memory_is_in_bytes() -> None:
    held: Any = bytearray(64 * 2**20)
    assert peak_memory_bytes() > 64 * 2**20
    assert peak_memory_bytes() < 2**40
    del held
