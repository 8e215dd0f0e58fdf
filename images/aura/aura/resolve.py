"""Fill in defaults for this machine: flags override the preset, which overrides general defaults."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from aura.config import AuraConfig
from aura.data.documents import read_documents
from aura.model.decoder import Checkpointing, ModelConfig, rounded_vocabulary
from aura.planning.hardware import checkpointing_for
from aura.planning.presets import Preset
from aura.tokenizer.loading import Tokenizer, load_tokenizer
from aura.tokenizer.training import trained_once
from estiba.errors import ConfigError
from estiba.log import get_logger
from estiba.training.schedule import Schedule

logger = get_logger(__name__)

VOCAB_SIZE, TINY_VOCAB_SIZE = 32_768, 4_096


@dataclass(frozen=True, kw_only=True)
class ResolvedConfig:
    """The model and its training steps, with all defaults filled in."""

    preset: Preset
    model: ModelConfig
    checkpointing: Checkpointing
    batch_size: int
    """Sequences per micro-batch on each rank."""
    accumulation_steps: int
    """Micro-batches per step on each rank."""
    world_size: int
    learning_rate: float
    weight_decay: float
    save_steps: int

    @property
    def sequences_per_step(self) -> int:
        return self.batch_size * self.accumulation_steps * self.world_size

    @property
    def tokens_per_step(self) -> int:
        return self.sequences_per_step * self.model.seq_length


def gpu_memory_bytes(device: torch.device) -> int | None:
    """Return the GPU's total memory, or None on a CPU."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def resolve_model(config: AuraConfig, preset: Preset, *, vocab_size: int) -> ModelConfig:
    """Return the preset's model with the configured sizes. Raises ConfigError if they are impossible."""
    names = {"embed_size", "num_layers", "num_heads", "seq_length", "dropout", "tie_embeddings"}
    return preset.model(rounded_vocabulary(vocab_size), **config.model_dump(include=names))


def resolve(
    config: AuraConfig, preset: Preset, *, vocab_size: int, device: torch.device, world_size: int
) -> ResolvedConfig:
    """Fill in all defaults. Raises ConfigError for sizes that are impossible or too large for this GPU."""
    model = resolve_model(config, preset, vocab_size=vocab_size)
    batch_size = config.batch_size or preset.batch_size
    checkpointing: Checkpointing = None
    if config.gradient_checkpointing:
        checkpointing = config.checkpoint_segments or "full"
    elif config.gradient_checkpointing is None:
        checkpointing = checkpointing_for(
            model, batch_size=batch_size, memory_bytes=gpu_memory_bytes(device), optimizer=config.optimizer
        )
    return ResolvedConfig(
        preset=preset,
        model=model,
        checkpointing=checkpointing,
        batch_size=batch_size,
        accumulation_steps=config.gradient_accumulation_steps or preset.gradient_accumulation_steps,
        world_size=world_size,
        learning_rate=config.learning_rate or preset.learning_rate,
        weight_decay=preset.weight_decay if config.weight_decay is None else config.weight_decay,
        save_steps=config.save_steps or preset.save_steps,
    )


def resolve_schedule(config: AuraConfig, resolved: ResolvedConfig, windows: int) -> Schedule:
    """Return the learning-rate schedule. Raises ConfigError if there is too little data for one step."""
    steps = config.max_steps or int(config.epochs * windows / resolved.sequences_per_step)
    if steps < 1:
        raise ConfigError(
            f"{windows} windows of {resolved.model.seq_length} tokens are too few for a step of "
            f"{resolved.sequences_per_step} sequences; give more text, more --epochs, or a smaller --batch-size or "
            "--gradient-accumulation-steps"
        )
    seen = steps * resolved.sequences_per_step / windows
    if config.max_steps is None and seen < 0.9 * config.epochs:
        logger.warning(
            f"--epochs {config.epochs:g}: {steps} whole steps of {resolved.sequences_per_step} sequences see "
            f"{seen:.2f} epochs of {windows} windows; a smaller --batch-size or --gradient-accumulation-steps sees more"
        )
    warmup_steps = config.warmup_steps
    if warmup_steps is not None and warmup_steps >= steps:
        logger.warning(
            f"--warmup-steps {warmup_steps}: the run has {steps} steps, so the learning rate never reaches its peak"
        )
    if warmup_steps is None:
        warmup_steps = min(max(10, round(resolved.preset.warmup_fraction * steps)), steps // 2)
    return Schedule(kind=config.lr_schedule, peak=resolved.learning_rate, steps=steps, warmup_steps=warmup_steps)


def trained_vocab_size(config: AuraConfig, preset: Preset) -> int | None:
    """Return the size of a tokenizer that is trained on the data; None if one is given."""
    if config.tokenizer_name_or_path is not None:
        return None
    return config.vocab_size or (TINY_VOCAB_SIZE if preset.name == "aura-tiny" else VOCAB_SIZE)


def resolve_tokenizer(config: AuraConfig, preset: Preset, folder: Path, identity: str | None = None) -> Tokenizer:
    """Load the configured tokenizer, or the one trained once on the data and kept in `folder`.

    `identity` is that of a checkpoint's tokenizer, which is then looked for first.
    """
    vocab_size = trained_vocab_size(config, preset)
    if config.tokenizer_name_or_path is None:
        assert vocab_size is not None
        texts = partial(read_documents, config.dataset_path, config.text_format)
        return trained_once(texts, vocab_size=vocab_size, folder=folder, identity=identity)
    if config.vocab_size is not None:
        raise ConfigError(
            f"--vocab-size {config.vocab_size} applies only to a tokenizer trained on the data, but "
            f"--tokenizer-name-or-path names {config.tokenizer_name_or_path}; omit one of them"
        )
    return load_tokenizer(config.tokenizer_name_or_path)
