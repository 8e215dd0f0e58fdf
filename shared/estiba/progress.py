"""Progress of a job: a bar on a terminal, else lines at intervals, for people and for metric regexes.

A line holds `name=value` pairs: `rows=48210 rows_per_s=812.4 eta_s=61`. The same numbers go to a
`MetricsWriter`, such as a file of JSON lines.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from estiba.log import format_fields, json_value, progress_bar
from estiba.metrics_output import JsonLines, MetricsWriter
from estiba.platform.stop import seconds

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
        metrics: MetricsWriter | None = None,
        interval_s: float | None = None,
    ) -> None:
        """`done` is the work of earlier attempts. It counts towards the total, not towards the rate.

        The numbers of a line also go to `metrics`, or as JSON lines to `metrics_path`.
        `interval_s` is the time between lines; None uses ESTIBA_LOG_INTERVAL_S, or ten seconds.
        """
        self.total, self.unit, self.resumed = total, unit, done
        self.done = done
        self._stream = stream or sys.stderr
        self._metrics = JsonLines(metrics_path) if metrics is None and metrics_path is not None else metrics
        self._interval_s = interval_s or seconds(os.environ, "ESTIBA_LOG_INTERVAL_S") or INTERVAL_S
        self._started = self._last = time.monotonic()
        self._bar = progress_bar(self._stream, total=total, done=done, unit=f" {unit}", unit_scale=True, leave=True)

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._started

    def rate_per_s(self) -> float:
        return (self.done - self.resumed) / max(self.elapsed_s, 1e-9)

    def advance(self, amount: float, **fields: Any) -> None:
        """Count work, and write a line if one is due."""
        self.done += amount
        if self._bar is not None:
            self._bar.set_postfix(fields, refresh=False)
            self._bar.update(amount)
        now = time.monotonic()
        if now - self._last >= self._interval_s:
            self._last = now
            self.line(**fields)

    def line(self, **fields: Any) -> None:
        """Write a line now."""
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
            print(format_fields(values), file=self._stream, flush=True)
        if self._metrics is not None:
            record = {"time": round(time.time(), 3), **{name: json_value(value) for name, value in values.items()}}
            try:
                self._metrics.write(record)
            except OSError as error:  # a full disk must not end the job
                print(f"warning: {self._metrics.name}: metrics not written ({error.strerror})", file=self._stream)
                self._metrics = None

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def peak_memory_bytes() -> int:
    """Return the peak memory of this process or of its largest finished child, whichever is more."""
    return max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) * 1024
