"""What a job will cost and how often it should save, simulated before it starts.

The model of a spot job: it needs `work_s` of work. Interruptions are random (exponential, M seconds apart on average,
one clock for the whole cluster because one lost host restarts all). After every `interval_s` of work it saves for
`save_s`. An interruption loses the work since the last save, unless (with chance `notice_saves`) the notice was long
enough to save. Each restart costs `restart_s` of billed time (download, image, restore).

Checkpoint interval: Young (1974), T = sqrt(2 C M), C the cost of a save, M the mean time between interruptions. If
the notice is long enough for a share p of interruptions, only (1 - p) of them lose work: T = sqrt(2 C M / (1 - p)).
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Annotated

from typer import Option

from estiba_launch.errors import LaunchError


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What the forecast assumes, and prints. Fields with an Option are options of `estiba plan`."""

    interruptions_per_hour: Annotated[
        float, Option("--interruptions", help="Forecast: spot interruptions per hour.")
    ] = 0.15
    save_s: Annotated[float, Option(help="Forecast: seconds that one checkpoint takes.")] = 60.0
    notice_saves: Annotated[
        float, Option(help="Forecast: probability that the notice is long enough for a save (0-1).")
    ] = 0.0
    """AWS documents no notice."""
    spot_discount: Annotated[float, Option(help="Forecast: share of the on-demand price that spot saves (0-1).")] = 0.6
    """AWS publishes no rate for managed spot, only "up to 90%"."""
    restart_s: float = 300.0
    """Billed seconds from an interruption until work resumes."""
    work_share: float = 0.7
    """Expected work as a share of MaxRuntimeInSeconds, if `work_s` is None."""
    work_s: Annotated[float | None, Option(help="Forecast: seconds of work; default: 70% of the limit.")] = None
    interval_s: float | None = None
    """Seconds between saves; None means the suggested interval."""
    runs: int = 2000
    """Simulated jobs."""
    seed: int = 20260927

    def __post_init__(self) -> None:
        """Raise LaunchError for a value out of range."""
        for name in ("interruptions_per_hour", "save_s", "restart_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise LaunchError(f"forecast: {name} {getattr(self, name)}: must be 0 or more")
        for name in ("notice_saves", "spot_discount"):
            if not 0 <= getattr(self, name) <= 1:
                raise LaunchError(f"forecast: {name} {getattr(self, name)}: must be from 0 to 1")
        if not 0 < self.work_share <= 1:
            raise LaunchError(f"forecast: work_share {self.work_share}: must be above 0 and at most 1")
        for name in ("work_s", "interval_s"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise LaunchError(f"forecast: {name} {value}: must be above 0")


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Billed time and cost of one job, in seconds and USD, for the whole cluster."""

    usd_per_h: float
    """Price of all hosts together."""
    ceiling_usd: float
    """The most that hosts can cost: the time limit plus the warm pool's wait at that price. Storage is extra."""
    billed_s: dict[str, float]
    """P10, P50 and P90 of billed seconds."""
    usd: dict[str, float]
    """The same in USD, at the on-demand price."""
    expected_usd: float
    """P50, less the assumed discount on spot."""
    interruptions: float
    """Mean number of interruptions."""
    lost_s: float
    """Mean seconds of work done twice."""
    finishes: float
    """Share of simulated jobs that finished within MaxRuntimeInSeconds."""
    interval_s: float | None
    """Suggested seconds between checkpoints (Young); None without interruptions."""
    interval_notice_s: float | None
    """The same if the notice is enough for `notice_saves` of the interruptions; None if it always is."""
    assumptions: Assumptions


def young_interval_s(save_s: float, mean_between_s: float, notice_saves: float = 0.0) -> float | None:
    """Seconds between checkpoints that minimize lost work; None if no interruption loses any.

    Source: J. W. Young, CACM 17 (1974) 530. `save_s` 60 at 0.15 an hour gives 1,697 s (28 min).
    """
    if notice_saves >= 1 or math.isinf(mean_between_s):
        return None
    return math.sqrt(2 * save_s * mean_between_s / (1 - notice_saves))


def mean_time_s(interruptions_per_hour: float) -> float:
    return 3600 / interruptions_per_hour if interruptions_per_hour > 0 else math.inf


def forecast(
    *, usd_per_h: float, max_runtime_s: int, spot: bool, assumptions: Assumptions, keep_alive_s: int = 0
) -> Forecast:
    """Simulate `assumptions.runs` jobs, seeded: the same inputs give the same numbers."""
    rate = assumptions.interruptions_per_hour if spot else 0.0
    mean_s = mean_time_s(rate)
    without_notice_s = young_interval_s(assumptions.save_s, mean_s)
    with_notice_s = young_interval_s(assumptions.save_s, mean_s, assumptions.notice_saves)
    # Free saves have the interval 0, which the simulation cannot divide by.
    interval_s = assumptions.interval_s or (math.inf if with_notice_s is None else max(with_notice_s, 1.0))
    work_s = min(assumptions.work_s or assumptions.work_share * max_runtime_s, max_runtime_s)
    rng = random.Random(assumptions.seed)
    jobs = [_simulate(rng, work_s, interval_s, mean_s, max_runtime_s, assumptions) for _ in range(assumptions.runs)]
    billed = sorted(job[0] for job in jobs)
    quantiles = {name: billed[int(q * (len(billed) - 1))] for name, q in (("p10", 0.1), ("p50", 0.5), ("p90", 0.9))}
    usd = {name: usd_per_h * seconds / 3600 for name, seconds in quantiles.items()}
    return Forecast(
        usd_per_h=usd_per_h,
        ceiling_usd=usd_per_h * (max_runtime_s + keep_alive_s) / 3600,
        billed_s=quantiles,
        usd=usd,
        expected_usd=usd["p50"] * (1 - assumptions.spot_discount if spot else 1),
        interruptions=sum(job[1] for job in jobs) / len(jobs),
        lost_s=sum(job[2] for job in jobs) / len(jobs),
        finishes=sum(job[3] for job in jobs) / len(jobs),
        interval_s=without_notice_s,
        interval_notice_s=with_notice_s,
        assumptions=assumptions,
    )


def _simulate(
    rng: random.Random, work_s: float, interval_s: float, mean_s: float, limit_s: float, assumed: Assumptions
) -> tuple[float, int, float, bool]:
    """One job: (billed seconds, interruptions, seconds of work lost, finished)."""
    billed, done, lost, count = assumed.restart_s, 0.0, 0.0, 0
    save_overhead = assumed.save_s / interval_s if math.isfinite(interval_s) else 0.0
    while True:
        needed = (work_s - done) * (1 + save_overhead)
        until_interruption = rng.expovariate(1 / mean_s) if math.isfinite(mean_s) else math.inf
        if billed + min(needed, until_interruption) >= limit_s:
            return limit_s, count, lost, False
        if needed <= until_interruption:
            return billed + needed, count, lost, True
        worked = until_interruption / (1 + save_overhead)
        kept = worked
        if rng.random() >= assumed.notice_saves:
            kept = math.floor(worked / interval_s) * interval_s if math.isfinite(interval_s) else 0.0
        lost += worked - kept
        done += kept
        billed += until_interruption + assumed.restart_s
        count += 1


def loss_without_saving(max_runtime_s: int, interruptions_per_hour: float = 0.15) -> str:
    """What a spot job without checkpoints loses, in one sentence."""
    mean_s = mean_time_s(interruptions_per_hour)
    chance = 1 - math.exp(-max_runtime_s / mean_s)
    # E[time to finish w s with restarts from zero] = M (e^(w/M) - 1), so the expected loss is that less w.
    expected_s = mean_s * math.expm1(min(max_runtime_s / mean_s, 600)) - max_runtime_s
    interval = young_interval_s(60, mean_s) or 0
    loss = f"{expected_s / 3600:,.1f} h" if expected_s < 1e4 * 3600 else "more than a year"
    return (
        f"at {interruptions_per_hour} interruptions/h a run of {max_runtime_s / 3600:g} h is interrupted with "
        f"probability {chance:.0%} and restarts from zero each time, {loss} of work lost on average; "
        f"saving every {interval / 60:.0f} min loses about {min(interval, max_runtime_s) / 2 / 60:.0f} min each"
    )
