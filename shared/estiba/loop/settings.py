"""What a loop can be told."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from estiba.loop.schedule import Schedule

Precision = Literal["auto", "float32", "bfloat16", "float16"]


class Settings(BaseModel):
    """Everything but the work itself."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    schedule: Schedule
    seed: int = 42
    clip: float | None = Field(default=1.0, gt=0)
    """Largest norm of all gradients together; None does not clip."""
    precision: Precision = "auto"
    """auto: bfloat16 where the GPU has it, else float16 with a scaled loss; float32 on a CPU."""
    compile: bool = False
    """torch.compile the model: minutes at the start, faster steps."""
    deterministic: bool = False
    """Refuse operations on a GPU whose result depends on timing; slower there."""
    evaluate_every: int | None = Field(default=None, ge=1)
    """Steps between evaluations; None evaluates at the end alone."""
    save_every: int | None = Field(default=None, ge=1)
    """Steps between checkpoints."""
    save_every_s: float | None = Field(default=600.0, gt=0)
    """Seconds between checkpoints; None saves by steps alone."""
    log_every: int = Field(default=10, ge=1)
    """Steps between lines of metrics."""
    accept_changed_plan: bool = False
    """Go on from a checkpoint that was made with another schedule, data, seed or batch."""
