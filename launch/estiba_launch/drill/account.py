"""The accounting: what each interruption cost, from the job's record and its hosts' logs. What is not known is None."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import LaunchError
from .scenario import Scenario, Strike
from .timeline import Reader, Timeline

SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0}


@dataclass(frozen=True, kw_only=True)
class Limit:
    """One `--max-lost`: the most that any single interruption may cost one host."""

    amount: float
    unit: str
    """`s`, or the name of the workload's counter."""

    @classmethod
    def parse(cls, text: str) -> Limit:
        """`90s`, `2min`, `1h`, `500rows`, `20 steps`. Raises LaunchError."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z_]\w*)", text.strip())
        if match is None:
            raise LaunchError(f"--max-lost {text!r}: write an amount with its unit, such as 120s, 2min or 500rows")
        amount, unit = float(match.group(1)), match.group(2)
        return cls(amount=amount * SECONDS[unit], unit="s") if unit in SECONDS else cls(amount=amount, unit=unit)

    def counts(self, unit: str | None) -> bool:
        """Whether it is about what a job counts as `unit`; `steps` and `step` are the same."""
        return unit is not None and self.unit.lower().removesuffix("s") == unit.lower().removesuffix("s")

    def __str__(self) -> str:
        return f"{self.amount:g} {self.unit}"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One attempt on one host."""

    attempt: int
    host: str
    how: str
    """How it ended, in words."""
    interrupted: bool
    """True when its host was taken away and another attempt followed."""
    unit: str | None
    started_from: float | None
    started_from_is: str
    """`exact`, `at most` (read off the first progress line, so some of it may be new work) or `unknown`."""
    counted: float | None
    """The last counter the attempt printed."""
    total: float | None
    lost: float | None
    """Work counted here beyond what the next attempt started from."""
    lost_is: str
    """`exact`, `at least` or `unknown`."""
    lost_s: float | None
    """Seconds of work lost, at most: from the last line whose work was kept to the interruption."""
    save_s: float | None
    """From TERM to the end of the host's processes; None without TERM."""
    checkpoint: str
    """What the next attempt found: `intact`, `N set aside`, `none`, `unknown`; empty for the last attempt."""
    restart_s: float | None
    """From the interruption to the next attempt's first progress line: new host, download, start of the workload."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def seconds_of(stamp: str | None) -> float | None:
    """Unix time of a record's timestamp."""
    return datetime.datetime.fromisoformat(stamp).timestamp() if stamp else None


def running_s(record: Mapping[str, Any]) -> float:
    """Seconds that hosts were held, over all attempts that have ended."""
    spans = [(seconds_of(one["StartTime"]), seconds_of(one.get("EndTime"))) for one in record["Estiba"]["Attempts"]]
    return sum(end - start for start, end in spans if start and end)


def timelines(job_dir: Path, record: Mapping[str, Any]) -> dict[tuple[int, str], Timeline]:
    """Every (attempt, host)'s."""
    return {
        (attempt["Number"], host): Reader(job_dir / "attempts" / str(attempt["Number"]) / f"{host}.log").read()
        for attempt in record["Estiba"]["Attempts"]
        for host in attempt["Hosts"]
    }


def account(
    record: Mapping[str, Any],
    lines: Mapping[tuple[int, str], Timeline],
    strikes: Sequence[Strike],
    results: Mapping[str, Any] | None = None,
) -> list[Entry]:
    """One entry for each attempt and host. `results` is the job's results.json, if it left one."""
    attempts = record["Estiba"]["Attempts"]
    struck = iter(strikes)
    entries = []
    for index, attempt in enumerate(attempts):
        after = attempts[index + 1] if index + 1 < len(attempts) else None
        strike = next(struck, None) if "Interruption" in attempt else None
        for host in attempt["Hosts"]:
            here = lines[attempt["Number"], host]
            then = lines[after["Number"], host] if after else None
            last = after is not None and index + 2 == len(attempts)
            start, start_is = _start(attempt, here, results if after is None else None)
            next_start, next_is = (
                _start(after, then, results if last else None) if after and then else (None, "unknown")
            )
            entries.append(_entry(attempt, host, here, (start, start_is), after, then, (next_start, next_is), strike))
    return entries


def _start(attempt: Mapping[str, Any], line: Timeline, results: Mapping[str, Any] | None) -> tuple[float | None, str]:
    """What an attempt started from, and how well that is known."""
    told = (results or {}).get(line.unit or "", {})
    if isinstance(told, dict) and isinstance(told.get("resumed"), int | float) and len(attempt["Hosts"]) == 1:
        return float(told["resumed"]), "exact"
    if line.resumed is not None:
        return line.resumed, "exact"
    if not attempt.get("RestoredFiles"):
        return 0.0, "exact"
    if line.points:
        return line.points[0][1], "at most"
    return None, "unknown"


def _entry(
    attempt: Mapping[str, Any],
    host: str,
    here: Timeline,
    start: tuple[float | None, str],
    after: Mapping[str, Any] | None,
    then: Timeline | None,
    next_start: tuple[float | None, str],
    strike: Strike | None,
) -> Entry:
    note = attempt.get("Interruption", {})
    stopped = seconds_of(note.get("Time") or attempt.get("EndTime"))
    ended = seconds_of(note.get("EndedTime"))
    lost, lost_is, lost_s = None, "unknown", None
    kept, kept_is = next_start
    if after is not None and kept is not None:
        if here.counted is not None:
            lost = max(here.counted - kept, 0.0)
            lost_is = "exact" if kept_is == "exact" else "at least"
        began = seconds_of(attempt.get("TrainingStartTime"))
        # With an `at most`, some of what looks kept may be new: then only the attempt's own start is a bound.
        since = here.last_time_at_most(kept) if kept_is == "exact" else None
        since = since or began
        lost_s = round(max(stopped - since, 0.0), 1) if since and stopped else None
    first = then.points[0][0] if then and then.points else None
    return Entry(
        attempt=attempt["Number"],
        host=host,
        how=_how(attempt, host, strike),
        interrupted=after is not None,
        unit=here.unit,
        started_from=start[0],
        started_from_is=start[1],
        counted=here.counted,
        total=here.total,
        lost=lost,
        lost_is=lost_is,
        lost_s=lost_s,
        save_s=round(ended - stopped, 1) if note.get("Notice") and ended and stopped else None,
        checkpoint=_checkpoint(after, then, next_start) if after and then else "",
        restart_s=round(first - stopped, 1) if first and stopped else None,
    )


def _how(attempt: Mapping[str, Any], host: str, strike: Strike | None) -> str:
    note = attempt.get("Interruption")
    code = attempt.get("ExitCodes", {}).get(host)
    if note is None:
        outcome = str(attempt.get("Outcome", "running"))
        return outcome if code in (0, None) else f"{outcome}, exit {code}"
    wait = f", new host after {strike.wait_s:g} s" if strike and strike.wait_s else ""
    if note["Notice"]:
        return f"TERM, {'killed after the grace' if code == 137 else f'left by itself with {code}'}{wait}"
    if note.get("During"):
        middle = {True: "in the middle of", False: "just after", None: "at"}[note.get("InTheMiddle")]
        return f"KILL {middle} the write of {note['During'].rsplit('/', 1)[-1][:40]}{wait}"
    if note["Host"] is not None:
        return f"KILL of {note['Host']}{wait}" if note["Host"] == host else f"KILL with {note['Host']}{wait}"
    held = strike is not None and strike.kind is Scenario.KILL_BEFORE_SYNC
    unsynced = f", {note.get('UnsyncedFiles', 0)} files unsynced" if held or note.get("UnsyncedFiles") else ""
    return f"KILL{unsynced}{wait}"


def _checkpoint(after: Mapping[str, Any], then: Timeline, next_start: tuple[float | None, str]) -> str:
    if then.set_aside:
        return f"{then.set_aside} set aside"
    if not after.get("RestoredFiles"):
        return "none"
    kept, kept_is = next_start
    return "intact" if kept and kept_is == "exact" else "unknown"


def worst(entries: Sequence[Entry]) -> dict[str, float | None]:
    """The most that one interruption cost: `s` and each counter; None where one of them is not known."""
    found: dict[str, float | None] = {}
    for entry in entries:
        if not entry.interrupted:
            continue
        for unit, value in (("s", entry.lost_s), (entry.unit, entry.lost if entry.lost_is == "exact" else None)):
            if unit is None:
                continue
            before = found.get(unit, 0.0)
            found[unit] = None if value is None or before is None else max(before, value)
    return found


def over(entries: Sequence[Entry], limits: Sequence[Limit]) -> list[str]:
    """Each limit that was not kept, or that cannot be judged, in words."""
    problems = []
    for limit in limits:
        for entry in entries:
            if not entry.interrupted:
                continue
            where = f"attempt {entry.attempt} on {entry.host}"
            if limit.unit == "s":
                value, sure = entry.lost_s, True
            elif not limit.counts(entry.unit):
                problems.append(
                    f"{where}: --max-lost {limit} cannot be judged, the job counts {entry.unit or 'nothing'}"
                )
                continue
            else:
                value, sure = entry.lost, entry.lost_is == "exact"
            if value is not None and value > limit.amount:
                problems.append(f"{where}: lost {value:g} {limit.unit}, more than --max-lost {limit}")
            elif value is None or not sure:
                problems.append(f"{where}: how much was lost is not known, so --max-lost {limit} is not shown to hold")
    return problems
