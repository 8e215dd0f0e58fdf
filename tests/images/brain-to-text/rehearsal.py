"""Small runs of the whole job on made-up recordings, and ways to stop them at a chosen place."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from brain_to_text.config import BrainConfig
from brain_to_text.generator import make_dataset
from brain_to_text.work import Decoding, Micro, train
from estiba.contract import Job
from estiba.errors import Interrupted
from estiba.loop.work import Sums
from estiba.stop import Stop

SMALL: dict[str, Any] = {
    "n_input_features": 12,
    "n_units": 16,
    "n_layers": 2,
    "batch_size": 6,
    "days_per_batch": 2,
    "num_training_batches": 18,
    "lr_warmup_steps": 3,
    "lr_max": 0.01,
    "lr_max_day": 0.005,
    "epsilon": 1e-6,
    "batches_per_val_step": 6,
    "batches_per_train_log": 4,
    "gradient_accumulation_steps": 2,
    "time_masks": 3,
    "ema_decay": 0.9,
    "num_dataloader_workers": 0,
    "cache_gb": 0.1,
    "log_individual_day_val_PER": False,
}
"""Everything that has a state: dropout, noise, masks, an average of weights, two courses of rates."""


def recordings(folder: Path, **changes: Any) -> Path:
    """Three sessions of a few short trials."""
    settings = {"sessions": 3, "trials": 8, "held_out_trials": 3, "features": 12, "longest_words": 2, **changes}
    return Path(make_dataset(folder, **settings))


def job_at(root: Path) -> Job:
    return Job(root=root, checkpoint_dir=root / "checkpoints")


def config_at(root: Path, data: Path | str, **changes: Any) -> BrainConfig:
    places = {
        "model_dir": str(root / "model"),
        "output_data_dir": str(root / "output"),
        "checkpoint_path": str(root / "checkpoints"),
        "dataset_dir": str(data),
    }
    return BrainConfig(**{**SMALL, **places, **changes})


def run(root: Path, data: Path | str, stop: Stop | None = None, **changes: Any) -> None:
    """The job in this process. Raises what it raises."""
    torch.set_num_threads(1)
    train(config_at(root, data, **changes), job_at(root), stop or Stop())


@dataclasses.dataclass
class Place:
    """Where a run is to be stopped: in the `poll`-th micro-batch of the step after `step`, or in an evaluation."""

    step: int
    poll: int = 0
    in_evaluation: bool = False


def stopped_at(place: Place, root: Path, data: Path, monkeypatch: Any, **changes: Any) -> Interrupted:
    """Run until `place`. Returns the error it ended with."""
    stop = Stop()
    evaluation, original_loss = Decoding.evaluation, Decoding.loss
    seen = 0

    def loss(self: Decoding, model: torch.nn.Module, batch: Micro) -> torch.Tensor:
        nonlocal seen
        if not place.in_evaluation and _steps_done(self) == place.step:
            if seen == place.poll:
                stop.request("the test")
            seen += 1
        return original_loss(self, model, batch)

    def evaluated(self: Decoding, model: torch.nn.Module) -> Iterator[Sums]:
        for index, sums in enumerate(evaluation(self, model)):
            yield sums
            if place.in_evaluation and _steps_done(self) == place.step and index == 0:
                stop.request("the test")

    with monkeypatch.context() as patch:
        patch.setattr(Decoding, "loss", loss)
        patch.setattr(Decoding, "evaluation", evaluated)
        try:
            run(root, data, stop, **changes)
        except Interrupted as error:
            return error
    raise AssertionError("it ended before it was stopped")


def _steps_done(self: Decoding) -> int:
    """As the optimizer counts them, so in a resumed run too. The last group's parameters are in every step."""
    state = self.optimizer.state.get(self.decoder.out.weight)
    return int(state["step"]) if state else 0


def outcome(root: Path, ignore: Sequence[str] = ("output/metrics", "output/results.json")) -> dict[str, bytes]:
    """Every file of model and output that is a function of the work alone."""
    found = {}
    for folder in ("model", "output"):
        for path in sorted((root / folder).rglob("*")):
            name = path.relative_to(root).as_posix()
            if path.is_file() and not name.startswith(tuple(ignore)):
                found[name] = path.read_bytes()
    return found


def start(root: Path, data: Path, *arguments: str, **changes: Any) -> subprocess.Popen[str]:
    """The job as a process."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in {**SMALL, **changes}.items()]
    return subprocess.Popen(
        [sys.executable, "-m", "brain_to_text", f"--dataset-dir={data}", *flags, *arguments],
        env={**os.environ, "ESTIBA_ROOT": str(root), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
