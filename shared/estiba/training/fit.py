"""`fit`: the sequence that every training image runs, from paths and ranks to the last artifact.

def setup(run: Run[MyConfig]) -> TrainingSetup[MyTask]:
    task = MyTask(run.config, run.device)
    schedule = Schedule(peak=run.config.learning_rate, steps=run.config.steps)
    trainer = run.config.trainer_config(schedule=schedule, evaluate_every=500)
    return TrainingSetup(task=task, trainer=trainer, restored=run.restore())

def train(config: MyConfig, job: Job, stop: Stop) -> None:
    fit(config, job, stop, output=writable(job.output_dir, "--output-dir"), setup=setup, finish=write_artifacts)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from estiba.checkpoint.manager import CheckpointManager, Restored
from estiba.distributed import DistContext
from estiba.errors import ConfigError, Interrupted, first_line
from estiba.log import get_logger
from estiba.paths import checkpoint_locations, match_local_copy, only_job_in
from estiba.platform.contract import Job
from estiba.platform.stop import Stop
from estiba.training.config import TrainerConfig, TrainingConfig
from estiba.training.host_watch import watched_hosts
from estiba.training.metrics import MetricsLogger
from estiba.training.task import TrainTask
from estiba.training.trainer import Trainer

logger = get_logger(__name__)
NOTHING_TRAINED = "nothing was trained in this attempt, and what earlier attempts saved is kept"
"""What is safe when a stop comes before the first step."""
C = TypeVar("C", bound=TrainingConfig)
T = TypeVar("T", bound=TrainTask[Any])


@dataclass(frozen=True, kw_only=True)
class Run(Generic[C]):
    """What `fit` passes to the image's functions."""

    config: C
    job: Job
    stop: Stop
    device: torch.device
    dist: DistContext
    checkpoints: CheckpointManager
    output: Path
    """Local directory for metrics and artifacts."""
    resources: ExitStack = field(default_factory=ExitStack)
    """Closed at the end of the run: `run.resources.enter_context(open_data())`."""

    def restore(self) -> Restored | None:
        """Return the newest checkpoint that verifies, or None. Raises Interrupted when a stop comes first."""
        return self.stop.unless_stopped(self.checkpoints.restore, NOTHING_TRAINED)


@dataclass(frozen=True, kw_only=True)
class TrainingSetup(Generic[T]):
    """What an image's `setup` returns."""

    task: T
    trainer: TrainerConfig
    restored: Restored | None
    """The state to resume from; None starts at step 0. Usually `run.restore()`."""
    on_resumed: Callable[[], None] | None = None
    """Called on every rank when the restored state was accepted, before the first step: for what must not happen if the
    run is refused."""
    log_columns: Sequence[str] | None = None
    """The columns of training_log.csv; None writes all."""


def fit(
    config: C,
    job: Job,
    stop: Stop,
    *,
    output: Path,
    setup: Callable[[Run[C]], TrainingSetup[T]],
    finish: Callable[[Run[C], T, Trainer], None],
    describe: Callable[[Run[C], T, Trainer], Sequence[str]] | None = None,
    on_interrupt: Callable[[Run[C], T, Trainer, Interrupted], None] | None = None,
    device: torch.device | None = None,
    replicas: int | None = None,
) -> None:
    """Train from the newest checkpoint to the end, then call `finish`.

    `setup` runs on every rank; the other functions run on the main rank. `describe` returns the lines that introduce
    the run in the log. `on_interrupt` is called when a stop ended the run, after its checkpoint was saved. `device`
    None uses `config.device`. `replicas` is for a task that is sharded over all ranks of all hosts, and says how many
    copies of it there are: checkpoints are then sharded too, and `finish` runs on every rank.

    Raises EstibaError; Interrupted when asked to stop, with what is saved in its message.
    """
    # With torchrun on several hosts the ranks are one group, and the checkpoint directory is shared.
    if job.host_count > 1 and replicas is None and "WORLD_SIZE" not in os.environ:
        raise ConfigError(
            f"{job.host_count} hosts: this image trains on the GPUs of one host; set InstanceCount to 1 and take a "
            "larger instance"
        )
    if config.deterministic:  # read once, at the first product on a GPU
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    device = device or select_device(config.device)
    if device.type == "cuda":
        stop.on_thread_start = lambda: torch.cuda.set_device(device)  # a new thread's is 0
    dist = DistContext.init(device.type)
    folder, upload = checkpoint_locations(config.checkpoint_path, config.checkpoint_upload)
    if dist.is_main and upload == config.checkpoint_path:
        match_local_copy(folder, upload)
    checkpoints: CheckpointManager
    if replicas is None:
        checkpoints = CheckpointManager(folder, retention=config.retention(), upload=upload, dist=dist)
    else:
        from estiba.checkpoint.sharded.manager import ShardedCheckpointManager
        from estiba.training.sharding import device_mesh

        mesh = device_mesh(dist, device, replicas=replicas)
        checkpoints = ShardedCheckpointManager(
            folder, retention=config.retention(), upload=upload, dist=dist, mesh=mesh
        )
    with ExitStack() as resources:
        resources.enter_context(watched_hosts(job, dist, stop))
        if dist.is_main:
            resources.enter_context(only_job_in(output, "--output-dir"))
        run = Run(
            config=config,
            job=job,
            stop=stop,
            device=device,
            dist=dist,
            checkpoints=checkpoints,
            output=output,
            resources=resources,
        )
        with ExitStack() as closing:
            closing.callback(lambda: checkpoints.close(stop.seconds_left()))
            prepared = setup(run)
            trainer = _trainer(run, prepared)
            if dist.is_main:
                lines = [] if describe is None else list(describe(run, prepared.task, trainer))
                if trainer.step:
                    lines.append(f"resuming at step {trainer.step} of {trainer.config.schedule.steps}")
                if lines:
                    logger.info("\n".join(lines))
            try:
                trainer.run()
            except Interrupted as error:
                if on_interrupt is not None and dist.is_main:
                    on_interrupt(run, prepared.task, trainer, error)
                raise
        if dist.is_main or replicas is not None:
            finish(run, prepared.task, trainer)
    dist.destroy()


def _trainer(run: Run[C], prepared: TrainingSetup[T]) -> Trainer:
    metrics_logger = MetricsLogger(
        run.output / "metrics" if run.dist.is_main else None,
        csv_path=run.output / "training_log.csv",
        columns=prepared.log_columns,
    )
    trainer = Trainer(
        prepared.task,
        prepared.trainer,
        checkpoints=run.checkpoints,
        metrics_logger=metrics_logger,
        stop=run.stop,
        device=run.device,
        dist=run.dist,
    )
    trainer.resume(prepared.restored)
    if prepared.on_resumed is not None:
        prepared.on_resumed()
    if prepared.restored is not None:
        prepared.restored.state.clear()  # the model and the optimizer have their own by now
    return trainer


def select_device(name: str | None) -> torch.device:
    """Return the named device, or this rank's GPU, or the CPU, and make a GPU this thread's current one.

    Raises ConfigError for a device that is absent, and for a GPU whose driver is too old for this torch.
    """
    count = torch.cuda.device_count()
    if name is None and count and not torch.cuda.is_available():
        raise ConfigError(
            f"{count} GPUs are here and CUDA {torch.version.cuda} cannot use them; update the driver, or give --device "
            "cpu to train without them"
        )
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ConfigError(f"--device {name}: {first_line(error)}; leave it out, or give cpu") from None
    if device.type == "cuda" and count:
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        if ranks > 1 and device.index is not None:
            raise ConfigError(f"--device {name} is one GPU, and {ranks} processes need one each; give cuda")
        index = int(os.environ.get("LOCAL_RANK", "0")) if device.index is None else device.index
        device = torch.device("cuda", index)
        if index >= count:
            raise ConfigError(
                f"{device} is not here, which has {count} GPUs; lower --processes, or name another device"
            )
        torch.cuda.set_device(device)
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {name}: {first_line(error)}; leave it out, or give cpu") from None
    return device
