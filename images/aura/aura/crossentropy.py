"""Cross entropy of a language model's head, without a matrix of all logits.

65,536 tokens by 32,000 words are 8.4 GB of float32, and autograd keeps them twice. Here a few rows at a time are taken
from hidden states to loss *and to gradients*, in the forward pass, so that nothing is kept and nothing is computed
again: the sum of losses has a gradient that only scales with what comes from above. Same idea as Liger Kernel's
FusedLinearCrossEntropy (arXiv:2410.10989, sec. 3.2), in plain torch operations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100
"""A target that counts for nothing, as in torch.nn.functional.cross_entropy."""
CHUNK_BYTES = {"cpu": 16 * 2**20, "cuda": 512 * 2**20}
"""Of float32 logits at once: what stays in a CPU's cache; on a GPU what is nothing beside a large model."""


def chunk_rows(vocab_size: int, device_type: str) -> int:
    """Rows of logits computed at once: a multiple of 16, at least 16."""
    rows = CHUNK_BYTES.get(device_type, CHUNK_BYTES["cuda"]) // (4 * vocab_size)
    return max(16, rows // 16 * 16)


@torch.compiler.disable
def summed_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, rows: int | None = None) -> Tensor:
    """Sum over targets that are not IGNORED of -log softmax(hidden @ weight.T)[target], a float32 scalar.

    Under autocast the products are in its dtype; softmax and sums are float32 always. `rows` is computed at once;
    None chooses by vocabulary and device. Its first derivatives are right; there are no second ones.
    """
    rows = rows or chunk_rows(weight_VD.shape[0], hidden_ND.device.type)
    # Asked here: inside of an autograd function gradients are off, and what needs them says so whether they are or not.
    wants_grad = torch.is_grad_enabled() and (hidden_ND.requires_grad or weight_VD.requires_grad)
    return _SummedCrossEntropy.apply(hidden_ND, weight_VD, targets_N, rows, wants_grad)


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, rows: int, wants_grad: bool
    ) -> Tensor:
        kind = hidden_ND.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight_VD.dtype
        wants_hidden, wants_weight = (wants_grad and wanted for wanted in ctx.needs_input_grad[:2])
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
                grad = logp.exp_()  # softmax; minus one at the target; nothing where the target is ignored
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
        return (
            None if grad_hidden is None else grad_hidden * grad_total.to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * grad_total).to(ctx.dtype),
            None,
            None,
            None,
        )
