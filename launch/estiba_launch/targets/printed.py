"""What the targets that only print have in common: the size of a host, and requests that they cannot express."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from estiba_launch.errors import LaunchError
from estiba_launch.request import prices
from estiba_launch.request.jobfile import JobFile
from estiba_launch.request.options import HostOptions


def instance_type(request: Mapping[str, Any], target: object) -> str:
    """The type of all hosts. Raises LaunchError for instance groups."""
    kind = request["ResourceConfig"].get("InstanceType")
    if kind is None:
        raise LaunchError(
            f"ResourceConfig.InstanceGroups: {target} starts hosts of one kind; use InstanceType and InstanceCount, or "
            "the target local or sagemaker"
        )
    return str(kind)


def gpus_per_host(options: HostOptions, kind: str) -> int:
    """How many GPUs each host asks its scheduler for. Raises LaunchError if that is not known."""
    if options.gpus is None:
        return 0
    if options.gpus != "all":
        return int(options.gpus)
    known = prices.load("us-east-1").instances.get(kind)
    if known is None:
        raise LaunchError(f"{kind}: its number of GPUs is not known here; pass --gpus with a number, or none")
    return known.gpus


def with_notes(job: JobFile) -> JobFile:
    """The job with a note for each setting that only a supervised target honours."""
    return replace(job, notes=(*job.notes, *_notes(job.request, job.target.kind)))


def _notes(request: Mapping[str, Any], kind: str) -> Iterator[str]:
    if request.get("EnableNetworkIsolation"):
        yield f"EnableNetworkIsolation: {kind} takes that from the cluster's own policies, so nothing is printed for it"
    if request.get("AlgorithmSpecification", {}).get("MetricDefinitions"):
        yield f"MetricDefinitions: {kind} records no metrics; the same lines are in the log"
