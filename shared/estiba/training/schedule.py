"""Learning-rate schedules. A schedule is fixed when a run starts, saved with its state and checked on a resume."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Kind = Literal["linear", "cosine", "wsd", "constant"]
WSD_DECAY = 0.2
"""The fraction of the steps in which a warm-up-stable-decay schedule decays (arXiv:2405.18392)."""


class Schedule(BaseModel):
    """Warm-up from zero to the peak, then a decay of the given kind until `steps`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    kind: Kind = "linear"
    peak: float = Field(gt=0)
    """Learning rate after warm-up."""
    steps: int = Field(ge=1)
    """Steps of the whole run."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up."""
    floor: float = Field(default=0.0, ge=0, le=1)
    """Learning rate at the end, as a fraction of the peak."""

    def at(self, step: int) -> float:
        """Return the learning rate of the step that leads from `step` to `step + 1`. Steps count from 0."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        length = max(1, self.steps - self.warmup_steps)
        done = min(1.0, (step - self.warmup_steps) / length)
        if self.kind == "constant":
            share = 1.0
        elif self.kind == "linear":
            share = 1.0 - done
        elif self.kind == "cosine":
            share = 0.5 * (1.0 + math.cos(math.pi * done))
        else:
            share = min(1.0, (1.0 - done) / WSD_DECAY)
        return self.peak * (self.floor + (1.0 - self.floor) * share)
