"""AdamW with upstream's three parameter groups, and the learning-rate schedules of upstream and the guide.

The groups, in order: biases (no weight decay), per-day input layers (with their own decay and schedule), the rest.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pydantic import Field

from brain_to_text.model import GRUDecoder
from estiba.training.schedule import WSD_DECAY, Schedule

DAY_GROUP = "day_layer"
FUSED_ON = frozenset({"cpu", "cuda", "xpu", "mps"})
"""Devices for which torch has a fused AdamW, which makes one pass over memory instead of a dozen."""


class LearningRateSchedule(Schedule):
    """Decays until `decay_steps`, and stays at the floor afterwards.

    cosine: warm-up from 0 to the peak, then half a cosine to the floor. linear: from the peak to the floor without
    warm-up, as torch's LinearLR. step and multistep (from the guide): multiplied by `factor` every `every` steps, or at
    each milestone. wsd: warm-up, constant, then linear to the floor in the last fifth (arXiv:2405.18392).
    """

    course: Literal["cosine", "linear", "step", "multistep", "wsd"] = "cosine"
    """Used instead of `kind`. Checkpoints store the schedule under these field names."""
    decay_steps: int = Field(ge=1)
    every: int = Field(default=50_000, ge=1)
    milestones: tuple[int, ...] = ()
    factor: float = Field(default=0.1, gt=0, le=1)

    def at(self, step: int) -> float:
        return self.peak * self._fraction_of_peak(step)

    def _fraction_of_peak(self, step: int) -> float:
        if self.course == "step":
            return self.factor ** (step // self.every)
        if self.course == "multistep":
            return self.factor ** sum(step >= milestone for milestone in self.milestones)
        if self.course == "linear":
            return 1.0 + (self.floor - 1.0) * min(1.0, step / self.decay_steps)
        if step < self.warmup_steps:
            return step / self.warmup_steps
        done = min(1.0, (step - self.warmup_steps) / max(1, self.decay_steps - self.warmup_steps))
        if self.course == "wsd":
            return self.floor + (1.0 - self.floor) * min(1.0, (1.0 - done) / WSD_DECAY)
        return self.floor + (1.0 - self.floor) * 0.5 * (1.0 + math.cos(math.pi * done))


def make_optimizer(
    model: GRUDecoder,
    *,
    lr: float,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
    weight_decay_day: float,
    device: torch.device,
) -> torch.optim.AdamW:
    """Return an optimizer for all trainable parameters. The model must be on `device` already, as fused AdamW needs."""
    groups: list[dict[str, Any]] = [
        {"params": [], "weight_decay": 0.0, "group_type": "bias"},
        {"params": [], "weight_decay": weight_decay_day, "group_type": DAY_GROUP},
        {"params": [], "weight_decay": weight_decay, "group_type": "other"},
    ]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_bias = "gru.bias" in name or "out.bias" in name
            groups[0 if is_bias else 1 if "day_" in name else 2]["params"].append(parameter)
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=lr, betas=betas, eps=epsilon, fused=device.type in FUSED_ON
    )
