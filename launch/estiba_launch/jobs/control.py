"""Requests to a running job, left as files in its directory: any process can make them at any time."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from estiba_launch.jobs import lock
from estiba_launch.jobs.directory import read_json, write_json

STOP = "stop.json"
INTERRUPT = "interrupt.json"
HOLD_SYNC = "hold-sync"
LOCK = "lock"


LOSS = "loss"
SILENCE = "silence"
"""All processes of the host are held: it answers nobody, and no connection to it is closed."""
PARTITION = "partition"
"""The host has no network."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One spot interruption to inject."""

    notice: bool = True
    """TERM first and KILL after `grace_s`. Without notice: KILL at once, and nothing more is synced."""
    grace_s: int = 120
    host: str | None = None
    """The host that is lost. The others are stopped with it, because one job is one cluster. None for all hosts."""
    capacity_wait_s: float = 0.0
    """Seconds until a new host is available."""
    how: str = LOSS
    """LOSS, SILENCE or PARTITION."""
    duration_s: float | None = None
    """When a silence or a partition is over; None for never."""
    survivors_s: float = 0.0
    """Seconds that the other hosts may take to end by themselves. With 0 they are killed with the host."""
    at_write: bool = False
    """Without notice only: wait for the next write to the checkpoint directory and KILL in the middle of it. What is on
    disk then is synced, torn files too, as a sync at that moment would have done."""


def request_stop(job_dir: Path, reason: str) -> None:
    write_json(job_dir / STOP, {"reason": reason})


def request_fault(job_dir: Path, fault: Fault) -> None:
    write_json(job_dir / INTERRUPT, asdict(fault))


def stop_reason(job_dir: Path) -> str | None:
    """Why the job must stop; None when it need not."""
    request = read_json(job_dir / STOP)
    return str(request["reason"]) if request else None


def take_fault(job_dir: Path) -> Fault | None:
    """The requested fault. A second call returns None."""
    request = read_json(job_dir / INTERRUPT)
    if request is None:
        return None
    (job_dir / INTERRUPT).unlink(missing_ok=True)
    return Fault(**request)


def hold_sync(job_dir: Path, held: bool) -> None:
    """Suspend checkpoint syncs until the next interruption (a drill of what a late sync costs), or resume them."""
    if held:
        (job_dir / HOLD_SYNC).touch()
    else:
        (job_dir / HOLD_SYNC).unlink(missing_ok=True)


def sync_held(job_dir: Path) -> bool:
    return (job_dir / HOLD_SYNC).exists()


def hold(job_dir: Path) -> IO[str] | None:
    """Become the job's only supervisor, or the only copier of its log, while the returned file is open.

    Returns None when another process already is.
    """
    return lock.try_lock(job_dir / LOCK)


def supervised(job_dir: Path) -> bool:
    return lock.is_locked(job_dir / LOCK)
