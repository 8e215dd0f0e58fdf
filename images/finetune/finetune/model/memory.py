"""How much memory and disk a run needs, before anything is loaded."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM

from estiba.errors import ConfigError
from estiba.log import get_logger
from estiba.memory import available_memory_bytes
from finetune.config import FinetuneConfig
from finetune.inputs import Inputs
from finetune.tokens.examples import Example

logger = get_logger(__name__)

SHARE_THAT_FITS = 0.97
CUDA_CONTEXT_BYTES = 0.6e9


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes on the device at the largest micro-batch."""

    parameters: int
    weights: float
    training_state: float
    """Gradients and moments of what trains."""
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.training_state + self.activations


def estimate_memory(
    model: torch.nn.Module,
    model_config: Any,
    config: FinetuneConfig,
    dtype: torch.dtype,
    *,
    tokens: int,
    trained_tokens: int,
    checkpoints_activations: bool,
) -> MemoryEstimate:
    """Estimate from the shapes alone; `model` may be on the meta device.

    Activations per token and layer: 34 widths without checkpointing (arXiv:2205.05198, sec. 4, without the attention
    scores, which no kernel here keeps), 2 with it. Logits are float32 at the trained positions, three times: the losses
    keep them, and their gradient has two copies. Autocast keeps a copy of float32 weights in half precision.
    """
    text = model_config.get_text_config()
    linear_layers = [
        part for name, part in model.named_modules() if isinstance(part, torch.nn.Linear) and "lm_head" not in name
    ]
    linear = sum(layer.weight.numel() for layer in linear_layers)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if text.tie_word_embeddings and model.get_output_embeddings() is not None:  # type: ignore[operator]
        parameters -= text.vocab_size * text.hidden_size
    size = torch.empty((), dtype=dtype).element_size()
    if config.method == "full":
        weights, trained = (4.0 + (size if size < 4 else 0)) * parameters, parameters
    else:
        weights = size * (parameters - linear) + (0.53 if config.method == "qlora" else size) * linear
        trained = config.lora_rank * sum(sum(layer.weight.shape) for layer in linear_layers)
        weights += 4.0 * trained
    moments = {"adamw8bit": 2.1, "paged_adamw8bit": 0.0, "paged_adamw": 0.0}.get(config.optimizer, 8.0)
    width = text.hidden_size * size
    per_token = 2 * width * text.num_hidden_layers + 34 * width
    if not checkpoints_activations:
        per_token = 34 * width * text.num_hidden_layers
    return MemoryEstimate(
        parameters=parameters,
        weights=weights,
        training_state=(4.0 + moments) * trained,
        activations=float(tokens * per_token + 3 * 4 * trained_tokens * text.vocab_size),
    )


def check_memory(inputs: Inputs, config: FinetuneConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Log what the run needs. Raises ConfigError if the GPU's memory or the output's disk is too small."""
    model_config = inputs.base.config
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(model_config, trust_remote_code=False)
    longest = _largest_batch(inputs.training.examples, config.batch_size)
    tokens, trained = sum(len(one.ids) for one in longest), sum(one.trained_tokens for one in longest)
    need = estimate_memory(
        model,
        model_config,
        config,
        dtype,
        tokens=tokens,
        trained_tokens=trained,
        checkpoints_activations=config.checkpoints_activations(device.type),
    )
    words = (
        f"{need.parameters / 1e6:,.0f}M parameters, {config.method}, up to {tokens:,} tokens in a micro-batch: "
        f"{need.total / 1e9:.1f} GB"
    )
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        if need.total + CUDA_CONTEXT_BYTES > SHARE_THAT_FITS * total:
            quantise = "" if config.method == "qlora" else "--method qlora, "
            raise ConfigError(
                f"{words}, and {torch.cuda.get_device_name(device)} has {total / 1e9:.1f} GB; pass {quantise}a smaller "
                "--batch-size or --max-sequence-length, or take a larger GPU"
            )
        words += f" of {total / 1e9:.1f} GB"
    elif (available := available_memory_bytes()) is not None:
        words += f" of {available / 1e9:.1f} GB"
        if need.weights + need.training_state > available:  # what cannot fit whatever the activations take
            raise ConfigError(
                f"{words} of memory that is available on this machine; use a machine with a GPU or more memory, or a "
                "smaller base model"
            )
    logger.info(words)
    _check_disk(config.output_dir, need.parameters * 2)


def _largest_batch(examples: Sequence[Example], batch_size: int) -> list[Example]:
    return sorted(examples, key=lambda example: len(example.ids), reverse=True)[:batch_size]


def _check_disk(output_dir: str, merged_bytes: int) -> None:
    folder = Path(output_dir)
    if "://" in output_dir:
        folder = Path(tempfile.gettempdir())
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < 1.1 * merged_bytes:
        raise ConfigError(
            f"{folder}: {free / 1e9:.1f} GB free, and the merged model needs {merged_bytes / 1e9:.1f} GB; use a larger "
            "volume (VolumeSizeInGB)"
        )
