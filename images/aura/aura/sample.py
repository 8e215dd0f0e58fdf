"""What the model would write on, so that a person can read its Spanish getting better."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from aura.model import Aura
from estiba.errors import ConfigError


class Words(Protocol):
    """What is used of a tokenizer."""

    @property
    def eos_id(self) -> int | None: ...
    @property
    def pad_id(self) -> int: ...
    def encode_batch(self, texts: list[str]) -> list[list[int]]: ...
    def decode(self, ids: Sequence[int]) -> str: ...


@torch.no_grad()
def sample(
    model: Aura,
    tokenizer: Words,
    prompt: str,
    *,
    max_new_tokens: int = 60,
    temperature: float = 0.8,
    top_k: int | None = 50,
    seed: int = 42,
) -> str:
    """The prompt and up to `max_new_tokens` more, fewer where the model ends the document.

    Temperature 0 takes the likeliest token always; `top_k` None lets every token come. The same seed gives the same
    text on the same machine. Numbers are drawn from a generator of its own and the model's mode is put back: training
    goes on with the same bits, sampled or not. The model reads the last seq_length tokens.
    """
    if temperature < 0:
        raise ConfigError(f"temperature {temperature}: it must be 0 (always the likeliest token) or more")
    if top_k is not None and top_k < 1:
        raise ConfigError(f"top_k {top_k}: it must be 1 or more, or none for all tokens")
    shown = list(tokenizer.encode_batch([prompt])[0]) if prompt else []
    # Training separates documents by eos, so that a document begins after one; bos, if there is any, was never seen.
    ids = [*shown] if tokenizer.eos_id is None else [tokenizer.eos_id, *shown]
    if not ids:
        raise ConfigError("the prompt has no tokens, and the tokenizer has none to begin with; give a prompt")
    generator = torch.Generator().manual_seed(seed)  # on the CPU, so that every device draws the same numbers
    device = model.embedding.device
    was_training = model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            window_BT = torch.tensor([ids[-model.shape.seq_length :]], device=device)
            last_V = F.linear(model.hidden(window_BT)[0, -1], model.head_VD).float().cpu()
            last_V[tokenizer.pad_id] = -torch.inf  # never trained on, so its logit means nothing
            token = _draw(last_V, temperature, top_k, generator)
            if token == tokenizer.eos_id:
                break
            ids.append(token)
            shown.append(token)
    finally:
        model.train(was_training)
    return tokenizer.decode(shown)


def _draw(logits_V: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    kept = logits_V.topk(min(top_k or len(logits_V), len(logits_V)))
    chances = torch.softmax(kept.values / temperature, dim=0)
    return int(kept.indices[torch.multinomial(chances, 1, generator=generator)])
