"""The training job: open the data, train, write the artifacts."""

from __future__ import annotations

from pathlib import Path

import torch

from brain_to_text import resolve
from brain_to_text.artifacts import LOG_COLUMNS, write_artifacts
from brain_to_text.config import BrainConfig
from brain_to_text.task import DecodingTask
from brain_to_text.weights import initial_weights
from estiba.errors import ConfigError
from estiba.paths import writable
from estiba.platform.contract import Job
from estiba.platform.stop import Stop
from estiba.training.fit import Run, TrainingSetup, fit
from estiba.training.trainer import Trainer


def train(config: BrainConfig, job: Job, stop: Stop) -> None:
    """Run the job. Raises EstibaError; Interrupted after a stop, whose message names what was saved."""
    device = resolve.device(config.device, config.gpu_number)
    if config.deterministic and device.type == "cuda":
        raise ConfigError(
            "--deterministic: CTC has no deterministic gradient on a GPU; remove it, or train with --device cpu"
        )
    output = writable(Path(config.output_data_dir), "--output-data-dir")
    writable(Path(config.model_dir), "--model-dir")
    fit(config, job, stop, output=output, setup=setup, finish=write_artifacts, describe=describe, device=device)


def setup(run: Run[BrainConfig]) -> TrainingSetup[DecodingTask]:
    config, stop, device = run.config, run.stop, run.device
    trials = run.resources.enter_context(
        resolve.open_trials(config, "train", stop, sessions=config.sessions, device=device)
    )
    resolve.keep_on_device(config, trials, device)
    if (val := resolve.open_val(config, trials, stop, device)) is not None:
        run.resources.enter_context(val)
    trainer = resolve.trainer_config(config)
    restored = run.restore()
    task = DecodingTask(config, trials, val, device)
    if restored is None and (initial := initial_weights(config)) is not None:
        task.start_from(*initial)
    return TrainingSetup(task=task, trainer=trainer, restored=restored, log_columns=LOG_COLUMNS)


def describe(run: Run[BrainConfig], task: DecodingTask, trainer: Trainer) -> list[str]:
    """Return the lines that introduce the run in the log."""
    shape, config = task.shape, run.config
    machine = f"no GPU; CPU with {torch.get_num_threads()} threads"
    if run.device.type == "cuda":
        machine = torch.cuda.get_device_name(run.device)
    sizes = {name: parameter.numel() for name, parameter in task.decoder.named_parameters()}
    day_sizes = [size for name, size in sizes.items() if "day_" in name]
    bidirectional = "bidirectional " if shape.bidirectional else ""
    n_val = 0 if task.val is None else task.val.n_trials
    decoder = (
        f"decoder: {sum(sizes.values()) / 1e6:.1f}M parameters, {sum(day_sizes) / 1e6:.1f}M of them in input layers of "
        f"{shape.n_days} days; {shape.n_layers} x {bidirectional}GRU {shape.n_units}, {shape.n_classes} classes, "
        f"patches of {shape.patch_size} bins at stride {shape.patch_stride}"
    )
    trials = f"{task.train.n_trials:,} trials to train on, {n_val:,} to evaluate"
    return [
        f"{machine}, {trainer.amp.name}",
        decoder,
        f"data: {config.data_location}: {len(task.train.sessions)} sessions, {trials}",
        f"{trainer.config.schedule.steps:,} steps of {config.batch_size} trials from {config.days_per_batch} days",
    ]
