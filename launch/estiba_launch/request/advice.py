"""What a valid request may cost its author: said before the job starts, and changed by nobody but the author."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import PurePosixPath
from typing import Any

from estiba_launch.request.contract import checkpoint_dir
from estiba_launch.request.prices import hosts_of
from estiba_launch.request.validation.view import View

LONG_KEEP_ALIVE_S = 3600
"""What AWS's guide to warm pools allows. The API's own model takes 21,600."""
DEFAULT_RUNTIME_QUOTA_S = 5 * 86_400
ONLY_ON_SAGEMAKER = (
    "AlgorithmSpecification.EnableSageMakerMetricsTimeSeries",
    "AlgorithmSpecification.TrainingImageConfig",
    "DebugHookConfig",
    "DebugRuleConfigurations",
    "EnableInterContainerTrafficEncryption",
    "InfraCheckConfig",
    "OutputDataConfig.KmsKeyId",
    "ProfilerConfig",
    "ProfilerRuleConfigurations",
    "RemoteDebugConfig",
    "ResourceConfig.InstancePlacementConfig",
    "ResourceConfig.KeepAlivePeriodInSeconds",
    "ResourceConfig.TrainingPlanArn",
    "ResourceConfig.VolumeKmsKeyId",
    "RetryStrategy",
    "SessionChainingConfig",
    "StoppingCondition.MaxPendingTimeInSeconds",
    "TensorBoardOutputConfig",
)
"""Members that other targets accept and ignore, unless they honour them."""
CHECKPOINT_NAME = re.compile(r"checkpoint|ckpt", re.IGNORECASE)
AT_THE_END = ("/opt/ml/model", "/opt/ml/output")
OLD_EFA_SETTINGS = {
    "NCCL_PROTO": "it limits NCCL to one protocol",
    "FI_PROVIDER": "NCCL's plugin finds EFA by itself",
    "FI_EFA_USE_DEVICE_RDMA": "RDMA is used where the device has it",
    "RDMAV_FORK_SAFE": "AWS says not to use it",
    "NCCL_IB_DISABLE": "EFA is no InfiniBand, and 1 does nothing for it",
}
"""Variable -> why it is not needed with libfabric >= 1.18 and aws-ofi-nccl >= 1.7.

Source: the EFA cheat-sheet of aws-samples/awsome-distributed-training.
"""


def notes(request: Mapping[str, Any]) -> Iterator[str]:
    """One line for each thing to know about a checked request."""
    yield from _limits(request)
    yield from _checkpoints(request)
    if sum(count for _, count in hosts_of(request)) > 1:
        yield from _network(request)


def without_effect(request: Mapping[str, Any], target: str, honoured: Sequence[str]) -> Iterator[str]:
    """One line with the members that `target`, which is not SageMaker, ignores."""
    view = View(request)
    ignored = [name for name in ONLY_ON_SAGEMAKER if view(name)]
    ignored += [one.field("ShuffleConfig") for one in view.each("InputDataConfig") if one("ShuffleConfig")]
    if view("OutputDataConfig.CompressionType") == "GZIP":
        # Without it the targets on hosts write plain files.
        ignored.append("OutputDataConfig.CompressionType")
    if ignored := [name for name in ignored if name not in honoured]:
        yield f"no effect on {target}, only on SageMaker: {', '.join(ignored)}"


def _limits(request: Mapping[str, Any]) -> Iterator[str]:
    keep_alive_s = request.get("ResourceConfig", {}).get("KeepAlivePeriodInSeconds") or 0
    if keep_alive_s > LONG_KEEP_ALIVE_S:
        yield (
            f"ResourceConfig.KeepAlivePeriodInSeconds {keep_alive_s}: AWS's guide to warm pools names "
            f"{LONG_KEEP_ALIVE_S} as the longest, and its API takes up to 21600; it is billed until then"
        )
    runtime_s = request.get("StoppingCondition", {}).get("MaxRuntimeInSeconds") or 0
    if runtime_s > DEFAULT_RUNTIME_QUOTA_S:
        yield (
            f"StoppingCondition.MaxRuntimeInSeconds {runtime_s}: a new account may run for {DEFAULT_RUNTIME_QUOTA_S} s "
            "(5 days); ask AWS to raise the quota `Longest run time for a training job`, up to 28 days"
        )


def _checkpoints(request: Mapping[str, Any]) -> Iterator[str]:
    kept = checkpoint_dir(request)
    remedy = f"save below {kept}" if kept else "add CheckpointConfig with an S3Uri, and save below /opt/ml/checkpoints"
    named = False
    for block in ("HyperParameters", "Environment"):
        for name, value in request.get(block, {}).items():
            path = str(value).strip('"')
            if not CHECKPOINT_NAME.search(name) or not path.startswith("/"):
                continue
            place = PurePosixPath(path)
            if (kept and place.is_relative_to(kept)) or place.is_relative_to("/opt/ml/input"):
                continue
            named = True
            if any(place.is_relative_to(one) for one in AT_THE_END):
                yield f"{block}.{name} {path}: reaches S3 only after the end, and is lost with a host; {remedy}"
            else:
                yield f"{block}.{name} {path}: a folder that nothing keeps, lost with its host; {remedy}"
    if not kept and not named and sum(count for _, count in hosts_of(request)) > 1:
        yield (
            "CheckpointConfig: not set, so what the job saves in /opt/ml/checkpoints is lost with a host; "
            "add it with an S3Uri, or save to S3"
        )


def _network(request: Mapping[str, Any]) -> Iterator[str]:
    """What the hosts talk over, what the image sets for it, and what is set in vain."""
    table = networks()
    given: Mapping[str, str] = request.get("Environment", {})
    has_efa = False
    for kind, count in hosts_of(request):
        network = table.get(kind)
        if network is None:
            yield f"network: {count} x {kind}, not known here whether with EFA; the image looks for it at the start"
            continue
        speed = f"{'up to ' if network.get('burst') else ''}{network['gbit_per_s']:g} Gbit/s"
        if not network["efa_interfaces"]:
            yield (
                f"network: {count} x {kind}, no EFA, {speed}: NCCL and gloo use TCP on the interface to the other "
                "hosts, which the image finds at the start"
            )
            continue
        has_efa = True
        yield (
            f"network: {count} x {kind}, EFA on {network['efa_interfaces']} interfaces, {speed}: NCCL takes it by "
            "itself; the image sets FI_EFA_USE_HUGE_PAGE=0, since huge pages fail in data loaders that fork"
        )
    for name, why in OLD_EFA_SETTINGS.items() if has_efa else ():
        if name in given:
            yield f"Environment.{name}={given[name]}: {why} (libfabric 1.18, aws-ofi-nccl 1.7); remove it"


@functools.cache
def networks() -> Mapping[str, Mapping[str, Any]]:
    """Instance type -> its EFA interfaces and bandwidth. `burst` means that it is not lasting."""
    path = resources.files("estiba_launch") / "data" / "networks.json"
    table: Mapping[str, Mapping[str, Any]] = json.loads(path.read_text("utf-8"))["instances"]
    return table
