"""`TrainingConfig`: the settings that every training image has. `TrainerConfig`: those of the trainer."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from estiba.config import Config
from estiba.platform.contract import checkpoint_dir
from estiba.training.schedule import Schedule

if TYPE_CHECKING:
    from estiba.checkpoint.retention import Retention

Precision = Literal["auto", "float32", "bfloat16", "float16"]


class TrainerConfig(BaseModel):
    """The trainer's settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    schedule: Schedule
    """Learning rates and length of the run."""
    seed: int = 42
    """Seed of dropout and of all other randomness in a step."""
    clip: float | None = Field(default=1.0, gt=0)
    """Max gradient norm; None disables clipping."""
    precision: Precision = "auto"
    """auto: bfloat16 where the GPU supports it, else float16 with a scaled loss; float32 on a CPU."""
    compile: bool = False
    """torch.compile the model: minutes at the start, faster steps."""
    deterministic: bool = False
    """Refuse operations on a GPU whose result depends on timing; slower there."""
    evaluate_every: int | None = Field(default=None, ge=1)
    """Steps between evaluations; None evaluates only at the end."""
    save_every: int | None = Field(default=None, ge=1)
    """Steps between checkpoints; None saves only by time."""
    save_every_s: float | None = Field(default=600.0, gt=0)
    """Seconds between checkpoints; None saves only by steps."""
    log_every: int = Field(default=10, ge=1)
    """Steps between lines of metrics."""
    accept_changed_plan: bool = False
    """Resume from a checkpoint whose run fingerprint differs."""


class TrainingConfig(Config):
    """The settings of a training image that runs in one process. An image adds its own and overrides defaults."""

    best_metric: ClassVar[str] = "val_loss"
    """The evaluation metric that `keep_best` ranks by; lower is better."""

    seed: Annotated[int, Field(ge=0)] = 42
    """Seed of the first weights, the order of the data and dropout."""
    checkpoint_path: str = Field(default_factory=lambda: str(checkpoint_dir()))
    """Directory for checkpoints, or s3://. It outlives a spot host; the outputs do not."""
    checkpoint_upload: str | None = None
    """An s3:// prefix that every checkpoint is also copied to, and restored from where the directory has none."""
    save_steps: Annotated[int, Field(ge=1)] | None = None
    """Steps between checkpoints; default is at each evaluation."""
    save_every_s: Annotated[float, Field(gt=0)] | None = 600.0
    """Seconds between checkpoints, besides --save-steps; none saves by steps alone."""
    keep_last: Annotated[int, Field(ge=2)] = 3
    """How many of the newest checkpoints to keep."""
    keep_every: Annotated[int, Field(ge=1)] | None = None
    """Also keep every checkpoint whose step is a multiple of this."""
    keep_best: Annotated[int, Field(ge=0)] = 0
    """Also keep this many of the best checkpoints by evaluation."""
    accept_changed_plan: bool = False
    """Resume from a checkpoint though schedule, data, batch size or seed have changed."""
    precision: Precision = "auto"
    """auto is bfloat16 where the GPU supports it, else float16 with a scaled loss; float32 on a CPU."""
    compile: bool = False
    """torch.compile: a minute or more at the start, faster steps."""
    device: str | None = None
    """Torch device; default is the GPU if there is one, else the CPU."""
    deterministic: bool = False
    """On a GPU, use only operations that give the same bits every time; slower. A CPU always does."""

    def trainer_config(self, *, schedule: Schedule, **settings: Any) -> TrainerConfig:
        """Return the trainer's settings: those of this configuration, overridden by `settings`."""
        own = {
            "seed": self.seed,
            "precision": self.precision,
            "compile": self.compile,
            "deterministic": self.deterministic,
            "save_every": self.save_steps or settings.get("evaluate_every"),
            "save_every_s": self.save_every_s,
            "accept_changed_plan": self.accept_changed_plan,
        }
        return TrainerConfig(schedule=schedule, **{**own, **settings})

    def retention(self) -> Retention:
        """Return which checkpoints to keep."""
        from estiba.checkpoint.retention import Retention

        return Retention(
            keep_last=self.keep_last, keep_every=self.keep_every, keep_best=self.keep_best, metric=self.best_metric
        )


class MultiProcessTrainingConfig(TrainingConfig):
    """The settings of a training image that trains one model in several processes, one for each GPU."""

    processes: Annotated[int, Field(ge=0)] = 0
    """Processes that train together on this host; 0 is one for each GPU, or one on a CPU."""

    def rank_count(self) -> int:
        """Return the number of ranks to start; 1 in a process that is a rank already."""
        if "WORLD_SIZE" in os.environ or (self.device and not self.processes):
            return 1
        if self.processes:
            return self.processes
        import torch

        return max(1, torch.cuda.device_count())
