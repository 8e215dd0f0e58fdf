"""Orders for a running job, left as files in its directory: any process can give them, at any time."""

from __future__ import annotations

import fcntl
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from ..scripts import HostOptions
from ..state import read_json, write_json

STOP = "stop.json"
INTERRUPT = "interrupt.json"
HOLD_SYNC = "hold-sync"
LOCK = "lock"
OPTIONS = "options.json"
REQUEST = "request.json"


@dataclass(frozen=True, kw_only=True)
class Interruption:
    """One spot interruption to carry out."""

    notice: bool = True
    """TERM first and KILL after `grace_s`; without, KILL at once and nothing more is synced."""
    grace_s: int = 120
    host: str | None = None
    """The host that is lost; the others are stopped with it, as one job is one cluster. None for all."""
    capacity_wait_s: float = 0.0
    """Seconds until there is a new host."""
    at_write: bool = False
    """Without notice only: wait for the next write to the checkpoint directory and KILL in the middle of it. What is
    on disk then is synced, torn files too, as a sync that looked at that moment would have done."""


@dataclass(frozen=True, kw_only=True)
class LocalOptions:
    """How the local host runs a job; kept with it."""

    host: HostOptions = field(default_factory=HostOptions)
    copy_inputs: bool = False
    """Give each host its own writable copy of File channels, as SageMaker does; else they are mounted read-only."""
    sync_every_s: float = 5.0
    """Seconds between looks at the checkpoint directory."""
    stop_grace_s: int = 120
    """From TERM to KILL."""
    capacity_wait_s: float = 0.0
    """Seconds until the first host is there."""
    keep_hosts: bool = False
    """Keep the directories of finished hosts."""
    environment: dict[str, str] = field(default_factory=dict)
    """Given to containers beside the request's own, which wins: what a drill sets without changing the job."""

    def write(self, job_dir: Path) -> None:
        write_json(job_dir / OPTIONS, asdict(self))

    @classmethod
    def read(cls, job_dir: Path) -> LocalOptions:
        values: dict[str, Any] = read_json(job_dir / OPTIONS, {})
        return cls(**{**values, "host": HostOptions(**values.get("host", {}))})


def order_stop(job_dir: Path, reason: str) -> None:
    """Ask the supervisor to stop the job: TERM, then KILL."""
    write_json(job_dir / STOP, {"reason": reason})


def order_interruption(job_dir: Path, order: Interruption) -> None:
    """Ask the supervisor for a spot interruption."""
    write_json(job_dir / INTERRUPT, asdict(order))


def stop_ordered(job_dir: Path) -> str | None:
    """Why the job is to stop, or None."""
    order = read_json(job_dir / STOP)
    return str(order["reason"]) if order else None


def take_interruption(job_dir: Path) -> Interruption | None:
    """The interruption that was ordered, once."""
    order = read_json(job_dir / INTERRUPT)
    if order is None:
        return None
    (job_dir / INTERRUPT).unlink(missing_ok=True)
    return Interruption(**order)


def hold_sync(job_dir: Path) -> None:
    """Leave the checkpoint directory unsynced until the next interruption: a drill of what a late sync costs."""
    (job_dir / HOLD_SYNC).touch()


def release_sync(job_dir: Path) -> None:
    (job_dir / HOLD_SYNC).unlink(missing_ok=True)


def sync_held(job_dir: Path) -> bool:
    return (job_dir / HOLD_SYNC).exists()


def hold(job_dir: Path) -> IO[str] | None:
    """Become the job's one supervisor for as long as the returned file is open; None when there is one already."""
    file = (job_dir / LOCK).open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def supervised(job_dir: Path) -> bool:
    """Whether a supervisor is alive. The kernel frees its lock however it dies."""
    try:
        file = (job_dir / LOCK).open()
    except FileNotFoundError:
        return False
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        return False
