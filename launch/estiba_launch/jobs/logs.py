"""The log of a job in one file, attempts marked, and the metrics in its lines."""

from __future__ import annotations

import contextlib
import datetime
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from estiba_launch.request.contract import metric_pattern

LOG = "job.log"
METRICS = "metrics.json"
"""Metrics of a job without a local supervisor; not in the record, which another process may be writing."""
METRICS_EVERY_S = 2.0
MESSAGE_BYTES = 16 << 10
"""The engine cuts longer lines into messages of this size, each with the line's timestamp."""
LINE_BYTES = 256 << 10
"""Longer lines are cut here."""
TAIL_BYTES = 2 * LINE_BYTES
"""More than any line of a stamped log."""
STAMP = re.compile(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+(?:Z|[+-]\d\d:\d\d) ")
BAR_EVERY_S = 5.0


def read_lines(path: Path, cursor: int = 0) -> Iterator[tuple[str, int]]:
    """Complete lines after byte `cursor`, each with the cursor after it. A missing file has no lines."""
    try:
        with path.open("rb") as file:
            # A log copier that died may have left lines that the next one removed.
            cursor = min(cursor, path.stat().st_size)
            file.seek(cursor)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                cursor += len(line)
                yield line[:-1].decode("utf-8", "replace"), cursor
    except FileNotFoundError:
        return


class JobLog:
    """Lines of all hosts in order of arrival. Thread-safe; a line is on disk when `line` returns."""

    def __init__(self, job_dir: Path, many: bool) -> None:
        self.path = job_dir / LOG
        self._many = many
        self._lock = threading.Lock()

    def mark(self, text: str) -> None:
        """Write a line of Estiba's own between the job's."""
        stamp = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        # A full disk must not end the job because of a line in its log.
        with contextlib.suppress(OSError):
            self._write(f"--- {text} · {stamp} ---\n")

    def line(self, host: str, text: str) -> None:
        self._write(f"[{host}] {text}\n" if self._many else f"{text}\n")

    def _write(self, text: str) -> None:
        with self._lock, self.path.open("a", encoding="utf-8", errors="replace") as file:
            file.write(text)


class Metrics:
    """The last value of each metric that MetricDefinitions match."""

    def __init__(self, request: Mapping[str, Any], keep: Callable[[list[dict[str, Any]]], None]) -> None:
        """`keep` receives a FinalMetricDataList, every few seconds while values change."""
        definitions = request["AlgorithmSpecification"].get("MetricDefinitions", [])
        self._patterns = [(one["Name"], metric_pattern(one["Regex"])) for one in definitions]
        self._keep = keep
        self._latest: dict[str, tuple[float, float]] = {}
        self._kept_at = 0.0
        self._lock = threading.Lock()

    def parse(self, text: str) -> None:
        changed = False
        for name, pattern in self._patterns:
            for match in pattern.finditer(text):
                try:
                    value = float(match.group(1))
                except (TypeError, ValueError):
                    continue
                with self._lock:
                    self._latest[name] = (value, time.time())
                changed = True
        if changed and time.monotonic() - self._kept_at > METRICS_EVERY_S:
            self.flush()

    def flush(self) -> None:
        self._kept_at = time.monotonic()
        with self._lock:
            values = [
                {"MetricName": name, "Value": value, "Timestamp": at} for name, (value, at) in self._latest.items()
            ]
        if values:
            self._keep(values)


def copy_output(
    host: str, own: Path, log: JobLog, metrics: Metrics, stream: Callable[[float | None], Iterable[bytes]]
) -> None:
    """Append new output of one container to the job's log and, with the engine's timestamps, to `own`.

    The last timestamp in `own` is where the next copy starts. Raises what the stream raises.
    """
    last = last_stamp(own)
    with own.open("a", encoding="utf-8") as file:
        for stamp, text in stamped_lines(stream(to_unix(last) if last else None)):
            # The engine's `since` is inclusive.
            if last and stamp <= last:
                continue
            file.write(f"{stamp} {shown(text)}\n")
            file.flush()
            log.line(host, shown(text))
            metrics.parse(text)


def stamped_lines(chunks: Iterable[bytes]) -> Iterator[tuple[str, str]]:
    """Split bytes into (timestamp, text) lines, wherever the chunks end, and join messages that the engine split."""
    rest = b""
    for chunk in chunks:
        rest += chunk
        *lines, rest = rest.split(b"\n")
        for line in lines:
            yield _joined(line)
        if len(rest) > LINE_BYTES:
            last = _messages(rest)[-1]
            yield _joined(rest[:last] or rest)
            rest = rest[last:] if last else rest.partition(b" ")[0] + b" "
    if rest:
        yield _joined(rest)


def _messages(line: bytes) -> list[int]:
    """Where the engine's messages of one line begin."""
    starts = [0]
    while True:
        end = line.find(b" ", starts[-1]) + 1 + MESSAGE_BYTES
        if not STAMP.match(line, end):
            return starts
        starts.append(end)


def _joined(line: bytes) -> tuple[str, str]:
    starts = _messages(line)
    messages = [line[start:end] for start, end in zip(starts, [*starts[1:], None], strict=True)]
    text = b"".join(message.partition(b" ")[2] for message in messages)
    return line.partition(b" ")[0].decode("utf-8", "replace"), text.decode("utf-8", "replace").rstrip("\r")


def shown(text: str) -> str:
    """The line as a terminal finally shows it: of a progress bar, the last state."""
    return text.rpartition("\r")[2] or text.rstrip("\r").rpartition("\r")[2]


def copy_bars(host: str, log: JobLog, chunks: Iterable[bytes]) -> None:
    """Log progress bars every few seconds: the engine's log withholds them until their newline."""
    line = b""
    last_shown = time.monotonic()
    for chunk in chunks:
        line = (line + chunk).rpartition(b"\n")[2][-MESSAGE_BYTES:]
        text = shown(line.decode("utf-8", "replace"))
        if b"\r" in line and text.strip() and time.monotonic() - last_shown >= BAR_EVERY_S:
            last_shown = time.monotonic()
            log.line(host, text)


def last_stamp(path: Path) -> str | None:
    """Timestamp of the last line of a stamped log. Reads only the end of the file."""
    try:
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - TAIL_BYTES, 0))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return None
    return lines[-1].partition(b" ")[0].decode("utf-8", "replace") if lines else None


def to_unix(stamp: str) -> float:
    """2026-09-27T12:30:05.123456789Z -> seconds, cut to microseconds, so the line itself is read again."""
    try:
        return datetime.datetime.fromisoformat(stamp).timestamp()
    except ValueError:
        return 0.0
