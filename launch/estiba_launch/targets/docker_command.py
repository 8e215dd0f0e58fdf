"""One host of a job as a container, and as the `docker run` command that starts it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from estiba_launch.errors import LaunchError
from estiba_launch.request import contract
from estiba_launch.request.options import HostOptions

STOP_S = 120
"""Seconds from TERM to KILL, as on SageMaker."""
MAX_HOSTS = 253
"""Addresses for hosts in the smallest subnet that Docker chooses, where the gateway has the first."""
WORK = "$work"
"""Root of paths that a script resolves at run time."""


@dataclass(frozen=True, kw_only=True)
class Mount:
    """A directory of the machine inside the container."""

    source: Path
    target: str
    read_only: bool = False


@dataclass(frozen=True, kw_only=True)
class Container:
    """Everything that decides how one host runs. The local engine and all scripts use the same one."""

    name: str
    host: contract.Host
    image: str
    entrypoint: str | None
    arguments: list[str]
    environment: dict[str, str]
    mounts: list[Mount]
    network: str | None
    """None for Docker's default; a host alias needs a network of the job's own."""
    addresses: Mapping[str, str]
    """Host name to fixed address, for all hosts of a cluster; empty for one host. Docker's DNS forgets a container that
    has ended, and SageMaker keeps every host until the job ends."""
    options: HostOptions
    labels: dict[str, str] = field(default_factory=dict)


def container_of(
    request: Mapping[str, Any],
    host: contract.Host,
    options: HostOptions,
    mounts: list[Mount],
    *,
    name: str,
    labels: dict[str, str] | None = None,
    environment: Mapping[str, str] | None = None,
    addresses: Mapping[str, str] | None = None,
) -> Container:
    """The container of one host. `environment` adds variables; the request's own win."""
    entrypoint, arguments = contract.command(request)
    return Container(
        name=name,
        host=host,
        image=request["AlgorithmSpecification"]["TrainingImage"],
        entrypoint=entrypoint,
        arguments=arguments,
        environment={**(environment or {}), **contract.environment(request)},
        mounts=mounts,
        network=network_of(request["TrainingJobName"]),
        addresses=addresses or {},
        options=options,
        labels=labels or {},
    )


def network_of(job: str) -> str:
    """The job's own network, where hosts find each other by name."""
    return f"estiba-{job}"


class Quoted(str):
    """Text that is shell syntax already."""


def quote(text: str) -> Quoted:
    """`text` as one word of a shell command."""
    return text if isinstance(text, Quoted) else Quoted(shlex.quote(text))


def work_path(path: str | Path) -> Quoted:
    """A path as one shell word; `$work` at its start stays a variable."""
    text = str(path)
    if not text.startswith(f"{WORK}/"):
        return quote(text)
    return Quoted(f'"{WORK}{_escape(text.removeprefix(WORK))}"')


def _escape(text: str) -> str:
    return re.sub(r'([\\"$`])', r"\\\1", text)


def mount_word(mount: Mount) -> str:
    # Docker reads the option as a line of CSV.
    fields = [
        "type=bind",
        f"source={mount.source}",
        f"target={mount.target}",
        *(["readonly"] if mount.read_only else []),
    ]
    line = ",".join('"' + one.replace('"', '""') + '"' if re.search('[,"]', one) else one for one in fields)
    if not str(mount.source).startswith(f"{WORK}/"):
        return line
    before, _, after = line.partition(WORK)
    return Quoted(f'"{_escape(before)}{WORK}{_escape(after)}"')


def docker_run(
    container: Container, *, env_file: str | None = None, gpus: str | None = None, detach: bool = True
) -> list[list[str]]:
    """`docker run` of a container: the options, one list of words each, then the image and its arguments.

    `env_file` names a file of NAME=VALUE lines. `gpus` is shell text that replaces `--gpus`, for scripts that look for
    GPUs when they run.
    """
    options = container.options
    lines = [
        ["docker", "run", *(["--detach"] if detach else [])],
        ["--name", container.name],
        ["--hostname", container.host.name],
    ]
    lines += [["--label", f"{name}={value}"] for name, value in container.labels.items()]
    lines += [["--stop-timeout", str(STOP_S)], ["--shm-size", options.shm_size]]
    if container.network:
        lines += [["--network", container.network], ["--network-alias", container.host.name]]
    for name, address in container.addresses.items():
        if name == container.host.name:
            lines.append(["--ip", address])
        else:
            lines.append(["--add-host", Quoted(f"{quote(name)}:{quote(address)}")])
    if gpus:
        lines.append([Quoted(gpus)])
    elif options.gpus:
        lines.append(["--gpus", options.gpus])
    if options.memory:
        # The same limit for memory and swap: a host has no swap.
        lines += [["--memory", options.memory], ["--memory-swap", options.memory]]
    if options.cpus:
        lines.append(["--cpus", f"{options.cpus:g}"])
    lines += [["--env", f"{name}={value}"] for name, value in container.environment.items()]
    if env_file:
        lines.append(["--env-file", env_file])
    lines += [["--mount", mount_word(mount)] for mount in container.mounts]
    if container.entrypoint:
        lines.append(["--entrypoint", container.entrypoint])
    return [*lines, [container.image, *container.arguments]]


def create_network(name: str, options: Sequence[str], hosts: Sequence[str]) -> Iterator[str]:
    """Shell that creates a job's network, replacing one that a killed script left. Fails while the job runs."""
    make = shlex.join(["docker", "network", "create", *options])
    yield f"docker network rm {name} >/dev/null 2>&1 || :"
    yield f"{make} {name} >/dev/null"
    if len(hosts) > 1:
        # Docker fixes addresses only in an explicit subnet, so request the one that it chose.
        yield f"range=$(docker network inspect --format '{{{{(index .IPAM.Config 0).Subnet}}}}' {name})"
        yield f"docker network rm {name} >/dev/null"
        yield f'{make} --subnet "$range" {name} >/dev/null'
        yield "first=${range%/*}"


def script_addresses(hosts: Sequence[str]) -> dict[str, str]:
    """Addresses in the network of `create_network`; the first is its gateway's.

    Raises LaunchError for too many hosts.
    """
    if len(hosts) == 1:
        return {}
    if len(hosts) > MAX_HOSTS:
        raise LaunchError(
            f"ResourceConfig.InstanceCount: {len(hosts)} hosts, but the network of one machine has addresses for "
            f"{MAX_HOSTS}; use at most {MAX_HOSTS}, or the target sagemaker, k8s or slurm"
        )
    return {name: Quoted(f'"${{first%.*}}.$((${{first##*.}} + {number}))"') for number, name in enumerate(hosts, 2)}


def share(
    channel: contract.ChannelSource,
    host: contract.Host,
    cluster: Sequence[contract.Host],
    source: Path,
    place: Path,
    *,
    link: bool = True,
) -> str:
    """Shell that gives a host every n-th file of a channel (ShardedByS3Key)."""
    peers = [peer for peer in cluster if not channel.groups or peer.group in channel.groups]
    pick = f"NR % {len(peers)} == {(peers.index(host) + 1) % len(peers)}"
    into = work_path(place)
    bring = f'cp -L "$file" {into}/"$file"'
    if link:
        bring = f'ln -fL "$file" {into}/"$file" 2>/dev/null || {bring}'
    return (
        f"mkdir -p {into}\n"
        f"(cd {work_path(source)} && find -L . -type f | LC_ALL=C sort | awk '{pick}' |\n"
        "  while IFS= read -r file; do\n"
        f'    mkdir -p {into}/"${{file%/*}}"\n'
        f"    {bring}\n  done)"
    )


def copy_from_s3(uri: str, place: Quoted) -> Iterator[str]:
    """Shell that copies what an S3Prefix address stands for: a folder, one object, or a name prefix."""
    parent, _, name = uri.rstrip("/").rpartition("/")
    yield f"mkdir -p {place}"
    yield f"aws s3 sync {shlex.quote(uri)} {place}"
    if parent != "s3:/":
        only = shlex.quote(re.sub(r"([*?[])", r"[\1]", name) + "*")
        again = f"aws s3 sync {shlex.quote(parent)} {place} --exclude '*' --include {only}"
        yield f'[ -n "$(ls -A {place})" ] || {again}'


def render(lines: Iterable[Iterable[str]]) -> str:
    """One shell command over several lines."""
    return " \\\n  ".join(" ".join(quote(word) for word in words) for words in lines)


def here_document(path: Quoted, text: str) -> str:
    """Shell that writes `text` to a file. No line of the text can end it."""
    mark = "ESTIBA_FILE"
    while mark in text.splitlines():
        mark += "_"
    return f"cat > {path} <<'{mark}'\n{text}{mark}"


def write_config(request: Mapping[str, Any], host: contract.Host, encoding: str) -> Iterator[str]:
    """Shell that makes one host's folders and the files of /opt/ml/input/config below `$work/HOST`."""
    root = f"{WORK}/{host.name}"
    yield "mkdir -p " + " ".join(work_path(f"{root}/{name}") for name in ("input/config", "model", "output/data"))
    for name, text in contract.config_files(request, host, encoding).items():
        yield here_document(work_path(f"{root}/input/config/{name}"), text)


def host_mounts(root: Path) -> list[Mount]:
    """The /opt/ml mounts that every host has, from its own directory."""
    return [Mount(source=root / name, target=f"/opt/ml/{name}") for name in ("input", "model", "output")]
