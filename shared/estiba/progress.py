"""What a job is doing: a bar on a terminal, else one line at intervals that people and metric regexes both read.

A line is `name=value` pairs: `rows=48210 rows_per_s=812.4 eta_s=61`. The same numbers go to a JSON-lines file.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from estiba.stop import seconds

INTERVAL_S = 10.0


class Progress:
    """Progress towards a known amount of work."""

    def __init__(
        self,
        *,
        total: float,
        unit: str,
        done: float = 0,
        stream: TextIO | None = None,
        metrics_path: Path | None = None,
        interval_s: float | None = None,
    ) -> None:
        """`done` is what an earlier attempt did: counted in the share, never in the rate.

        `interval_s` is between lines; None takes ESTIBA_LOG_INTERVAL_S, or ten seconds.
        """
        self.total, self.unit, self.resumed = total, unit, done
        self.done = done
        self._stream = stream or sys.stderr
        self._metrics = metrics_path
        self._interval_s = interval_s or seconds(os.environ, "ESTIBA_LOG_INTERVAL_S") or INTERVAL_S
        self._started = self._last = time.monotonic()
        self._bar: tqdm | None = None
        if self._stream.isatty():
            self._bar = tqdm(
                total=total,
                initial=done,
                unit=f" {unit}",
                unit_scale=True,
                file=self._stream,
                leave=True,
                ncols=None if columns_of(self._stream) else 80,
                nrows=None if columns_of(self._stream) else 24,
            )

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._started

    def rate_per_s(self) -> float:
        return (self.done - self.resumed) / max(self.elapsed_s, 1e-9)

    def advance(self, amount: float, **fields: Any) -> None:
        """Count work, and say so if it is time to."""
        self.done += amount
        if self._bar is not None:
            self._bar.set_postfix(fields, refresh=False)
            self._bar.update(amount)
        now = time.monotonic()
        if now - self._last >= self._interval_s:
            self._last = now
            self.line(**fields)

    def line(self, **fields: Any) -> None:
        """One line now."""
        rate = self.rate_per_s()
        values = {
            self.unit: self.done,
            "of": self.total,
            f"{self.unit}_per_s": round(rate, 1),
            **fields,
            "eta_s": round((self.total - self.done) / rate) if rate > 0 else None,
            "memory_mb": round(peak_memory_bytes() / 1e6),
        }
        if self._bar is None:
            text = " ".join(f"{name}={_plain(value)}" for name, value in values.items() if value is not None)
            print(text, file=self._stream, flush=True)
        if self._metrics is not None:
            record = json.dumps(
                {"time": round(time.time(), 3), **{name: _strict(value) for name, value in values.items()}}
            )
            try:
                with open(self._metrics, "a", encoding="utf-8") as file:
                    file.write(record + "\n")
            except OSError as error:  # a full disk must not end a job for the sake of its diary
                print(f"warning: {self._metrics}: metrics not written ({error.strerror})", file=self._stream)
                self._metrics = None

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def columns_of(stream: TextIO) -> int:
    """0 where the terminal does not say, as with `docker run -t` into a pipe."""
    try:
        return os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        return 0


def peak_memory_bytes() -> int:
    """The most this process, or the largest of its ended children, has held at once."""
    return max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) * 1024


def _strict(value: Any) -> Any:
    """JSON has no NaN and no infinity; readers of the file may be strict."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
