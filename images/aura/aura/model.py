"""The model: a Llama decoder, so that its weights are a Hugging Face directory's by another name (export.py).

    model = Aura(Shape(vocab_size=16384, embed_size=768, num_layers=12, num_heads=12, seq_length=1024), seed=42)
    loss = model.loss(tokens_BT, targets_BT) / targets_BT.numel()

RMSNorm before each half of a layer, rotary positions, SwiGLU, no biases. The products of q, k and v, and of gate and
up, are one matrix each. Parameters are float32; under autocast the layers, the residual stream too, run in its dtype.

Shapes: B sequences, T tokens, D embed_size, H heads, E width of a head, F ff_size, V words, N = B * T.
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

from aura.crossentropy import summed_cross_entropy
from estiba.errors import ConfigError

NORM_EPS = 1e-5
Checkpointing = Literal["full", "selective"] | int | None
"""What backward computes again instead of keeping it: nothing (None), every layer ("full"), all but matrix products and
attention ("selective"), or the layers in so many segments, of which only the borders are kept."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Everything that decides which parameters there are and what they compute."""

    vocab_size: int
    embed_size: int
    num_layers: int
    num_heads: int
    seq_length: int
    """Longest sequence the model is asked to read."""
    ff_size: int | None = None
    """Width of the feed-forward layer; None is the multiple of 256 that reaches 8/3 of embed_size (2560 -> 6912)."""
    dropout: float = 0.0
    """Of token vectors and of what each half of a layer adds; in training only."""
    rope_theta: float = 10_000.0
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        for name in ("vocab_size", "embed_size", "num_layers", "num_heads", "seq_length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if self.embed_size % self.num_heads:
            fitting = [n for n in range(1, self.embed_size + 1) if self.embed_size % (2 * n) == 0]
            near = sorted(fitting, key=lambda n: abs(n - self.num_heads))[:3]
            raise ConfigError(
                f"embed_size {self.embed_size} is not a multiple of num_heads {self.num_heads}; "
                f"with this embed_size, num_heads can be {' or '.join(map(str, sorted(near)))}"
            )
        if self.head_size % 2:
            raise ConfigError(
                f"embed_size {self.embed_size} over num_heads {self.num_heads} gives heads of {self.head_size}, which "
                "rotary positions cannot split in two; halve num_heads or double embed_size"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"dropout is {self.dropout}; it must be 0 or more and less than 1")
        if self.rope_theta <= 0:
            raise ConfigError(f"rope_theta is {self.rope_theta}; it must be positive (Llama's is 10000)")
        if self.ff_size is None:
            object.__setattr__(self, "ff_size", 256 * math.ceil(self.embed_size * 8 / 3 / 256))
        elif self.ff_size < 1:
            raise ConfigError(f"ff_size is {self.ff_size}; it must be 1 or more, or left out")

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
        """All of them, a tied matrix once."""
        matrices = 1 if self.tie_embeddings else 2
        return self.num_layers * self.layer_parameters + self.embed_size * (matrices * self.vocab_size + 1)

    def flops_per_token(self, seq_length: int | None = None) -> float:
        """Of forward and backward, six a weight that multiplies; attention by half, as it looks only backwards.

        Nothing that checkpointing computes again counts: the number model FLOPs utilisation is made of.
        Source: arXiv:2204.02311, appendix B, with a causal mask.
        """
        weights = self.num_layers * self.layer_parameters + self.embed_size * self.vocab_size
        return 6.0 * weights + 6.0 * self.num_layers * self.embed_size * (seq_length or self.seq_length)


class Aura(nn.Module):
    """A decoder with its loss. `seed` decides its first parameters, whatever the device and the global random state."""

    cos_TE: Tensor
    sin_TE: Tensor

    def __init__(self, shape: Shape, *, seed: int, checkpointing: Checkpointing = None) -> None:
        super().__init__()
        self.shape = shape
        self.checkpointing: Checkpointing = checkpointing
        self.embedding = _matrix(shape.vocab_size, shape.embed_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_layers))
        self.norm = RMSNorm(shape.embed_size)
        self.head = None if shape.tie_embeddings else _matrix(shape.vocab_size, shape.embed_size)
        cos_TE, sin_TE = rotary(shape.seq_length, shape.head_size, shape.rope_theta)
        self.register_buffer("cos_TE", cos_TE, persistent=False)
        self.register_buffer("sin_TE", sin_TE, persistent=False)
        self._initialise(seed)

    @property
    def head_VD(self) -> Tensor:
        return self.embedding if self.head is None else self.head

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None) -> Tensor:
        """Logits [B, T, V]; with targets the loss instead, for a wrapper around forward (DDP) to be asked for."""
        if targets_BT is not None:
            return self.loss(tokens_BT, targets_BT)
        return F.linear(self.hidden(tokens_BT), self.head_VD)

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Sum of cross entropies in nats over targets that are not -100: float32, to be divided by their count."""
        return summed_cross_entropy(self.hidden(tokens_BT).flatten(0, 1), self.head_VD, targets_BT.flatten())

    def hidden(self, tokens_BT: Tensor) -> Tensor:
        """What the head reads: [B, T, D]. Raises ConfigError where T is longer than the model's seq_length."""
        length = tokens_BT.shape[1]
        if length > self.shape.seq_length:
            raise ConfigError(f"{length} tokens in a sequence; this model reads {self.shape.seq_length} at most")
        x_BTD = F.embedding(tokens_BT, self.embedding)
        kind = tokens_BT.device.type
        if torch.is_autocast_enabled(kind):
            x_BTD = x_BTD.to(torch.get_autocast_dtype(kind))
        x_BTD = F.dropout(x_BTD, self.shape.dropout, self.training)
        cos_TE = self.cos_TE[:length, None].to(x_BTD.dtype)
        sin_TE = self.sin_TE[:length, None].to(x_BTD.dtype)
        for run in self._segments():
            x_BTD = run(x_BTD, cos_TE, sin_TE)
        return self.norm(x_BTD)

    def _segments(self) -> list[Callable[..., Tensor]]:
        """The layers as functions, each of which keeps what backward needs or is run again there, dropout included."""
        layers = list(self.layers)
        how = self.checkpointing
        if how is None or not self.training or not torch.is_grad_enabled():
            return [*layers]
        again: Callable[..., Any] = partial(checkpoint, use_reentrant=False, preserve_rng_state=True)
        if how == "full":
            return [partial(again, layer) for layer in layers]
        if how == "selective":
            keep = partial(create_selective_checkpoint_contexts, KEPT_OPERATIONS)
            return [partial(again, layer, context_fn=keep) for layer in layers]
        assert isinstance(how, int) and how >= 1, how
        size = math.ceil(len(layers) / how)
        return [partial(again, _Chain(layers[i : i + size])) for i in range(0, len(layers), size)]

    @torch.no_grad()
    def _initialise(self, seed: int) -> None:
        """Small normal numbers; what is added to the residual stream smaller by the number of additions.

        sqrt(2 / 5D) is from arXiv:1910.05895, 1 / sqrt(2 layers) from GPT-2.
        """
        generator = torch.Generator().manual_seed(seed)
        small = math.sqrt(2 / (5 * self.shape.embed_size))
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
                continue
            std = 0.02 if name == "embedding" else small
            if name.endswith(("out", "down")):
                std /= math.sqrt(2 * self.shape.num_layers)
            parameter.normal_(0.0, std, generator=generator)


class Layer(nn.Module):
    """Attention and feed-forward, each added to what came in."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.dropout = shape.num_heads, shape.dropout
        self.attention_norm = RMSNorm(shape.embed_size)
        self.qkv = _matrix(3 * shape.embed_size, shape.embed_size)
        self.out = _matrix(shape.embed_size, shape.embed_size)
        self.ff_norm = RMSNorm(shape.embed_size)
        self.gate_up = _matrix(2 * shape.ff_width, shape.embed_size)
        self.down = _matrix(shape.embed_size, shape.ff_width)

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
        # The flash kernel on a GPU in half precision, and the CPU's own.
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
        # Autocast would widen its output to float32; the kernel computes in float32 and returns what it was given.
        with torch.autocast(x_BTD.device.type, enabled=False):
            return F.rms_norm(x_BTD, self.weight.shape, self.weight.to(x_BTD.dtype), NORM_EPS)


class _Chain(nn.Module):
    """Layers in a row; a plain list keeps them from being registered twice."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self._run = tuple(layers)

    def forward(self, x_BTD: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
        for layer in self._run:
            x_BTD = layer(x_BTD, cos_TE, sin_TE)
        return x_BTD


def rotary(length: int, head_size: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32[length, head_size / 2] each, by the operations of Hugging Face's Llama."""
    frequencies = 1.0 / (theta ** (torch.arange(0, head_size, 2, dtype=torch.float32) / head_size))
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
    return angles.cos(), angles.sin()


def rotate(x_BTHE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    """Turn the pairs (e, e + E/2) by the angle of their position. cos and sin are [T, 1, E/2]. arXiv:2104.09864."""
    first, second = x_BTHE.chunk(2, dim=-1)
    return torch.cat((first * cos_TE - second * sin_TE, second * cos_TE + first * sin_TE), dim=-1)


def _matrix(rows: int, columns: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(rows, columns))


_aten = torch.ops.aten
KEPT_OPERATIONS = [
    _aten.mm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
]
"""What "selective" keeps: dear to compute, and no larger than what they are computed from."""
