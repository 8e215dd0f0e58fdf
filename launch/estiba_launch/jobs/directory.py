"""One directory for each job that was started from this machine, readable by any process at any time."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from estiba_launch.errors import LaunchError
from estiba_launch.paths import state_root

REQUEST = "request.json"
"""The CreateTrainingJob request. Written last: a directory with this file is a job."""
TARGET = "target.json"
"""Where the job runs, and what its target must remember. Local jobs of earlier versions have none."""


def jobs_root() -> Path:
    return state_root() / "jobs"


def job_dir(name: str) -> Path:
    """The directory of one job. Raises LaunchError when there is none."""
    path = jobs_root() / name
    if "/" in name or name in ("", ".", "..") or not (path / REQUEST).exists():
        known = ", ".join(job_names()[-5:]) or "none"
        raise LaunchError(
            f"{name}: no such job on this machine (latest: {known}); see `estiba list`. A job that was only printed "
            "(k8s, slurm) is known to its cluster alone: kubectl, squeue"
        )
    return path


def job_names() -> list[str]:
    """Every job, oldest first."""
    found = [path.parent for path in jobs_root().glob(f"*/{REQUEST}")]
    return [path.name for path in sorted(found, key=lambda path: (path / REQUEST).stat().st_mtime_ns)]


def refuse_known(name: str) -> None:
    """Raise LaunchError when a job of this name is recorded, or is being started."""
    directory = jobs_root() / name
    if directory.exists() and not (directory / REQUEST).exists():
        raise LaunchError(
            f"{name}: a job of this name is being started, or its start was interrupted; if none is running, "
            f"remove {directory}"
        )
    if directory.exists():
        raise LaunchError(
            f"{name}: a job of this name is known already ({directory}); pass --set JOB_NAME=ANOTHER, "
            "or leave the time in TrainingJobName (${ESTIBA_TIMESTAMP})"
        )


@contextmanager
def creating(name: str) -> Iterator[Path]:
    """The directory of a new job, to be filled in. Removed when that fails, so that the name is free again."""
    directory = create(name)
    try:
        yield directory
    except BaseException as error:
        shutil.rmtree(directory, ignore_errors=True)
        if isinstance(error, OSError):
            reason = error.strerror or error
            raise LaunchError(f"{directory}: {reason}; make room, or point ESTIBA_STATE to another place") from error
        raise


def create(name: str) -> Path:
    """Make the directory of a new job. Raises LaunchError when the name is taken or the place cannot be written."""
    directory = jobs_root() / name
    try:
        directory.mkdir(parents=True)
    except FileExistsError:
        refuse_known(name)
    except OSError as error:
        raise LaunchError(f"{directory}: {error.strerror}; point ESTIBA_STATE to a writable place") from None
    return directory


def read_target(job_dir: Path) -> dict[str, Any]:
    value: dict[str, Any] = read_json(job_dir / TARGET, {"target": "local"})
    return value


def write_json(path: Path, value: Any) -> None:
    """Replace a file whole: a reader sees the old text or the new, also after a crash."""
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        # A file name that is not UTF-8 becomes the escape that JSON reads back.
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            json.dump(value, file, indent=1, ensure_ascii=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        Path(partial).replace(path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def read_json(path: Path, default: Any = None) -> Any:
    """The JSON in `path`, or `default` when there is no such file. Raises LaunchError when it is broken."""
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return default
    except ValueError as error:
        raise LaunchError(f"{path}: broken ({error}); remove the job's directory {path.parent}") from None
