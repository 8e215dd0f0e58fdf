"""The job from start to end. `fit` restores, trains, saves and stops; this file provides the task and the schedule."""

from __future__ import annotations

from pathlib import Path

from estiba.paths import writable
from estiba.platform.contract import Job
from estiba.platform.stop import Stop
from estiba.training.fit import Run, TrainingSetup, fit
from estiba.training.schedule import Schedule
from estiba.training.trainer import Trainer
from new_image.artifacts import write_artifacts
from new_image.config import TextConfig
from new_image.data import Text
from new_image.task import LanguageTask


def train(config: TextConfig, job: Job, stop: Stop) -> None:
    output = writable(Path(config.output_dir), "--output-dir")
    fit(config, job, stop, output=output, setup=setup, finish=write_artifacts, describe=describe)


def setup(run: Run[TextConfig]) -> TrainingSetup[LanguageTask]:
    config = run.config
    text = Text(Path(config.input_path), seq_length=config.seq_length, seed=config.seed)
    warmup_steps = config.steps // 50
    schedule = Schedule(kind="cosine", peak=config.learning_rate, steps=config.steps, warmup_steps=warmup_steps)
    return TrainingSetup(
        task=LanguageTask(config, text, run.device, run.dist),
        trainer=config.trainer_config(schedule=schedule, evaluate_every=config.eval_steps),
        restored=run.restore(),
    )


def describe(run: Run[TextConfig], task: LanguageTask, trainer: Trainer) -> list[str]:
    """The first lines of the log."""
    parameters = sum(parameter.numel() for parameter in task.model.parameters())
    return [f"{parameters:,} parameters, {trainer.config.schedule.steps} steps, {trainer.amp.name} on {run.device}"]
