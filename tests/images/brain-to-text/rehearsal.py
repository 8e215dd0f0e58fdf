"""Run small jobs on synthetic recordings, and stop them at a chosen point."""

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
from brain_to_text.data.batches import MicroBatch
from brain_to_text.synthetic.generator import make_dataset
from brain_to_text.task import DecodingTask
from brain_to_text.train import train
from estiba.errors import Interrupted
from estiba.platform.contract import Job
from estiba.platform.stop import Stop
from estiba.training.task import Sums

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
"""Covers everything that has state: dropout, noise, masks, averaged weights, two learning-rate schedules."""


def recordings(folder: Path, **changes: Any) -> Path:
    """Generate three sessions of a few short trials."""
    settings = {"sessions": 3, "trials": 8, "held_out_trials": 3, "features": 12, "longest_words": 2, **changes}
    return Path(make_dataset(folder, **settings))


def job_at(root: Path) -> Job:
    return Job(root=root, checkpoint_dir=root / "checkpoints")


def config_at(root: Path, data: Path | str, **changes: Any) -> BrainConfig:
    paths = {
        "model_dir": str(root / "model"),
        "output_data_dir": str(root / "output"),
        "checkpoint_path": str(root / "checkpoints"),
        "dataset_dir": str(data),
    }
    return BrainConfig(**{**SMALL, **paths, **changes})


def run(root: Path, data: Path | str, stop: Stop | None = None, **changes: Any) -> None:
    """Run the job in this process. Raises what the job raises."""
    torch.set_num_threads(1)
    train(config_at(root, data, **changes), job_at(root), stop or Stop())


@dataclasses.dataclass
class StopPoint:
    """Where to stop a run: in micro-batch `poll` of the step after `step`, or in the evaluation after `step`."""

    step: int
    poll: int = 0
    in_evaluation: bool = False


def stopped_at(point: StopPoint, root: Path, data: Path, monkeypatch: Any, **changes: Any) -> Interrupted:
    """Run until the stop point. Returns the error that ended the run."""
    stop = Stop()
    original_evaluate, original_loss = DecodingTask.evaluate, DecodingTask.loss
    n_micro_batches = 0

    def loss(self: DecodingTask, model: torch.nn.Module, batch: MicroBatch) -> torch.Tensor:
        nonlocal n_micro_batches
        if not point.in_evaluation and steps_done(self) == point.step:
            if n_micro_batches == point.poll:
                stop.request("the test")
            n_micro_batches += 1
        return original_loss(self, model, batch)

    def evaluate(self: DecodingTask, model: torch.nn.Module) -> Iterator[Sums]:
        for index, sums in enumerate(original_evaluate(self, model)):
            yield sums
            if point.in_evaluation and steps_done(self) == point.step and index == 0:
                stop.request("the test")

    with monkeypatch.context() as patch:
        patch.setattr(DecodingTask, "loss", loss)
        patch.setattr(DecodingTask, "evaluate", evaluate)
        try:
            run(root, data, stop, **changes)
        except Interrupted as error:
            return error
    raise AssertionError("the run ended before it was stopped")


def steps_done(self: DecodingTask) -> int:
    """Return the optimizer's step count, which continues in a resumed run. Every step updates the output layer."""
    state = self.optimizer.state.get(self.decoder.out.weight)
    return int(state["step"]) if state else 0


def outcome(root: Path, ignore: Sequence[str] = ("output/metrics", "output/results.json")) -> dict[str, bytes]:
    """Return every output file whose content must not depend on interruptions."""
    files = {}
    for folder in ("model", "output"):
        for path in sorted((root / folder).rglob("*")):
            name = path.relative_to(root).as_posix()
            if path.is_file() and not name.startswith(tuple(ignore)):
                files[name] = path.read_bytes()
    return files


def start(root: Path, data: Path, *arguments: str, **changes: Any) -> subprocess.Popen[str]:
    """Start the job in a new process."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in {**SMALL, **changes}.items()]
    return subprocess.Popen(
        [sys.executable, "-m", "brain_to_text", f"--dataset-dir={data}", *flags, *arguments],
        env={**os.environ, "ESTIBA_ROOT": str(root), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
