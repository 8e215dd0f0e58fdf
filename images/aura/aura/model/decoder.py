"""The model: a Llama decoder, whose weights export to a Hugging Face directory (artifacts/export.py).

    model = Aura(ModelConfig(vocab_size=16384, embed_size=768, num_layers=12, num_heads=12, seq_length=1024), seed=42)
    loss = model.loss(tokens_BT, targets_BT) / targets_BT.numel()

RMSNorm before attention and feed-forward, rotary positions, SwiGLU, no biases. q, k and v share one matrix, and so do
gate and up. Parameters are float32; under autocast the layers and the residual stream run in its dtype.

Shapes: B sequences, T tokens, D embed_size, H heads, E head size, F ff_size, V vocabulary, N = B * T.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from aura.model.cross_entropy import summed_cross_entropy
from estiba.errors import ConfigError

NORM_EPS = 1e-5
Checkpointing = Literal["full", "selective"] | int | None
"""What backward recomputes instead of keeping: nothing (None), every layer ("full"), everything but matrix products and
attention ("selective"), or this number of segments of layers, whose inputs alone are kept."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture."""

    vocab_size: int
    embed_size: int
    num_layers: int
    num_heads: int
    seq_length: int
    """Maximum sequence length."""
    ff_size: int | None = None
    """Width of the feed-forward layer; None means 8/3 of embed_size, rounded up to a multiple of 256 (2560 -> 6912)."""
    dropout: float = 0.0
    """Dropout of embeddings and of the output of attention and feed-forward; in training only."""
    rope_theta: float = 10_000.0
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        for name in ("vocab_size", "embed_size", "num_layers", "num_heads", "seq_length", "ff_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be 1 or more")
        if self.embed_size % (2 * self.num_heads):
            fitting = [n for n in range(1, self.embed_size + 1) if self.embed_size % (2 * n) == 0]
            near = sorted(fitting, key=lambda n: abs(n - self.num_heads))[:3]
            raise ConfigError(
                f"embed_size {self.embed_size} over num_heads {self.num_heads} gives heads of size "
                f"{self.embed_size / self.num_heads:g}, but rotary positions need an even number; with this "
                f"embed_size, num_heads can be {' or '.join(map(str, sorted(near)))}"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"dropout is {self.dropout}; it must be 0 or more and less than 1")
        if self.rope_theta <= 0:
            raise ConfigError(f"rope_theta is {self.rope_theta}; it must be positive (Llama's is 10000)")
        if self.ff_size is None:
            object.__setattr__(self, "ff_size", 256 * math.ceil(self.embed_size * 8 / 3 / 256))

    @property
    def head_size(self) -> int:
        return self.embed_size // self.num_heads

    @property
    def ff_width(self) -> int:
        """ff_size, never None."""
        assert self.ff_size is not None
        return self.ff_size

    @property
    def layer_parameters(self) -> int:
        return 4 * self.embed_size**2 + 3 * self.embed_size * self.ff_width + 2 * self.embed_size

    @property
    def parameters(self) -> int:
        """Number of parameters; tied embeddings count once."""
        matrices = 1 if self.tie_embeddings else 2
        return self.num_layers * self.layer_parameters + self.embed_size * (matrices * self.vocab_size + 1)

    @property
    def parameters_without_embeddings(self) -> int:
        """Parameters of layers and norms, which the name of a size, such as 2.5B, usually counts."""
        return self.num_layers * self.layer_parameters + self.embed_size

    def flops_per_token(self, seq_length: int | None = None) -> float:
        """Return model FLOPs of forward and backward for one token: six for each weight, and causal attention's.

        What activation checkpointing recomputes does not count, as usual for MFU. Source: arXiv:2204.02311, appendix B.
        """
        weights = self.num_layers * self.layer_parameters + self.embed_size * self.vocab_size
        return 6.0 * weights + 6.0 * self.num_layers * self.embed_size * (seq_length or self.seq_length)


def rounded_vocabulary(vocab_size: int) -> int:
    """Return the rows of the embeddings: matrix products are faster with multiples of 64."""
    return -(-vocab_size // 64) * 64


class Aura(nn.Module):
    """A decoder with its loss. Initialization depends on `seed` alone, on every device."""

    cos_TE: Tensor
    sin_TE: Tensor

    def __init__(self, config: ModelConfig, *, seed: int, checkpointing: Checkpointing = None) -> None:
        super().__init__()
        self.config = config
        self.checkpointing: Checkpointing = checkpointing
        self.embedding = _matrix(config.vocab_size, config.embed_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.embed_size)
        self.head = None if config.tie_embeddings else _matrix(config.vocab_size, config.embed_size)
        cos_TE, sin_TE = rotary(config.seq_length, config.head_size, config.rope_theta)
        self.register_buffer("cos_TE", cos_TE, persistent=False)
        self.register_buffer("sin_TE", sin_TE, persistent=False)
        self.initialise(seed)

    @property
    def head_VD(self) -> Tensor:
        return self.embedding if self.head is None else self.head

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None) -> Tensor:
        """Return logits [B, T, V], or the loss if targets are given, because DDP wraps only `forward`."""
        if targets_BT is not None:
            return self.loss(tokens_BT, targets_BT)
        return F.linear(self.hidden(tokens_BT), self.head_VD)

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Return the sum of cross entropies (nats) over targets that are not -100, a float32 scalar."""
        return summed_cross_entropy(self.hidden(tokens_BT).flatten(0, 1), self.head_VD, targets_BT.flatten())

    def hidden(self, tokens_BT: Tensor) -> Tensor:
        """Return the hidden states [B, T, D] before the head. Raises ConfigError if T exceeds seq_length."""
        length = tokens_BT.shape[1]
        if length > self.config.seq_length:
            raise ConfigError(f"{length} tokens in a sequence; this model reads {self.config.seq_length} at most")
        x_BTD = F.embedding(tokens_BT, self.embedding)
        kind = tokens_BT.device.type
        if torch.is_autocast_enabled(kind):
            x_BTD = x_BTD.to(torch.get_autocast_dtype(kind))
        x_BTD = F.dropout(x_BTD, self.config.dropout, self.training)
        cos_TE = self.cos_TE[:length, None].to(x_BTD.dtype)
        sin_TE = self.sin_TE[:length, None].to(x_BTD.dtype)
        for run in self._segments():
            x_BTD = run(x_BTD, cos_TE, sin_TE)
        return self.norm(x_BTD)

    def _segments(self) -> list[Callable[..., Tensor]]:
        """Return the layers as functions, wrapped for activation checkpointing; recomputation repeats dropout."""
        layers = list(self.layers)
        mode = self.checkpointing
        if mode is None or not self.training or not torch.is_grad_enabled():
            return [*layers]
        recomputed: Callable[..., Any] = partial(checkpoint, use_reentrant=False, preserve_rng_state=True)
        if mode == "full":
            return [partial(recomputed, layer) for layer in layers]
        if mode == "selective":
            context = partial(create_selective_checkpoint_contexts, SAVED_OPERATIONS)
            return [partial(recomputed, layer, context_fn=context) for layer in layers]
        assert isinstance(mode, int) and mode >= 1, mode
        size = math.ceil(len(layers) / mode)
        return [partial(recomputed, partial(_run_layers, layers[i : i + size])) for i in range(0, len(layers), size)]

    @torch.no_grad()
    def initialise(self, seed: int, std_of: InitialStd | None = None) -> None:
        """Draw matrices from a normal distribution with the standard deviations of `std_of` (default: initial_std)."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                std = (std_of or initial_std)(name, parameter.shape[1], self.config)
                parameter.normal_(0.0, std, generator=generator)


InitialStd = Callable[[str, int, ModelConfig], float]
"""The standard deviation of a matrix's initial weights: of its name, its number of inputs and the model."""


def initial_std(name: str, inputs: int, config: ModelConfig) -> float:
    """Return 1 / sqrt(D) for the embedding and sqrt(2 / 5D) (arXiv:1910.05895) for the others.

    It is less where a matrix writes to the residual stream (GPT-2). Chosen by benchmarks/aura_init.py.
    """
    del inputs
    std = math.sqrt((1.0 if name == "embedding" else 0.4) / config.embed_size)
    return std / math.sqrt(2 * config.num_layers) if writes_to_stream(name) else std


def writes_to_stream(name: str) -> bool:
    """Return whether a matrix's outputs are added to the residual stream."""
    return name.endswith((".out", ".down"))


class Layer(nn.Module):
    """Attention and feed-forward, each with a residual connection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.dropout = config.num_heads, config.dropout
        self.attention_norm = RMSNorm(config.embed_size)
        self.qkv = _matrix(3 * config.embed_size, config.embed_size)
        self.out = _matrix(config.embed_size, config.embed_size)
        self.ff_norm = RMSNorm(config.embed_size)
        self.gate_up = _matrix(2 * config.ff_width, config.embed_size)
        self.down = _matrix(config.embed_size, config.ff_width)

    def forward(self, x_BTD: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
        x_BTD = x_BTD + self._drop(self._attend(self.attention_norm(x_BTD), cos_TE, sin_TE))
        gate_BTF, up_BTF = F.linear(self.ff_norm(x_BTD), self.gate_up).chunk(2, dim=-1)
        return x_BTD + self._drop(F.linear(F.silu(gate_BTF) * up_BTF, self.down))

    def _attend(self, x_BTD: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
        batch, length, width = x_BTD.shape
        qkv_BTHE = F.linear(x_BTD, self.qkv).view(batch, length, 3 * self.heads, width // self.heads)
        qk_BTHE, v_BTHE = qkv_BTHE.split((2 * self.heads, self.heads), dim=2)
        qk_BHTE = rotate(qk_BTHE, cos_TE, sin_TE).transpose(1, 2)
        q_BHTE, k_BHTE = qk_BHTE.chunk(2, dim=1)
        y_BHTE = F.scaled_dot_product_attention(q_BHTE, k_BHTE, v_BTHE.transpose(1, 2), is_causal=True)
        return F.linear(y_BHTE.transpose(1, 2).reshape(batch, length, width), self.out)

    def _drop(self, x_BTD: Tensor) -> Tensor:
        return F.dropout(x_BTD, self.dropout, self.training) if self.dropout else x_BTD


class RMSNorm(nn.Module):
    """Source: arXiv:1910.07467."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x_BTD: Tensor) -> Tensor:
        # Autocast would return float32; the kernel computes in float32 and returns its input's dtype.
        with torch.autocast(x_BTD.device.type, enabled=False):
            return F.rms_norm(x_BTD, self.weight.shape, self.weight.to(x_BTD.dtype), NORM_EPS)


def _run_layers(layers: list[nn.Module], x_BTD: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    for layer in layers:
        x_BTD = layer(x_BTD, cos_TE, sin_TE)
    return x_BTD


def rotary(length: int, head_size: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return cosines and sines, float32[length, head_size / 2] each, computed as Hugging Face's Llama does."""
    frequencies = 1.0 / (theta ** (torch.arange(0, head_size, 2, dtype=torch.float32) / head_size))
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
    return angles.cos(), angles.sin()


def rotate(x_BTHE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    """Rotate the pairs (e, e + E/2) by the angle of their position; cos and sin are [T, 1, E/2]. arXiv:2104.09864."""
    first, second = x_BTHE.chunk(2, dim=-1)
    return torch.cat((first * cos_TE - second * sin_TE, second * cos_TE + first * sin_TE), dim=-1)


def _matrix(rows: int, columns: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(rows, columns))


_aten = torch.ops.aten
SAVED_OPERATIONS = [
    _aten.mm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
]
"""What "selective" keeps: expensive to compute, and no larger than its inputs."""
