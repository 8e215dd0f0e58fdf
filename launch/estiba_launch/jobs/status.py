"""The status of a job, typed. The JSON form is DescribeTrainingJob's document with more under `Estiba`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TERMINAL = ("Completed", "Failed", "Stopped")


@dataclass(frozen=True, kw_only=True)
class AttemptStatus:
    """One run of the job on one set of hosts."""

    number: int
    hosts: tuple[str, ...]
    start_time: str
    training_start_time: str | None
    """When its containers started; None before that."""
    end_time: str | None
    outcome: str | None
    """None while it runs."""
    reason: str
    exit_codes: Mapping[str, int | None]
    """Host name to exit code."""
    restored_files: int | None
    interruption: Mapping[str, Any] | None
    """The injected fault that ended it, as recorded; None without one."""
    faults: tuple[Mapping[str, Any], ...] = ()
    """Injected faults that it outlived."""

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> AttemptStatus:
        return cls(
            number=value["Number"],
            hosts=tuple(value.get("Hosts", ())),
            start_time=value["StartTime"],
            training_start_time=value.get("TrainingStartTime"),
            end_time=value.get("EndTime"),
            outcome=value.get("Outcome"),
            reason=value.get("Reason", ""),
            exit_codes=value.get("ExitCodes", {}),
            restored_files=value.get("RestoredFiles"),
            interruption=value.get("Interruption"),
            faults=tuple(value.get("Faults", ())),
        )


@dataclass(frozen=True, kw_only=True)
class JobStatus:
    name: str
    target: str
    """As in --target."""
    status: str
    """InProgress, Stopping, Completed, Failed or Stopped."""
    secondary_status: str
    reason: str | None
    """FailureReason; None unless the job failed."""
    attempts: tuple[AttemptStatus, ...]
    creation_time: str
    training_end_time: str | None
    training_s: int | None
    """Seconds that hosts were held; None while unknown."""
    billable_s: int | None
    metrics: Mapping[str, float]
    """Last value of each metric."""
    model_uri: str | None
    output_uri: str | None
    links: Mapping[str, str]
    """What a browser can show: `job`, `logs`, `output`; empty for a target without a console."""
    unsynced: str | None
    """What of the checkpoints the last sync could not bring to the store, and why."""
    supervised: bool
    """A process drives the job. False for a job whose supervisor died."""
    unreachable: str | None
    """Why the target did not answer; None when this status is fresh."""
    usd_per_h: float | None
    """Price of the remote host, as set at the start."""
    document: Mapping[str, Any]
    """The whole JSON form, from which the other fields are read."""

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> JobStatus:
        extra = document.get("Estiba", {})
        return cls(
            name=document["TrainingJobName"],
            target=extra.get("Target", "local"),
            status=document["TrainingJobStatus"],
            secondary_status=document.get("SecondaryStatus", document["TrainingJobStatus"]),
            reason=document.get("FailureReason"),
            attempts=tuple(AttemptStatus.from_json(one) for one in extra.get("Attempts", [])),
            creation_time=str(document.get("CreationTime", "")),
            training_end_time=document.get("TrainingEndTime"),
            training_s=document.get("TrainingTimeInSeconds"),
            billable_s=document.get("BillableTimeInSeconds"),
            metrics={one["MetricName"]: one["Value"] for one in document.get("FinalMetricDataList", [])},
            model_uri=document.get("ModelArtifacts", {}).get("S3ModelArtifacts"),
            output_uri=extra.get("OutputArtifacts"),
            links=extra.get("Links", {}),
            unsynced=next((one.get("Unsynced") for one in extra.get("Attempts", [])[-1:]), None),
            supervised=extra.get("Supervised", True),
            unreachable=extra.get("Unreachable"),
            usd_per_h=extra.get("UsdPerHour"),
            document=document,
        )

    def to_json(self) -> dict[str, Any]:
        return dict(self.document)

    @property
    def is_terminal(self) -> bool:
        return self.status in TERMINAL

    @property
    def is_orphaned(self) -> bool:
        """Not finished, and no process drives it: its supervisor was killed, or the machine restarted."""
        return not self.is_terminal and not self.supervised
