"""Every target by name. Only this file looks at a target's kind; modules load on first use."""

from __future__ import annotations

import importlib
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

from estiba_launch.errors import LaunchError
from estiba_launch.jobs import directory
from estiba_launch.request import advice
from estiba_launch.request.address import TargetAddress
from estiba_launch.request.jobfile import JobFile
from estiba_launch.targets.base import ListFilters, Target


@dataclass(frozen=True)
class Entry:
    """How one kind of target is addressed, and the class that serves it."""

    location: str
    """`module:Class`"""
    runs_here: bool = False
    on_aws: bool = False
    has_host: bool = False
    """Addressed as `kind://user@host[:port]`."""
    waits_count: bool = False
    restarts_clock: bool = False
    honours: tuple[str, ...] = ()
    """Members of the request that it acts on, of those that are SageMaker's otherwise."""


ARCHIVES = "OutputDataConfig.CompressionType"
TARGETS = {
    "local": Entry(
        "estiba_launch.targets.local.target:LocalTarget", runs_here=True, honours=("RetryStrategy", ARCHIVES)
    ),
    "sagemaker": Entry("estiba_launch.targets.sagemaker.target:SageMakerTarget", on_aws=True),
    "ssh": Entry("estiba_launch.targets.ssh.target:SshTarget", has_host=True),
    "k8s": Entry("estiba_launch.targets.k8s.target:KubernetesTarget", waits_count=True, honours=("RetryStrategy",)),
    "slurm": Entry("estiba_launch.targets.slurm.target:SlurmTarget", restarts_clock=True),
}


def parse(text: str) -> TargetAddress:
    """Read the text of --target. Raises LaunchError when it names no target."""
    entry = TARGETS.get(text)
    if entry and not entry.has_host:
        return TargetAddress(
            text,
            runs_here=entry.runs_here,
            on_aws=entry.on_aws,
            waits_count=entry.waits_count,
            restarts_clock=entry.restarts_clock,
        )
    try:
        parts = urlsplit(text)
        port = 22 if parts.port is None else parts.port
    except ValueError:
        parts, port = urlsplit(""), 0
    entry = TARGETS.get(parts.scheme)
    name = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
    # User and host reach a shell: `ssh -oProxyCommand=...` must not pass as a host name.
    good_host = re.fullmatch(rf"{name}|[0-9a-fA-F:]+", parts.hostname or "")
    good_user = parts.username is None or re.fullmatch(name, parts.username)
    plain = not parts.password and not parts.path.strip("/") and port > 0
    if not entry or not entry.has_host or not good_host or not good_user or not plain:
        raise LaunchError(f"--target {text!r}: unknown; use {forms()}")
    return TargetAddress(parts.scheme, parts.username, parts.hostname, port, on_aws=entry.on_aws)


def forms() -> str:
    """How each target is written: `local, sagemaker or ssh://user@host[:port]`."""
    texts = [f"{kind}://user@host[:port]" if entry.has_host else kind for kind, entry in TARGETS.items()]
    return f"{', '.join(texts[:-1])} or {texts[-1]}"


def addresses() -> list[TargetAddress]:
    """The targets that are addressed by their name alone."""
    return [parse(kind) for kind, entry in TARGETS.items() if not entry.has_host]


def target_of(address: TargetAddress | str) -> Target:
    """The target at an address. Raises LaunchError when the text names none."""
    parsed = parse(address) if isinstance(address, str) else address
    module, _, name = TARGETS[parsed.kind].location.partition(":")
    target: Target = getattr(importlib.import_module(module), name)(parsed)
    return target


def address_of_job(name: str) -> TargetAddress:
    """Where a recorded job runs. Raises LaunchError when no job has this name."""
    return parse(directory.read_target(directory.job_dir(name))["target"])


def without_effect(job: JobFile) -> Iterator[str]:
    """A note with the members of a job's request that its target ignores."""
    if not job.target.on_aws:
        yield from advice.without_effect(job.request, job.target.kind, TARGETS[job.target.kind].honours)


def target_of_job(name: str) -> Target:
    """The target that runs a recorded job. Raises LaunchError when no job has this name."""
    return target_of(address_of_job(name))


def by_target(names: list[str]) -> Iterator[tuple[Target, ListFilters]]:
    """Recorded jobs grouped by their target."""
    groups: dict[TargetAddress, list[str]] = defaultdict(list)
    for name in names:
        groups[address_of_job(name)].append(name)
    for address, group in groups.items():
        yield target_of(address), ListFilters(names=group)
