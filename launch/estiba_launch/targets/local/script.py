"""The containers of a local job, and the shell script that starts the same ones by hand."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from estiba_launch.jobs.options import SubmitOptions
from estiba_launch.request import contract
from estiba_launch.request.contract import ChannelSource
from estiba_launch.request.jobfile import JobFile
from estiba_launch.request.variables import ENV_LINES
from estiba_launch.targets.docker_command import (
    WORK,
    Container,
    Mount,
    container_of,
    copy_from_s3,
    create_network,
    docker_run,
    host_mounts,
    network_of,
    render,
    script_addresses,
    share,
    work_path,
    write_config,
)
from estiba_launch.targets.local.channels import own_folder

JOB_LABEL = "estiba.job"
ATTEMPT_LABEL = "estiba.attempt"
HOST_LABEL = "estiba.host"


def local_container(
    request: Mapping[str, Any],
    host: contract.Host,
    options: SubmitOptions,
    mounts: list[Mount],
    *,
    attempt: int,
    addresses: Mapping[str, str] | None = None,
) -> Container:
    """One host of one attempt: what the supervisor starts, and what the script prints for attempt 1."""
    name = request["TrainingJobName"]
    return container_of(
        request,
        host,
        options.host,
        mounts,
        name=f"estiba-{name}-{host.name}-{attempt}",
        labels={JOB_LABEL: name, ATTEMPT_LABEL: str(attempt), HOST_LABEL: host.name},
        environment=options.environment,
        addresses=addresses,
    )


def local_script(job: JobFile, options: SubmitOptions) -> str:
    """A shell script that runs the job on this machine with docker alone."""
    return "\n".join(
        [
            "#!/bin/sh",
            f"# {job.name} on this machine, by hand. `estiba run` starts the same containers, and also restores and",
            "# syncs checkpoints, keeps the time limits, restarts after an interruption and packs the results.",
            "set -eu",
            f"work=${{WORK:-$PWD/{job.name}}}",
            *_body(job, options),
            "",
        ]
    )


def _body(job: JobFile, options: SubmitOptions) -> Iterator[str]:
    request = job.request
    cluster = contract.hosts(request)
    network = network_of(job.name)
    containers = [
        local_container(
            request,
            host,
            options,
            list(_mounts(request, host, options)),
            attempt=1,
            addresses=script_addresses([host.name for host in cluster]),
        )
        for host in cluster
    ]
    names = shlex.join(container.name for container in containers)
    yield f"set -- {names}"
    yield "for name; do"
    yield '  [ "$(docker inspect --format \'{{.State.Running}}\' "$name" 2>/dev/null)" != true ] || {'
    yield f'    echo "$name runs already; stop it (docker stop $name, or estiba stop {job.name}) first" >&2; exit 1; }}'
    yield "done"
    yield 'docker rm "$@" >/dev/null 2>&1 || :'
    for channel in contract.channels(request):
        yield from _inputs(channel, cluster, options)
    if contract.checkpoint_dir(request):
        folder, store = work_path(_checkpoints(request)), request["CheckpointConfig"]["S3Uri"]
        yield f"mkdir -p {folder}"
        if store.startswith("s3://"):
            yield f"aws s3 sync {shlex.quote(store)} {folder}"
    for host in cluster:
        yield from write_config(request, host, options.host.encoding)
    isolated = ["--internal"] if request.get("EnableNetworkIsolation") else []
    labels = ["--label", f"{JOB_LABEL}={job.name}"]
    yield from create_network(network, [*isolated, *labels], [host.name for host in cluster])
    yield f"trap '{{ docker stop {names}; docker rm {names}; docker network rm {network}; }} >/dev/null 2>&1' EXIT"
    yield "trap 'exit 1' HUP INT TERM"
    if options.host.env_file:
        yield ENV_LINES
        yield f": <{shlex.quote(options.host.env_file)}"
    for container in containers:
        if options.host.env_file:
            run = render(docker_run(container, env_file="/dev/stdin"))
            yield f"env_lines {shlex.quote(options.host.env_file)} | {run}"
        else:
            yield render(docker_run(container))
    yield f"docker logs --follow {shlex.quote(containers[0].name)}"
    yield f'exit "$(docker wait {names} | sort -n | tail -n 1)"'


def _checkpoints(request: Mapping[str, Any]) -> Path:
    store = request["CheckpointConfig"]["S3Uri"]
    return contract.file_path(store) if store.startswith("file://") else Path(WORK, "checkpoints")


def _mounts(request: Mapping[str, Any], host: contract.Host, options: SubmitOptions) -> Iterator[Mount]:
    yield from host_mounts(Path(WORK, host.name))
    if target := contract.checkpoint_dir(request):
        yield Mount(source=_checkpoints(request), target=target)
    for channel in contract.channels(request):
        if not channel.groups or host.group in channel.groups:
            source, own = _place(channel, host, options), _own(channel, options)
            yield Mount(source=source, target=f"/opt/ml/input/data/{channel.name}", read_only=not own)


def _own(channel: ChannelSource, options: SubmitOptions) -> bool:
    return options.copy_inputs and channel.mode == "File"


def _place(channel: ChannelSource, host: contract.Host, options: SubmitOptions) -> Path:
    """Where the script finds or puts the files of a channel for one host, as `channels.place` does."""
    if channel.sharded or _own(channel, options):
        return Path(WORK, "inputs", host.name, channel.name)
    return own_folder(channel) or Path(WORK, "inputs", "all", channel.name)


def _inputs(channel: ChannelSource, cluster: list[contract.Host], options: SubmitOptions) -> Iterator[str]:
    """Shell that brings the files of a channel, unless they can be mounted where they are."""
    every = own_folder(channel) or Path(WORK, "inputs", "all", channel.name)
    if every.is_relative_to(WORK):
        yield from _fetch(channel, every)
    for host in cluster:
        if channel.groups and host.group not in channel.groups:
            continue
        place = _place(channel, host, options)
        if place == every:
            continue
        yield f"rm -rf {work_path(place)}"
        if channel.sharded:
            yield share(channel, host, cluster, every, place, link=not _own(channel, options))
        else:
            yield f"mkdir -p {work_path(place)}"
            yield f"cp -RL {work_path(every)}/. {work_path(place)}"


def _fetch(channel: ChannelSource, into: Path) -> Iterator[str]:
    place = work_path(into)
    if channel.uri.startswith("s3://"):
        yield from copy_from_s3(channel.uri, place)
        return
    path = contract.file_path(channel.uri)
    source = f"{shlex.quote(str(path))}{'/.' if path.is_dir() else '' if path.is_file() else '*'}"
    yield f"rm -rf {place}"
    yield f"mkdir -p {place}"
    yield f"cp -RL {source} {place}"
