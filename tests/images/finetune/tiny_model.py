"""Small models with random weights and their tokenizer, as directories that transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = (
    "El barco zarpa al alba con la bodega llena de trigo y vino hacia otro puerto. The ship sails at dawn. "
    "system user assistant Year Units Value Variable code: Dollars (millions) 0123456789,\n"
)
SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}


def make_tokenizer(*, template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Byte-level BPE with ChatML's control tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = template
    return fast


def build(
    folder: Path,
    kind: str = "llama",
    *,
    template: str | None = CHATML,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> Path:
    """Write a model of a kind (llama, qwen3, mistral with a window of 16, gemma3) and its tokenizer. Returns the
    folder."""
    tokenizer = make_tokenizer(template=template)
    sizes = {
        **SIZES,
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": 1,
        **changes,
    }
    torch.manual_seed(0)
    if kind == "qwen3":
        model: Any = Qwen3ForCausalLM(Qwen3Config(**sizes))
    elif kind == "mistral":
        model = MistralForCausalLM(MistralConfig(**{"sliding_window": 16, **sizes}))
    elif kind == "gemma3":
        model = Gemma3ForCausalLM(
            Gemma3TextConfig(**{"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"], **sizes})
        )
    else:
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    with torch.no_grad():  # logits of the size that trained models have
        model.get_input_embeddings().weight.mul_(20)
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
