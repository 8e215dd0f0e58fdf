"""AdamW, with states of 32 bits or of 8.

    optimizer = make_optimizer(model, "adamw", lr=3e-4, weight_decay=0.01, betas=(0.9, 0.95), device="cuda")

Two groups in this order: matrices, which decay, and the gains of norms, which do not. A schedule may set "lr" of both.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import nn
from torch.optim import Optimizer

from aura.model import Aura
from estiba.errors import ConfigError

Name = Literal["adamw", "adamw8bit"]
FUSED_ON = frozenset({"cpu", "cuda", "xpu", "mps"})
"""Devices that torch has a fused AdamW for: one pass over memory instead of a dozen."""


def make_optimizer(
    model: Aura,
    name: Name = "adamw",
    *,
    lr: float,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.95),
    device: torch.device | str = "cpu",
) -> Optimizer:
    """An optimizer of all the model's parameters, which are on `device` already.

    "adamw8bit" keeps moments in 8 bits, a block of 256 at a time (bitsandbytes; arXiv:2110.02861), except those of the
    embeddings, where 8 bits are unstable (sec. 2.3 there). Raises ConfigError on a value that cannot be, or where
    bitsandbytes is missing or does not work.
    """
    _check(lr=lr, weight_decay=weight_decay, betas=betas)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=torch.device(device).type in FUSED_ON)
    if name == "adamw8bit":
        return _eight_bits(groups, [model.embedding, model.head_VD], lr=lr, betas=betas, device=torch.device(device))
    raise ConfigError(f"there is no optimizer {name!r}; give adamw or adamw8bit")


def _eight_bits(
    groups: list[dict], in_32_bits: list[nn.Parameter], *, lr: float, betas: tuple[float, float], device: torch.device
) -> Optimizer:
    otherwise = "pass --optimizer adamw, which needs 6 bytes a parameter more"
    try:
        import bitsandbytes as bnb
    except (ImportError, OSError, RuntimeError) as error:  # a CUDA it was not built for ends as any of these
        raise ConfigError(
            f"--optimizer adamw8bit needs bitsandbytes, which does not import: {error}; {otherwise}"
        ) from error
    optimizer = bnb.optim.AdamW8bit(groups, lr=lr, betas=betas)
    bnb.optim.GlobalOptimManager.get_instance().override_config(in_32_bits, "optim_bits", 32)
    try:  # its kernels are looked for at the first step, which is late to learn that there are none
        trial = nn.Parameter(torch.zeros(4096, device=device))
        trial.grad = torch.ones_like(trial)
        bnb.optim.AdamW8bit([trial], lr=1.0).step()
        works = bool(trial.abs().min() > 0)
    except Exception as error:
        raise ConfigError(f"--optimizer adamw8bit: bitsandbytes fails on {device}: {error}; {otherwise}") from error
    if not works:
        raise ConfigError(
            f"--optimizer adamw8bit: bitsandbytes {bnb.__version__} does nothing on {device}; {otherwise}"
        )
    return optimizer


def _check(*, lr: float, weight_decay: float, betas: tuple[float, float]) -> None:
    if not (math.isfinite(lr) and lr > 0):
        raise ConfigError(f"learning rate {lr}: it must be more than 0; 3e-4 is a usual one")
    if not (math.isfinite(weight_decay) and weight_decay >= 0):
        raise ConfigError(f"weight decay {weight_decay}: it must be 0 or more; 0.01 is a usual one")
    if not all(0 <= beta < 1 for beta in betas):
        raise ConfigError(f"betas {betas}: each must be 0 or more and less than 1; 0.9 and 0.95 are usual")
