"""The job: tokenize the text, load the model in shards, train, write the model."""

from __future__ import annotations

import math
import shutil
import tempfile
import uuid
from pathlib import Path
from typing import Any

import torch

from estiba.errors import ConfigError
from estiba.log import get_logger
from estiba.paths import writable
from estiba.platform.contract import Job
from estiba.platform.stop import Stop
from estiba.training.fit import NOTHING_TRAINED, Run, TrainingSetup, fit
from estiba.training.precision import AmpContext
from estiba.training.schedule import Schedule
from estiba.training.sharding import device_mesh
from estiba.training.trainer import Trainer
from multinode.artifacts import write_artifacts
from multinode.config import MultinodeConfig
from multinode.data import Sequences, map_sequences, read_documents, tokenize
from multinode.memory import needs_checkpointing
from multinode.model import BaseModel, checkpoint_activations, find_base, load_sharded
from multinode.task import CausalTask

logger = get_logger(__name__)
LOG_COLUMNS = ("epoch", "train_loss", "val_loss", "step", "lr", "grad_norm", "tokens")
"""Columns of training_log.csv: those that interruptions do not change."""


def train(config: MultinodeConfig, job: Job, stop: Stop) -> None:
    """Run the job. Raises EstibaError; Interrupted after a stop, whose message names what was saved."""
    output = writable(Path(config.output_dir), "--output-dir")
    base: list[BaseModel] = []

    def setup(run: Run[MultinodeConfig]) -> TrainingSetup[CausalTask]:
        base.append(stop.unless_stopped(lambda: find_base(config.model_location()), NOTHING_TRAINED))
        return _setup(run, base[0])

    def finish(run: Run[MultinodeConfig], task: CausalTask, trainer: Trainer) -> None:
        write_artifacts(run, task, trainer, base[0])

    fit(config, job, stop, output=output, setup=setup, finish=finish, describe=describe, replicas=config.replicas)


def _setup(run: Run[MultinodeConfig], base: BaseModel) -> TrainingSetup[CausalTask]:
    config, stop, device = run.config, run.stop, run.device
    length = _sequence_length(config, base.config)
    training, validation = stop.unless_stopped(lambda: _read_data(run, base, length), NOTHING_TRAINED)
    amp = AmpContext(config.precision, device)
    if amp.dtype == torch.float16:  # what `auto` is on a GPU without bfloat16; its scaler is not for shards
        logger.info("this GPU lacks bfloat16; training in float32")
        config = config.model_copy(update={"precision": "float32"})
        amp = AmpContext(config.precision, device)
    mesh = device_mesh(run.dist, device, replicas=config.replicas)
    model = stop.unless_stopped(lambda: load_sharded(base, mesh, device, amp.dtype), NOTHING_TRAINED)
    if needs_checkpointing(config, model, mesh, device, length):
        checkpoint_activations(model)
    task = CausalTask(config, model, training, validation, device=device, dist=run.dist)
    steps = config.max_steps or max(1, math.ceil(config.epochs * len(training) / config.global_batch_size))
    schedule = Schedule(
        kind=config.lr_schedule,
        peak=config.learning_rate,
        steps=steps,
        warmup_steps=min(round(config.warmup_ratio * steps), steps // 2),
    )
    trainer = config.trainer_config(
        schedule=schedule,
        clip=config.grad_clip,
        evaluate_every=config.eval_steps or max(1, steps // 4),
        log_every=config.log_interval,
    )
    return TrainingSetup(task=task, trainer=trainer, restored=run.restore(), log_columns=LOG_COLUMNS)


def _sequence_length(config: MultinodeConfig, model_config: Any) -> int:
    positions = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    asked = config.max_sequence_length
    if not positions or asked <= positions:
        return asked
    logger.warning(f"--max-sequence-length {asked}: the model has {positions} positions, so that is the length")
    return int(positions)


def _read_data(run: Run[MultinodeConfig], base: BaseModel, length: int) -> tuple[Sequences, Sequences | None]:
    """Tokenize on the first rank of each host; its other ranks map the same files."""
    config = run.config
    tokenizer = base.tokenizer()
    eos_id = tokenizer.eos_token_id
    if eos_id is None:
        raise ConfigError(
            f"{base.location}: its tokenizer has no end token (eos_token), which separates documents; set it"
        )
    token = run.dist.broadcast(uuid.uuid4().hex)
    folder = Path(tempfile.gettempdir()) / f"estiba-tokens-{token}-{run.dist.rank - run.dist.local_rank}"
    locations = {"training": config.data_location(), "validation": config.validation_location()}
    if run.dist.local_rank == 0:
        run.resources.callback(shutil.rmtree, folder, ignore_errors=True)
        folder.mkdir()
        for name, location in locations.items():
            if location is not None:
                tokenize(read_documents(location, config.text_column), tokenizer, int(eos_id), folder / name)
    run.dist.barrier()
    sides = [
        None if location is None else map_sequences(folder / name, location, length=length, seed=config.seed)
        for name, location in locations.items()
    ]
    training, validation = sides
    assert training is not None
    rows = base.config.get_text_config().vocab_size
    if (largest := max(int(side.tokens.max()) for side in sides if side is not None)) >= rows:
        raise ConfigError(f"{base.location}: its tokenizer gives token {largest}, and the model has {rows} embeddings")
    return training, validation


def describe(run: Run[MultinodeConfig], task: CausalTask, trainer: Trainer) -> list[str]:
    """The first lines of the log."""
    parameters = sum(parameter.numel() for parameter in task.model.parameters())
    ranks, hosts, replicas = run.dist.world_size, run.job.host_count, run.config.replicas
    copies = "" if replicas == 1 else f", {replicas} replicas"
    model = (
        f"{parameters:,} parameters sharded over {ranks // replicas} of {ranks} ranks{copies}, {hosts} hosts; "
        f"{trainer.amp.name} on {run.device.type}"
    )
    data = (
        f"{len(task.training.tokens):,} tokens in {len(task.training):,} sequences of {task.training.length}; "
        f"{run.config.global_batch_size} sequences a step, {trainer.config.schedule.steps} steps"
    )
    return [model, data]
