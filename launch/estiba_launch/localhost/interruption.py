"""Taking hosts away from a running attempt, as a spot market does, and noting what was seen of it."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from . import control, watch
from .control import Interruption
from .record import now_text

if TYPE_CHECKING:
    from .attempt import Attempt, Result


def carry_out(attempt: Attempt, order: Interruption) -> Result | None:
    """Interrupt `attempt`; None when the job ended by itself before that. What happened is noted in the record."""
    lost = [run for run in attempt.runs if order.host in (None, run.host.name)]
    ids = [run.container for run in lost]
    who = order.host or "all hosts"
    note: dict[str, Any] = {"Notice": order.notice, "Host": order.host, "Time": now_text()}
    if order.notice:
        attempt.log.mark(f"spot interruption of {who}: TERM, then KILL after {order.grace_s} s")
        attempt.engine.stop(ids, order.grace_s)
    elif order.at_write:
        hit = watch.kill_at_write(
            [run.root / "checkpoints" for run in lost],
            kill=_killer(attempt, ids),
            give_up=lambda: (
                control.stop_ordered(attempt.job_dir) is not None
                or any(attempt.engine.end(container) for container in ids)
            ),
        )
        if hit is None:
            return None
        note |= {"Time": hit.time, "During": hit.name, "InTheMiddle": hit.in_the_middle}
        attempt.log.mark(f"spot interruption of {who}: KILL while {hit.name} was written")
    else:
        # The host is gone: nothing more of its directory reaches the store.
        attempt.quiet.set()
        attempt.log.mark(f"spot interruption of {who}: KILL, no notice")
        note["Time"] = now_text()
        attempt.engine.kill(ids)
    note["EndedTime"] = now_text()
    attempt.engine.kill(attempt.running())
    # The last sync of a host that was killed at a write is what makes torn files reach the store.
    sync = order.notice or order.at_write
    if not sync:
        pending = [run.sync.pending() for run in attempt.runs if run.sync]
        note["UnsyncedFiles"] = sum(files for files, _ in pending)
        note["UnsyncedBytes"] = sum(size for _, size in pending)
    control.release_sync(attempt.job_dir)
    return attempt.interrupted(note, sync=sync, wait_s=order.capacity_wait_s)


def _killer(attempt: Attempt, ids: list[str]) -> Callable[[], None]:
    """A KILL that is as quick as this process may: a signal by number, else by way of the engine."""
    pids = [attempt.engine.pid(container) for container in ids]

    def kill() -> None:
        for pid in filter(None, pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        attempt.engine.kill(ids)

    return kill
