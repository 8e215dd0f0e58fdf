"""What the machine gives a job beyond the request."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from estiba_launch.errors import LaunchError
from estiba_launch.request import contract
from estiba_launch.request.prices import Instance
from estiba_launch.request.variables import read_container_env


@dataclass(frozen=True, kw_only=True)
class HostOptions:
    """Limits and devices of each host's container; those with an Option are options of the commands that run jobs."""

    gpus: str | None = None
    """`all`, a number, or None for none."""
    gpus_if_any: bool = False
    """`gpus` is a guess: a machine without GPUs runs the job on its CPUs instead of refusing it."""
    shm_size: Annotated[str, Option(help="Shared memory of each host.")] = "8g"
    """Docker's default of 64 MB breaks data loaders."""
    memory: Annotated[str | None, Option(help="Memory limit of each host, such as 16g.")] = None
    cpus: Annotated[float | None, Option(help="CPU limit of each host.")] = None
    encoding: Annotated[str, Option(help="Hyperparameters as plain text (SDK v3) or json (SDK v2).")] = "plain"
    env_file: Annotated[
        str | None,
        Option(metavar="FILE", help="NAME=VALUE lines for the container; never stored.", envvar="ESTIBA_ENV_FILE"),
    ] = None
    """The place for tokens. The request's Environment wins, as `--env` does over `--env-file`."""


def gpus_here() -> int:
    """The number of GPUs that this machine's driver lists."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith("GPU ") for line in listed.splitlines())


def read_options(
    gpus: str = "auto", *, like: Instance | None = None, remote: bool = False, **fields: Any
) -> HostOptions:
    """HostOptions from flags. `like` supplies limits that no flag sets. `auto` means all GPUs, if any: of this
    machine, or with `remote` of the machine that runs the job.

    Raises LaunchError for an invalid value.
    """
    options = HostOptions(**fields)
    if gpus not in ("auto", "all", "none") and not re.fullmatch(r"[1-9]\d*", gpus):
        raise LaunchError(f"--gpus {gpus!r}: not auto, all, none or a number; use one of them")
    if options.encoding not in contract.ENCODINGS:
        known = ", ".join(contract.ENCODINGS)
        raise LaunchError(f"--encoding {options.encoding!r}: not one of {known}; use one of them")
    for flag, size in (("--shm-size", options.shm_size), ("--memory", options.memory)):
        if size is not None and not re.fullmatch(r"[1-9]\d*[bkmg]?", size.lower()):
            raise LaunchError(f"{flag} {size!r}: not a size; write for example 8g or 512m")
    if options.cpus is not None and not 0.01 <= options.cpus <= 4096:
        raise LaunchError(f"--cpus {options.cpus}: not from 0.01 to 4096; write for example 4")
    if options.env_file is not None:
        read_container_env(Path(options.env_file))
    if like is not None:
        memory = f"{round(like.memory_gib * 1024)}m" if like.memory_gib else None
        options = replace(options, memory=options.memory or memory, cpus=options.cpus or like.vcpus)
    is_auto = gpus == "auto"
    if is_auto:
        gpus = "all" if remote or gpus_here() else "none"
    return replace(options, gpus=None if gpus == "none" else gpus, gpus_if_any=is_auto)
