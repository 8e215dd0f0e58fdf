"""What a job would be and cost, before anything is started."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from . import scripts
from .errors import BudgetError, LaunchError
from .forecast import Assumptions, Forecast, forecast
from .jobfile import JobFile
from .prices import Instance, Prices, hosts_of
from .rules.inputs import DEFAULT_MAX_RUNTIME_S


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One job with its price; `cost` is None for targets that AWS does not bill."""

    job: JobFile
    options: scripts.HostOptions
    hosts: list[tuple[Instance, int]]
    cost: Forecast | None
    warnings: list[str]
    box_usd_per_h: float | None = None
    """What an ssh box costs, as its tenant says; None when nobody said."""

    @property
    def usd_per_h(self) -> float:
        return self.cost.usd_per_h if self.cost else self.box_usd_per_h or 0.0

    @property
    def ceiling_usd(self) -> float:
        if self.cost:
            return self.cost.ceiling_usd
        return self.usd_per_h * max_runtime_s(self.job.request) / 3600

    def to_json(self) -> dict[str, Any]:
        """Everything `estiba plan` says, for machines."""
        return {
            "job": self.job.name,
            "target": str(self.job.target),
            **scripts.as_json(self.job, self.options),
            "hosts": [{**_instance_json(instance), "count": count} for instance, count in self.hosts],
            "cost": self.cost.to_json() if self.cost else None,
            "warnings": self.warnings,
        }


def _instance_json(instance: Instance) -> dict[str, Any]:
    return {**asdict(instance), "date": instance.date.isoformat()}


def make(
    job: JobFile,
    prices: Prices,
    *,
    assumptions: Assumptions | None = None,
    options: scripts.HostOptions | None = None,
    region: str | None = None,
    today: datetime.date | None = None,
    box_usd_per_h: float | None = None,
) -> Plan:
    """Price and forecast `job`. Raises LaunchError when the price of an instance type is unknown on SageMaker."""
    used = options or scripts.HostOptions()
    if not job.target.is_sagemaker:
        return Plan(job=job, options=used, hosts=[], cost=None, warnings=[], box_usd_per_h=box_usd_per_h)
    wanted = hosts_of(job.request)
    hosts = [(prices.get(name), count) for name, count in wanted]
    run_s = max_runtime_s(job.request)
    cost = forecast(
        usd_per_h=sum(instance.usd_per_h * count for instance, count in hosts),
        max_runtime_s=run_s,
        spot=bool(job.request.get("EnableManagedSpotTraining")),
        assumptions=assumptions or Assumptions(),
    )
    warnings = prices.warnings([name for name, _ in wanted], region, today)
    return Plan(job=job, options=used, hosts=hosts, cost=cost, warnings=warnings)


def max_runtime_s(request: Mapping[str, Any]) -> int:
    """Seconds of StoppingCondition.MaxRuntimeInSeconds, or the API's default of a day."""
    value = request.get("StoppingCondition", {}).get("MaxRuntimeInSeconds", DEFAULT_MAX_RUNTIME_S)
    return int(value)


def refuse_over(plan: Plan, max_cost_usd: float | None) -> None:
    """Raise BudgetError when the job could cost more than `max_cost_usd`, LaunchError when nobody knows the price."""
    if max_cost_usd is not None and plan.job.target.kind == "ssh" and plan.box_usd_per_h is None:
        raise LaunchError(f"--max-cost: the price of {plan.job.target} is not known; pass --usd-per-h")
    if max_cost_usd is not None and plan.ceiling_usd > max_cost_usd:
        raise BudgetError(
            f"{plan.job.name}: may cost up to {plan.ceiling_usd:.2f} USD (MaxRuntimeInSeconds "
            f"{max_runtime_s(plan.job.request)} at {plan.usd_per_h:.4g} USD/h), more than "
            f"--max-cost {max_cost_usd:.2f}; lower MaxRuntimeInSeconds, take a cheaper instance, or raise --max-cost"
        )


def describe(plan: Plan) -> str:
    """Price and forecast in words, one fact a line."""
    if plan.box_usd_per_h is not None and plan.cost is None:
        return (
            f"{plan.job.name} on {plan.job.target}: at most {plan.ceiling_usd:.2f} USD "
            f"({duration(max_runtime_s(plan.job.request))} x {plan.box_usd_per_h:.4g} USD/h, as you say; the box is "
            "billed until you give it back)\n"
        )
    if plan.cost is None:
        return f"{plan.job.name} on {plan.job.target}: no bill from AWS\n"
    cost, given = plan.cost, plan.cost.assumptions
    spot = bool(plan.job.request.get("EnableManagedSpotTraining"))
    lines = [f"{plan.job.name} on SageMaker{', managed spot' if spot else ', on-demand'}"]
    for instance, count in plan.hosts:
        gpus = f"{instance.gpus} x {instance.gpu} {instance.gpu_memory_mib} MiB" if instance.gpus else "no GPU"
        lines.append(
            f"  {count} x {instance.name} ({gpus}, {instance.vcpus or '?'} vCPU, {instance.memory_gib or '?'} GiB): "
            f"{instance.usd_per_h:.4g} USD/h each, {instance.region}, read {instance.date}"
        )
    seconds = max_runtime_s(plan.job.request)
    quantiles = "  ".join(f"{name.upper()} {cost.usd[name]:.2f}" for name in ("p10", "p50", "p90"))
    billed = " / ".join(duration(cost.billed_s[q]) for q in ("p10", "p50", "p90"))
    lines += [
        f"  price         {cost.usd_per_h:.4g} USD/h",
        f"  ceiling       {cost.ceiling_usd:.2f} USD ({duration(seconds)} x {cost.usd_per_h:.4g} USD/h)",
        f"  forecast      {quantiles} USD ({billed})",
    ]
    work = f"{duration(given.work_s)} of work" if given.work_s else f"work of {given.work_share:.0%} of the limit"
    if spot:
        lines.append(
            f"  interruptions {cost.interruptions:.2f} on average, {duration(cost.lost_s)} of work lost; "
            f"{cost.finishes:.0%} of jobs finish in time"
        )
        if cost.interval_s is not None:
            aware = f", {duration(cost.interval_notice_s)} with the notice" if given.notice_saves else ""
            aware = aware if cost.interval_notice_s is not None else ""
            lines.append(f"  save every    {duration(cost.interval_s)} (Young){aware}")
        lines.append(
            f"  assuming      {given.interruptions_per_hour:g} interruptions/h, {given.save_s:g} s a save, "
            f"{given.restart_s:g} s a restart, notice saves {given.notice_saves:.0%}, {work}"
        )
    else:
        lines.append(f"  assuming      {given.restart_s:g} s to start, {work}")
    return "\n".join([*lines, ""])


def duration(seconds: float | None) -> str:
    """90 -> `1.5 min`; 5400 -> `1.5 h`."""
    if seconds is None:
        return "never"
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.3g} min"
    return f"{seconds / 3600:.3g} h"
