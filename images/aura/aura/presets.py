"""Sizes of models by name, and which of them a machine gets when nobody says.

    preset = PRESETS["aura-72h-max"]
    preset = choose(memory_bytes=80 * GIB)        # by the memory of the GPU; None is a machine without one

The four of the guide keep its numbers (2 x 16, 4 x 8 and 8 x 4 sequences a step are 65,536 tokens each). The planner
(`python -m aura plan`) says which of them the time pays for; `choose` knows only what fits.
"""

from __future__ import annotations

from dataclasses import dataclass

from estiba.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What a name stands for; each value is a default that a flag overrides."""

    name: str
    embed_size: int
    """Width of the residual stream."""
    num_layers: int
    num_heads: int
    seq_length: int
    """Tokens of context."""
    batch_size: int
    """Sequences in a micro-batch, of one device."""
    gradient_accumulation_steps: int
    """Micro-batches in a step."""
    learning_rate: float
    save_steps: int
    """Steps between checkpoints."""
    warmup_share: float = 0.03
    """Part of all steps in which the learning rate rises; never fewer than ten steps."""
    weight_decay: float = 0.01
    dropout: float = 0.1
    tie_embeddings: bool = False
    """One matrix for tokens in and out: a third fewer parameters where the model is small and the vocabulary is not."""
    from_memory_bytes: int | None = None
    """Least GPU memory that `auto` gives this preset to; None is never by memory."""
    ff_size: int | None = None
    """Width of the feed-forward layer; None is the multiple of 256 that reaches 8/3 of embed_size."""

    @property
    def tokens_per_step(self) -> int:
        """On one device."""
        return self.batch_size * self.gradient_accumulation_steps * self.seq_length


_ALL = (
    Preset(
        name="aura-72h-max", embed_size=2560, num_layers=32, num_heads=20, seq_length=2048,
        batch_size=2, gradient_accumulation_steps=16, learning_rate=2e-4, save_steps=500,
        from_memory_bytes=70 * 10**9,
    ),
    Preset(
        name="aura-72h-extended", embed_size=2048, num_layers=28, num_heads=16, seq_length=2048,
        batch_size=4, gradient_accumulation_steps=8, learning_rate=2.5e-4, save_steps=500,
        from_memory_bytes=55 * 10**9,
    ),
    Preset(
        name="aura-large", embed_size=1536, num_layers=24, num_heads=12, seq_length=2048,
        batch_size=4, gradient_accumulation_steps=8, learning_rate=2.5e-4, save_steps=1000,
        from_memory_bytes=40 * 10**9,
    ),
    Preset(
        name="aura-medium", embed_size=1024, num_layers=24, num_heads=16, seq_length=2048,
        batch_size=8, gradient_accumulation_steps=4, learning_rate=3e-4, save_steps=1000,
        from_memory_bytes=0,
    ),
    # Learns something to look at within minutes on two CPU cores.
    Preset(
        name="aura-tiny", embed_size=192, num_layers=4, num_heads=3, seq_length=256,
        batch_size=8, gradient_accumulation_steps=1, learning_rate=2e-3, save_steps=100,
        dropout=0.0, tie_embeddings=True,
    ),
    # A place to start from: every size of it is meant to be given by hand.
    Preset(
        name="manual", embed_size=768, num_layers=12, num_heads=12, seq_length=1024,
        batch_size=8, gradient_accumulation_steps=4, learning_rate=3e-4, save_steps=1000,
    ),
)  # fmt: skip

PRESETS: dict[str, Preset] = {preset.name: preset for preset in _ALL}


def choose(memory_bytes: int | None) -> Preset:
    """The preset of `auto`: the largest whose memory the GPU has, the tiny one where there is no GPU (None).

    The bounds are decimal gigabytes, so that an "80 GB" card, of which the driver reports 79.1 GiB, counts as one.
    """
    if memory_bytes is None:
        return PRESETS["aura-tiny"]
    fitting = [p for p in _ALL if p.from_memory_bytes is not None and memory_bytes >= p.from_memory_bytes]
    return max(fitting, key=lambda preset: preset.from_memory_bytes or 0)


def find(name: str, *, memory_bytes: int | None) -> Preset:
    """A preset by name, or `choose` for "auto". Raises ConfigError on a name there is not."""
    if name == "auto":
        return choose(memory_bytes)
    if name not in PRESETS:
        raise ConfigError(f"there is no preset {name!r}; give one of: auto, {', '.join(PRESETS)}")
    return PRESETS[name]
