"""The work that each interruption cost, computed from the job's status and its hosts' logs. Unknown values are None."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from estiba_launch.drill.scenario import PlannedFault, Scenario
from estiba_launch.errors import LaunchError
from estiba_launch.jobs.control import LOSS, PARTITION, SILENCE
from estiba_launch.jobs.progress import Progress
from estiba_launch.jobs.status import AttemptStatus, JobStatus

FAULT_NAMES = {LOSS: "KILL", SILENCE: "silence", PARTITION: "partition"}
SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0}
ProgressByHost = Mapping[tuple[int, str], Progress]
"""(attempt number, host) -> progress."""


@dataclass(frozen=True, kw_only=True)
class Limit:
    """One `--max-lost`: the most that a single interruption may cost on one host."""

    amount: float
    unit: str
    """`s`, or the name of the workload's counter."""

    @classmethod
    def parse(cls, text: str) -> Limit:
        """Parse `90s`, `2min`, `1h`, `500rows` or `20 steps`. Raises LaunchError."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z_]\w*)", text.strip())
        if match is None:
            raise LaunchError(f"--max-lost {text!r}: write an amount with its unit, such as 120s, 2min or 500rows")
        amount, unit = float(match.group(1)), match.group(2)
        return cls(amount=amount * SECONDS[unit], unit="s") if unit in SECONDS else cls(amount=amount, unit=unit)

    def applies_to(self, unit: str | None) -> bool:
        """Whether `unit` is the limit's unit; `steps` and `step` are the same."""
        return unit is not None and self.unit.lower().removesuffix("s") == unit.lower().removesuffix("s")

    def __str__(self) -> str:
        return f"{self.amount:g} {self.unit}"


@dataclass(frozen=True, kw_only=True)
class AttemptLoss:
    """One attempt on one host, and what its interruption cost."""

    attempt: int
    host: str
    how: str
    """How the attempt ended, in words."""
    interrupted: bool
    """True when another attempt followed."""
    unit: str | None
    started_from: float | None
    started_from_is: str
    """`exact`, `at most` (the first progress line, which may include new work) or `unknown`."""
    counted: float | None
    """The last counter that the attempt printed."""
    total: float | None
    lost: float | None
    """Work counted in this attempt beyond the point where the next one started."""
    lost_is: str
    """`exact`, `at least` or `unknown`."""
    lost_s: float | None
    """Upper bound on the seconds of lost work: from the last line whose work was saved to the interruption."""
    save_s: float | None
    """Seconds from TERM to the end of the host's processes; None without TERM."""
    checkpoint: str
    """What the next attempt found: `intact`, `N quarantined`, `none`, `unknown`; empty for the last attempt."""
    restart_s: float | None
    """Seconds from the interruption to the next attempt's first progress line."""


class Start(NamedTuple):
    """The counter from which an attempt started, and its certainty."""

    counter: float | None
    certainty: str


def seconds_of(stamp: str | None) -> float | None:
    """Unix time of a timestamp in a job's status."""
    return datetime.datetime.fromisoformat(stamp).timestamp() if stamp else None


def held_s(status: JobStatus) -> float:
    """Seconds during which hosts were held, over all finished attempts."""
    spans = [(seconds_of(one.start_time), seconds_of(one.end_time)) for one in status.attempts]
    return sum(end - start for start, end in spans if start and end)


def loss_report(
    attempts: Sequence[AttemptStatus],
    progress: ProgressByHost,
    planned: Sequence[PlannedFault],
    results: Mapping[str, Any] | None = None,
) -> list[AttemptLoss]:
    """One row for each attempt and host. `results` is the job's results.json, if it wrote one."""
    starts: dict[tuple[int, str], Start] = {}
    for attempt in attempts:
        known = results if results and attempt is attempts[-1] else {}
        for host in attempt.hosts:
            starts[attempt.number, host] = _start(attempt, progress[attempt.number, host], known)
    faults = iter(planned)
    losses = []
    for attempt, following in zip(attempts, [*attempts[1:], None], strict=True):
        fault = next(faults, None) if attempt.interruption is not None else None
        losses += [_loss(attempt, following, host, progress, starts, fault) for host in attempt.hosts]
    return losses


def came_late(attempt: AttemptStatus, progress: ProgressByHost) -> bool:
    """Whether the attempt was interrupted after every host had counted all of its work."""
    stopped = seconds_of((attempt.interruption or {}).get("Time"))
    if stopped is None or not attempt.hosts:
        return False
    logs = [progress[attempt.number, host] for host in attempt.hosts]
    return all(log.total and any(at <= stopped and done >= log.total for at, done in log.points) for log in logs)


def _start(attempt: AttemptStatus, progress: Progress, results: Mapping[str, Any]) -> Start:
    counts = results.get(progress.unit or "", {})
    if isinstance(counts, dict) and isinstance(counts.get("resumed"), int | float) and len(attempt.hosts) == 1:
        return Start(float(counts["resumed"]), "exact")
    if progress.resumed_from is not None:
        return Start(progress.resumed_from, "exact")
    if not attempt.restored_files:
        return Start(0.0, "exact")
    if progress.points:
        return Start(progress.points[0][1], "at most")
    return Start(None, "unknown")


def _loss(
    attempt: AttemptStatus,
    following: AttemptStatus | None,
    host: str,
    progress: ProgressByHost,
    starts: Mapping[tuple[int, str], Start],
    fault: PlannedFault | None,
) -> AttemptLoss:
    own_progress, start = progress[attempt.number, host], starts[attempt.number, host]
    interruption = attempt.interruption or {}
    stopped = seconds_of(interruption.get("Time") or attempt.end_time)
    ended = seconds_of(interruption.get("EndedTime"))
    lost, lost_is, lost_s, restart_s, checkpoint = None, "unknown", None, None, ""
    if following is not None:
        next_progress, next_start = progress[following.number, host], starts[following.number, host]
        checkpoint = _checkpoint(following, next_progress, next_start)
        if next_start.counter is not None:
            if own_progress.counter is not None:
                lost = max(own_progress.counter - next_start.counter, 0.0)
                lost_is = "exact" if next_start.certainty == "exact" else "at least"
            # An upper bound may include new work; then only the attempt's own start is certain.
            since = own_progress.last_time_at_most(next_start.counter) if next_start.certainty == "exact" else None
            since = since or seconds_of(attempt.training_start_time)
            lost_s = round(max(stopped - since, 0.0), 1) if since and stopped else None
        points = next_progress.points
        restart_s = round(points[0][0] - stopped, 1) if points and stopped else None
    return AttemptLoss(
        attempt=attempt.number,
        host=host,
        how=_how(attempt, host, fault),
        interrupted=following is not None,
        unit=own_progress.unit,
        started_from=start.counter,
        started_from_is=start.certainty,
        counted=own_progress.counter,
        total=own_progress.total,
        lost=lost,
        lost_is=lost_is,
        lost_s=lost_s,
        save_s=round(ended - stopped, 1) if interruption.get("Notice") and ended and stopped else None,
        checkpoint=checkpoint,
        restart_s=restart_s,
    )


def _how(attempt: AttemptStatus, host: str, planned: PlannedFault | None) -> str:
    interruption = attempt.interruption
    code = attempt.exit_codes.get(host)
    if interruption is None:
        outcome = attempt.outcome or "running"
        return outcome if code in (0, None) else f"{outcome}, exit {code}"
    wait_s = planned.fault.capacity_wait_s if planned else 0.0
    wait = f", new host after {wait_s:g} s" if wait_s else ""
    if interruption["Notice"]:
        return f"TERM, {'killed after the grace period' if code == 137 else f'exited with {code}'}{wait}"
    if interruption.get("During") and "Hosts" not in interruption:
        when = {True: "in the middle of", False: "just after", None: "at"}[interruption.get("InTheMiddle")]
        return f"KILL {when} the write of {interruption['During'].rsplit('/', 1)[-1][:40]}{wait}"
    lost_host = interruption["Host"]
    if "Hosts" in interruption:
        end = interruption["Hosts"].get(host)
        fault = f"{FAULT_NAMES[interruption['Kind']]} of {lost_host}"
        if end is None:
            return f"{fault}{wait}"
        after_s = end["EndedAfterSeconds"]
        text = "still running, killed" if after_s is None else f"ended after {after_s:g} s with {end['ExitCode']}"
        return f"{fault}: {text}{wait}"
    if lost_host is not None:
        return f"KILL {'of' if lost_host == host else 'with'} {lost_host}{wait}"
    unsynced = interruption.get("UnsyncedFiles", 0)
    show = unsynced or (planned is not None and planned.scenario is Scenario.KILL_BEFORE_SYNC)
    return f"KILL{f', {unsynced} files unsynced' if show else ''}{wait}"


def _checkpoint(following: AttemptStatus, progress: Progress, next_start: Start) -> str:
    if progress.quarantined:
        return f"{progress.quarantined} quarantined"
    if not following.restored_files:
        return "none"
    return "intact" if next_start.counter and next_start.certainty == "exact" else "unknown"


def most_lost(losses: Sequence[AttemptLoss]) -> dict[str, float | None]:
    """Unit -> the most that a single interruption cost; None if one of the values is unknown."""
    values: dict[str, list[float | None]] = {}
    for loss in losses:
        if loss.interrupted:
            values.setdefault("s", []).append(loss.lost_s)
            if loss.unit is not None:
                values.setdefault(loss.unit, []).append(loss.lost if loss.lost_is == "exact" else None)
    return {unit: None if None in costs else max(filter(None, costs), default=0.0) for unit, costs in values.items()}


def violations(losses: Sequence[AttemptLoss], limits: Sequence[Limit]) -> list[str]:
    """A sentence for each limit that an interruption exceeds or that cannot be checked."""
    problems = []
    for limit in limits:
        for loss in losses:
            if not loss.interrupted:
                continue
            where = f"attempt {loss.attempt} on {loss.host}"
            in_s = limit.unit == "s"
            value, exact = (loss.lost_s, True) if in_s else (loss.lost, loss.lost_is == "exact")
            if not in_s and not limit.applies_to(loss.unit):
                counts = loss.unit or "nothing"
                problems.append(f"{where}: --max-lost {limit} cannot be checked, the job counts {counts}")
            elif value is not None and value > limit.amount:
                problems.append(f"{where}: lost {value:g} {limit.unit}, more than --max-lost {limit}")
            elif value is None or not exact:
                problems.append(f"{where}: the loss is not known, so --max-lost {limit} cannot be checked")
    return problems
