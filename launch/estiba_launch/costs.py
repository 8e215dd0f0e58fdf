"""What a job has cost: billed by AWS, by the owner of a box, or not at all."""

from __future__ import annotations

from typing import Any

from .plan import duration
from .prices import Prices, hosts_of
from .target import Target


def of(value: dict[str, Any], tables: Prices, region: str | None) -> tuple[dict[str, Any], list[str]]:
    """(the bill of a described job, warnings about its prices). Raises LaunchError for an instance type without price.

    SageMaker bills BillableTimeInSeconds x hosts x the on-demand rate; for managed spot that is less than the time the
    hosts ran, and the difference is the saving.
    """
    target = Target.parse(value["Estiba"].get("Target", "local"))
    hosts = [(tables.get(kind), count) for kind, count in hosts_of(value)]
    ran_s = value.get("TrainingTimeInSeconds", 0)
    billable_s = value.get("BillableTimeInSeconds", 0 if target.is_sagemaker else ran_s)
    on_aws = sum(instance.usd_per_h * count for instance, count in hosts)
    box_usd_per_h = value["Estiba"].get("UsdPerHour")
    usd: float | None = 0.0
    if target.is_sagemaker:
        usd = on_aws * billable_s / 3600
    elif target.kind == "ssh":
        usd = None if box_usd_per_h is None else box_usd_per_h * ran_s / 3600
    document = {
        "job": value["TrainingJobName"],
        "target": str(target),
        "status": value["TrainingJobStatus"],
        "training_s": ran_s,
        "billable_s": billable_s,
        "usd": usd,
        "spot_saving": 1 - billable_s / ran_s if target.is_sagemaker and ran_s and billable_s else None,
        "sagemaker_usd_per_h": on_aws,
        "sagemaker_usd": on_aws * billable_s / 3600,
        "instances": [{"type": instance.name, "count": count} for instance, count in hosts],
        "prices_read": min(instance.date for instance, _ in hosts).isoformat(),
    }
    return document, tables.warnings([instance.name for instance, _ in hosts], region)


def describe(document: dict[str, Any]) -> str:
    """The bill in words."""
    shape = ", ".join(f"{one['count']} x {one['type']}" for one in document["instances"])
    read = f"{document['sagemaker_usd_per_h']:.4g} USD/h, read {document['prices_read']}"
    job, took = document["job"], duration(document["training_s"])
    if document["target"] == "sagemaker":
        saving = document["spot_saving"]
        words = f", {saving:.0%} less than on-demand" if saving is not None else ""
        billed = f"{duration(document['billable_s'])} billed of {took}"
        if not document["billable_s"]:
            billed = f"{took} so far, nothing billed yet" if took != "0 s" else "nothing billed yet"
        return f"{job}: about {document['usd']:.4f} USD on {shape} ({billed}{words}; {read})"
    if document["target"] == "local":
        first = f"{job}: {took} on this machine, 0.00 USD"
    elif document["usd"] is None:
        first = f"{job}: {took} on {document['target']}, whose price is not known (run with --usd-per-h)"
    else:
        first = f"{job}: {took} on {document['target']}, {document['usd']:.4f} USD (and what the box idled)"
    return f"{first}\nthe same time on {shape}: {document['sagemaker_usd']:.4f} USD ({read})"
