"""AdamW with 32-bit or 8-bit states.

It has two parameter groups: matrices, with weight decay, and the weights of norms, without.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import nn
from torch.optim import Optimizer

from aura.model.decoder import Aura
from estiba.errors import ConfigError

OptimizerName = Literal["adamw", "adamw8bit"]
FUSED_DEVICES = frozenset({"cpu", "cuda", "xpu", "mps"})
"""Devices for which torch has a fused AdamW: one pass over memory instead of a dozen."""


def make_optimizer(
    model: Aura,
    name: OptimizerName = "adamw",
    *,
    lr: float,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.95),
    device: torch.device | str = "cpu",
) -> Optimizer:
    """Return an optimizer for all parameters of a model on `device`.

    "adamw8bit" keeps moments in 8 bits in blocks of 256 (bitsandbytes; arXiv:2110.02861), except those of the
    embeddings, where 8 bits are unstable (sec. 2.3). Raises ConfigError for an invalid value, or if bitsandbytes is
    missing or does not work.
    """
    _check(lr=lr, weight_decay=weight_decay, betas=betas)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=torch.device(device).type in FUSED_DEVICES)
    if name == "adamw8bit":
        return _eight_bits(groups, [model.embedding, model.head_VD], lr=lr, betas=betas, device=torch.device(device))
    raise ConfigError(f"unknown optimizer {name!r}; give adamw or adamw8bit")


def _eight_bits(
    groups: list[dict], in_32_bits: list[nn.Parameter], *, lr: float, betas: tuple[float, float], device: torch.device
) -> Optimizer:
    remedy = "pass --optimizer adamw, which needs 6 more bytes per parameter"
    try:
        import bitsandbytes as bnb
    except (ImportError, OSError, RuntimeError) as error:  # the wrong CUDA version may raise any of these
        raise ConfigError(
            f"--optimizer adamw8bit needs bitsandbytes, which cannot be imported: {error}; {remedy}"
        ) from error
    optimizer = bnb.optim.AdamW8bit(groups, lr=lr, betas=betas)
    bnb.optim.GlobalOptimManager.get_instance().override_config(in_32_bits, "optim_bits", 32)
    try:  # kernels load at the first step; a missing one must be reported before training
        trial = nn.Parameter(torch.zeros(4096, device=device))
        trial.grad = torch.ones_like(trial)
        bnb.optim.AdamW8bit([trial], lr=1.0).step()
        works = bool(trial.abs().min() > 0)
    except Exception as error:
        raise ConfigError(f"--optimizer adamw8bit: bitsandbytes fails on {device}: {error}; {remedy}") from error
    if not works:
        raise ConfigError(f"--optimizer adamw8bit: bitsandbytes {bnb.__version__} does nothing on {device}; {remedy}")
    return optimizer


def _check(*, lr: float, weight_decay: float, betas: tuple[float, float]) -> None:
    if not (math.isfinite(lr) and lr > 0):
        raise ConfigError(f"learning rate {lr}: must be more than 0; 3e-4 is typical")
    if not (math.isfinite(weight_decay) and weight_decay >= 0):
        raise ConfigError(f"weight decay {weight_decay}: must be 0 or more; 0.01 is typical")
    if not all(0 <= beta < 1 for beta in betas):
        raise ConfigError(f"betas {betas}: each must be 0 or more and less than 1; 0.9 and 0.95 are typical")
