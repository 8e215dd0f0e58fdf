"""What a job may cost, before it starts: its price, the ceiling from its time limit, and on AWS a forecast."""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from estiba_launch.errors import BudgetError, LaunchError
from estiba_launch.request.contract import max_runtime_s
from estiba_launch.request.forecast import Assumptions, Forecast, forecast
from estiba_launch.request.jobfile import JobFile
from estiba_launch.request.prices import Instance, Prices, choices_of


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The cost of one job on its target."""

    job: JobFile
    usd_per_h: float | None
    """Price of all hosts together; 0 on this machine; None if unknown."""
    hosts: list[tuple[Instance, int]]
    """Instance types with counts; empty where AWS bills nothing."""
    choices: int
    """How many kinds of cluster AWS may choose from; `hosts` is the most expensive."""
    forecast: Forecast | None
    """None where AWS bills nothing, or the price is unknown."""
    warnings: list[str]
    """Caveats about the prices."""

    @property
    def ceiling_usd(self) -> float:
        """The most that the hosts can cost; 0 if the price is unknown."""
        return (self.usd_per_h or 0.0) * self.limit_s / 3600

    @property
    def limit_s(self) -> int:
        """The longest that the hosts can be billed, including a warm pool's wait."""
        if self._waits_count:
            return int(self.job.request["StoppingCondition"]["MaxWaitTimeInSeconds"])
        warm_s = self.job.request["ResourceConfig"].get("KeepAlivePeriodInSeconds", 0)
        return max_runtime_s(self.job.request) + (int(warm_s) if self.job.target.on_aws else 0)

    @property
    def _is_spot(self) -> bool:
        return bool(self.job.request.get("EnableManagedSpotTraining"))

    @property
    def _waits_count(self) -> bool:
        return self.job.target.waits_count and self._is_spot

    def to_json(self) -> dict[str, Any]:
        return {
            "hosts": [
                {**asdict(one), "date": one.date and one.date.isoformat(), "count": count} for one, count in self.hosts
            ],
            "cost": asdict(self.forecast) if self.forecast else None,
            "warnings": self.warnings,
        }

    def render(self) -> str:
        """Price and forecast as text, one fact per line."""
        where = f"{self.job.name} on {self.job.target}"
        if self.job.target.on_aws:
            return "\n".join([*self._billed_by_aws(), ""])
        if self.usd_per_h is None:
            return f"{where}: price unknown (pass --usd-per-h); no bill from AWS\n"
        if not self.usd_per_h:
            return f"{where}: no bill from AWS\n"
        terms = f"{duration(self.limit_s)} x {self.usd_per_h:.4g} USD/h, from --usd-per-h"
        if self._waits_count:
            terms += "; the limit is MaxWaitTimeInSeconds, in which waits and restarts count too"
        most = "at most"
        if self.job.target.restarts_clock and self._is_spot:
            most = "each start at most"
            terms += f"; {self.job.target} counts the time anew after each interruption"
        return f"{where}: {most} {self.ceiling_usd:.2f} USD ({terms}; a rented host is billed until you return it)\n"

    @property
    def _storage(self) -> str:
        """What the ceiling leaves out: no table has the price of the volumes."""
        size_gb = self.job.request["ResourceConfig"].get("VolumeSizeInGB")
        count = sum(count for _, count in self.hosts)
        return f", without storage: {count} x {size_gb} GB of EBS" if size_gb else ""

    def _billed_by_aws(self) -> list[str]:
        spot = self._is_spot
        lines = [f"{self.job.name} on SageMaker{', managed spot' if spot else ', on-demand'}"]
        for one, count in self.hosts:
            gpus = f"{one.gpus} x {one.gpu} {one.gpu_memory_mib} MiB" if one.gpus else "no GPU"
            if one.usd_per_h is None:
                lines.append(f"  {count} x {one.name}: price unknown")
                continue
            lines.append(
                f"  {count} x {one.name} ({gpus}, {one.vcpus or '?'} vCPU, {one.memory_gib or '?'} GiB): "
                f"{one.usd_per_h:.4g} USD/h each, {one.region}, read {one.date}"
            )
        if self.choices > 1:
            lines.append(f"  the most expensive of {self.choices} preferences; AWS starts the first available one")
        cost = self.forecast
        if cost is None:
            return [*lines, f"  ceiling       unknown ({duration(self.limit_s)} at most); pass --usd-per-h or --prices"]
        used = cost.assumptions
        usd = "  ".join(f"{name.upper()} {cost.usd[name]:.2f}" for name in ("p10", "p50", "p90"))
        billed = " / ".join(duration(cost.billed_s[name]) for name in ("p10", "p50", "p90"))
        terms = f"{duration(self.limit_s)} x {cost.usd_per_h:.4g} USD/h{self._storage}"
        lines += [
            f"  price         {cost.usd_per_h:.4g} USD/h",
            f"  ceiling       {self.ceiling_usd:.2f} USD ({terms})",
            f"  forecast      {usd} USD ({billed})",
        ]
        work = f"{duration(used.work_s)} of work" if used.work_s else f"work of {used.work_share:.0%} of the limit"
        if spot:
            lines.append(
                f"  expected      {cost.expected_usd:.2f} USD at an assumed spot discount of {used.spot_discount:.0%} "
                "(`estiba plan --spot-discount`)"
            )
        else:
            return [*lines, f"  assuming      {used.restart_s:g} s to start, {work}"]
        lines.append(
            f"  interruptions {cost.interruptions:.2f} on average, {duration(cost.lost_s)} of work lost; "
            f"{cost.finishes:.0%} of jobs finish in time"
        )
        if cost.interval_s is not None:
            notice = f", {duration(cost.interval_notice_s)} with the notice"
            shown = notice if used.notice_saves and cost.interval_notice_s is not None else ""
            lines.append(f"  save every    {duration(cost.interval_s)} (Young){shown}")
        lines.append(
            f"  assuming      {used.interruptions_per_hour:g} interruptions/h, {used.save_s:g} s a save, "
            f"{used.restart_s:g} s a restart, notice saves {used.notice_saves:.0%}, {work}"
        )
        return lines


def estimate(
    job: JobFile,
    prices: Prices,
    *,
    assumptions: Assumptions | None = None,
    region: str | None = None,
    today: datetime.date | None = None,
    usd_per_h: float | None = None,
) -> Estimate:
    """Price a job on its target; forecast it where AWS bills it.

    `usd_per_h` is the user's price of all hosts together. Without it, AWS's comes from the table of prices, this
    machine is free, and the price of another host is unknown. If AWS may choose between kinds of hosts, the most
    expensive counts.
    """
    if not job.target.on_aws:
        price = 0.0 if usd_per_h is None and job.target.runs_here else usd_per_h
        return Estimate(job=job, usd_per_h=price, hosts=[], choices=1, forecast=None, warnings=[])
    choices = [[(prices.find(name), count) for name, count in hosts] for hosts in choices_of(job.request)]
    hosts = max(choices, key=lambda hosts: math.inf if (usd := hourly_usd(hosts)) is None else usd)
    price = hourly_usd(hosts) if usd_per_h is None else usd_per_h
    projection = (
        None
        if price is None
        else forecast(
            usd_per_h=price,
            max_runtime_s=max_runtime_s(job.request),
            keep_alive_s=int(job.request["ResourceConfig"].get("KeepAlivePeriodInSeconds", 0)),
            spot=bool(job.request.get("EnableManagedSpotTraining")),
            assumptions=assumptions or Assumptions(),
        )
    )
    names = [instance.name for hosts in choices for instance, _ in hosts]
    return Estimate(
        job=job,
        usd_per_h=price,
        hosts=hosts,
        choices=len(choices),
        forecast=projection,
        warnings=prices.warnings(names, region, today),
    )


def hourly_usd(hosts: Sequence[tuple[Instance, int]]) -> float | None:
    """Price of all hosts together; None if the price of one is unknown."""
    listed = [instance.usd_per_h and instance.usd_per_h * count for instance, count in hosts]
    return None if None in listed else sum(filter(None, listed))


def refuse_over(cost: Estimate, max_cost_usd: float | None) -> None:
    """Raise BudgetError if the job may cost more than `max_cost_usd`, LaunchError if its price is unknown."""
    if max_cost_usd is None:
        return
    if not 0 <= max_cost_usd < math.inf:
        raise LaunchError(f"--max-cost {max_cost_usd}: not an amount in USD; write for example 12.5")
    if cost.usd_per_h is None:
        unknown = [one.name for one, _ in cost.hosts if one.usd_per_h is None] or [str(cost.job.target)]
        raise LaunchError(f"--max-cost: the price of {', '.join(unknown)} is unknown; pass --usd-per-h")
    if cost.ceiling_usd > max_cost_usd:
        raise BudgetError(
            f"{cost.job.name}: may cost up to {cost.ceiling_usd:.2f} USD ({cost.limit_s} s at {cost.usd_per_h:.4g} "
            f"USD/h), more than --max-cost {max_cost_usd:.2f}; lower MaxRuntimeInSeconds, use a cheaper instance, or "
            "raise --max-cost"
        )


def duration(seconds: float | None) -> str:
    """90 -> `1.5 min`; 5400 -> `1.5 h`."""
    if seconds is None:
        return "never"
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.3g} min"
    return f"{seconds / 3600:.3g} h"
