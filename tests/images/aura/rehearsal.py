"""Small runs of the whole job, in this or another process, stopped at a chosen point."""

from __future__ import annotations

import dataclasses
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from aura.config import AuraConfig
from aura.task import PretrainingTask
from aura.train import train
from estiba.errors import Interrupted
from estiba.platform.contract import Job
from estiba.platform.stop import Stop
from estiba.training.task import Sums

WORDS = "el barco zarpa al alba con la bodega llena de trigo y vino hacia otro puerto del mar".split()
SMALL: dict[str, Any] = {
    "model_preset": "manual",
    "embed_size": 32,
    "num_layers": 1,
    "num_heads": 2,
    "seq_length": 32,
    "vocab_size": 300,
    "batch_size": 4,
    "gradient_accumulation_steps": 2,
    "learning_rate": 0.005,
    "dropout": 0.1,
    "epochs": 3,
    "validation_split": 0.1,
    "save_steps": 7,
    "eval_steps": 6,
    "log_interval": 4,
    "sample_tokens": 5,
    "text_format": "lines",
    "num_workers": 1,
}
"""Three epochs of about fourteen steps each."""


def write_text(path: Path, lines: int = 130, seed: int = 0) -> Path:
    dice = random.Random(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(" ".join(dice.choices(WORDS, k=dice.randint(4, 30))) + ".\n" for _ in range(lines)))
    return path


def job_at(root: Path) -> Job:
    return Job(root=root, checkpoint_dir=root / "checkpoints")


def config_at(root: Path, text: Path, **changes: Any) -> AuraConfig:
    places = {"output_dir": str(root / "model"), "checkpoint_path": str(root / "checkpoints")}
    return AuraConfig(**{**SMALL, **places, "dataset_path": str(text), **changes})


def run(root: Path, text: Path, stop: Stop | None = None, **changes: Any) -> None:
    """Run the job in this process."""
    torch.set_num_threads(1)
    train(config_at(root, text, **changes), job_at(root), stop or Stop())


@dataclasses.dataclass
class Place:
    """Where to stop a run: in micro-batch `poll` of the step after `step`, or in an evaluation."""

    step: int
    poll: int = 0
    in_evaluation: bool = False
    signum: int | None = None


def stopped_at(place: Place, root: Path, text: Path, monkeypatch: Any, **changes: Any) -> Interrupted:
    """Run until `place` and return the error."""
    stop = Stop()
    evaluation, original_loss = PretrainingTask.evaluate, PretrainingTask.loss
    seen = 0

    def loss(self: PretrainingTask, model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
        nonlocal seen
        if not place.in_evaluation and _steps_done(self) == place.step:
            if seen == place.poll:
                stop.request("the test", signum=place.signum)
            seen += 1
        return original_loss(self, model, batch)

    def evaluated(self: PretrainingTask, model: torch.nn.Module) -> Iterator[Sums]:
        for index, sums in enumerate(evaluation(self, model)):
            yield sums
            if place.in_evaluation and _steps_done(self) == place.step and index == 0:
                stop.request("the test", signum=place.signum)

    with monkeypatch.context() as patch:
        patch.setattr(PretrainingTask, "loss", loss)
        patch.setattr(PretrainingTask, "evaluate", evaluated)
        try:
            run(root, text, stop, **changes)
        except Interrupted as error:
            return error
    raise AssertionError("the run ended before the stop")


def _steps_done(self: PretrainingTask) -> int:
    """Return the optimizer's count, which a resume restores."""
    states = self.optimizer.state_dict()["state"]
    return int(states[0]["step"]) if states else 0


def outcome(root: Path, ignore: Sequence[str] = ("metrics", "results.json")) -> dict[str, bytes]:
    """Return the output files that interruptions must not change."""
    folder = root / "model"
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not name.startswith(tuple(ignore)) and not name.startswith("interrupt-"):
            found[name] = path.read_bytes()
    return found


def start(root: Path, text: Path, *arguments: str, **changes: Any) -> subprocess.Popen[str]:
    """Start the job in another process."""
    flags = [f"--{name}={value}" for name, value in {**SMALL, **changes}.items()]
    return subprocess.Popen(
        [sys.executable, "-m", "aura", f"--dataset_path={text}", *flags, *arguments],
        env={**os.environ, "ESTIBA_ROOT": str(root), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
