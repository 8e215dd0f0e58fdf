"""What a container finds in /opt/ml, as pure functions of a request, for every target.

Source: the SageMaker training toolkit's and the SDK's readers of these files (docs.aws.amazon.com, "How Amazon
SageMaker AI provides training information").
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from estiba_launch.errors import LaunchError
from estiba_launch.request.prices import hosts_of

INTERFACE = "eth0"
DEFAULT_CHECKPOINT_DIR = "/opt/ml/checkpoints"
DEFAULT_MAX_RUNTIME_S = 86_400
"""The API's default of StoppingCondition.MaxRuntimeInSeconds."""
HOMOGENEOUS = "homogeneousCluster"
MAX_FILE_NAME_BYTES = 255
ENCODINGS = ("plain", "json")
SUBMIT_DIRECTORY = "SAGEMAKER_SUBMIT_DIRECTORY"


@dataclass(frozen=True, kw_only=True)
class Host:
    name: str
    """algo-1, algo-2, ..."""
    instance_type: str
    group: str


CONDITIONS = "EstibaConditions"
"""What a drill makes different about the hosts of its own copy of a request, which goes to no other target."""


@dataclass(frozen=True, kw_only=True)
class LateHost:
    name: str
    late_s: float
    is_nameless: bool
    """Its name resolves only once it is there; otherwise the name is known and nobody answers."""


def late_host(request: Mapping[str, Any]) -> LateHost | None:
    value = request.get(CONDITIONS, {}).get("LateHost")
    return LateHost(**value) if value else None


@dataclass(frozen=True, kw_only=True)
class ChannelSource:
    """One input channel, with the job's defaults filled in."""

    name: str
    uri: str
    mode: str
    """File or FastFile."""
    sharded: bool
    groups: tuple[str, ...]
    """Instance groups that receive it; empty for all."""
    content_type: str | None


def hosts(request: Mapping[str, Any]) -> list[Host]:
    """Hosts of the cluster in numeric order, algo-1 first."""
    config = request["ResourceConfig"]
    names = [group["InstanceGroupName"] for group in config.get("InstanceGroups") or []] or [HOMOGENEOUS]
    counts = zip(names, hosts_of(request), strict=True)
    kinds = [(group, kind) for group, (kind, count) in counts for _ in range(count)]
    given = request.get(CONDITIONS, {}).get("HostNames") or [f"algo-{number}" for number in range(1, len(kinds) + 1)]
    return [Host(name=name, instance_type=kind, group=group) for name, (group, kind) in zip(given, kinds, strict=True)]


def channels(request: Mapping[str, Any]) -> list[ChannelSource]:
    """Channels of a request that was checked for a target outside AWS."""
    sources = []
    for channel in request.get("InputDataConfig", []):
        source = channel["DataSource"]["S3DataSource"]
        sources.append(
            ChannelSource(
                name=channel["ChannelName"],
                uri=source["S3Uri"],
                mode=channel.get("InputMode") or request["AlgorithmSpecification"]["TrainingInputMode"],
                sharded=source.get("S3DataDistributionType") == "ShardedByS3Key",
                groups=tuple(source.get("InstanceGroupNames", [])),
                content_type=channel.get("ContentType"),
            )
        )
    return sources


def hyperparameters(request: Mapping[str, Any], encoding: str = "plain") -> dict[str, str]:
    """Hyperparameters as the container reads them: `plain` unchanged (SDK v3, CLI), `json` as SDK v2 encodes them.

    With `json` a value that is valid JSON (3, true, [1]) stays and other text gets quotes.
    """
    values = _with_code_location(request, dict(request.get("HyperParameters", {})), SUBMIT_DIRECTORY.lower())
    if encoding == "plain":
        return values
    return {name: _as_json(value) for name, value in values.items()}


def _as_json(text: str) -> str:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return json.dumps(text)
    return text


def resource_config(request: Mapping[str, Any], current: Host) -> dict[str, Any]:
    """resourceconfig.json of one host; hosts are in lexicographic order, as on SageMaker (algo-10 < algo-2)."""
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
        "network_interface_name": request.get(CONDITIONS, {}).get("Interface", INTERFACE),
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


def max_runtime_s(request: Mapping[str, Any]) -> int:
    return int(request.get("StoppingCondition", {}).get("MaxRuntimeInSeconds", DEFAULT_MAX_RUNTIME_S))


def checkpoint_dir(request: Mapping[str, Any]) -> str | None:
    """Checkpoint directory in the container, if configured."""
    config = request.get("CheckpointConfig")
    return config.get("LocalPath", DEFAULT_CHECKPOINT_DIR).rstrip("/") if config else None


def config_files(request: Mapping[str, Any], host: Host, encoding: str = "plain") -> dict[str, str]:
    """Files of /opt/ml/input/config on `host`: name to text."""
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
    """A well-formed ARN for a job that does not run on AWS."""
    return f"arn:aws:sagemaker:local:000000000000:training-job/{name}"


def environment(request: Mapping[str, Any]) -> dict[str, str]:
    """The two variables that SageMaker sets, and the request's own."""
    name = request["TrainingJobName"]
    values = _with_code_location(request, dict(request.get("Environment", {})), SUBMIT_DIRECTORY)
    return {"TRAINING_JOB_NAME": name, "TRAINING_JOB_ARN": job_arn(name), **values}


def _with_code_location(request: Mapping[str, Any], values: dict[str, str], name: str) -> dict[str, str]:
    """`values` with the code's address replaced by its path in the container, if a channel brings it there."""
    location = values.get(name, "").strip('"')
    for channel in channels(request) if location else ():
        relative = path_inside(location, channel.uri)
        if relative is not None:
            values[name] = values[name].replace(location, f"/opt/ml/input/data/{channel.name}/{relative}".rstrip("/"))
            break
    return values


def path_inside(location: str, uri: str) -> str | None:
    """The path of `location` relative to the channel's address; empty if they are the same, None if outside."""
    path, root = (str(file_path(one)) if one.startswith("file://") else one.rstrip("/") for one in (location, uri))
    if path == root:
        return ""
    return path[len(root) + 1 :] if path.startswith(f"{root}/") else None


def command(request: Mapping[str, Any]) -> tuple[str | None, list[str]]:
    """(--entrypoint or None, arguments): ContainerArguments replace `train`; the entrypoint's tail goes before them."""
    algorithm = request["AlgorithmSpecification"]
    entrypoint = algorithm.get("ContainerEntrypoint") or []
    arguments = algorithm.get("ContainerArguments") or ["train"]
    return (entrypoint[0] if entrypoint else None), [*entrypoint[1:], *arguments]


def file_path(uri: str) -> Path:
    """`file://PATH` -> absolute path; a relative one is below the current directory, ~ is the home directory.

    Raises LaunchError for the ~ of a user whom this machine does not know, and for a name that no disk can hold.
    """
    try:
        path = Path(uri.removeprefix("file://")).expanduser().absolute()
        longest = max((len(part.encode("utf-8", "replace")) for part in path.parts), default=0)
        if longest > MAX_FILE_NAME_BYTES:
            raise LaunchError(f"{uri}: a name of {longest} bytes, at most {MAX_FILE_NAME_BYTES}; correct the path")
        return path
    except RuntimeError:
        raise LaunchError(
            f"{uri}: no such user on this machine, so ~ is no directory; write the path in full"
        ) from None


def metric_pattern(regex: str) -> re.Pattern[str]:
    """The compiled Regex of a metric. Raises re.error, OverflowError or RecursionError."""
    with warnings.catch_warnings():
        # Python announces a later meaning of `[[`; what it means now is what counts.
        warnings.simplefilter("ignore", FutureWarning)
        return re.compile(regex)
