"""What a rank does after the ranks of another host were lost: save what lives on, and end.

The lost ranks never answer again, so nothing here is a collective. Where a whole replica lives on (HSDP), its ranks
save their present step as a checkpoint of its own. With one replica the lost shard is missing, so the newest committed
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
from estiba.errors import EstibaError, RanksLost, first_line
from estiba.log import get_logger
from estiba.platform.contract import root_of
from estiba.platform.failure import write_failure
from estiba.platform.outcomes import CONSEQUENCE, kind_of
from estiba.platform.stop import Stop
from estiba.platform.supervisor import LOST_FILE, RESERVE_S

logger = get_logger(__name__)
POLL_S = 0.5
SETTLE_S = 3.0
"""How long the main thread has to find out by itself that a host is lost."""
CLEANUP_S = 5.0
Present = Callable[[], tuple[int, Mapping[str, Any], Mapping[str, float]]]
"""Returns the present step, its whole state and its metrics, without a collective."""


class Survivors:
    """A rank's part of the end after a loss."""

    def __init__(self, checkpoints: CheckpointManager | None, present: Present, *, stop: Stop) -> None:
        self._checkpoints, self._present, self._stop = checkpoints, present, stop
        self._is_over = threading.Event()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Look for a loss during the block, which trains. Raises RanksLost in place of a lost connection's error."""
        path = os.environ.get(LOST_FILE)
        if self._checkpoints is not None and self._checkpoints.is_sharded and path:
            threading.Thread(target=self._watch, args=(Path(path),), name="estiba-survivors", daemon=True).start()
        try:
            yield
        except RuntimeError as error:  # torch's errors of lost connections are several classes
            self._is_over.set()
            text = f"{type(error).__name__}: {first_line(error)}"
            if self._checkpoints is None or not self._checkpoints.is_sharded or kind_of(text) != CONSEQUENCE:
                raise
            reason = text.partition(". ")[0]  # gloo adds advice
            raise RanksLost(f"lost the ranks of another host ({reason}): {self._save(self._seconds_left())}") from error
        finally:
            self._is_over.set()

    def _watch(self, path: Path) -> None:
        while not path.exists():
            if self._is_over.wait(POLL_S):
                return
        end = time.monotonic() + self._seconds_left()
        if self._is_over.wait(SETTLE_S):
            return
        assert self._checkpoints is not None
        error = RanksLost(self._save(end - time.monotonic()))  # PID 1 tells which host was lost
        self._checkpoints.close(max(0.0, end - time.monotonic()))
        logger.error("%s", error)
        write_failure(root_of() / "output/failure", str(error))
        os._exit(error.exit_code)  # the main thread waits for ranks that are gone

    def _seconds_left(self) -> float:
        left_s = self._stop.seconds_left()
        return max(0.0, (self._stop.grace_s - RESERVE_S if left_s is None else left_s) - CLEANUP_S)

    def _save(self, timeout_s: float) -> str:
        """Save this rank's replica. Returns what is safe."""
        checkpoints = self._checkpoints
        assert checkpoints is not None
        newest = checkpoints.newest_step
        safe = "no checkpoint was committed" if newest is None else f"checkpoints up to step {newest} are kept"
        if not checkpoints.has_replicas:
            return f"{safe}; a new one would lack the lost shard"
        # On a GPU the main thread's stream may wait for a lost rank for ever.
        stream = torch.cuda.Stream() if torch.cuda.is_initialized() else None
        with checkpoints.state_lock, torch.cuda.stream(stream):
            step, state, metrics = self._present()
            if step == 0:
                return "no step was completed"
            try:
                if checkpoints.save_replica(step, state, timeout_s=timeout_s, metrics=metrics):
                    return f"this replica saved everything up to step {step} in {checkpoints.folder}"
            except EstibaError as error:
                return f"{safe}; step {step} could not be saved ({error})"
        return f"{safe}; step {step} could not be saved"
