"""What a job has cost: billed by AWS, by the owner of a remote host, or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from estiba_launch.jobs.status import JobStatus
from estiba_launch.request.address import TargetAddress
from estiba_launch.request.estimate import duration, hourly_usd
from estiba_launch.request.prices import Instance


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The bill of one job. SageMaker bills BillableTimeInSeconds x hosts x the on-demand rate, for managed spot too:
    there the billable time is shorter than the training time, and the difference is the saving.
    """

    status: JobStatus
    target: TargetAddress
    hosts: Sequence[tuple[Instance, int]]
    """Instance types and counts."""
    warnings: Sequence[str]
    """What to know about the prices."""

    @property
    def training_s(self) -> int:
        return self.status.training_s or 0

    @property
    def billable_s(self) -> int:
        elsewhere = 0 if self.target.on_aws else self.training_s
        return elsewhere if self.status.billable_s is None else self.status.billable_s

    @property
    def usd(self) -> float | None:
        """None when the price of the remote host, or of an instance type, is unknown."""
        if self.target.on_aws:
            return self.sagemaker_usd
        if self.target.runs_here:
            return 0.0
        return None if self.status.usd_per_h is None else self.status.usd_per_h * self.training_s / 3600

    @property
    def sagemaker_usd_per_h(self) -> float | None:
        return hourly_usd(self.hosts)

    @property
    def sagemaker_usd(self) -> float | None:
        """What SageMaker bills for the same time."""
        return None if self.sagemaker_usd_per_h is None else self.sagemaker_usd_per_h * self.billable_s / 3600

    def to_json(self) -> dict[str, Any]:
        dates = [instance.date for instance, _ in self.hosts if instance.date]
        known = self.target.on_aws and self.training_s and self.billable_s
        return {
            "job": self.status.name,
            "target": str(self.target),
            "status": self.status.status,
            "training_s": self.training_s,
            "billable_s": self.billable_s,
            "usd": self.usd,
            "spot_saving": 1 - self.billable_s / self.training_s if known else None,
            "sagemaker_usd_per_h": self.sagemaker_usd_per_h,
            "sagemaker_usd": self.sagemaker_usd,
            "instances": [{"type": instance.name, "count": count} for instance, count in self.hosts],
            "prices_read": min(dates).isoformat() if dates else None,
        }

    def render(self) -> str:
        values = self.to_json()
        job, took, usd = self.status.name, duration(self.training_s), self.usd
        shape = ", ".join(f"{count} x {instance.name}" for instance, count in self.hosts)
        rate = self.sagemaker_usd_per_h
        listed = "price unknown" if rate is None else f"{rate:.4g} USD/h, read {values['prices_read']}"
        if self.target.on_aws:
            saving = values["spot_saving"]
            saved = f", {saving:.0%} less than on-demand" if saving is not None else ""
            billed = f"{duration(self.billable_s)} billed of {took}{saved}"
            if not self.billable_s:
                billed = f"{took} so far, nothing billed yet" if self.training_s else "nothing billed yet"
            about = "price unknown" if usd is None else f"about {usd:.4f} USD"
            return f"{job}: {about} on {shape} ({billed}; {listed})"
        if self.target.runs_here:
            first = f"{job}: {took} on this machine, 0.00 USD"
        elif usd is None:
            first = f"{job}: {took} on {self.target}, whose price is unknown (run with --usd-per-h)"
        else:
            first = f"{job}: {took} on {self.target}, {usd:.4f} USD (plus the host's idle time)"
        if self.sagemaker_usd is None:
            return f"{first}\nthe same time on {shape}: {listed}"
        return f"{first}\nthe same time on {shape}: {self.sagemaker_usd:.4f} USD ({listed})"
