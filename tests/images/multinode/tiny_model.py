"""Random models of three layers with a tokenizer of bytes, as directories that `from_pretrained` reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, PreTrainedTokenizerFast, Qwen3Config

VOCAB_SIZE = 259
KINDS = ("llama", "llama-tied", "qwen3", "gemma3")
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}


def build(folder: Path, kind: str = "llama", *, dtype: torch.dtype = torch.float32) -> Path:
    """Make a model whose output embeddings are tied to its inputs, except for `llama`. Returns its directory."""
    torch.manual_seed(0)
    config: Any
    if kind == "qwen3":
        config = Qwen3Config(**SIZES, tie_word_embeddings=True)
    elif kind == "gemma3":
        layers = ["sliding_attention", "full_attention", "sliding_attention"]
        config = Gemma3TextConfig(**SIZES, tie_word_embeddings=True, sliding_window=16, layer_types=layers)
    else:
        config = LlamaConfig(**SIZES, tie_word_embeddings=kind == "llama-tied")
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, and an end token."""
    vocabulary = {byte: index for index, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab={**vocabulary, "<eos>": len(vocabulary)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
