"""Model sizes by name, and the choice of `auto`.

Four are the guide's, with its numbers (2 x 16, 4 x 8 and 8 x 4 sequences per step are 65,536 tokens each). `choose`
considers only memory; `aura plan` recommends a size for the time available.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any

from aura.model.decoder import ModelConfig
from estiba.errors import ConfigError


@dataclass(frozen=True)
class Preset:
    """Defaults that flags override."""

    name: str
    embed_size: int
    num_layers: int
    num_heads: int
    seq_length: int
    batch_size: int
    """Sequences per micro-batch on each GPU."""
    gradient_accumulation_steps: int
    """Micro-batches per step on each GPU."""
    learning_rate: float
    save_steps: int
    _: KW_ONLY
    warmup_fraction: float = 0.03
    """Fraction of all steps, with a minimum of ten steps."""
    weight_decay: float = 0.01
    dropout: float = 0.1
    tie_embeddings: bool = False
    """Share input and output embeddings: a third fewer parameters in a small model with a large vocabulary."""
    min_memory_bytes: int | None = None
    """`auto` considers this preset from this much GPU memory; None excludes it."""

    def model(self, vocab_size: int, **overrides: Any) -> ModelConfig:
        """Return the preset's model, with overrides that are not None. Raises ConfigError for impossible sizes."""
        names = ("embed_size", "num_layers", "num_heads", "seq_length", "dropout", "tie_embeddings")
        set_overrides = {name: value for name, value in overrides.items() if value is not None}
        return ModelConfig(vocab_size=vocab_size, **{name: getattr(self, name) for name in names} | set_overrides)


_ALL = (
    # name, width, layers, heads, context, batch size, accumulation steps, learning rate, save steps
    Preset("aura-72h-max", 2560, 32, 20, 2048, 2, 16, 2e-4, 500, min_memory_bytes=70 * 10**9),
    Preset("aura-72h-extended", 2048, 28, 16, 2048, 4, 8, 2.5e-4, 500, min_memory_bytes=55 * 10**9),
    Preset("aura-large", 1536, 24, 12, 2048, 4, 8, 2.5e-4, 1000, min_memory_bytes=40 * 10**9),
    Preset("aura-medium", 1024, 24, 16, 2048, 8, 4, 3e-4, 1000, min_memory_bytes=0),
    # Learns something visible within minutes on two CPU cores.
    Preset("aura-tiny", 192, 4, 3, 256, 8, 1, 2e-3, 100, dropout=0.0, tie_embeddings=True),
    # A starting point for sizes set by flags.
    Preset("manual", 768, 12, 12, 1024, 8, 4, 3e-4, 1000),
)

PRESETS: dict[str, Preset] = {preset.name: preset for preset in _ALL}


def choose(memory_bytes: int | None) -> Preset:
    """Return the largest preset for a GPU's memory, or the tiny one if there is no GPU (None).

    The limits are decimal gigabytes, so that an "80 GB" card, which the driver reports as 79.1 GiB, counts as one.
    """
    if memory_bytes is None:
        return PRESETS["aura-tiny"]
    fitting = [p for p in _ALL if p.min_memory_bytes is not None and memory_bytes >= p.min_memory_bytes]
    return max(fitting, key=lambda preset: preset.min_memory_bytes or 0)


def find(name: str, *, memory_bytes: int | None) -> Preset:
    """Return the preset with this name, or the choice for "auto". Raises ConfigError for an unknown name."""
    if name == "auto":
        return choose(memory_bytes)
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; give one of: auto, {', '.join(PRESETS)}")
    return PRESETS[name]
