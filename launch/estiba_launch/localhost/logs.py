"""The whole log of a job in one file, attempts marked, and the metrics that its lines carry."""

from __future__ import annotations

import contextlib
import datetime
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

LOG = "job.log"
METRICS_EVERY_S = 2.0
# More than the 16 KiB at which the engine cuts a line.
TAIL_BYTES = 1 << 20


class JobLog:
    """Lines of all hosts in the order they came. Thread-safe; each line is on disk when `line` returns."""

    def __init__(self, job_dir: Path, many: bool) -> None:
        self.path = job_dir / LOG
        self._many = many
        self._lock = threading.Lock()

    def mark(self, text: str) -> None:
        """A line of Estiba's own, between the job's."""
        stamp = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        # A disk that is full must not end the job for the sake of its diary.
        with contextlib.suppress(OSError):
            self._write(f"--- {text} · {stamp} ---\n")

    def line(self, host: str, text: str) -> None:
        self._write(f"[{host}] {text}\n" if self._many else f"{text}\n")

    def _write(self, text: str) -> None:
        with self._lock, self.path.open("a", encoding="utf-8", errors="replace") as file:
            file.write(text)


class Metrics:
    """The last value of each metric that MetricDefinitions find."""

    def __init__(self, definitions: Iterable[dict[str, str]], keep: Callable[[dict[str, Any]], None]) -> None:
        self._patterns = [(one["Name"], re.compile(one["Regex"])) for one in definitions]
        self._keep = keep
        self._latest: dict[str, tuple[float, float]] = {}
        self._kept_at = 0.0
        self._lock = threading.Lock()

    def look(self, text: str) -> None:
        found = False
        for name, pattern in self._patterns:
            for match in pattern.finditer(text):
                try:
                    value = float(match.group(1))
                except (TypeError, ValueError):
                    continue
                with self._lock:
                    self._latest[name] = (value, time.time())
                found = True
        if found and time.monotonic() - self._kept_at > METRICS_EVERY_S:
            self.flush()

    def flush(self) -> None:
        self._kept_at = time.monotonic()
        with self._lock:
            latest = dict(self._latest)
        if latest:
            self._keep(latest)


class Pump(threading.Thread):
    """Copies one container's output to the job's log, and to a file of its own with the engine's timestamps.

    That file says where to go on when a new supervisor takes over.
    """

    def __init__(
        self, host: str, own: Path, log: JobLog, metrics: Metrics, stream: Callable[[float | None], Any]
    ) -> None:
        super().__init__(name=f"log {host}", daemon=True)
        self.host, self.own, self.log, self.metrics, self.stream = host, own, log, metrics, stream

    def run(self) -> None:
        """Until the stream ends; an engine that goes away ends it, and the supervisor starts another pump."""
        last = last_stamp(self.own)
        try:
            with self.own.open("a", encoding="utf-8") as own:
                for stamp, text in stamped_lines(self.stream(to_unix(last) if last else None)):
                    # The engine's `since` is inclusive: what is there already is left out.
                    if last and stamp <= last:
                        continue
                    own.write(f"{stamp} {text}\n")
                    own.flush()
                    self.log.line(self.host, text)
                    self.metrics.look(text)
        except Exception as error:
            self.log.mark(f"log of {self.host} broke off ({error})")


def stamped_lines(chunks: Iterable[bytes]) -> Iterator[tuple[str, str]]:
    """(timestamp, text) of each line, however the bytes are cut."""
    rest = b""
    for chunk in chunks:
        rest += chunk
        *lines, rest = rest.split(b"\n")
        for line in lines:
            yield _stamped(line)
    if rest:
        yield _stamped(rest)


def _stamped(line: bytes) -> tuple[str, str]:
    stamp, _, text = line.decode("utf-8", "replace").partition(" ")
    return stamp, text.rstrip("\r")


def last_stamp(path: Path) -> str | None:
    """Timestamp of the last line of a stamped log; only its end is read."""
    try:
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - TAIL_BYTES, 0))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return None
    return lines[-1].partition(b" ")[0].decode("utf-8", "replace") if lines else None


def to_unix(stamp: str) -> float:
    """2026-09-27T12:30:05.123456789Z -> seconds, cut to microseconds: the line itself is seen again."""
    match = re.fullmatch(r"(.{19})(\.\d{1,6})?\d*Z", stamp)
    if match is None:
        return 0.0
    return datetime.datetime.fromisoformat(f"{match.group(1)}{match.group(2) or ''}+00:00").timestamp()
