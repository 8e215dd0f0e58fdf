"""What a machine can hold and how fast it is: GPU memory of a training run, peak arithmetic, a quick measurement.

memory_needed(shape, batch_size=2, optimizer="adamw", checkpointing=None)       # bytes
checkpointing_for(shape, batch_size=2, optimizer="adamw", memory_bytes=...)     # only what memory asks for
"""

from __future__ import annotations

import time

import torch

from aura.crossentropy import CHUNK_BYTES, chunk_rows
from aura.model import Aura, Checkpointing, Shape
from aura.optimizer import Name
from estiba.errors import ConfigError

CONTEXT_BYTES = 1_500_000_000
"""What CUDA, cuBLAS and the allocator take before the first tensor (recalled, not measured)."""
FILLED = 0.95
"""Part of the memory that may be planned for; the rest is lost between blocks."""


# --- memory --------------------------------------------------------------------------------------------------------


def state_bytes(shape: Shape, optimizer: Name) -> int:
    """Parameters, gradients and moments, and the copy of the weights in bfloat16 that autocast keeps in a step."""
    words = shape.embed_size * shape.vocab_size * (1 if shape.tie_embeddings else 2)
    moments = 8 * shape.parameters if optimizer == "adamw" else 2 * shape.parameters + 6 * words
    return (4 + 4 + 2) * shape.parameters + moments


def activation_bytes(shape: Shape, checkpointing: Checkpointing) -> int:
    """Of one sequence, in bfloat16: what is kept for backward, counted tensor by tensor in model.Layer.

    A layer keeps ten tensors of the stream's width (its input twice, normed twice, q k v, turned q k, attention's
    output) and four of the feed-forward's; "selective" its input and the products; "full" its input.
    """
    width, ff, layers = shape.embed_size, shape.ff_width, shape.num_layers
    masks = 2 * width if shape.dropout else 0  # a byte each
    whole = 2 * (10 * width + 4 * ff) + masks
    segments = layers
    if checkpointing is None:
        a_token = layers * whole
    elif checkpointing == "selective":
        a_token = layers * 2 * (7 * width + 2 * ff) + whole
    else:
        segments = layers if checkpointing == "full" else min(int(checkpointing), layers)
        a_token = segments * 2 * width + -(-layers // segments) * whole
    backward = 2 * (4 * width + 3 * ff)  # gradients on their way through one layer
    head = 2 * 3 * width
    return shape.seq_length * (a_token + backward + head)


def memory_needed(
    shape: Shape, *, batch_size: int, optimizer: Name = "adamw", checkpointing: Checkpointing = None
) -> int:
    """Bytes of GPU memory that a training step takes, in bfloat16 with the chunked loss. An estimate, for choosing."""
    words = shape.vocab_size * shape.embed_size * (4 + 2)  # the head's gradient, and the head in bfloat16
    logits = min(batch_size * shape.seq_length, chunk_rows(shape.vocab_size, "cuda")) * shape.vocab_size * 10
    assert logits <= 3 * CHUNK_BYTES["cuda"] or chunk_rows(shape.vocab_size, "cuda") == 16
    activations = batch_size * activation_bytes(shape, checkpointing)
    return CONTEXT_BYTES + state_bytes(shape, optimizer) + words + logits + activations


def checkpointing_for(
    shape: Shape, *, batch_size: int, memory_bytes: int | None, optimizer: Name = "adamw"
) -> Checkpointing:
    """The least that makes the batch fit: None where it fits as it is, and where memory is not known (a CPU).

    Raises ConfigError where even "full" does not fit.
    """
    if memory_bytes is None:
        return None
    ways: tuple[Checkpointing, ...] = (None, "selective", "full")
    for how in ways:
        if memory_needed(shape, batch_size=batch_size, optimizer=optimizer, checkpointing=how) <= FILLED * memory_bytes:
            return how
    needed = memory_needed(shape, batch_size=batch_size, optimizer=optimizer, checkpointing="full")
    smaller = "a smaller --batch-size, " if batch_size > 1 else ""
    eight = "--optimizer adamw8bit, " if optimizer == "adamw" else ""
    raise ConfigError(
        f"{shape.parameters / 1e9:.2f}B parameters with batch {batch_size} need about {needed / 1e9:.1f} GB, also with "
        f"full checkpointing; there are {memory_bytes / 1e9:.1f} GB: take {smaller}{eight}or a smaller preset"
    )


# --- speed ---------------------------------------------------------------------------------------------------------


def measure(device: torch.device, *, at_least_s: float = 3.0) -> float:
    """Model FLOPs a second of this machine, forward and backward, on four layers of a shape that suits it."""
    if device.type == "cuda":
        shape = Shape(vocab_size=8192, embed_size=1536, num_layers=4, num_heads=12, seq_length=2048)
        batch_size, dtype = 4, torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    else:
        shape = Shape(vocab_size=8192, embed_size=256, num_layers=4, num_heads=4, seq_length=256)
        batch_size, dtype = 2, torch.float32
    model = Aura(shape, seed=0).to(device)
    tokens = torch.zeros(batch_size, shape.seq_length, dtype=torch.int64, device=device)

    def step() -> None:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = model.loss(tokens, tokens) / tokens.numel()
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    step()
    step()
    steps, began = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - began) < at_least_s:
        step()
        steps += 1
    return steps * tokens.numel() * shape.flops_per_token() / elapsed
