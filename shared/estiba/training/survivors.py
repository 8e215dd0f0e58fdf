"""What a rank does after other ranks of the run were lost: save what lives on, and end.

The lost ranks never answer again, so nothing here is a collective. Where a whole replica lives on (HSDP), its ranks
save their current step as a checkpoint of its own. With one replica the lost shard is missing, so the newest committed
checkpoint counts, which may be an upload that was complete on all hosts.

A closed connection raises an error in the main thread. A host that stands still or is cut off does not: the main thread
waits in a collective, where Python runs no signal handler. PID 1 then writes the file ESTIBA_LOST_FILE, which a thread
looks for. The state cannot change meanwhile: it changes only between two collectives, under the manager's lock.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from estiba.checkpoint.manager import CheckpointManager
from estiba.errors import RanksLost, first_line
from estiba.log import get_logger
from estiba.platform.contract import root_of
from estiba.platform.failure import read_failure, write_failure
from estiba.platform.outcomes import CONSEQUENCE, kind_of
from estiba.platform.stop import Stop
from estiba.platform.supervisor import LOST_FILE, RESERVE_S

logger = get_logger(__name__)
POLL_S = 0.5
SETTLE_S = 3.0
"""How long the main thread has to find out by itself that a host is lost."""
CLEANUP_S = 5.0
CurrentState = Callable[[], tuple[int, Mapping[str, Any], Mapping[str, float]]]
"""Returns the current step, its whole state and its metrics, without a collective."""


class Survivors:
    """A rank's part of the end after a loss."""

    def __init__(self, checkpoints: CheckpointManager | None, current_state: CurrentState, *, stop: Stop) -> None:
        self._checkpoints, self._current_state, self._stop = checkpoints, current_state, stop
        self._finished = threading.Event()
        self._ending = threading.RLock()
        """Taken by the thread that ends the process, and never released: the other would end it during its save."""

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Look for a loss during the block, which trains. Raises RanksLost in place of a lost connection's error."""
        path = os.environ.get(LOST_FILE)
        if self._checkpoints is not None and self._checkpoints.is_sharded and path:
            device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
            arguments = (Path(path), device)
            threading.Thread(target=self._watch, args=arguments, name="estiba-survivors", daemon=True).start()
        try:
            yield
        except RuntimeError as error:  # torch's errors of lost connections are several classes
            self._ending.acquire()
            text = f"{type(error).__name__}: {first_line(error)}"
            if self._checkpoints is None or not self._checkpoints.is_sharded or kind_of(text) != CONSEQUENCE:
                raise
            reason = text.partition(". ")[0]  # gloo adds advice
            raise RanksLost(f"lost other ranks of the run ({reason}): {self._save(self._seconds_left())}") from error
        finally:
            self._finished.set()
            self._ending.acquire()  # waits for the end of the process if the other thread has it

    def _watch(self, path: Path, device: int | None) -> None:
        if device is not None:  # a new thread's is 0
            torch.cuda.set_device(device)
        while not path.exists():
            if self._finished.wait(POLL_S):
                return
        end = time.monotonic() + self._seconds_left()
        reason = ""
        with contextlib.suppress(OSError):  # the host's first rank removes the file when it ends
            reason = path.read_text()
        if self._finished.wait(SETTLE_S) or not self._ending.acquire(blocking=False):
            return
        assert self._checkpoints is not None
        error = RanksLost(self._save(end - time.monotonic()))
        try:
            self._checkpoints.close(max(0.0, end - time.monotonic()))
        finally:
            logger.error("%s", error)
            self._write_failure(str(error), reason)
            os._exit(error.exit_code)  # the main thread waits for ranks that are gone

    def _write_failure(self, saved: str, reason: str) -> None:
        """Write what is safe, below the reason if `host_watch` wrote it already; PID 1 writes it at the end."""
        path = root_of() / "output/failure"
        written = (read_failure(path) or "").strip()
        if not written or (reason and written.startswith(reason)):  # else another rank told why it left
            write_failure(path, "\n\n".join(filter(None, [written, saved])))

    def _seconds_left(self) -> float:
        left_s = self._stop.seconds_left()
        return max(0.0, (self._stop.grace_s - RESERVE_S if left_s is None else left_s) - CLEANUP_S)

    def _save(self, timeout_s: float) -> str:
        """Save this rank's replica. Returns what is safe."""
        checkpoints = self._checkpoints
        assert checkpoints is not None
        newest = checkpoints.newest_step
        safe = "no checkpoint was committed"
        if newest is not None and checkpoints.dist.is_main:
            safe = f"checkpoints up to step {newest} are kept"
        elif newest is not None:  # the other ranks know only about their own parts
            safe = "the newest committed checkpoint is kept"
        if not checkpoints.has_replicas:
            return f"{safe}; a new one would lack the lost shard"
        what = "the current step"
        try:
            # On a GPU the main thread's stream may wait for a lost rank for ever.
            stream = torch.cuda.Stream() if torch.cuda.is_initialized() else None
            with checkpoints.state_lock, torch.cuda.stream(stream):
                step, state, metrics = self._current_state()
                if step == 0:
                    return "no step was completed"
                what = f"step {step}"
                if not checkpoints.save_replica(step, state, timeout_s=timeout_s, metrics=metrics):
                    return f"{safe}; {what} could not be saved"
        except Exception as error:  # it must not hide the loss
            return f"{safe}; {what} could not be saved ({type(error).__name__}: {first_line(error)})"
        if checkpoints.is_first_of_replica:
            return f"this replica saved everything up to {what} in {checkpoints.folder}"
        return f"this rank's part of {what} is written; it counts once the replica's first rank has committed it"
