"""Take hosts away from a running attempt, as a spot market does, and record how it went."""

from __future__ import annotations

from typing import Any

from estiba_launch.jobs import checkpoint_watch, control
from estiba_launch.jobs.control import Fault
from estiba_launch.jobs.record import now_text
from estiba_launch.targets.local.attempt import Attempt
from estiba_launch.targets.local.one_host import FreezableContainers, inject_on_host
from estiba_launch.targets.local.outcome import Result


def inject(attempt: Attempt, fault: Fault) -> Result | None:
    """Interrupt `attempt`. Returns None when the job ended by itself first."""
    if fault.host and (fault.survivors_s or fault.how != control.LOSS):
        return inject_on_host(attempt, fault)
    lost = [run for run in attempt.runs if fault.host in (None, run.host.name)]
    ids = [run.container for run in lost]
    who = fault.host or "all hosts"
    note: dict[str, Any] = {"Notice": fault.notice, "Host": fault.host, "Time": now_text()}
    if fault.notice:
        attempt.log.mark(f"spot interruption of {who}: TERM, then KILL after {fault.grace_s} s")
        attempt.engine.stop(ids, fault.grace_s)
    elif fault.at_write:
        hit = checkpoint_watch.kill_at_write(
            [run.root / "checkpoints" for run in lost],
            FreezableContainers(attempt.engine, ids),
            give_up=lambda: attempt.must_end() is not None or any(attempt.engine.end(container) for container in ids),
        )
        if hit is None:
            return None
        note |= {"Time": hit.time, "During": hit.name, "InTheMiddle": hit.in_the_middle}
        attempt.log.mark(f"spot interruption of {who}: KILL while {hit.name} was written")
    else:
        # The host is lost: nothing more of its directory reaches the store.
        attempt.uploads.stop()
        attempt.log.mark(f"spot interruption of {who}: KILL, no notice")
        note["Time"] = now_text()
        attempt.engine.kill(ids)
    note["EndedTime"] = now_text()
    attempt.engine.kill(attempt.running())
    # The last sync of a host that was killed at a write is what brings torn files to the store.
    sync = fault.notice or fault.at_write
    if not sync:
        note |= attempt.uploads.pending()
    control.hold_sync(attempt.job_dir, False)
    return attempt.interrupted(note, sync=sync, wait_s=fault.capacity_wait_s)
