"""A small workload with everything a real one has: dropout, accumulation, an evaluation, metrics, checkpoints.

python tests/tensors/toy.py FOLDER --steps 40          # ends with the digest of its weights on standard output
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash

from estiba.checkpoint.manager import CheckpointManager
from estiba.checkpoint.retention import Retention
from estiba.distributed import DistContext
from estiba.errors import EstibaError
from estiba.log import get_logger
from estiba.platform.stop import Stop
from estiba.training.config import TrainerConfig
from estiba.training.metrics import MetricsLogger
from estiba.training.schedule import Schedule
from estiba.training.task import Sums, TrainTask
from estiba.training.trainer import Trainer

logger = get_logger(__name__)

CLASSES, WIDTH = 5, 16


class Toy(TrainTask[tuple[torch.Tensor, torch.Tensor]]):
    """Which of five centres a point belongs to. Micro-batches differ in size, as sequences do."""

    unit = "points"

    def __init__(
        self, *, seed: int = 1, hidden: int = 32, micro: Sequence[int] = (8, 3), pause_s: float = 0.0, rank: int = 0
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.seed, self.micro, self.pause_s, self.rank = seed, micro, pause_s, rank
        self.centres = torch.randn(CLASSES, WIDTH, generator=generator) * 0.7
        self.model = torch.nn.Sequential(
            torch.nn.Linear(WIDTH, hidden), torch.nn.ReLU(), torch.nn.Dropout(0.2), torch.nn.Linear(hidden, CLASSES)
        )
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        self.evaluations = 0

    def points(self, index: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        labels = torch.randint(CLASSES, (count,), generator=generator)
        return self.centres[labels] + torch.randn(count, WIDTH, generator=generator), labels

    def batches(self, step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        first = (step * 8 + self.rank) * len(self.micro)
        return [self.points(first + index, count) for index, count in enumerate(self.micro)]

    def units_in(self, batch: tuple[torch.Tensor, torch.Tensor]) -> int:
        return len(batch[1])

    def loss(self, model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        if self.pause_s:
            time.sleep(self.pause_s)
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")

    def evaluate(self, model: torch.nn.Module) -> Iterator[Sums]:
        for index in range(4):
            if self.pause_s:
                time.sleep(self.pause_s)
            points, labels = self.points(10**6 + index, 16)
            logits = model(points)
            loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
            yield {"val_loss": (loss, 16), "accuracy": ((logits.argmax(1) == labels).sum(), 16)}

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> Mapping[str, float]:
        del step, metrics
        torch.rand(3)  # leaves no trace
        self.evaluations += 1
        return {"evaluations": self.evaluations}

    def run_fingerprint(self) -> Mapping[str, Any]:
        return {"data": f"toy-{self.seed}", "units_per_step": sum(self.micro)}

    def state_dict(self) -> dict[str, Any]:
        return {"evaluations": self.evaluations}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.evaluations = state["evaluations"]


def digest(model: torch.nn.Module) -> str:
    """Return a digest of every bit of the weights."""
    whole = xxhash.xxh3_128()
    for name, tensor in sorted(model.state_dict().items()):
        whole.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return whole.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--save-every", type=int, default=5)
    parser.add_argument("--evaluate-every", type=int, default=10)
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--pause-s", type=float, default=0.0)
    parser.add_argument("--keep-last", type=int, default=3)
    parser.add_argument("--upload", default=None)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--accept-changed-plan", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    stop = Stop.from_environment().install()
    ranks = DistContext.init("cpu")
    try:
        toy = Toy(seed=given.seed, hidden=given.hidden, pause_s=given.pause_s, rank=ranks.rank)
        checkpoints = CheckpointManager(
            given.folder / "checkpoints",
            retention=Retention(keep_last=given.keep_last),
            upload=given.upload,
            dist=ranks,
        )
        settings = TrainerConfig(
            schedule=Schedule(peak=0.01, steps=given.steps, warmup_steps=3),
            evaluate_every=given.evaluate_every,
            save_every=given.save_every,
            log_every=4,
            accept_changed_plan=given.accept_changed_plan,
        )
        history = MetricsLogger(given.folder / "metrics" if ranks.is_main else None, tensorboard=False)
        trainer = Trainer(
            toy,
            settings,
            checkpoints=checkpoints,
            metrics_logger=history,
            stop=stop,
            device=torch.device("cpu"),
            dist=ranks,
        )
        found = checkpoints.restore()
        logger.info(f"resuming at step {found.step}" if found else "starting")
        trainer.resume(found)
        try:
            trainer.run()
        finally:
            checkpoints.close()
        if ranks.is_main:
            print(f"digest {digest(toy.model)}")
    except EstibaError as error:
        logger.error(f"{error}")
        sys.exit(error.exit_code)
    ranks.destroy()


if __name__ == "__main__":
    main()
