"""Local jobs from outside: start, look, order, follow. Works from any process; state is on disk."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import contract, state
from ..errors import LaunchError
from ..jobfile import JobFile
from ..rules import s3_uris
from . import channels, control, output
from .control import Interruption, LocalOptions
from .engine import Engine
from .logs import LOG
from .record import RECORD, TERMINAL, Record

FOLLOW_S = 0.2


@dataclass(frozen=True, kw_only=True)
class Started:
    """A job that has its own supervisor now."""

    name: str
    directory: Path


def start(job: JobFile, options: LocalOptions, say: Callable[[str], None] = lambda _: None) -> Started:
    """Hand `job` to a supervisor of its own and return. Raises LaunchError before anything was started."""
    engine = Engine()
    engine.ping()
    for channel in contract.channels(job.request):
        channels.check(channel)
    engine.ensure_image(job.request["AlgorithmSpecification"]["TrainingImage"], say)
    request = with_absolute_paths(job.request)
    refuse_shared_checkpoints(request)
    directory = state.jobs_root() / job.name
    try:
        directory.mkdir(parents=True)
    except FileExistsError:
        raise LaunchError(
            f"{job.name}: a job of this name is known already ({directory}); pass --set JOB_NAME=ANOTHER, "
            "or leave the time in TrainingJobName (${ESTIBA_TIMESTAMP})"
        ) from None
    except OSError as error:
        raise LaunchError(f"{directory}: {error.strerror}; point ESTIBA_STATE to a place you may write") from None
    options.write(directory)
    Record.create(directory, request)
    # Last, as its being there is what makes a directory a job.
    state.write_json(directory / control.REQUEST, request)
    supervise(directory)
    return Started(name=job.name, directory=directory)


def refuse_shared_checkpoints(request: dict[str, Any]) -> None:
    """Two jobs that sync to one place overwrite each other's checkpoints. Raises LaunchError naming the other."""
    place = request.get("CheckpointConfig", {}).get("S3Uri")
    if place is None or not state.jobs_root().is_dir():
        return
    for directory in sorted(state.jobs_root().iterdir()):
        other = state.read_json(directory / control.REQUEST, {})
        if other.get("CheckpointConfig", {}).get("S3Uri", "").rstrip("/") != place.rstrip("/"):
            continue
        if control.supervised(directory) and not is_over(describe(directory.name)):
            raise LaunchError(
                f"{place}: {directory.name} is still running with these checkpoints; follow it with `estiba logs -f "
                f"{directory.name}`, end it with `estiba stop {directory.name}`, or use another CheckpointConfig"
            )


def with_absolute_paths(request: dict[str, Any]) -> dict[str, Any]:
    """The request with file:// addresses that mean the same from any directory."""
    found = {uri for _, uri in s3_uris(request) if uri.startswith("file://")}

    def change(node: Any) -> Any:
        if isinstance(node, dict):
            return {name: change(value) for name, value in node.items()}
        if isinstance(node, list):
            return [change(value) for value in node]
        return f"file://{contract.file_path(node)}" if isinstance(node, str) and node in found else node

    changed: dict[str, Any] = change(request)
    return changed


def supervise(directory: Path) -> None:
    """Start a supervisor that outlives this process, its terminal and its session."""
    package = Path(__file__).resolve().parents[2]
    paths = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
    with (directory / "supervisor.log").open("ab") as log:
        subprocess.Popen(
            [sys.executable, "-m", "estiba_launch.localhost.supervisor", str(directory)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,
        )


def describe(name: str) -> dict[str, Any]:
    """The job as DescribeTrainingJob would tell it; under `Estiba`, attempts and whether anybody looks after it."""
    directory = state.job_dir(name)
    value: dict[str, Any] = state.read_json(directory / RECORD, {})
    value["Estiba"]["Supervised"] = control.supervised(directory)
    value["Estiba"]["Directory"] = str(directory)
    return value


def is_over(value: dict[str, Any]) -> bool:
    return value["TrainingJobStatus"] in TERMINAL


def orphaned(value: dict[str, Any]) -> bool:
    """A job that is not over and that nobody looks after: its supervisor was killed, or the machine restarted."""
    return not is_over(value) and not value["Estiba"]["Supervised"]


def resume(name: str) -> bool:
    """Give an orphaned job a new supervisor; False when it needs none."""
    if not orphaned(describe(name)):
        return False
    supervise(state.job_dir(name))
    return True


def stop(name: str, reason: str = "asked for") -> None:
    """TERM, then KILL after 120 s; returns at once. Raises LaunchError when the job is over."""
    value = describe(name)
    if is_over(value):
        raise LaunchError(f"{name}: is over already ({value['TrainingJobStatus']}); nothing to stop")
    control.order_stop(state.job_dir(name), reason)
    resume(name)


def interrupt(name: str, order: Interruption) -> None:
    """A spot interruption, for drills. Raises LaunchError when the job is over."""
    value = describe(name)
    if is_over(value):
        raise LaunchError(f"{name}: is over already ({value['TrainingJobStatus']}); nothing to interrupt")
    control.order_interruption(state.job_dir(name), order)


def wait(name: str, timeout_s: float | None = None) -> dict[str, Any]:
    """Until the job is over. Raises LaunchError when it is orphaned or takes longer than `timeout_s`."""
    until = None if timeout_s is None else time.monotonic() + timeout_s
    lonely_since: float | None = None
    while True:
        value = describe(name)
        if is_over(value):
            return value
        lonely_since = (lonely_since or time.monotonic()) if orphaned(value) else None
        # A supervisor takes a moment to start; one that stays away is dead.
        if lonely_since and time.monotonic() - lonely_since > 15:
            raise LaunchError(f"{name}: nobody looks after it, its supervisor died; run `estiba resume {name}`")
        if until is not None and time.monotonic() > until:
            raise LaunchError(
                f"{name}: still {value['SecondaryStatus']} after {timeout_s:g} s; see `estiba logs {name}`"
            )
        time.sleep(FOLLOW_S)


def log_lines(name: str, *, follow: bool) -> Iterator[str]:
    """The whole log, attempts marked; with `follow` until the job is over."""
    directory = state.job_dir(name)
    path = directory / LOG
    rest = ""
    position = 0
    while True:
        # Looked at first: what is written until now is read below even if the job ends in between.
        done = not follow or is_over(value := describe(name)) or (orphaned(value) and _settled(directory))
        if path.exists():
            with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
                file.seek(position)
                rest += file.read()
                position = file.tell()
            *lines, rest = rest.split("\n")
            yield from lines
        if done:
            if rest:
                yield rest
            return
        time.sleep(FOLLOW_S)


def _settled(directory: Path) -> bool:
    """Whether the supervisor had time to start."""
    return time.time() - (directory / "supervisor.log").stat().st_mtime > 15


def fetch(name: str, into: Path) -> dict[str, int]:
    """Model and output of a finished job, unpacked below `into`: number of files of each. Raises LaunchError."""
    value = describe(name)
    if not is_over(value):
        raise LaunchError(
            f"{name}: still {value['SecondaryStatus']}; wait for it (`estiba logs -f {name}`) or stop it first"
        )
    request = state.read_json(state.job_dir(name) / control.REQUEST)
    found: dict[str, int] = {}
    if "ModelArtifacts" in value:
        found["model"] = output.fetch(request, "model", into / "model")
    if "OutputArtifacts" in value["Estiba"]:
        found["output"] = output.fetch(request, "output", into / "output")
    if not found:
        raise LaunchError(f"{name}: left nothing ({value.get('FailureReason', value['TrainingJobStatus'])})")
    return found
