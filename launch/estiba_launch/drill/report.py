"""What a drill found: a table for people, a document for machines, and the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .account import Entry, worst
from .compare import SHOWN
from .scenario import Scenario, Strike

HEADS = (
    "attempt",
    "host",
    "ended by",
    "started from",
    "did until",
    "lost",
    "lost s",
    "save s",
    "restart s",
    "checkpoint",
)


@dataclass(kw_only=True)
class Report:
    """One drill."""

    job: str
    scenario: Scenario
    seed: int
    planned: Sequence[Strike]
    entries: Sequence[Entry]
    status: str
    running_s: float
    reference: str | None
    """Name of the undisturbed job; None without one."""
    reference_s: float | None
    compared: int | None
    """Files that were compared; None when there was nothing to compare with."""
    differences: Sequence[str] = ()
    ignored: Sequence[str] = ()
    limits: Sequence[str] = ()
    problems: list[str] = field(default_factory=list)
    """Why the drill failed; empty is PASS."""

    @property
    def passed(self) -> bool:
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """Everything; what is not known is null."""
        return {
            "job": self.job,
            "result": "PASS" if self.passed else "FAIL",
            "problems": self.problems,
            "scenario": str(self.scenario),
            "seed": self.seed,
            "planned": [
                {"kind": str(one.kind), "share": round(one.share, 4), "host": one.host, "wait_s": one.wait_s}
                for one in self.planned
            ],
            "attempts": [entry.to_json() for entry in self.entries],
            "most_lost": worst(self.entries),
            "max_lost": list(self.limits),
            "status": self.status,
            "running_s": self.running_s,
            "reference": None
            if self.reference is None
            else {
                "job": self.reference,
                "running_s": self.reference_s,
                "files_compared": self.compared,
                "differences": list(self.differences),
                "ignored": list(self.ignored),
            },
        }

    def table(self) -> str:
        """The table and the lines below it."""
        many = len({entry.host for entry in self.entries}) > 1
        rows = [_cells(entry) for entry in self.entries]
        keep = [index for index, head in enumerate(HEADS) if many or head != "host"]
        shown = [tuple(row[index] for index in keep) for row in [HEADS, *rows]]
        widths = [max(len(row[column]) for row in shown) for column in range(len(keep))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in shown
        ]
        return "\n".join([*lines, "", *self._words(), ""])

    def _words(self) -> list[str]:
        waited = sum(strike.wait_s for strike in self.planned)
        held = f"hosts held {self.running_s:.1f} s"
        if self.reference_s is not None:
            held += f" against {self.reference_s:.1f} s undisturbed"
        if waited:
            held += f"; {waited:g} s of waiting for capacity beside that"
        most = worst(self.entries)
        lost = ", ".join(f"{'?' if value is None else f'{value:g}'} {unit}" for unit, value in most.items())
        words = [f"most lost by one interruption: {lost or 'nothing was interrupted'}", held]
        if self.compared is None:
            words.append("output not compared")
        elif not self.differences:
            words.append(f"output: {self.compared} files equal to the undisturbed run, byte for byte")
        else:
            more = f" and {len(self.differences) - SHOWN} more" if len(self.differences) > SHOWN else ""
            words.append(f"output: {'; '.join(self.differences[:SHOWN])}{more}")
        words.append(f"seed {self.seed} repeats the plan")
        return [*words, *(["PASS"] if self.passed else [f"FAIL: {problem}" for problem in self.problems])]


def _cells(entry: Entry) -> tuple[str, ...]:
    def amount(value: float | None, how: str) -> str:
        if value is None:
            return "?"
        return {"at most": "<= ", "at least": ">= "}.get(how, "") + f"{value:g}"

    unit = f" {entry.unit}" if entry.unit else ""
    ended = entry.interrupted
    return (
        str(entry.attempt),
        entry.host,
        entry.how,
        amount(entry.started_from, entry.started_from_is),
        amount(entry.counted, "exact") + (f" of {entry.total:g}" if entry.total else "") + unit,
        amount(entry.lost, entry.lost_is) if ended else "-",
        ("?" if entry.lost_s is None else f"<= {entry.lost_s:.1f}") if ended else "-",
        "-" if entry.save_s is None else f"{entry.save_s:.1f}",
        ("?" if entry.restart_s is None else f"{entry.restart_s:.1f}") if ended else "-",
        entry.checkpoint or "-",
    )
