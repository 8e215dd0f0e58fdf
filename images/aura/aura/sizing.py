"""How large a model some hours of arithmetic pay for.

From arithmetic a second follows how many tokens a model of each size would see, and from both the loss to expect, by
the law of "Training Compute-Optimal Large Language Models" as fitted again by Besiroglu et al. (arXiv:2404.10102):

    1.8172 + 482.01 / parameters^0.3478 + 2085.43 / tokens^0.3658

Its constants are of other text and another tokenizer. The order of sizes is worth trusting, the number is not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from aura import presets
from aura.hardware import FILLED, memory_needed
from aura.model import Checkpointing, Shape
from aura.optimizer import Name
from estiba.errors import ConfigError

TOKENS_PER_PARAMETER = 20
"""Compute-optimal, as the rule of thumb has it (arXiv:2203.15556)."""
SPEED: dict[Checkpointing, float] = {None: 1.0, "selective": 0.95, "full": 0.75}
"""Of tokens a second without checkpointing: full computes every layer's forward pass twice, 4 passes for 3."""
STEP_TOKENS = 65_536
"""In a step, on however many GPUs; fewer where the time is short of a thousand steps."""
FULL_TOKENS = 32_768
"""In a micro-batch; more of them make no GPU faster."""
FITTED_TOKENS = 100e6
"""The smallest runs behind the law have about so many."""
EPOCHS_WORTH = 4
"""So often text can be read again and teach nearly as much as new text (arXiv:2305.16264)."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A size, how it would be trained, and what would come of it."""

    name: str
    shape: Shape
    parameters: int
    batch_size: int
    gradient_accumulation_steps: int
    optimizer: Name
    checkpointing: Checkpointing
    memory_bytes: int
    fits: bool
    tokens_per_s: float
    tokens: float
    """In the hours there are."""
    epochs: float | None
    """None where nobody said how many tokens of text there are."""
    loss: float
    learning_rate: float
    gpus: int = 1

    @property
    def steps(self) -> int:
        """On all GPUs together, in the hours there are."""
        micro_batches = self.gradient_accumulation_steps * self.gpus
        return max(1, int(self.tokens / (micro_batches * self.batch_size * self.shape.seq_length)))

    @property
    def tokens_per_parameter(self) -> float:
        return self.tokens / self.parameters


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to train, among what was weighed, and what speaks against a preset."""

    hours: float
    flops_per_s: float
    speed_from: str
    memory_bytes: int
    best: Candidate
    candidates: tuple[Candidate, ...]
    warnings: tuple[str, ...]


def expected_loss(parameters: float, tokens: float, tokens_available: float | None = None) -> float:
    """Nats a token. Tokens beyond `tokens_available` are repetitions, worth less each time (arXiv:2305.16264)."""
    if tokens_available is not None and tokens > tokens_available:
        repetitions = tokens / tokens_available - 1
        tokens = tokens_available * (1 + 15.39 * (1 - math.exp(-repetitions / 15.39)))
    return 1.8172 + 482.01 / parameters**0.3478 + 2085.43 / tokens**0.3658


def learning_rate(parameters: int) -> float:
    """3.2e-3 - 1.4e-4 ln N (arXiv:2001.08361, eq. D.1), to two digits, within what has been tried."""
    return float(f"{min(2e-3, max(1e-4, 0.003239 - 0.0001395 * math.log(parameters))):.1e}")


def plan(
    *,
    hours: float,
    flops_per_s: float,
    memory_bytes: int,
    speed_from: str = "stated",
    gpus: int = 1,
    vocab_size: int = 32_000,
    seq_length: int = 2048,
    tokens_available: float | None = None,
    preset: str = "auto",
) -> Plan:
    """Weigh the presets and a ladder of sizes. `flops_per_s` is model FLOPs of one GPU without checkpointing.

    `preset` is the one that warnings are about. Raises ConfigError where nothing fits or a value cannot be.
    """
    for name, value in (("hours", hours), ("flops_per_s", flops_per_s), ("memory_bytes", memory_bytes), ("gpus", gpus)):
        if not value > 0:
            raise ConfigError(f"{name} is {value}; it must be more than 0")
    asked = presets.find(preset, memory_bytes=memory_bytes)
    budget = hours * 3600 * flops_per_s * gpus

    def candidate(name: str, shape: Shape) -> Candidate:
        most = budget / shape.flops_per_token()
        aim = min(STEP_TOKENS, 2 ** int(math.log2(max(seq_length, most / 1000))))  # a thousand steps at least
        sequences = max(1, aim // shape.seq_length // gpus)  # of one GPU in a step
        batch_size, optimizer, how, memory = _fit(shape, sequences, memory_bytes)
        rate = gpus * flops_per_s / shape.flops_per_token() * SPEED[how]
        tokens = rate * hours * 3600
        return Candidate(
            name=name, shape=shape, parameters=shape.parameters, batch_size=batch_size,
            gradient_accumulation_steps=max(1, sequences // batch_size),
            optimizer=optimizer, checkpointing=how, memory_bytes=memory, fits=memory <= FILLED * memory_bytes,
            tokens_per_s=rate, tokens=tokens,
            epochs=None if tokens_available is None else tokens / tokens_available,
            loss=expected_loss(shape.parameters, tokens, tokens_available),
            learning_rate=learning_rate(shape.parameters), gpus=gpus,
        )  # fmt: skip

    named = [candidate(p.name, shape_of(p, vocab_size)) for p in presets.PRESETS.values() if p.name != "manual"]
    known = {(c.shape.embed_size, c.shape.num_layers) for c in named}
    ladder = [candidate("", shape) for shape in _ladder(vocab_size, seq_length)]
    ladder = [c for c in ladder if (c.shape.embed_size, c.shape.num_layers) not in known]
    fitting = [c for c in (*named, *ladder) if c.fits]
    if not fitting:
        raise ConfigError(f"{memory_bytes / 1e9:.1f} GB hold no model of any size here; take a GPU with more memory")
    best = min(fitting, key=lambda c: c.loss)
    chosen = next((c for c in named if c.name == asked.name), best)
    if best.tokens < FITTED_TOKENS and chosen.fits:  # the law would guess; the preset is known to learn something
        best = chosen
    near = sorted(ladder, key=lambda c: abs(math.log(c.parameters / best.parameters)))[:7]
    shown = tuple(sorted({id(c): c for c in (*named, *near, best)}.values(), key=lambda c: -c.parameters))
    warnings = _warnings(asked, chosen, best, hours=hours, memory_bytes=memory_bytes, tokens_available=tokens_available)
    return Plan(
        hours=hours, flops_per_s=flops_per_s * gpus, speed_from=speed_from, memory_bytes=memory_bytes,
        best=best, candidates=shown, warnings=tuple(warnings),
    )  # fmt: skip


def shape_of(preset: presets.Preset, vocab_size: int) -> Shape:
    """What a preset's model is, with a vocabulary."""
    return Shape(
        vocab_size=vocab_size, embed_size=preset.embed_size, num_layers=preset.num_layers, num_heads=preset.num_heads,
        seq_length=preset.seq_length, ff_size=preset.ff_size, dropout=preset.dropout,
        tie_embeddings=preset.tie_embeddings,
    )  # fmt: skip


def _ladder(vocab_size: int, seq_length: int) -> list[Shape]:
    """Sizes in steps of a third or so, about 64 of width a layer as in GPT-3 and Llama, heads of 64 or 128."""
    widths = (
        128,
        192,
        256,
        320,
        384,
        512,
        640,
        768,
        896,
        1024,
        1152,
        1280,
        1408,
        1536,
        1792,
        2048,
        2304,
        2560,
        3072,
        4096,
    )
    return [
        Shape(
            vocab_size=vocab_size, embed_size=width, num_layers=max(4, round(width / 64)),
            num_heads=width // (128 if width >= 1024 else 64), seq_length=seq_length, tie_embeddings=width < 768,
        )
        for width in widths
    ]  # fmt: skip


def _fit(shape: Shape, sequences: int, memory_bytes: int) -> tuple[int, Name, Checkpointing, int]:
    """The micro-batch and the least that has to be given up for it, 4,096 tokens of it if memory lets there be."""
    most = min(sequences, max(1, FULL_TOKENS // shape.seq_length))
    sizes = [size for size in (128, 64, 32, 16, 8, 4, 2, 1) if size <= most]
    enough = min(sequences, max(1, 4096 // shape.seq_length))
    needed = 0
    for least in (enough, 1):
        for optimizer in ("adamw", "adamw8bit"):
            for how in (None, "selective", "full"):
                for size in sizes:
                    needed = memory_needed(shape, batch_size=size, optimizer=optimizer, checkpointing=how)
                    if size >= least and needed <= FILLED * memory_bytes:
                        return size, optimizer, how, needed
    return 1, "adamw8bit", "full", needed


def _warnings(
    asked: presets.Preset, chosen: Candidate, best: Candidate, *,
    hours: float, memory_bytes: int, tokens_available: float | None,
) -> list[str]:  # fmt: skip
    found = []
    if not chosen.fits:
        found.append(
            f"{asked.name} ({chosen.parameters / 1e9:.2f}B) needs {chosen.memory_bytes / 1e9:.1f} GB with "
            f"8-bit moments, full checkpointing and a batch of one; there are {memory_bytes / 1e9:.1f} GB."
        )
    if chosen.tokens_per_parameter < TOKENS_PER_PARAMETER / 2 and chosen.loss > best.loss:
        wanted = TOKENS_PER_PARAMETER * chosen.parameters
        days = wanted / chosen.tokens_per_s / 86400
        found.append(
            f"{asked.name}: {count(chosen.parameters)} parameters would see {count(chosen.tokens)} tokens in "
            f"{hours:g} h, {chosen.tokens_per_parameter:.1f} a parameter. Compute-optimal is about "
            f"{TOKENS_PER_PARAMETER}: {count(wanted)} tokens, {days:.0f} days at this speed. Expected loss "
            f"{chosen.loss:.3f}, against {best.loss:.3f} for {count(best.parameters)} parameters in the same time."
        )
    if chosen.fits and chosen.checkpointing is None and chosen.memory_bytes > memory_bytes / 2:
        batch = asked.batch_size
        spared = memory_needed(chosen.shape, batch_size=batch, optimizer=chosen.optimizer)
        if spared <= FILLED * memory_bytes:
            found.append(
                f"{asked.name}: do not pass --gradient-checkpointing. Its batch of {batch} fits in "
                f"{memory_bytes / 1e9:.0f} GB without ({spared / 1e9:.1f} GB), and full checkpointing "
                "costs 25% of the speed."
            )
    if best.tokens < FITTED_TOKENS:
        found.append(
            f"{count(best.tokens)} tokens in {hours:g} h are far below the {count(FITTED_TOKENS)} and more that the "
            "law of losses was fitted to; the order of sizes here is a guess."
        )
    if tokens_available is not None and best.tokens > EPOCHS_WORTH * tokens_available:
        found.append(
            f"{count(tokens_available)} tokens of text would be read {best.tokens / tokens_available:.1f} times in "
            f"{hours:g} h; after {EPOCHS_WORTH} times text teaches less and less. Find more, or stop after "
            f"{EPOCHS_WORTH * tokens_available / best.tokens * hours:.1f} h."
        )
    return found


def count(number: float) -> str:
    """2.7B, 64k."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return f"{number:.3g}"
