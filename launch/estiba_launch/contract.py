"""What a container finds below /opt/ml, from a request: pure functions, shared by plans and by the machines that run.

Source: the SageMaker training toolkit's and the SDK's readers of these files (docs.aws.amazon.com, "How Amazon
SageMaker AI provides training information").
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .prices import hosts_of

INTERFACE = "eth0"
DEFAULT_CHECKPOINT_DIR = "/opt/ml/checkpoints"
HOMOGENEOUS = "homogeneousCluster"
ENCODINGS = ("plain", "json")


@dataclass(frozen=True, kw_only=True)
class Host:
    """One host of the cluster."""

    name: str
    """algo-1, algo-2, ..."""
    instance_type: str
    group: str


@dataclass(frozen=True, kw_only=True)
class ChannelSource:
    """One input channel as the local host sees it."""

    name: str
    uri: str
    mode: str
    """File or FastFile."""
    sharded: bool
    groups: tuple[str, ...]
    """Instance groups that get it; empty for all."""
    content_type: str | None


def hosts(request: Mapping[str, Any]) -> list[Host]:
    """The cluster, algo-1 first, in order of number."""
    config = request["ResourceConfig"]
    groups = config.get("InstanceGroups")
    named = [(g["InstanceGroupName"], g["InstanceType"], g["InstanceCount"]) for g in groups or []]
    flat = named or [(HOMOGENEOUS, kind, count) for kind, count in hosts_of(request)]
    kinds = [(group, kind) for group, kind, count in flat for _ in range(count)]
    return [Host(name=f"algo-{i}", instance_type=kind, group=group) for i, (group, kind) in enumerate(kinds, 1)]


def channels(request: Mapping[str, Any]) -> list[ChannelSource]:
    """Every channel of a request that was checked for the local or the ssh target."""
    found = []
    for channel in request.get("InputDataConfig", []):
        source = channel["DataSource"]["S3DataSource"]
        found.append(
            ChannelSource(
                name=channel["ChannelName"],
                uri=source["S3Uri"],
                mode=channel.get("InputMode") or request["AlgorithmSpecification"]["TrainingInputMode"],
                sharded=source.get("S3DataDistributionType") == "ShardedByS3Key",
                groups=tuple(source.get("InstanceGroupNames", [])),
                content_type=channel.get("ContentType"),
            )
        )
    return found


def hyperparameters(request: Mapping[str, Any], encoding: str = "plain") -> dict[str, str]:
    """Flat text to text. `plain` passes values as they are (SDK v3, CLI); `json` encodes each one (SDK v2).

    In `json` a value that is JSON already (3, true, [1]) stays and other text gets quotes: what SDK v2 sends.
    """
    values: dict[str, str] = dict(request.get("HyperParameters", {}))
    if encoding == "plain":
        return values
    return {name: value if _is_json(value) else json.dumps(value) for name, value in values.items()}


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def resource_config(request: Mapping[str, Any], current: Host) -> dict[str, Any]:
    """resourceconfig.json of one host; hosts are in lexicographic order, as SageMaker gives them (algo-10 < algo-2)."""
    cluster = hosts(request)
    groups: dict[str, dict[str, Any]] = {}
    for host in cluster:
        group = groups.setdefault(
            host.group, {"instance_group_name": host.group, "instance_type": host.instance_type, "hosts": []}
        )
        group["hosts"].append(host.name)
    for group in groups.values():
        group["hosts"].sort()
    return {
        "current_host": current.name,
        "current_instance_type": current.instance_type,
        "current_group_name": current.group,
        "hosts": sorted(host.name for host in cluster),
        "instance_groups": list(groups.values()),
        "network_interface_name": INTERFACE,
    }


def input_data_config(request: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """inputdataconfig.json."""
    config: dict[str, dict[str, str]] = {}
    for channel in channels(request):
        config[channel.name] = {
            "TrainingInputMode": channel.mode,
            "S3DistributionType": "ShardedByS3Key" if channel.sharded else "FullyReplicated",
            "RecordWrapperType": "None",
        }
        if channel.content_type:
            config[channel.name]["ContentType"] = channel.content_type
    return config


def checkpoint_dir(request: Mapping[str, Any]) -> str | None:
    """Where checkpoints are in the container; None when none are configured."""
    config = request.get("CheckpointConfig")
    return config.get("LocalPath", DEFAULT_CHECKPOINT_DIR).rstrip("/") if config else None


def config_files(request: Mapping[str, Any], host: Host, encoding: str = "plain") -> dict[str, str]:
    """Name and text of every file in /opt/ml/input/config of `host`."""
    files: dict[str, Any] = {
        "hyperparameters.json": hyperparameters(request, encoding),
        "resourceconfig.json": resource_config(request, host),
        "inputdataconfig.json": input_data_config(request),
    }
    local = checkpoint_dir(request)
    if local:
        files["checkpointconfig.json"] = {"LocalPath": local}
    return {name: json.dumps(value, indent=1, ensure_ascii=False) + "\n" for name, value in files.items()}


def job_arn(name: str) -> str:
    """An ARN of the right form for a job that AWS does not know."""
    return f"arn:aws:sagemaker:local:000000000000:training-job/{name}"


def environment(request: Mapping[str, Any]) -> dict[str, str]:
    """The platform's two variables and the request's own; SageMaker sets no others."""
    name = request["TrainingJobName"]
    return {"TRAINING_JOB_NAME": name, "TRAINING_JOB_ARN": job_arn(name), **request.get("Environment", {})}


def command(request: Mapping[str, Any]) -> tuple[str | None, list[str]]:
    """(--entrypoint or None, arguments): ContainerArguments replace `train`; the entrypoint's tail goes before them."""
    algorithm = request["AlgorithmSpecification"]
    entrypoint = algorithm.get("ContainerEntrypoint") or []
    arguments = algorithm.get("ContainerArguments") or ["train"]
    return (entrypoint[0] if entrypoint else None), [*entrypoint[1:], *arguments]


def file_path(uri: str) -> Path:
    """`file://PATH` -> absolute path; a relative one starts at the current directory, ~ is the home directory."""
    return Path(uri.removeprefix("file://")).expanduser().absolute()
