"""Estimate the GPU memory of a training run and measure the speed of this machine."""

from __future__ import annotations

import torch
from torch.utils import benchmark

from aura.model.cross_entropy import chunk_rows
from aura.model.decoder import Aura, Checkpointing, ModelConfig
from aura.model.optimizer import OptimizerName
from estiba.errors import ConfigError

CONTEXT_BYTES = 1_500_000_000
"""Memory that CUDA, cuBLAS and the allocator need before the first tensor (from experience, not measured)."""
USABLE_MEMORY = 0.95
"""Fraction of GPU memory to plan for; the rest is lost to fragmentation."""


def state_bytes(config: ModelConfig, optimizer: OptimizerName) -> int:
    """Return the size of parameters, gradients, moments, and the bfloat16 copy of the weights that autocast caches."""
    embeddings = config.embed_size * config.vocab_size * (1 if config.tie_embeddings else 2)
    moments = 8 * config.parameters if optimizer == "adamw" else 2 * config.parameters + 6 * embeddings
    return (4 + 4 + 2) * config.parameters + moments


def activation_bytes(config: ModelConfig, checkpointing: Checkpointing) -> int:
    """Return the size of what backward keeps for one sequence in bfloat16, counting the tensors of decoder.Layer.

    A layer keeps ten tensors of the stream's width (its input twice, normed twice, q k v, rotated q k, attention's
    output) and four of the feed-forward's; "selective" its input and the products; "full" its input.
    """
    width, ff, layers = config.embed_size, config.ff_width, config.num_layers
    dropout_masks = 2 * width if config.dropout else 0  # one byte each
    per_layer = 2 * (10 * width + 4 * ff) + dropout_masks
    if checkpointing is None:
        per_token = layers * per_layer
    elif checkpointing == "selective":
        per_token = layers * 2 * (7 * width + 2 * ff) + per_layer
    else:
        segments = layers if checkpointing == "full" else min(int(checkpointing), layers)
        per_token = segments * 2 * width + -(-layers // segments) * per_layer
    gradients = 2 * (4 * width + 3 * ff)  # in flight through one layer
    head = 2 * 3 * width
    return config.seq_length * (per_token + gradients + head)


def memory_needed(
    config: ModelConfig, *, batch_size: int, optimizer: OptimizerName = "adamw", checkpointing: Checkpointing = None
) -> int:
    """Estimate the GPU memory (bytes) of a training step in bfloat16 with the chunked loss."""
    head = config.vocab_size * config.embed_size * (4 + 2)  # its gradient, and its bfloat16 copy
    rows = min(batch_size * config.seq_length, chunk_rows(config.vocab_size, "cuda"))
    logits = rows * config.vocab_size * 10
    activations = batch_size * activation_bytes(config, checkpointing)
    return CONTEXT_BYTES + state_bytes(config, optimizer) + head + logits + activations


def checkpointing_for(
    config: ModelConfig, *, batch_size: int, memory_bytes: int | None, optimizer: OptimizerName = "adamw"
) -> Checkpointing:
    """Return the least checkpointing with which the batch fits; None also if the memory is unknown (a CPU).

    Raises ConfigError if even "full" does not fit.
    """
    if memory_bytes is None:
        return None
    needed = 0
    modes: tuple[Checkpointing, ...] = (None, "selective", "full")
    for mode in modes:
        needed = memory_needed(config, batch_size=batch_size, optimizer=optimizer, checkpointing=mode)
        if needed <= USABLE_MEMORY * memory_bytes:
            return mode
    smaller_batch = "a smaller --batch-size, " if batch_size > 1 else ""
    eight_bit = "--optimizer adamw8bit, " if optimizer == "adamw" else ""
    raise ConfigError(
        f"{config.parameters / 1e9:.2f}B parameters with batch {batch_size} need about {needed / 1e9:.1f} GB even with "
        f"full checkpointing; there are {memory_bytes / 1e9:.1f} GB: pass {smaller_batch}{eight_bit}or a smaller preset"
    )


def measure(device: torch.device, *, at_least_s: float = 3.0) -> float:
    """Measure model FLOPs/s of forward and backward, on four layers of a size that suits the device."""
    if device.type == "cuda":
        config = ModelConfig(vocab_size=8192, embed_size=1536, num_layers=4, num_heads=12, seq_length=2048)
        batch_size, dtype = (
            4,
            torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16,
        )
    else:
        config = ModelConfig(vocab_size=8192, embed_size=256, num_layers=4, num_heads=4, seq_length=256)
        batch_size, dtype = 2, torch.float32
    model = Aura(config, seed=0).to(device)
    tokens = torch.zeros(batch_size, config.seq_length, dtype=torch.int64, device=device)

    def step() -> None:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = model.loss(tokens, tokens) / tokens.numel()
        loss.backward()

    timer = benchmark.Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())
    seconds_per_step = timer.blocked_autorange(min_run_time=at_least_s).median
    return tokens.numel() * config.flops_per_token() / seconds_per_step
