"""What one host's log tells of its work: how far it was when, and from where it went on.

The protocol is the job layer's, and any workload can speak it with two kinds of lines:

    rows=1200 of=6000 rows_per_s=80.1 ...      progress: the first pair is the counter, `of` the whole
    resuming: 800 rows ...                     once, at the start of an attempt that goes on from saved work

`step=40` alone counts as well. A line with "set aside" means a saved piece that did not verify and was not used.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from ..localhost.logs import to_unix

NUMBER = r"(\d+(?:\.\d+)?(?:[eE][+]?\d+)?)"
PROGRESS = re.compile(rf"^\s*(?:(?P<unit>[A-Za-z_]\w*)={NUMBER} of={NUMBER}|(?P<step>steps?)={NUMBER})(?=\s|$)")
RESUMING = re.compile(r"\bresum(?:ing|ed)\b:? (?:(?:at|from|after) )?(?:[a-z_]+[ =])?(\d+)(?=[\s;,.]|$)", re.IGNORECASE)
SET_ASIDE = re.compile(r"\bset aside\b")


@dataclass(kw_only=True)
class Timeline:
    """One attempt on one host."""

    unit: str | None = None
    """What is counted; None until a progress line came."""
    total: float | None = None
    points: list[tuple[float, float]] = field(default_factory=list)
    """(Unix time, counter), in order."""
    resumed: float | None = None
    """What the attempt said it goes on from."""
    set_aside: int = 0

    def read(self, stamp: str, text: str) -> None:
        """Take in one line of the log with the engine's timestamp."""
        if match := PROGRESS.match(text):
            numbers = [float(group) for group in match.groups()[1:] if group and group[0].isdigit()]
            self.unit = match["unit"] or match["step"]
            self.points.append((to_unix(stamp), numbers[0]))
            if len(numbers) > 1:
                self.total = numbers[1]
        elif self.resumed is None and (match := RESUMING.search(text)):
            self.resumed = float(match.group(1))
        if SET_ASIDE.search(text):
            self.set_aside += 1

    @property
    def counted(self) -> float | None:
        """The last the attempt said of itself."""
        return self.points[-1][1] if self.points else None

    @property
    def share(self) -> float | None:
        """Share of the whole that is done; None where the whole is not known."""
        return self.points[-1][1] / self.total if self.points and self.total else None

    def last_time_at_most(self, amount: float) -> float | None:
        """When the counter was last seen at or below `amount`; None where it never was."""
        times = [time for time, counter in self.points if counter <= amount]
        return times[-1] if times else None


class Reader:
    """Follows a stamped log file (`attempts/N/HOST.log`) and keeps its timeline."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.timeline = Timeline()
        self._position = 0
        self._rest = b""

    def read(self) -> Timeline:
        """Take in what is new."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._position)
                data = file.read()
        except FileNotFoundError:
            return self.timeline
        self._position += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            stamp, _, text = line.decode("utf-8", "replace").partition(" ")
            self.timeline.read(stamp, text)
        return self.timeline
