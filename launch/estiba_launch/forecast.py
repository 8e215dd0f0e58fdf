"""What a job will cost and how often it should save, before it is started.

The model of a spot job: it needs `work_s` of work; interruptions come at random (exponential, mean M seconds apart,
one clock for the whole cluster because one lost host restarts all); every `interval_s` of work it saves for `save_s`;
an interruption loses the work since the last save, unless (chance `notice_saves`) the notice was long enough to save;
each restart costs `restart_s` of billed time (download, image, restore). Saving while working is not billed twice.

Checkpoint interval: Young (1974), T = sqrt(2 C M), C the cost of a save, M the mean time between interruptions. When
a share p of interruptions is survived by the save on notice, only (1 - p) of them lose work: T = sqrt(2 C M / (1 - p)).
"""

from __future__ import annotations

import math
import random
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What the forecast cannot know; every one is printed with it and can be set."""

    interruptions_per_hour: float = 0.15
    """Spot interruptions of the cluster per hour of running; 0 for on-demand."""
    save_s: float = 60.0
    """Seconds one checkpoint takes away from the work."""
    notice_saves: float = 0.0
    """Chance that an interruption's notice is long enough for a last save. No document promises one."""
    restart_s: float = 300.0
    """Billed seconds before the work goes on after an interruption."""
    work_share: float = 0.7
    """Expected work as a share of MaxRuntimeInSeconds, when nothing better is known."""
    work_s: float | None = None
    """Expected seconds of uninterrupted work; None takes `work_share` of the limit."""
    interval_s: float | None = None
    """Seconds between saves; None takes the suggested interval."""
    runs: int = 2000
    """Simulated jobs."""
    seed: int = 20260927

    def __post_init__(self) -> None:
        """Raise ValueError for values the model has no meaning for."""
        for name in ("interruptions_per_hour", "save_s", "restart_s"):
            if not (0 <= getattr(self, name) < math.inf):
                raise ValueError(f"{name} {getattr(self, name)}: must be 0 or more")
        if not 0 <= self.notice_saves <= 1:
            raise ValueError(f"notice_saves {self.notice_saves}: a chance, from 0 to 1")
        if not 0 < self.work_share <= 1:
            raise ValueError(f"work_share {self.work_share}: a share, above 0 and at most 1")
        for name in ("work_s", "interval_s"):
            value = getattr(self, name)
            if value is not None and not (0 < value < math.inf):
                raise ValueError(f"{name} {value}: must be above 0")


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Billed time and cost of one job, in seconds and USD, for the whole cluster."""

    usd_per_h: float
    """Price of all hosts together."""
    ceiling_usd: float
    """MaxRuntimeInSeconds at that price: it cannot cost more (waiting is free; storage and transfer are extra)."""
    billed_s: dict[str, float]
    """P10, P50 and P90 of billed seconds."""
    usd: dict[str, float]
    """The same in USD."""
    interruptions: float
    """Mean number of interruptions."""
    lost_s: float
    """Mean seconds of work done twice."""
    finishes: float
    """Share of simulated jobs that finished within MaxRuntimeInSeconds."""
    interval_s: float | None
    """Suggested seconds between checkpoints (Young); None when nothing interrupts."""
    interval_notice_s: float | None
    """The same when the notice saves `notice_saves` of the interruptions; None when nothing can be lost."""
    assumptions: Assumptions

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def young_interval_s(save_s: float, mean_between_s: float, notice_saves: float = 0.0) -> float | None:
    """Seconds between checkpoints that lose the least; None when no interruption can lose work.

    Source: J. W. Young, CACM 17 (1974) 530. `save_s` 60 at 0.15 an hour gives 1,697 s (28 min).
    """
    if notice_saves >= 1 or math.isinf(mean_between_s):
        return None
    return math.sqrt(2 * save_s * mean_between_s / (1 - notice_saves))


def mean_time_s(interruptions_per_hour: float) -> float:
    return 3600 / interruptions_per_hour if interruptions_per_hour > 0 else math.inf


def forecast(*, usd_per_h: float, max_runtime_s: int, spot: bool, assumptions: Assumptions) -> Forecast:
    """Simulate `assumptions.runs` jobs, seeded: the same inputs give the same numbers."""
    rate = assumptions.interruptions_per_hour if spot else 0.0
    mean_s = mean_time_s(rate)
    plain = young_interval_s(assumptions.save_s, mean_s)
    aware = young_interval_s(assumptions.save_s, mean_s, assumptions.notice_saves)
    interval_s = assumptions.interval_s or aware or math.inf
    work_s = min(assumptions.work_s or assumptions.work_share * max_runtime_s, max_runtime_s)
    clock = random.Random(assumptions.seed)
    jobs = [_simulate(clock, work_s, interval_s, mean_s, max_runtime_s, assumptions) for _ in range(assumptions.runs)]
    billed = sorted(job[0] for job in jobs)
    quantiles = {name: billed[int(q * (len(billed) - 1))] for name, q in (("p10", 0.1), ("p50", 0.5), ("p90", 0.9))}
    return Forecast(
        usd_per_h=usd_per_h,
        ceiling_usd=usd_per_h * max_runtime_s / 3600,
        billed_s=quantiles,
        usd={name: usd_per_h * seconds / 3600 for name, seconds in quantiles.items()},
        interruptions=sum(job[1] for job in jobs) / len(jobs),
        lost_s=sum(job[2] for job in jobs) / len(jobs),
        finishes=sum(job[3] for job in jobs) / len(jobs),
        interval_s=plain,
        interval_notice_s=aware,
        assumptions=assumptions,
    )


def _simulate(
    clock: random.Random, work_s: float, interval_s: float, mean_s: float, limit_s: float, given: Assumptions
) -> tuple[float, int, float, bool]:
    """One job: (billed seconds, interruptions, seconds of work lost, finished)."""
    billed, done, lost, count = given.restart_s, 0.0, 0.0, 0
    saves = given.save_s / interval_s if math.isfinite(interval_s) else 0.0
    while True:
        needed = (work_s - done) * (1 + saves)
        until = clock.expovariate(1 / mean_s) if math.isfinite(mean_s) else math.inf
        if billed + min(needed, until) >= limit_s:
            return limit_s, count, lost, False
        if needed <= until:
            return billed + needed, count, lost, True
        worked = until / (1 + saves)
        kept = worked
        if clock.random() >= given.notice_saves:
            kept = math.floor(worked / interval_s) * interval_s if math.isfinite(interval_s) else 0.0
        lost += worked - kept
        done += kept
        billed += until + given.restart_s
        count += 1


def loss_without_saving(max_runtime_s: int, interruptions_per_hour: float = 0.15) -> str:
    """The arithmetic of running on spot with no checkpoint, as one sentence."""
    mean_s = mean_time_s(interruptions_per_hour)
    chance = 1 - math.exp(-max_runtime_s / mean_s)
    # E[time to finish w s with restarts from zero] = M (e^(w/M) - 1), so the expected loss is that less w.
    expected_s = mean_s * math.expm1(min(max_runtime_s / mean_s, 600)) - max_runtime_s
    interval = young_interval_s(60, mean_s) or 0
    loss = f"{expected_s / 3600:,.1f} h" if expected_s < 1e4 * 3600 else "more than a year"
    return (
        f"at {interruptions_per_hour} interruptions/h a run of {max_runtime_s / 3600:g} h is cut with chance "
        f"{chance:.0%} and starts again from zero each time, {loss} of work lost on average; "
        f"saving every {interval / 60:.0f} min loses about {min(interval, max_runtime_s) / 2 / 60:.0f} min each"
    )
