"""Toy runs inside the test's own process, stopped at a chosen place by the flag that a signal would raise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from estiba.checkpoint.manager import CheckpointManager
from estiba.errors import Interrupted
from estiba.platform.stop import Stop
from estiba.training.config import TrainerConfig
from estiba.training.metrics import MetricsLogger
from estiba.training.schedule import Schedule
from estiba.training.task import Sums
from estiba.training.trainer import Trainer
from tensors.toy import Toy, digest

STEPS = 14


class Watched(Toy):
    """Reports its position: ("micro", step, index), ("evaluation", step, index), ("evaluated", step, 0)."""

    def __init__(self, at: Callable[[str, int, int], None], **how: Any) -> None:
        super().__init__(**how)
        self._at = at
        self.trainer: Trainer | None = None
        self._micro = 0

    @property
    def _step(self) -> int:
        assert self.trainer is not None
        return self.trainer.step

    def loss(self, model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        if torch.is_grad_enabled():  # the check at the start computes losses too
            self._at("micro", self._step, self._micro % len(self.micro))
            self._micro += 1
        return super().loss(model, batch)

    def evaluate(self, model: torch.nn.Module) -> Iterator[Sums]:
        for index, sums in enumerate(super().evaluate(model)):
            self._at("evaluation", self._step, index)
            yield sums

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> Mapping[str, float]:
        self._at("evaluated", step, 0)
        return super().on_evaluation(step, metrics)


def make(
    folder: Path | None,
    toy: Toy,
    *,
    stop: Stop | None = None,
    checkpoints: CheckpointManager | None = None,
    steps: int = STEPS,
    tensorboard: bool = False,
    **settings: Any,
) -> Trainer:
    """A trainer over a toy; `settings` over these: evaluate every 5 steps, save every 3, a row every 4."""
    schedule = settings.pop("schedule", None) or Schedule(peak=0.01, steps=steps, warmup_steps=3)
    options = {"evaluate_every": 5, "save_every": 3, "log_every": 4, "save_every_s": None, **settings}
    trainer = Trainer(
        toy,
        TrainerConfig(schedule=schedule, **options),
        checkpoints=checkpoints,
        metrics_logger=MetricsLogger(None if folder is None else folder / "metrics", tensorboard=tensorboard),
        stop=stop or Stop(),
        device=torch.device("cpu"),
    )
    if isinstance(toy, Watched):
        toy.trainer = trainer
    return trainer


def attempt(
    folder: Path,
    place: tuple[str, int, int] | None = None,
    *,
    kind: type[Watched] = Watched,
    on_start: Callable[[int], None] = lambda _: None,
    **how: Any,
) -> tuple[str | None, Trainer]:
    """Restore, run, and stop at `place`. Returns the digest of the weights, None where the run was stopped.

    `on_start` is called with the step that the run starts at.
    """
    stop = Stop()

    def at(*here: Any) -> None:
        if here == place:
            stop.request("the test", seconds_left=60)

    toy = kind(at)
    checkpoints = CheckpointManager(folder / "checkpoints")
    trainer = make(folder, toy, stop=stop, checkpoints=checkpoints, **how)
    torch.manual_seed(12345)  # earlier random draws must not matter
    try:
        trainer.resume(checkpoints.restore())
        on_start(trainer.step)
        try:
            trainer.run()
        except Interrupted:
            assert place is not None
            return None, trainer
        return digest(toy.model), trainer
    finally:
        checkpoints.close(timeout_s=30)
