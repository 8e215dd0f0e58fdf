"""What a configuration comes to on this machine: flags before the preset, the preset before what is usual."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash

from aura.config import AuraConfig
from aura.documents import read_documents
from aura.hardware import checkpointing_for
from aura.model import Checkpointing, Shape
from aura.presets import Preset, find
from aura.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from estiba.errors import ConfigError
from estiba.loop.schedule import Schedule
from estiba.stop import say
from estiba.store import sync_directory

TRAINED_ON_BYTES = 200 * 10**6
"""More text than this does not make a better tokenizer."""
VOCABULARY, TINY_VOCABULARY = 32_768, 4_096


@dataclass(frozen=True, kw_only=True)
class Choices:
    """Everything about the model and its steps, decided."""

    preset: Preset
    shape: Shape
    checkpointing: Checkpointing
    batch_size: int
    """Sequences in a micro-batch of one process."""
    micro_batches: int
    """In a step of one process."""
    processes: int
    learning_rate: float
    weight_decay: float
    save_steps: int

    @property
    def sequences_per_step(self) -> int:
        return self.batch_size * self.micro_batches * self.processes

    @property
    def tokens_per_step(self) -> int:
        return self.sequences_per_step * self.shape.seq_length


def device_of(config: AuraConfig, local_rank: int) -> torch.device:
    """Raises ConfigError for a device that is not here."""
    if config.device is None:
        return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(config.device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"--device {config.device}: {str(error).splitlines()[0]}; leave it out, or give cpu"
        ) from None
    return device


def memory_of(device: torch.device) -> int | None:
    """Bytes of GPU memory, or None on a CPU."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def preset_of(config: AuraConfig, device: torch.device) -> Preset:
    return find(config.model_preset, memory_bytes=memory_of(device))


def sizes_of(config: AuraConfig, preset: Preset, *, vocab_size: int) -> Shape:
    """Raises ConfigError for sizes that cannot be."""
    return Shape(
        vocab_size=-(-vocab_size // 64) * 64,  # matrix products like round numbers
        embed_size=config.embed_size or preset.embed_size,
        num_layers=config.num_layers or preset.num_layers,
        num_heads=config.num_heads or preset.num_heads,
        seq_length=config.seq_length or preset.seq_length,
        ff_size=None if config.embed_size else preset.ff_size,
        dropout=preset.dropout if config.dropout is None else config.dropout,
        tie_embeddings=preset.tie_embeddings if config.tie_embeddings is None else config.tie_embeddings,
    )


def choose(config: AuraConfig, preset: Preset, tokenizer: Tokenizer, device: torch.device, processes: int) -> Choices:
    """Raises ConfigError for sizes that cannot be, or that this GPU cannot hold."""
    shape = sizes_of(config, preset, vocab_size=tokenizer.vocab_size)
    batch_size = config.batch_size or preset.batch_size
    return Choices(
        preset=preset,
        shape=shape,
        checkpointing=_checkpointing(config, shape, batch_size, device),
        batch_size=batch_size,
        micro_batches=config.gradient_accumulation_steps or preset.gradient_accumulation_steps,
        processes=processes,
        learning_rate=config.learning_rate or preset.learning_rate,
        weight_decay=preset.weight_decay if config.weight_decay is None else config.weight_decay,
        save_steps=config.save_steps or preset.save_steps,
    )


def _checkpointing(config: AuraConfig, shape: Shape, batch_size: int, device: torch.device) -> Checkpointing:
    if config.gradient_checkpointing is False:
        return None
    if config.gradient_checkpointing:
        return config.checkpoint_segments or "full"
    return checkpointing_for(shape, batch_size=batch_size, memory_bytes=memory_of(device), optimizer=config.optimizer)


def schedule_of(config: AuraConfig, choices: Choices, windows: int) -> Schedule:
    """The course of the learning rate. Raises ConfigError where the data does not make one step."""
    steps = config.max_steps or int(config.epochs * windows / choices.sequences_per_step)
    if steps < 1:
        raise ConfigError(
            f"{windows} windows of {choices.shape.seq_length} tokens are not one step of {choices.sequences_per_step} "
            "sequences; give more text, more --epochs, or a smaller --batch-size or --gradient-accumulation-steps"
        )
    warmup = config.warmup_steps
    if warmup is None:
        warmup = min(max(10, round(choices.preset.warmup_share * steps)), steps // 2)
    return Schedule(kind=config.lr_schedule, peak=choices.learning_rate, steps=steps, warmup_steps=warmup)


def tokenizer_of(config: AuraConfig, preset: Preset, folder: Path, *, may_train: bool) -> Tokenizer:
    """The tokenizer that was asked for, or a native one, trained once on the data and kept in `folder`."""
    if config.tokenizer_name_or_path is not None:
        if config.vocab_size is not None:
            raise ConfigError(
                f"--vocab-size {config.vocab_size} is of a tokenizer that is trained here, and "
                f"--tokenizer-name-or-path {config.tokenizer_name_or_path} names one; leave one of them out"
            )
        return load_tokenizer(config.tokenizer_name_or_path)
    size = config.vocab_size or (TINY_VOCABULARY if preset.name == "aura-tiny" else VOCABULARY)
    place = _kept(folder, size)
    if place is None:
        assert may_train, "the first process makes it before the others look"
        say(f"training a tokenizer of {size} tokens on {config.dataset_path}; kept in {folder}")
        place = _train(config, size, folder)
    return load_tokenizer(str(place))


def _kept(folder: Path, size: int) -> Path | None:
    """The tokenizer of an earlier attempt, verified: its name holds its digest. A bad one is set aside."""
    for place in sorted(folder.glob(f"tokenizer-{size}-*")):
        if place.name == f"tokenizer-{size}-{_digest(place)}":
            return place
        say(f"warning: {place}: its bytes do not match its digest; set aside as bad-{place.name}, it is made again")
        bad = place.with_name(f"bad-{place.name}")
        shutil.rmtree(bad, ignore_errors=True)
        place.rename(bad)
    return None


def _train(config: AuraConfig, size: int, folder: Path) -> Path:
    beside = folder / f".tokenizer-{size}.making"
    shutil.rmtree(beside, ignore_errors=True)

    def some() -> Iterator[str]:
        total = 0
        for document in read_documents(config.dataset_path, config.text_format):
            yield document
            total += len(document)
            if total > TRAINED_ON_BYTES:
                return

    train_tokenizer(some(), vocab_size=size, folder=beside)
    for path in beside.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    place = folder / f"tokenizer-{size}-{_digest(beside)}"
    beside.rename(place)
    sync_directory(folder)
    return place


def _digest(place: Path) -> str:
    """Of every file's name and bytes, 16 hexadecimal digits."""
    digest = xxhash.xxh3_64()
    for path in sorted(place.iterdir()):
        if path.is_file():
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()
