"""Sample text from the model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from aura.model.decoder import Aura
from aura.tokenizer.loading import Tokenizer
from estiba.errors import ConfigError


@torch.no_grad()
def sample(
    model: Aura,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int = 60,
    temperature: float = 0.8,
    top_k: int | None = 50,
    seed: int = 42,
) -> str:
    """Return the prompt and up to `max_new_tokens` generated tokens, fewer if the model ends the document.

    Temperature 0 picks the likeliest token; `top_k` None samples from all tokens. The same seed gives the same text on
    the same machine. The global random state and the model's mode do not change, so training continues bit for bit. The
    model reads the last seq_length tokens.
    """
    if temperature < 0:
        raise ConfigError(f"temperature {temperature}: must be 0 (the likeliest token) or more")
    if top_k is not None and top_k < 1:
        raise ConfigError(f"top_k {top_k}: must be 1 or more, or none for all tokens")
    shown = list(tokenizer.encode_batch([prompt])[0]) if prompt else []
    ids = [tokenizer.eos_id, *shown]  # in training, documents follow an eos; the model never saw a bos
    generator = torch.Generator().manual_seed(seed)  # on the CPU, so that every device draws the same numbers
    device = model.embedding.device
    was_training = model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            window_BT = torch.tensor([ids[-model.config.seq_length :]], device=device)
            last_V = F.linear(model.hidden(window_BT)[0, -1], model.head_VD).float().cpu()
            last_V[tokenizer.pad_id] = -torch.inf  # never trained, so its logit means nothing
            token = _draw(last_V, temperature, top_k, generator)
            if token == tokenizer.eos_id:
                break
            ids.append(token)
            shown.append(token)
    finally:
        model.train(was_training)
    return tokenizer.decode(shown)


def sample_line(step: int, text: str) -> str:
    """Return one log line, with line breaks in the text replaced by spaces."""
    return f"sample at step {step}: {' '.join(text.split())}"


def _draw(logits_V: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    kept = logits_V.topk(min(top_k or len(logits_V), len(logits_V)))
    probabilities = torch.softmax(kept.values / temperature, dim=0)
    return int(kept.indices[torch.multinomial(probabilities, 1, generator=generator)])
