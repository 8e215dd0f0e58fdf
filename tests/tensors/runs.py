"""Toy runs inside the test's own process, stopped at a chosen place by the flag that a signal would raise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from estiba.checkpoint.saver import Checkpoints
from estiba.errors import Interrupted
from estiba.loop.history import History
from estiba.loop.loop import Loop
from estiba.loop.schedule import Schedule
from estiba.loop.settings import Settings
from estiba.loop.work import Sums
from estiba.stop import Stop
from tensors.toy import Toy, digest

STEPS = 14


class Watched(Toy):
    """Tells where it is: ("micro", step, index), ("evaluation", step, index), ("evaluated", step, 0)."""

    def __init__(self, at: Callable[[str, int, int], None], **how: Any) -> None:
        super().__init__(**how)
        self._at = at
        self.loop: Loop | None = None
        self._micro = 0

    @property
    def _step(self) -> int:
        assert self.loop is not None
        return self.loop.step

    def loss(self, model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        self._at("micro", self._step, self._micro % len(self.micro))
        self._micro += 1
        return super().loss(model, batch)

    def evaluation(self, model: torch.nn.Module) -> Iterator[Sums]:
        for index, sums in enumerate(super().evaluation(model)):
            self._at("evaluation", self._step, index)
            yield sums

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> Mapping[str, float]:
        self._at("evaluated", step, 0)
        return super().evaluated(step, metrics)


def make(
    folder: Path | None,
    toy: Toy,
    *,
    stop: Stop | None = None,
    checkpoints: Checkpoints | None = None,
    steps: int = STEPS,
    tensorboard: bool = False,
    **settings: Any,
) -> Loop:
    """A loop over a toy; `settings` over these: evaluate every 5 steps, save every 3, a row every 4."""
    schedule = settings.pop("schedule", None) or Schedule(peak=0.01, steps=steps, warmup_steps=3)
    options = {"evaluate_every": 5, "save_every": 3, "log_every": 4, "save_every_s": None, **settings}
    loop = Loop(
        toy,
        Settings(schedule=schedule, **options),
        checkpoints=checkpoints,
        history=History(None if folder is None else folder / "metrics", tensorboard=tensorboard),
        stop=stop or Stop(),
        device=torch.device("cpu"),
    )
    if isinstance(toy, Watched):
        toy.loop = loop
    return loop


def attempt(folder: Path, place: tuple[str, int, int] | None = None, **how: Any) -> tuple[str | None, Loop]:
    """Restore, run, and stop at `place`; the digest of the weights, None where it was stopped."""
    stop = Stop()

    def at(*here: Any) -> None:
        if here == place:
            stop.request("the test", seconds_left=60)

    toy = Watched(at)
    checkpoints = Checkpoints(folder / "checkpoints")
    loop = make(folder, toy, stop=stop, checkpoints=checkpoints, **how)
    torch.manual_seed(12345)  # what was drawn before must not matter
    try:
        loop.resume(checkpoints.restore())
        try:
            loop.run()
        except Interrupted:
            assert place is not None
            return None, loop
        return digest(toy.model), loop
    finally:
        checkpoints.close(timeout_s=30)
