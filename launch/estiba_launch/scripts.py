"""A job as text a person can paste: the request as JSON, `docker run` for this machine, a script for ssh."""

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
    gpus_if_any: bool = False
    """`gpus` was not asked for: a machine without GPUs gives none and is not refused."""
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


def docker_run(
    job: JobFile,
    host: contract.Host,
    options: HostOptions,
    mounts: list[str],
    *,
    detach: bool,
    env_from_stdin: bool = False,
) -> list[str]:
    """The words of one host's `docker run`; detached hosts get a network where they find each other.

    `env_from_stdin` reads further NAME=VALUE lines from stdin, where `options.env_file` names a file otherwise.
    """
    request = job.request
    name = f"{job.name}-{host.name}" if len(contract.hosts(request)) > 1 else job.name
    words = ["docker", "run", "--detach" if detach else "--rm", "--name", name, "--hostname", host.name]
    words += ["--stop-timeout", str(DOCKER_STOP_S), "--shm-size", options.shm_size]
    if detach or request.get("EnableNetworkIsolation"):
        words += ["--network", f"estiba-{job.name}"]
    if detach:
        words += ["--network-alias", host.name]
    if options.gpus:
        words += ["--gpus", options.gpus]
    if options.memory:
        words += ["--memory", options.memory]
    if options.cpus:
        words += ["--cpus", f"{options.cpus:g}"]
    for key, value in contract.environment(request).items():
        words += ["--env", f"{key}={value}"]
    if env_from_stdin:
        words += ["--env-file", "/dev/stdin"]
    elif options.env_file:
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
            *_body(job, options),
            "",
        ]
    )


def _body(job: JobFile, options: HostOptions) -> Iterator[str]:
    """Config files, data and one `docker run` a host."""
    request = job.request
    cluster = contract.hosts(request)
    many = len(cluster) > 1
    network = f"estiba-{job.name}"
    if many or request.get("EnableNetworkIsolation"):
        internal = " --internal" if request.get("EnableNetworkIsolation") else ""
        yield f"docker network create{internal} {shlex.quote(network)}"
    data: dict[str, str] = {}
    for channel in contract.channels(request):
        if channel.sharded and many:
            yield f"# {channel.name} is ShardedByS3Key: `estiba run` gives each host a share, here each sees it all."
        if channel.uri.startswith("s3://"):
            data[channel.name] = f"$work/data/{channel.name}"
            yield f"aws s3 sync {shlex.quote(channel.uri)} {quote(data[channel.name])}"
        else:
            data[channel.name] = str(contract.file_path(channel.uri))
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
            here = str(contract.file_path(store)) if store.startswith("file://") else "$work/checkpoints"
            yield f"mkdir -p {quote(here)}"
            mounts.append(f"{here}:{checkpoints}")
        words = docker_run(job, host, options, mounts, detach=many)
        yield wrap(words, len(words) - len(contract.command(request)[1]) - 1)


def artefact(job: JobFile, options: HostOptions) -> str:
    """The text of the job for its own target."""
    if job.target.is_sagemaker:
        return request_json(job)
    if job.target.kind == "local":
        return local_script(job, options)
    from .ssh.script import ssh_script  # it builds on this module

    return ssh_script(job, options)


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
    guessed = gpus == "auto"
    if guessed:
        gpus = "all" if has_gpu_instance or shutil.which("nvidia-smi") else "none"
    return HostOptions(
        gpus=None if gpus == "none" else gpus,
        gpus_if_any=guessed,
        shm_size=shm_size,
        memory=memory,
        cpus=cpus,
        encoding=encoding,
        env_file=env_file,
    )
