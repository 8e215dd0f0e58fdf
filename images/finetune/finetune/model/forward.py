"""One forward pass over a packed micro-batch: the logits and losses of its trained tokens alone."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy

from finetune.model.packed_attention import NO_MASK
from finetune.tokens.examples import PackedBatch


def logits_of(model: torch.nn.Module, batch: PackedBatch) -> torch.Tensor:
    """Return the logits [P, V] at the trained positions alone."""
    logits: torch.Tensor = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=NO_MASK.to(batch.input_ids.device),
        use_cache=False,
        logits_to_keep=batch.predictors,
        segments=batch.segments,
    ).logits[0]
    return logits


def token_losses(model: torch.nn.Module, batch: PackedBatch) -> torch.Tensor:
    """Return the float32 loss [P] of each trained token, in nats."""
    return cross_entropy(logits_of(model, batch).float(), batch.targets, reduction="none")
