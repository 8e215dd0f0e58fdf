"""AdamW in upstream's three groups, and the course of each group's learning rate.

Groups in this order: biases (never decayed), layers of days (a decay and a course of their own), everything else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field

from brain_to_text.model import GRUDecoder
from estiba.loop.schedule import WSD_DECAY, Schedule

CourseKind = Literal["cosine", "linear", "step", "multistep", "wsd"]
FUSED_ON = frozenset({"cpu", "cuda", "xpu", "mps"})
"""Devices that torch has a fused AdamW for: one pass over memory instead of a dozen."""


class Course(Schedule):
    """Upstream's schedules, which decay until a step of their own and stay at their floor then.

    cosine: from 0 at step 0 over the warm-up to the peak, then half a cosine to the floor. linear: from the peak to the
    floor, no warm-up (torch's LinearLR). step, multistep: times `factor` every `every` steps, or at the milestones (the
    guide's). wsd: warm-up, peak, and straight to the floor in the last fifth (arXiv:2405.18392).
    """

    course: CourseKind = "cosine"
    decay_steps: int = Field(ge=1)
    every: int = Field(default=50_000, ge=1)
    milestones: tuple[int, ...] = ()
    factor: float = Field(default=0.1, gt=0, le=1)

    def at(self, step: int) -> float:
        return self.peak * self._share(step)

    def _share(self, step: int) -> float:
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
    """Of all parameters that are trained. The model is on `device` already; only then can the optimizer be fused."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    biases = [p for name, p in trained if "gru.bias" in name or "out.bias" in name]
    days = [p for name, p in trained if "day_" in name]
    others = [p for name, p in trained if not ("day_" in name or "gru.bias" in name or "out.bias" in name)]
    groups: list[dict[str, Any]] = [
        {"params": biases, "weight_decay": 0.0, "group_type": "bias"},
        {"params": days, "weight_decay": weight_decay_day, "group_type": "day_layer"},
        {"params": others, "weight_decay": weight_decay, "group_type": "other"},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=lr, betas=betas, eps=epsilon, fused=device.type in FUSED_ON
    )


def set_day_rate(groups: Sequence[dict[str, Any]], rate: float) -> None:
    """The layers of days at a learning rate of their own, whatever the others have."""
    for group in groups:
        if group["group_type"] == "day_layer":
            group["lr"] = rate
