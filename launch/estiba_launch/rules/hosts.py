"""Rules about instances, disks and time limits."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ..errors import Problem
from ..target import Target
from .parts import Request, part, parts, twice

MAX_RUNTIME_S = 28 * 86_400
DEFAULT_MAX_RUNTIME_S = 86_400
# EBS-only families must say how big their volume is; the others bring NVMe disks.
EBS_ONLY = re.compile(r"ml\.(m4|m5|m6i|m7i|c4|c5|c5n|c6i|c7i|r5|r7i|t3|p2|p3)\.")


def resources(request: Request, target: Target) -> Iterator[Problem]:
    config = part(request, "ResourceConfig")
    if not config and not request.get("ServerlessJobConfig"):
        yield Problem(
            field="ResourceConfig",
            rule="required and missing",
            remedy="add InstanceType, InstanceCount, VolumeSizeInGB",
        )
        return
    groups, preferences = parts(config, "InstanceGroups"), parts(config, "InstancePreferences")
    plain = [name for name in ("InstanceType", "InstanceCount") if name in config]
    if groups and plain:
        yield Problem(
            field="ResourceConfig.InstanceGroups",
            rule=f"not together with {' and '.join(plain)}",
            remedy="keep one form",
        )
    if preferences and (groups or "InstanceType" in config):
        yield Problem(
            field="ResourceConfig.InstancePreferences",
            rule="not together with InstanceType or InstanceGroups",
            remedy="keep one form",
        )
    if preferences and not target.is_sagemaker:
        yield Problem(
            field="ResourceConfig.InstancePreferences",
            rule=f"target {target.kind} has one kind of host",
            remedy="use InstanceType",
        )
    if config and not groups and not preferences:
        for name in ("InstanceType", "InstanceCount"):
            if name not in config:
                yield Problem(field=f"ResourceConfig.{name}", rule="required and missing", remedy="add it")
    for name in twice([g.get("InstanceGroupName") for g in groups]):
        yield Problem(
            field="ResourceConfig.InstanceGroups", value=name, rule="each InstanceGroupName once", remedy="rename one"
        )
    for at, entry in [
        ("ResourceConfig", config),
        *((f"ResourceConfig.InstanceGroups[{i}]", group) for i, group in enumerate(groups)),
    ]:
        if entry.get("InstanceCount") == 0:
            yield Problem(field=f"{at}.InstanceCount", value=0, rule="at least 1", remedy="set it to 1 or more")
        yield from _volume(config, str(entry.get("InstanceType")))
    yield from _group_names(request, {g.get("InstanceGroupName") for g in groups})
    keep = config.get("KeepAlivePeriodInSeconds")
    if keep and request.get("EnableManagedSpotTraining"):
        yield Problem(
            field="ResourceConfig.KeepAlivePeriodInSeconds",
            value=keep,
            rule="not with managed spot training",
            remedy="remove it or set EnableManagedSpotTraining: false",
        )


def _volume(config: dict[str, Any], instance_type: str) -> Iterator[Problem]:
    size = config.get("VolumeSizeInGB")
    ebs = EBS_ONLY.match(instance_type) is not None
    if (size == 0) or (size is None and ebs):
        yield Problem(
            field="ResourceConfig.VolumeSizeInGB",
            value=size,
            rule=f"at least 1 GB; {instance_type} has no disk of its own" if ebs else "at least 1 GB",
            remedy="set it, for example to 30",
        )
    nvme = re.match(r"ml\.(g4dn|g5|g6|g6e|p4d|p4de|p5|p5e|p5en|trn1)\.", instance_type)
    if config.get("VolumeKmsKeyId") and nvme:
        yield Problem(
            field="ResourceConfig.VolumeKmsKeyId",
            value=config["VolumeKmsKeyId"],
            rule=f"not with {instance_type}, whose own disk is encrypted by hardware",
            remedy="remove it",
        )


def _group_names(request: Request, known: set[Any]) -> Iterator[Problem]:
    for index, channel in enumerate(parts(request, "InputDataConfig")):
        for name in part(part(channel, "DataSource"), "S3DataSource").get("InstanceGroupNames") or []:
            if name not in known:
                yield Problem(
                    field=f"InputDataConfig[{index}].DataSource.S3DataSource.InstanceGroupNames",
                    value=name,
                    rule="no such group in ResourceConfig.InstanceGroups",
                    remedy="name one that exists",
                )


def stopping(request: Request, _target: Target) -> Iterator[Problem]:
    condition = part(request, "StoppingCondition")
    if "StoppingCondition" not in request and not request.get("ServerlessJobConfig"):
        yield Problem(
            field="StoppingCondition", rule="required and missing", remedy="add MaxRuntimeInSeconds, it limits the cost"
        )
    run, wait = condition.get("MaxRuntimeInSeconds"), condition.get("MaxWaitTimeInSeconds")
    spot = request.get("EnableManagedSpotTraining")
    if isinstance(run, int) and run > MAX_RUNTIME_S:
        yield Problem(
            field="StoppingCondition.MaxRuntimeInSeconds",
            value=run,
            rule=f"at most {MAX_RUNTIME_S} (28 days)",
            remedy="shorten it; a later job can go on from the checkpoint",
        )
    if wait is not None and not spot:
        yield Problem(
            field="StoppingCondition.MaxWaitTimeInSeconds",
            value=wait,
            rule="only with managed spot training",
            remedy="remove it or set EnableManagedSpotTraining: true",
        )
    if spot and wait is None:
        yield Problem(
            field="StoppingCondition.MaxWaitTimeInSeconds",
            rule="required with managed spot training",
            remedy="set it to MaxRuntimeInSeconds or more",
        )
    shortest = run if isinstance(run, int) else DEFAULT_MAX_RUNTIME_S
    if spot and isinstance(wait, int) and wait < shortest:
        yield Problem(
            field="StoppingCondition.MaxWaitTimeInSeconds",
            value=wait,
            rule=f"at least MaxRuntimeInSeconds ({shortest}{'' if isinstance(run, int) else ', its default'})",
            remedy=f"raise it to {shortest} or more; it counts the waiting and the running",
        )
