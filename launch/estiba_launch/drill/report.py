"""The result of a drill: a table for people, a document for machines, PASS or FAIL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from estiba_launch.drill.config import DrillConfig
from estiba_launch.drill.loss_report import AttemptLoss, held_s, most_lost
from estiba_launch.drill.reference import Reference
from estiba_launch.drill.scenario import PlannedFault
from estiba_launch.jobs.status import JobStatus

DIFFERENCES_SHOWN = 5


@dataclass(kw_only=True)
class Report:
    config: DrillConfig
    planned: Sequence[PlannedFault]
    status: JobStatus
    losses: Sequence[AttemptLoss]
    reference: Reference | None
    compared: int | None = None
    """Number of files compared; None without a reference or without output."""
    differences: Sequence[str] = ()
    ignored: Sequence[str] = ()
    """Patterns of files that were not compared."""
    missed: str | None = None
    """The problem if fewer interruptions than planned hit the job at work, else None."""
    problems: list[str] = field(default_factory=list)
    """Why the drill failed; empty for PASS."""

    @property
    def passed(self) -> bool:
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """The whole report; unknown values are null."""
        reference = self.reference and {
            "job": self.reference.job,
            "running_s": round(self.reference.running_s, 1),
            "files_compared": self.compared,
            "differences": list(self.differences),
            "ignored": list(self.ignored),
        }
        planned = [
            {
                "kind": str(one.scenario),
                "share": round(one.share, 4),
                "host": one.fault.host,
                "wait_s": one.fault.capacity_wait_s,
            }
            for one in self.planned
        ]
        return {
            "job": self.status.name,
            "result": "PASS" if self.passed else "FAIL",
            "problems": self.problems,
            "scenario": str(self.config.fault or self.config.scenario),
            "seed": self.config.seed,
            "planned": planned,
            "attempts": [asdict(loss) for loss in self.losses],
            "host_faults": [
                dict(note)
                for attempt in self.status.attempts
                for note in (*attempt.faults, attempt.interruption or {})
                if "Hosts" in note
            ],
            "most_lost": most_lost(self.losses),
            "max_lost": list(map(str, self.config.limits)),
            "status": self.status.status,
            "running_s": round(held_s(self.status), 1),
            "reference": reference,
        }

    def table(self) -> str:
        """One row for each attempt and host, then the summary."""
        rows = [_cells(loss) for loss in self.losses]
        if len({row["host"] for row in rows}) == 1:
            rows = [{title: cell for title, cell in row.items() if title != "host"} for row in rows]
        lines = [[*row] for row in rows[:1]] + [[*row.values()] for row in rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
        return "\n".join([*table, "", *self._summary(), ""])

    def _summary(self) -> list[str]:
        lost = ", ".join(
            f"{'?' if value is None else f'{value:g}'} {unit}" for unit, value in most_lost(self.losses).items()
        )
        held = f"hosts held {held_s(self.status):.1f} s"
        if self.reference:
            held += f", {self.reference.running_s:.1f} s in the uninterrupted run"
        if waited_s := sum(planned.fault.capacity_wait_s for planned in self.planned):
            held += f"; {waited_s:g} s of waiting for capacity not included"
        more = len(self.differences) - DIFFERENCES_SHOWN
        if self.compared is None:
            output = "output not compared"
        elif self.differences:
            output = "output: " + "; ".join(self.differences[:DIFFERENCES_SHOWN])
            output += f" and {more} more" if more > 0 else ""
        else:
            output = f"output: {self.compared} files equal to the uninterrupted run, byte for byte"
        return [
            f"most lost by one interruption: {lost or 'nothing was interrupted'}",
            held,
            output,
            f"seed {self.config.seed} repeats the schedule",
            *([f"FAIL: {problem}" for problem in self.problems] or ["PASS"]),
        ]


def _cells(loss: AttemptLoss) -> dict[str, str]:
    """Column title -> cell."""

    def amount(value: float | None, certainty: str = "exact") -> str:
        return "?" if value is None else {"at most": "<= ", "at least": ">= "}.get(certainty, "") + f"{value:g}"

    def seconds(value: float | None, prefix: str = "") -> str:
        return "?" if value is None else f"{prefix}{value:.1f}"

    counted = amount(loss.counted) + (f" of {loss.total:g}" if loss.total else "")
    return {
        "attempt": str(loss.attempt),
        "host": loss.host,
        "ended by": loss.how,
        "started from": amount(loss.started_from, loss.started_from_is),
        "reached": f"{counted} {loss.unit or ''}".rstrip(),
        "lost": amount(loss.lost, loss.lost_is) if loss.interrupted else "-",
        "lost s": seconds(loss.lost_s, "<= ") if loss.interrupted else "-",
        "save s": "-" if loss.save_s is None else seconds(loss.save_s),
        "restart s": seconds(loss.restart_s) if loss.interrupted else "-",
        "checkpoint": loss.checkpoint or "-",
    }
