"""When a training run saves: by steps, by the clock, at its end, and in the time left before a kill."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from estiba.checkpoint.manager import CheckpointManager
from estiba.distributed import DistContext
from estiba.platform.stop import Stop
from estiba.training.config import TrainerConfig

CLEANUP_S = 5.0
"""The part of the time before a kill that is reserved for the process to exit."""
State = Callable[[], Mapping[str, Any]]


class SavePolicy:
    """Decides when a run's state is saved, the same on every rank, and saves it."""

    def __init__(
        self, checkpoints: CheckpointManager | None, config: TrainerConfig, *, dist: DistContext, stop: Stop
    ) -> None:
        """`checkpoints` None saves nothing."""
        self._checkpoints, self._config, self._dist, self._stop = checkpoints, config, dist, stop
        self._is_requested = False
        self._is_reserved = False
        self._saved_at = time.monotonic()

    def start(self) -> None:
        """Start the clock of `save_every_s`."""
        self._saved_at = time.monotonic()

    def save_if_due(self, step: int, state: State, metrics: Mapping[str, float]) -> None:
        """Save if due by steps or by time. A save waits until the previous one is on the disk."""
        checkpoints = self._checkpoints
        if checkpoints is None or step == 0:
            return
        every, every_s = self._config.save_every, self._config.save_every_s
        if every and step % every == 0 and checkpoints.newest_step != step:
            self._is_requested = True
        if every_s and time.monotonic() - self._saved_at >= every_s:
            self._is_requested = True
        if not self._is_reserved:  # after the first step the optimizer has its state, so the size is known
            self._is_reserved = True
            checkpoints.reserve(state())
        if self._dist.broadcast(self._is_requested and checkpoints.is_affordable):
            checkpoints.save(step, state(), metrics=metrics)
            self._saved_at, self._is_requested = time.monotonic(), False

    def save_final(self, step: int, state: State, metrics: Mapping[str, float]) -> None:
        """Save a complete run, unless the newest checkpoint is of this step already."""
        if self._checkpoints is None or self._dist.broadcast(self._checkpoints.newest_step == step):
            return
        self._checkpoints.save(step, state(), kind="final", metrics=metrics, wait=True)

    def save_before_error(self, step: int, state: State, metrics: Mapping[str, float]) -> None:
        """Save the state before the run ends with an error, unless the newest checkpoint is of this step already."""
        if self._checkpoints is None or self._dist.broadcast(self._checkpoints.newest_step == step):
            return
        self._checkpoints.save(step, state(), metrics=metrics, wait=True)

    def save_and_interrupt(self, step: int, state: State, metrics: Mapping[str, float]) -> NoReturn:
        """Save what can be saved in the time left. Raises Interrupted, with what is safe in its message."""
        checkpoints = self._checkpoints
        if checkpoints is None:
            raise self._stop.interrupted("nothing is kept without checkpoints")
        # The signal may have reached one rank only, and that rank's part may be on the disk before the main rank's is.
        own_s = self._stop.seconds_left()
        least_s = -self._dist.all_reduce_max(-(math.inf if own_s is None else own_s))[0]
        left_s = None if math.isinf(least_s) else max(0.0, least_s - CLEANUP_S)
        if not self._stop():
            self._stop.request("the stop of another rank", seconds_left=least_s)
        fits = self._dist.broadcast(checkpoints.fits(left_s))
        if step == 0:
            safe = "no step was completed"
        elif self._dist.broadcast(checkpoints.newest_step == step and not checkpoints.is_busy):
            safe = f"everything up to step {step} is saved in {checkpoints.folder}"
        else:
            safe = checkpoints.save_before_stop(
                step, state(), seconds_left=left_s, fits=fits, kind="interrupt", metrics=metrics
            )
        raise self._stop.interrupted(safe)
