"""Adam and AdamW, also with 8-bit states and in paged memory (bitsandbytes)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from estiba.errors import ConfigError, first_line
from estiba.log import get_logger
from finetune.config import OptimizerName

logger = get_logger(__name__)

BETAS = (0.9, 0.999)


def make_optimizer(
    parameters: Iterable[torch.nn.Parameter],
    name: OptimizerName,
    *,
    lr: float,
    weight_decay: float,
    device: torch.device,
) -> torch.optim.Optimizer:
    """Return the optimizer of the trained parameters: matrices with weight decay, vectors without.

    Raises ConfigError if bitsandbytes does not work on the device.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in trained if parameter.ndim >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if name in ("adam", "adamw"):
        kind = torch.optim.Adam if name == "adam" else torch.optim.AdamW
        return kind(groups, lr=lr, betas=BETAS, fused=True)
    return _from_bitsandbytes(groups, name, lr=lr, device=device)


def _from_bitsandbytes(
    groups: list[dict[str, Any]], name: OptimizerName, *, lr: float, device: torch.device
) -> torch.optim.Optimizer:
    remedy = "pass --optimizer adamw, which needs more memory"
    try:
        import bitsandbytes as bnb

        is_paged = name.startswith("paged")
        if is_paged and device.type == "cpu":
            logger.warning(f"--optimizer {name}: a CPU has no paged memory; its states are kept in plain memory")
            is_paged = False
        kind = bnb.optim.AdamW8bit if name.endswith("8bit") else bnb.optim.AdamW
        if is_paged:
            kind = bnb.optim.PagedAdamW8bit if name.endswith("8bit") else bnb.optim.PagedAdamW
        trial = torch.nn.Parameter(torch.zeros(4096, device=device))
        trial.grad = torch.ones_like(trial)
        kind([trial], lr=1.0).step()  # kernels load at the first step
        if not bool(trial.detach().abs().min() > 0):
            raise RuntimeError(f"bitsandbytes {bnb.__version__} does nothing there")
        optimizer: torch.optim.Optimizer = kind(groups, lr=lr, betas=BETAS)
    except Exception as error:
        raise ConfigError(
            f"--optimizer {name}: bitsandbytes does not work on {device} ({first_line(error)}); {remedy}"
        ) from None
    return optimizer
