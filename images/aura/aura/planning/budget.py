"""Recommend a model size for a budget of hours.

FLOPs/s determine how many tokens each size would train on; size and tokens determine the expected loss, by the law of
"Training Compute-Optimal Large Language Models" as refit by Besiroglu et al. (arXiv:2404.10102):

    1.8172 + 482.01 / parameters^0.3478 + 2085.43 / tokens^0.3658

Its constants were fitted with a different text and tokenizer. Trust the ranking of sizes, not the number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from aura.model.decoder import Checkpointing, ModelConfig, rounded_vocabulary
from aura.model.optimizer import OptimizerName
from aura.planning import presets
from aura.planning.hardware import USABLE_MEMORY, memory_needed
from estiba.errors import ConfigError

TOKENS_PER_PARAMETER = 20
"""Compute-optimal ratio, as a rule of thumb (arXiv:2203.15556)."""
RELATIVE_SPEED: dict[Checkpointing, float] = {None: 1.0, "selective": 0.95, "full": 0.75}
"""Speed relative to no activation checkpointing; "full" runs the forward pass twice: 4 passes instead of 3."""
STEP_TOKENS = 65_536
"""Tokens per step on all GPUs; fewer if the time is too short for a thousand steps."""
MAX_MICRO_BATCH_TOKENS, MIN_MICRO_BATCH_TOKENS = 32_768, 4_096
"""A larger micro-batch does not speed up a GPU; a smaller one leaves it partly idle."""
FITTED_TOKENS = 100e6
"""About as many tokens as the smallest runs that the law was fitted to."""
USEFUL_EPOCHS = 4
"""Up to this many epochs, repeated text is nearly as useful as new text (arXiv:2305.16264)."""
_WIDTHS = (*range(128, 385, 64), *range(512, 1537, 128), *range(1792, 2561, 256), 3072, 4096)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One size, how it would be trained, and the expected result."""

    name: str
    """The preset's name, or empty."""
    shape: ModelConfig
    parameters: int
    batch_size: int
    gradient_accumulation_steps: int
    optimizer: OptimizerName
    checkpointing: Checkpointing
    memory_bytes: int
    fits: bool
    tokens_per_s: float
    tokens: float
    """Tokens trained on in the budgeted hours."""
    epochs: float | None
    """None if the amount of text is not given."""
    loss: float
    learning_rate: float
    gpus: int = 1

    @property
    def steps(self) -> int:
        """Steps in the budgeted hours, on all GPUs together."""
        micro_batches = self.gradient_accumulation_steps * self.gpus
        return max(1, int(self.tokens / (micro_batches * self.batch_size * self.shape.seq_length)))

    @property
    def tokens_per_parameter(self) -> float:
        return self.tokens / self.parameters


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The recommendation, the alternatives, and warnings about a preset."""

    hours: float
    flops_per_s: float
    speed_from: str
    memory_bytes: int
    best: Candidate
    candidates: tuple[Candidate, ...]
    warnings: tuple[str, ...]


def expected_loss(parameters: float, tokens: float, tokens_available: float | None = None) -> float:
    """Return nats per token. Tokens beyond `tokens_available` repeat and count less each time (arXiv:2305.16264)."""
    if tokens_available is not None and tokens > tokens_available:
        repetitions = tokens / tokens_available - 1
        tokens = tokens_available * (1 + 15.39 * (1 - math.exp(-repetitions / 15.39)))
    return 1.8172 + 482.01 / parameters**0.3478 + 2085.43 / tokens**0.3658


def learning_rate(parameters: int) -> float:
    """Return 3.2e-3 - 1.4e-4 ln N (arXiv:2001.08361, eq. D.1), to two digits, between 1e-4 and 2e-3."""
    return float(f"{min(2e-3, max(1e-4, 0.003239 - 0.0001395 * math.log(parameters))):.1e}")


def plan_budget(
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
) -> Budget:
    """Compare the presets and a range of other sizes. `flops_per_s` is one GPU's model FLOPs/s without checkpointing.

    The warnings are about `preset`. Raises ConfigError if nothing fits or a value is invalid.
    """
    for name, value in (("hours", hours), ("flops_per_s", flops_per_s), ("memory_bytes", memory_bytes), ("gpus", gpus)):
        if not value > 0:
            raise ConfigError(f"{name} is {value}; it must be more than 0")
    requested = presets.find(preset, memory_bytes=memory_bytes)
    vocab_size = rounded_vocabulary(vocab_size)

    def candidate(name: str, shape: ModelConfig) -> Candidate:
        max_tokens = hours * 3600 * flops_per_s * gpus / shape.flops_per_token()
        step_tokens = min(STEP_TOKENS, 2 ** int(math.log2(max(seq_length, max_tokens / 1000))))
        sequences = max(1, step_tokens // shape.seq_length // gpus)  # in a step of one GPU
        batch_size, optimizer, checkpointing, needed_bytes = _fit(shape, sequences, memory_bytes)
        tokens_per_s = gpus * flops_per_s / shape.flops_per_token() * RELATIVE_SPEED[checkpointing]
        tokens = tokens_per_s * hours * 3600
        return Candidate(
            name=name, shape=shape, parameters=shape.parameters, batch_size=batch_size,
            gradient_accumulation_steps=max(1, sequences // batch_size), optimizer=optimizer,
            checkpointing=checkpointing, memory_bytes=needed_bytes, fits=needed_bytes <= USABLE_MEMORY * memory_bytes,
            tokens_per_s=tokens_per_s, tokens=tokens,
            epochs=None if tokens_available is None else tokens / tokens_available,
            loss=expected_loss(shape.parameters, tokens, tokens_available),
            learning_rate=presets.PRESETS[name].learning_rate if name else learning_rate(shape.parameters), gpus=gpus,
        )  # fmt: skip

    named = [candidate(p.name, p.model(vocab_size)) for p in presets.PRESETS.values() if p.name != "manual"]
    named_sizes = {(c.shape.embed_size, c.shape.num_layers) for c in named}
    shapes = [  # as in GPT-3 and Llama: about one layer per 64 of width, and heads of 64 or 128
        ModelConfig(
            vocab_size=vocab_size, embed_size=width, num_layers=max(4, round(width / 64)), seq_length=seq_length,
            num_heads=width // (128 if width >= 1024 else 64), tie_embeddings=width < 768,
        )
        for width in _WIDTHS
    ]  # fmt: skip
    others = [candidate("", shape) for shape in shapes if (shape.embed_size, shape.num_layers) not in named_sizes]
    fitting = [c for c in (*named, *others) if c.fits]
    if not fitting:
        raise ConfigError(f"{memory_bytes / 1e9:.1f} GB hold no model of any size; use a GPU with more memory")
    best = min(fitting, key=lambda c: c.loss)
    chosen = next((c for c in named if c.name == requested.name), best)
    if best.tokens < FITTED_TOKENS and chosen.fits:  # outside the range of the law; the preset is known to work
        best = chosen
    near = sorted(others, key=lambda c: abs(math.log(c.parameters / best.parameters)))[:7]
    shown = tuple(sorted({id(c): c for c in (*named, *near, best)}.values(), key=lambda c: -c.parameters))
    warnings = _warnings(
        requested, chosen, best, hours=hours, memory_bytes=memory_bytes, tokens_available=tokens_available
    )
    return Budget(
        hours=hours, flops_per_s=flops_per_s * gpus, speed_from=speed_from, memory_bytes=memory_bytes,
        best=best, candidates=shown, warnings=tuple(warnings),
    )  # fmt: skip


def _fit(shape: ModelConfig, sequences: int, memory_bytes: int) -> tuple[int, OptimizerName, Checkpointing, int]:
    """Return micro-batch, optimizer, checkpointing and memory of the fastest combination that fits."""
    max_size = min(sequences, max(1, MAX_MICRO_BATCH_TOKENS // shape.seq_length))
    min_size = min(sequences, max(1, MIN_MICRO_BATCH_TOKENS // shape.seq_length))
    sizes = [size for size in (128, 64, 32, 16, 8, 4, 2, 1) if size <= max_size]
    needed = 0
    for smallest in (min_size, 1):
        for optimizer in ("adamw", "adamw8bit"):
            for mode in (None, "selective", "full"):
                for size in sizes:
                    needed = memory_needed(shape, batch_size=size, optimizer=optimizer, checkpointing=mode)
                    if size >= smallest and needed <= USABLE_MEMORY * memory_bytes:
                        return size, optimizer, mode, needed
    return 1, "adamw8bit", "full", needed


def _warnings(
    requested: presets.Preset, chosen: Candidate, best: Candidate, *,
    hours: float, memory_bytes: int, tokens_available: float | None,
) -> list[str]:  # fmt: skip
    warnings = []
    if not chosen.fits:
        warnings.append(
            f"{requested.name} ({chosen.parameters / 1e9:.2f}B) needs {chosen.memory_bytes / 1e9:.1f} GB with "
            f"8-bit moments, full checkpointing and a batch of one; there are {memory_bytes / 1e9:.1f} GB."
        )
    if chosen.tokens_per_parameter < TOKENS_PER_PARAMETER / 2 and chosen.loss > best.loss:
        optimal_tokens = TOKENS_PER_PARAMETER * chosen.parameters
        days = optimal_tokens / chosen.tokens_per_s / 86400
        warnings.append(
            f"{requested.name}: {count(chosen.parameters)} parameters would train on {count(chosen.tokens)} tokens in "
            f"{hours:g} h, {chosen.tokens_per_parameter:.1f} per parameter. Compute-optimal is about "
            f"{TOKENS_PER_PARAMETER}: {count(optimal_tokens)} tokens, {days:.0f} days at this speed. Expected loss "
            f"{chosen.loss:.3f}, against {best.loss:.3f} for {count(best.parameters)} parameters in the same time."
        )
    if chosen.fits and chosen.checkpointing is None and chosen.memory_bytes > memory_bytes / 2:
        needed = memory_needed(chosen.shape, batch_size=requested.batch_size, optimizer=chosen.optimizer)
        if needed <= USABLE_MEMORY * memory_bytes:
            warnings.append(
                f"{requested.name}: do not pass --gradient-checkpointing. Its batch of {requested.batch_size} fits in "
                f"{memory_bytes / 1e9:.0f} GB without it ({needed / 1e9:.1f} GB), and full checkpointing costs 25% of "
                "the speed."
            )
    if best.tokens < FITTED_TOKENS:
        warnings.append(
            f"{count(best.tokens)} tokens in {hours:g} h are far fewer than the {count(FITTED_TOKENS)} and more that "
            "the law of losses was fitted to; the ranking of sizes is a guess."
        )
    if tokens_available is not None and best.tokens > USEFUL_EPOCHS * tokens_available:
        warnings.append(
            f"{count(tokens_available)} tokens of text would be read {best.tokens / tokens_available:.1f} times in "
            f"{hours:g} h; after {USEFUL_EPOCHS} epochs, repeating text helps less and less. Add text, or stop after "
            f"{USEFUL_EPOCHS * tokens_available / best.tokens * hours:.1f} h."
        )
    return warnings


def count(number: float) -> str:
    """Format a number with up to three digits and a unit: 2.7B, 64k."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return f"{number:.3g}"
