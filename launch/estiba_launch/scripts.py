"""A job as text a person can paste: the request as JSON, `docker run` for this machine, a script for an ssh box."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import contract
from .errors import LaunchError
from .jobfile import JobFile
from .prices import Instance

DOCKER_STOP_S = 120


@dataclass(frozen=True, kw_only=True)
class HostOptions:
    """What the machine gives a job, beyond the request."""

    gpus: str | None = None
    """`all`, a number, or None for none."""
    shm_size: str = "8g"
    """Shared memory of each host; Docker's own 64 MB breaks data loaders."""
    memory: str | None = None
    """Limit of each host, as docker's --memory; None for none."""
    cpus: float | None = None
    """Limit of each host in CPUs; None for none."""
    encoding: str = "plain"
    """How hyperparameters are written: `plain` (SDK v3, CLI) or `json` (SDK v2)."""
    env_file: str | None = None
    """File of NAME=VALUE lines given to the container and never stored with the job: for tokens."""


def request_json(job: JobFile) -> str:
    """The CreateTrainingJob request, exactly as it would be sent."""
    return json.dumps(job.request, indent=2, ensure_ascii=False) + "\n"


def quote(text: str) -> str:
    """Shell-quoted; `$work` at the start stays a variable."""
    if text.startswith("$work/"):
        return '"$work' + re.sub(r'([\\"$`])', r"\\\1", text[5:]) + '"'
    return shlex.quote(text)


def docker_run(job: JobFile, host: contract.Host, options: HostOptions, mounts: list[str], *, many: bool) -> list[str]:
    """The words of one host's `docker run`."""
    request = job.request
    name = f"{job.name}-{host.name}" if many else job.name
    words = ["docker", "run", *(["--detach"] if many else ["--rm"]), "--name", name, "--hostname", host.name]
    words += ["--stop-timeout", str(DOCKER_STOP_S), "--shm-size", options.shm_size]
    if many or request.get("EnableNetworkIsolation"):
        words += ["--network", f"estiba-{job.name}"]
    if many:
        words += ["--network-alias", host.name]
    if options.gpus:
        words += ["--gpus", options.gpus]
    if options.memory:
        words += ["--memory", options.memory]
    if options.cpus:
        words += ["--cpus", f"{options.cpus:g}"]
    for key, value in contract.environment(request).items():
        words += ["--env", f"{key}={value}"]
    if options.env_file:
        words += ["--env-file", options.env_file]
    for mount in mounts:
        words += ["--volume", mount]
    entrypoint, arguments = contract.command(request)
    if entrypoint:
        words += ["--entrypoint", entrypoint]
    return [*words, request["AlgorithmSpecification"]["TrainingImage"], *arguments]


def wrap(words: list[str], image_at: int) -> str:
    """One command over several lines, an option with its value on each, then the image and its arguments."""
    lines: list[str] = []
    current: list[str] = []
    for index, word in enumerate(words):
        if (index == image_at or (word.startswith("--") and index < image_at)) and current:
            lines.append(" ".join(current))
            current = []
        current.append(quote(word))
    return " \\\n  ".join([*lines, " ".join(current)])


def local_script(job: JobFile, options: HostOptions) -> str:
    """A shell script that runs the job on this machine with docker alone."""
    return "\n".join(
        [
            "#!/bin/sh",
            f"# {job.name} on this machine, by hand. `estiba run` does this and also restores and syncs checkpoints,",
            "# keeps the time limits, restarts after an interruption and packs the results.",
            "set -eu",
            f"work=${{WORK:-$PWD/{job.name}}}",
            *_body(job, options, local=True),
            "",
        ]
    )


def ssh_script(job: JobFile, options: HostOptions) -> str:
    """A shell script, run here, that starts the job on the box of an ssh target."""
    target = job.target
    at = f"{target.user}@{target.host}" if target.user else str(target.host)
    ssh = f"ssh -p {target.port} {at}"
    image = shlex.quote(job.request["AlgorithmSpecification"]["TrainingImage"])
    work = f"estiba/{job.name}"
    lines = [
        "#!/bin/sh",
        f"# {job.name} on {target}: image, data, then a detached container. Nothing secret is written on the box.",
        "set -eu",
        f"{ssh} mkdir -p {work}/data",
        f"{ssh} docker pull {image} || docker save {image} | gzip -1 | {ssh} 'gunzip | docker load'",
    ]
    for channel in contract.channels(job.request):
        if channel.uri.startswith("file://"):
            source = contract.file_path(channel.uri)
            tail = "/" if not source.suffix else ""
            into = f"{at}:{work}/data/{channel.name}/"
            lines.append(f"rsync -az -e 'ssh -p {target.port}' {shlex.quote(str(source) + tail)} {shlex.quote(into)}")
    inner = "\n".join(["set -eu", f'work="$HOME/{work}"', *_body(job, options, local=False)])
    lines += [f"{ssh} sh -s <<'ESTIBA_SSH'", inner, "ESTIBA_SSH", f"{ssh} docker logs --follow {_first(job)}", ""]
    return "\n".join(lines)


def _first(job: JobFile) -> str:
    return f"{job.name}-algo-1"


def _body(job: JobFile, options: HostOptions, *, local: bool) -> Iterator[str]:
    """Config files, data and one `docker run` a host."""
    request = job.request
    cluster = contract.hosts(request)
    many = len(cluster) > 1 or not local
    network = f"estiba-{job.name}"
    if many or request.get("EnableNetworkIsolation"):
        internal = " --internal" if request.get("EnableNetworkIsolation") else ""
        yield f"docker network create{internal} {shlex.quote(network)}"
    data: dict[str, str] = {}
    for channel in contract.channels(request):
        if channel.sharded and len(cluster) > 1:
            yield f"# {channel.name} is ShardedByS3Key: `estiba run` gives each host a share, here each sees it all."
        if channel.uri.startswith("s3://"):
            data[channel.name] = f"$work/data/{channel.name}"
            yield f"aws s3 sync {shlex.quote(channel.uri)} {quote(data[channel.name])}"
        else:
            data[channel.name] = str(contract.file_path(channel.uri)) if local else f"$work/data/{channel.name}"
    checkpoints = contract.checkpoint_dir(request)
    store = request.get("CheckpointConfig", {}).get("S3Uri", "")
    if checkpoints and store.startswith("s3://"):
        yield f"aws s3 sync {shlex.quote(store)} {quote('$work/checkpoints')}"
    for host in cluster:
        root = f"$work/{host.name}"
        yield f"mkdir -p {quote(root + '/input/config')} {quote(root + '/model')} {quote(root + '/output/data')}"
        for name, text in contract.config_files(request, host, options.encoding).items():
            yield f"cat > {quote(f'{root}/input/config/{name}')} <<'ESTIBA_FILE'\n{text}ESTIBA_FILE"
        mounts = [f"{root}/input:/opt/ml/input", f"{root}/model:/opt/ml/model", f"{root}/output:/opt/ml/output"]
        mounts += [
            f"{data[channel.name]}:/opt/ml/input/data/{channel.name}:ro"
            for channel in contract.channels(request)
            if not channel.groups or host.group in channel.groups
        ]
        if checkpoints:
            here = str(contract.file_path(store)) if local and store.startswith("file://") else "$work/checkpoints"
            yield f"mkdir -p {quote(here)}"
            mounts.append(f"{here}:{checkpoints}")
        words = docker_run(job, host, options, mounts, many=many)
        yield wrap(words, len(words) - len(contract.command(request)[1]) - 1)


def artefact(job: JobFile, options: HostOptions) -> str:
    """The text of the job for its own target."""
    if job.target.is_sagemaker:
        return request_json(job)
    return local_script(job, options) if job.target.kind == "local" else ssh_script(job, options)


def as_json(job: JobFile, options: HostOptions) -> dict[str, Any]:
    """The same for machines: the request, and the script of other targets."""
    out: dict[str, Any] = {"request": job.request}
    if not job.target.is_sagemaker:
        out["script"] = artefact(job, options)
    return out


def read_options(
    *,
    gpus: str,
    shm_size: str,
    memory: str | None,
    cpus: float | None,
    encoding: str,
    env_file: str | None,
    like: Instance | None,
    has_gpu_instance: bool,
) -> HostOptions:
    """HostOptions from flags. `like` limits hosts to that instance type where no explicit limit is given.

    Raises LaunchError for a flag that makes no sense.
    """
    if gpus not in ("auto", "all", "none") and not re.fullmatch(r"[1-9]\d*", gpus):
        raise LaunchError(f"--gpus {gpus!r}: not auto, all, none or a number; use one of them")
    if encoding not in contract.ENCODINGS:
        raise LaunchError(f"--encoding {encoding!r}: not one of {', '.join(contract.ENCODINGS)}; use one of them")
    for flag, size in (("--shm-size", shm_size), ("--memory", memory)):
        if size is not None and not re.fullmatch(r"[1-9]\d*[bkmg]?", size.lower()):
            raise LaunchError(f"{flag} {size!r}: not a size; write for example 8g or 512m")
    if cpus is not None and not 0.01 <= cpus <= 4096:
        raise LaunchError(f"--cpus {cpus}: must be above 0; write for example 4")
    if env_file is not None and not Path(env_file).is_file():
        raise LaunchError(f"--env-file {env_file}: no such file; create it with NAME=VALUE lines")
    if like is not None:
        memory = memory or (f"{round(like.memory_gib * 1024)}m" if like.memory_gib else None)
        cpus = cpus or like.vcpus
    if gpus == "auto":
        gpus = "all" if has_gpu_instance or shutil.which("nvidia-smi") else "none"
    return HostOptions(
        gpus=None if gpus == "none" else gpus,
        shm_size=shm_size,
        memory=memory,
        cpus=cpus,
        encoding=encoding,
        env_file=env_file,
    )
