"""Steps that a script reports, and the silence that counts as a stall. Standard library only.

A script reports each step by one line, in any language:

    open(os.environ["ESTIBA_STEP_FILE"], "w").write(str(step))      # Python
    echo "$step" > "$ESTIBA_STEP_FILE"                              # shell

`estiba.training` does it by itself. A script that reports nothing never counts as stalled, nor one that removed the
file after its last step.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path

NAME = "ESTIBA_STEP_FILE"
STALL_S = 300.0
STALL_STEPS = 20
"""A stall is a silence of STALL_S or of this many median steps, whichever is longer."""
_REMEMBERED_STEPS = 100
_FROZEN_S = 5.0


def report_step(step: int, environ: Mapping[str, str] = os.environ) -> None:
    """Report that a step was completed, or that one still makes progress (the same number again)."""
    if path := environ.get(NAME):
        with contextlib.suppress(OSError):  # a full disk must not fail a step
            Path(path).write_text(str(step))


def report_end(environ: Mapping[str, str] = os.environ) -> None:
    """Report that no more steps come, since what follows, such as writing the model, may take any time."""
    if path := environ.get(NAME):
        with contextlib.suppress(OSError):
            Path(path).unlink(missing_ok=True)


class StepWatch:
    """Reads the step file of one host."""

    def __init__(self, path: Path, stall_s: float = STALL_S) -> None:
        self.path = path
        self.stall_s = stall_s
        self.step: int | None = None
        self._changed_at: float | None = None
        self._stamp: tuple[int, str] | None = None
        self._durations_s: deque[float] = deque(maxlen=_REMEMBERED_STEPS)
        self._step_at: float | None = None
        self._looked_at: float | None = None

    def look(self, now: float | None = None) -> float | None:
        """Read the file. Returns the seconds of silence if they count as a stall, else None."""
        now = time.monotonic() if now is None else now
        gap_s = 0.0 if self._looked_at is None else now - self._looked_at
        self._looked_at = now
        if gap_s > _FROZEN_S:  # this host stood still itself
            self._changed_at = None if self._changed_at is None else self._changed_at + gap_s
            self._step_at = None
        try:
            stamp = (self.path.stat().st_mtime_ns, self.path.read_text(errors="replace").strip())
        except OSError:
            self._changed_at = self._stamp = None
            return None
        if stamp != self._stamp:
            self._stamp, self._changed_at = stamp, now
            if stamp[1].isdigit() and int(stamp[1]) != self.step:
                if self._step_at is not None and self.step is not None and int(stamp[1]) > self.step:
                    self._durations_s.append((now - self._step_at) / (int(stamp[1]) - self.step))
                self.step, self._step_at = int(stamp[1]), now
        if self._changed_at is None or not self._durations_s:
            return None
        silent_s = now - self._changed_at
        return silent_s if silent_s > max(self.stall_s, STALL_STEPS * self.median_s) else None

    @property
    def median_s(self) -> float:
        return statistics.median(self._durations_s) if self._durations_s else 0.0
