"""Before training: packed sequences must not see each other, and every adapter must learn."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import numpy as np
import torch

from estiba.errors import ConfigError, first_line
from estiba.log import get_logger
from estiba.training.precision import AmpContext
from estiba.training.prefetch import to_device
from finetune.model.adapters import untrained_adapters
from finetune.model.forward import logits_of, token_losses
from finetune.tokens.examples import Example, join, pack

logger = get_logger(__name__)

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 6e-2, torch.float16: 1e-2}
"""Largest accepted difference, as a share of the largest logit. A neighbour that is seen changes logits by half."""
TEST_EXAMPLES, TEST_TOKENS = 4, 512


def choose_attention(
    model: torch.nn.Module, examples: Sequence[Example], amp: AmpContext, device: torch.device
) -> bool:
    """Compare packed examples with each of their sequences alone. Returns whether to use `varlen_attn`.

    Raises ConfigError if a neighbour changes a logit in every way of computing.
    """
    examples = _few(examples)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), amp.forward():
            expected = torch.cat([_alone(model, example, device) for example in examples])
            if not bool(expected.isfinite().all()):
                raise ConfigError(
                    f"{type(model).__name__}: its outputs are not finite before anything is trained; its weights are "
                    f"damaged, or too large for --precision {amp.name}"
                )
            reasons = []
            for use_varlen in (True, False) if device.type == "cuda" and amp.dtype != torch.float32 else (False,):
                try:
                    found = logits_of(model, to_device(pack(examples, use_varlen=use_varlen), device)).float()
                except (RuntimeError, ImportError, TypeError, ValueError) as error:
                    reasons.append(first_line(error))
                    continue
                off = float((found - expected).abs().max() / expected.abs().max())
                if off <= TOLERANCE[amp.dtype]:
                    slower = f"; one mask for all of them, as varlen_attn fails: {reasons[0]}" if reasons else ""
                    logger.info(
                        "self-test: packed sequences do not see each other (logits differ by "
                        f"{off:.1e} of the largest{slower})"
                    )
                    return use_varlen
                reasons.append(f"logits differ by {off:.1e} of the largest")
    finally:
        model.train(was_training)
    raise ConfigError(
        f"{type(model).__name__}: sequences cannot be packed with this model ({'; '.join(reasons)}); choose a base "
        "model whose attention transformers can replace, such as Llama, Qwen, Mistral or Gemma"
    )


def check_gradients(
    model: torch.nn.Module,
    examples: Sequence[Example],
    amp: AmpContext,
    device: torch.device,
    *,
    use_varlen: bool = False,
) -> float:
    """One forward and backward pass whose gradients are discarded. Returns its seconds per token.

    Raises ConfigError if a trained tensor gets no gradient, or if the first loss is 0 or not finite.
    """
    started = time.perf_counter()
    with amp.forward():
        batch = to_device(pack(_few(examples), use_varlen=use_varlen), device)
        loss = token_losses(model, batch).mean()
    first = float(loss.detach())
    if not (first > 0 and math.isfinite(first)):
        raise ConfigError(f"the first loss is {first}: nothing is learnt from these records; look at the samples above")
    loss.backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    missing = list(untrained_adapters(model))
    model.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - started
    if missing:
        raise ConfigError(
            f"{len(missing)} trained tensors get no gradient, such as {missing[0]}; choose other --lora-targets"
        )
    return seconds / batch.input_ids.numel()


def _few(examples: Sequence[Example]) -> list[Example]:
    """Return a few short examples, each with at most two branches."""
    chosen: list[Example] = []
    for example in sorted(examples, key=lambda example: len(example.ids))[:TEST_EXAMPLES]:
        chosen.append(join(example.sequences()[:2]))
        if sum(len(one.ids) for one in chosen) > TEST_TOKENS:
            break
    return chosen


def _alone(model: torch.nn.Module, example: Example, device: torch.device) -> torch.Tensor:
    rows = []
    for sequence in example.sequences():
        ids = torch.from_numpy(sequence.ids.astype(np.int64))[None].to(device)
        positions = torch.from_numpy(np.flatnonzero(sequence.trained) - 1).to(device)
        rows.append(model(input_ids=ids, use_cache=False, logits_to_keep=positions).logits[0].float())
    return torch.cat(rows)
