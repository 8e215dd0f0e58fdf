"""Cross entropy of a language model's head without the full matrix of logits.

Logits for 65,536 tokens and a vocabulary of 32,000 take 8.4 GB in float32, and autograd keeps them twice. Here the
forward pass computes loss *and gradients*, a few rows at a time, so that nothing is kept or recomputed: the gradient of
a sum of losses only scales with the incoming gradient. The idea is that of Liger Kernel's FusedLinearCrossEntropy
(arXiv:2410.10989, sec. 3.2), in plain torch operations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100
"""The target to ignore, as in torch.nn.functional.cross_entropy."""
CHUNK_BYTES = {"cpu": 16 * 2**20, "cuda": 512 * 2**20}
"""Size of the float32 logits computed at once: fits a CPU's cache; small beside a large model on a GPU."""


def chunk_rows(vocab_size: int, device_type: str) -> int:
    """Return how many rows of logits to compute at once: a multiple of 16, at least 16."""
    rows = CHUNK_BYTES.get(device_type, CHUNK_BYTES["cuda"]) // (4 * vocab_size)
    return max(16, rows // 16 * 16)


@torch.compiler.disable
def summed_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, rows: int | None = None) -> Tensor:
    """Return the sum of -log softmax(hidden @ weight.T)[target] over targets that are not IGNORED, a float32 scalar.

    Under autocast, matrix products are in its dtype; softmax and sums are always float32. `rows` are computed at once;
    None chooses by vocabulary and device. Second derivatives are not supported.
    """
    rows = rows or chunk_rows(weight_VD.shape[0], hidden_ND.device.type)
    # Inside an autograd function, gradients are off and ctx.needs_input_grad ignores an enclosing no_grad.
    wants_grad = torch.is_grad_enabled() and (hidden_ND.requires_grad or weight_VD.requires_grad)
    return _SummedCrossEntropy.apply(hidden_ND, weight_VD, targets_N, rows, wants_grad)


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, rows: int, wants_grad: bool
    ) -> Tensor:
        kind = hidden_ND.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight_VD.dtype
        wants_hidden, wants_weight = (wants_grad and needed for needed in ctx.needs_input_grad[:2])
        with torch.autocast(kind, enabled=False):
            weight = weight_VD.to(dtype)
            total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
            grad_hidden = torch.empty_like(hidden_ND) if wants_hidden else None
            grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if wants_weight else None
            index = torch.arange(rows, device=hidden_ND.device)
            for start in range(0, hidden_ND.shape[0], rows):
                hidden = hidden_ND[start : start + rows].to(dtype)
                targets = targets_N[start : start + rows]
                counts = (targets != IGNORED).float()
                targets = targets.clamp(min=0)
                logp = torch.log_softmax(hidden @ weight.t(), dim=-1, dtype=torch.float32)
                at = index[: len(targets)]
                total -= (logp[at, targets] * counts).sum()
                if grad_hidden is None and grad_weight is None:
                    continue
                grad = logp.exp_()  # softmax, minus one at the target, zero where the target is ignored
                grad[at, targets] -= 1
                grad = grad.mul_(counts[:, None]).to(dtype)
                if grad_hidden is not None:
                    grad_hidden[start : start + rows] = grad @ weight
                if grad_weight is None:
                    continue
                if dtype == torch.float32:
                    grad_weight.addmm_(grad.t(), hidden)
                else:
                    grad_weight += grad.t() @ hidden
        ctx.grads = grad_hidden, grad_weight
        ctx.dtype = weight_VD.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grad_hidden, grad_weight = ctx.grads
        hidden = None if grad_hidden is None else grad_hidden * grad_total.to(grad_hidden.dtype)
        weight = None if grad_weight is None else (grad_weight * grad_total).to(ctx.dtype)
        return hidden, weight, None, None, None
