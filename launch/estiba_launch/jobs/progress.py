"""Progress of a workload, read from the log of one host.

Any workload can report progress with two kinds of lines:

    rows=1200 of=6000 rows_per_s=80.1 ...      the first pair is the counter, `of` is the total
    resuming: 800 rows ...                     once, when an attempt continues from saved work

`step=40` without a total is a counter too. A line that contains "quarantined" or "set aside" reports a checkpoint that
failed verification and was not used.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from estiba_launch.jobs.logs import read_lines, to_unix

NUMBER = r"(\d+(?:\.\d+)?(?:[eE][+]?\d+)?)"
PROGRESS = re.compile(rf"^\s*(?:(?P<unit>[A-Za-z_]\w*)={NUMBER} of={NUMBER}|(?P<step>steps?)={NUMBER})(?=\s|$)")
RESUMING = re.compile(r"\bresum(?:ing|ed)\b:? (?:(?:at|from|after) )?(?:[a-z_]+[ =])?(\d+)(?=[\s;,.]|$)", re.IGNORECASE)
QUARANTINED = re.compile(r"\b(?:quarantined|set aside)\b")


@dataclass(kw_only=True)
class Progress:
    unit: str | None = None
    """Name of the counter; None before the first progress line."""
    total: float | None = None
    points: list[tuple[float, float]] = field(default_factory=list)
    """(Unix time, counter), in order."""
    resumed_from: float | None = None
    """The counter value from which the attempt resumed."""
    quarantined: int = 0
    """Checkpoints that failed verification."""

    def add(self, stamp: str, text: str) -> None:
        """Parse one log line, with the engine's timestamp."""
        if match := PROGRESS.match(text):
            numbers = [float(group) for group in match.groups()[1:] if group and group[0].isdigit()]
            self.unit = match["unit"] or match["step"]
            self.points.append((to_unix(stamp), numbers[0]))
            if len(numbers) > 1:
                self.total = numbers[1]
        elif self.resumed_from is None and (match := RESUMING.search(text)):
            self.resumed_from = float(match.group(1))
        if QUARANTINED.search(text):
            self.quarantined += 1

    @property
    def counter(self) -> float | None:
        """The last value that the attempt printed."""
        return self.points[-1][1] if self.points else None

    def last_time_at_most(self, amount: float) -> float | None:
        """Unix time of the last line with a counter of at most `amount`, or None."""
        times = [time for time, counter in self.points if counter <= amount]
        return times[-1] if times else None


class ProgressReader:
    """Reads the progress from a log file of stamped lines (`attempts/N/HOST.log`) that may still grow."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.progress = Progress()
        self._cursor = 0

    def read(self) -> Progress:
        """Parse the lines that were added since the last call."""
        for line, cursor in read_lines(self.path, self._cursor):
            self._cursor = cursor
            stamp, _, text = line.partition(" ")
            self.progress.add(stamp, text)
        return self.progress
