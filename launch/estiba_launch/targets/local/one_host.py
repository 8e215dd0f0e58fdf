"""A fault of one host of several, and what the others make of it: they end by themselves, or they work on."""

from __future__ import annotations

import time
from typing import Any

from docker.errors import NotFound

from estiba_launch.errors import HostError
from estiba_launch.jobs import checkpoint_watch, control
from estiba_launch.jobs.control import Fault
from estiba_launch.jobs.record import now_text
from estiba_launch.targets.local.attempt import Attempt, HostRun
from estiba_launch.targets.local.engine import Engine
from estiba_launch.targets.local.outcome import Result

POLL_S = 0.1
REASON_CHARS = 300


class FreezableContainers:
    """Containers whose processes can be paused between two instructions."""

    def __init__(self, engine: Engine, ids: list[str]) -> None:
        self._engine, self._ids = engine, ids

    def freeze(self) -> bool:
        try:
            for container in self._ids:
                self._engine.pause(container)
        except (HostError, NotFound):
            return False
        return True

    def thaw(self) -> None:
        for container in self._ids:
            self._engine.unpause(container)

    def kill(self) -> None:
        self._engine.kill(self._ids)


def inject_on_host(attempt: Attempt, fault: Fault) -> Result | None:
    """Strike one host and watch the others. Returns None when the attempt outlived it, or ended by itself first.

    The note that is recorded says for each host when it ended and why, or that it did not end.
    """
    (struck,) = [run for run in attempt.runs if run.host.name == fault.host]
    note: dict[str, Any] = {
        "Notice": False,
        "Host": fault.host,
        "Kind": fault.how,
        "DurationSeconds": fault.duration_s,
    }
    if not _strike(attempt, fault, struck, note):
        return None
    is_over = False
    started = time.monotonic()
    ended: dict[str, float] = {}
    # A host that is gone or held cannot end by itself.
    acting = [run for run in attempt.runs if run is not struck or fault.how == control.PARTITION]
    if fault.duration_s is not None:
        acting = attempt.runs
    while len(ended) < len(acting) and not attempt.must_end():
        elapsed_s = time.monotonic() - started
        if fault.duration_s is not None and not is_over and elapsed_s >= fault.duration_s:
            _undo(attempt, fault, struck)
            is_over, note["UndoneTime"] = True, now_text()
            if not ended and fault.survivors_s <= fault.duration_s:
                break
        if elapsed_s >= fault.survivors_s and (fault.duration_s is None or is_over):
            break
        for run in acting:
            if run.host.name in ended or (run is struck and fault.how == control.SILENCE and not is_over):
                continue
            run.end = run.end or attempt.engine.end(run.container)
            if run.end:
                ended[run.host.name] = round(elapsed_s, 1)
        time.sleep(POLL_S)
    note["Hosts"] = {run.host.name: _account(attempt, run, ended) for run in acting}
    note["WatchedSeconds"] = round(time.monotonic() - started, 1)
    control.hold_sync(attempt.job_dir, False)
    failed = any(run.end and run.end.exit_code for run in acting)
    if fault.duration_s is not None and not failed:
        attempt.log.mark(f"the {fault.how} of {fault.host} ended no host")
        attempt.record.attempts[-1].setdefault("Faults", []).append(note)
        attempt.record.save()
        return None
    note["EndedTime"] = now_text()
    attempt.engine.kill(attempt.running())
    note |= attempt.uploads.pending([struck.host.name]) if fault.how != control.PARTITION else {}
    return attempt.interrupted(note, sync=True, wait_s=fault.capacity_wait_s)


def _strike(attempt: Attempt, fault: Fault, run: HostRun, note: dict[str, Any]) -> bool:
    """Returns False when the job ended by itself first."""
    name = run.host.name
    note["Time"] = now_text()
    if run.end or attempt.engine.end(run.container):
        return False
    if fault.how == control.PARTITION:
        attempt.log.mark(f"{name} has no network{_for(fault)}")
        attempt.engine.disconnect(run.container, attempt.job)
        return True
    if fault.how == control.SILENCE:
        attempt.log.mark(f"{name} is silent{_for(fault)}")
        attempt.engine.pause(run.container)
    elif fault.at_write:
        hit = checkpoint_watch.kill_at_write(
            [run.root / "checkpoints"],
            FreezableContainers(attempt.engine, [run.container]),
            give_up=lambda: attempt.must_end() is not None or attempt.engine.end(run.container) is not None,
        )
        if hit is None:
            return False
        note |= {"Time": hit.time, "During": hit.name, "InTheMiddle": hit.in_the_middle}
        attempt.log.mark(f"{name} lost: KILL while {hit.name} was written")
    else:
        attempt.log.mark(f"{name} lost: KILL, no notice")
        attempt.engine.kill([run.container])
    if fault.duration_s is None:
        attempt.uploads.lose(name)
    return True


def _for(fault: Fault) -> str:
    return "" if fault.duration_s is None else f" for {fault.duration_s:g} s"


def _undo(attempt: Attempt, fault: Fault, run: HostRun) -> None:
    try:
        if fault.how == control.PARTITION:
            attempt.engine.connect(run.container, attempt.job, run.host.name)
        else:
            attempt.engine.unpause(run.container)
    except (HostError, NotFound):
        if attempt.engine.end(run.container) is None:
            raise
        # It ended meanwhile.


def _account(attempt: Attempt, run: HostRun, ended: dict[str, float]) -> dict[str, Any]:
    """When and why a host ended."""
    if run.end is None:
        return {"EndedAfterSeconds": None}
    reason = attempt.failure_reason(run, run.end)[:REASON_CHARS] if run.end.exit_code else ""
    return {"EndedAfterSeconds": ended.get(run.host.name), "ExitCode": run.end.exit_code, "Reason": reason}
