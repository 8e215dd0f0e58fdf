"""Finished weights: found, read and written, with the settings that they belong to beside them.

A decoder lies in a file of torch (`best_checkpoint` of upstream, of the guide or of this image) with `args.yaml` beside
it, or in a verified checkpoint of a run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
import yaml

from brain_to_text import arguments
from brain_to_text.choices import checkpoint_channel, shape_of
from brain_to_text.config import FREE, BrainConfig
from brain_to_text.model import GRUDecoder, canonical, load_weights
from estiba.checkpoint import directory
from estiba.checkpoint.exports import import_pt, save_pt
from estiba.checkpoint.saver import load as load_checkpoint
from estiba.errors import CheckpointError, ConfigError
from estiba.stop import say
from estiba.store import FileStore

BEST, FINAL, ARGUMENTS = "best_checkpoint", "final_checkpoint", "args.yaml"
PLACES = ("", BEST, f"checkpoint/{BEST}")
"""Where the weights may lie in a directory that is named."""
NUMPY_SCALARS: list[Any] = [
    np.dtype,
    np._core.multiarray.scalar,  # type: ignore[attr-defined]
    type(np.dtype(np.float32)),
    type(np.dtype(np.float64)),
]
"""In upstream's files, whose losses are numpy's numbers."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """Weights, and what they are called in messages and in the state of a run."""

    name: str
    weights: Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A finished decoder with the settings and the sessions of its training."""

    name: str
    model: GRUDecoder
    config: BrainConfig
    sessions: list[str]


def first_weights(config: BrainConfig) -> Found | None:
    """What a new run begins with; None for fresh weights. Raises ConfigError, CheckpointError."""
    place = config.init_checkpoint_path if config.init_from_checkpoint else None
    if place is None:
        channel = checkpoint_channel()
        if not channel.is_dir() or not any(channel.iterdir()):
            return None
        place = str(channel)
    path = _file(Path(place))
    return Found(name=f"{path.name} {_digest(path)}", weights=read(path))


def read(path: Path) -> dict[str, torch.Tensor]:
    """The weights of a file of torch, with upstream's names. Raises CheckpointError."""
    with torch.serialization.safe_globals(NUMPY_SCALARS):
        return canonical(import_pt(path)["model"])


def open_decoder(place: str, device: torch.device) -> Decoder:
    """A finished decoder, in evaluation mode. Raises ConfigError, CheckpointError."""
    path = Path(place)
    if path.is_dir() and ((path / directory.MANIFEST).exists() or directory.names_in(path)):
        return _from_checkpoint(path, device)
    path = _file(path)
    beside = path.with_name(ARGUMENTS)
    if not beside.exists():
        raise ConfigError(f"{path}: has no {ARGUMENTS} beside it, which says its sizes and sessions; put it there")
    values, _ = arguments.read(beside, BrainConfig)
    config = BrainConfig.model_validate(values)
    if not config.sessions:
        raise ConfigError(f"{beside}: has no dataset.sessions, the order of the layers of days; add them")
    return _made(str(path), read(path), config, config.sessions, device)


def _from_checkpoint(path: Path, device: torch.device) -> Decoder:
    if (path / directory.MANIFEST).exists():
        found = load_checkpoint(path)
    else:
        found = _newest(path)
    plan, work = found.state["plan"], found.state["work"]
    weights = work["averaged"] or found.state["model"]
    config = BrainConfig.model_validate({name: value for name, value in plan["config"].items() if name not in FREE})
    return _made(str(found.path), weights, config, plan["sessions"], device)


def _newest(folder: Path) -> Any:
    names = directory.names_in(folder)
    for name in names:
        try:
            return load_checkpoint(folder / name)
        except CheckpointError as error:
            say(f"warning: {error}; taking the one before")
    raise CheckpointError(f"{folder}: {len(names)} checkpoints there and none verifies; give another place")


def _made(
    name: str, weights: Mapping[str, torch.Tensor], config: BrainConfig, sessions: list[str], device: torch.device
) -> Decoder:
    model = GRUDecoder(shape_of(config, len(sessions)), seed=0)
    load_weights(model, weights, name)
    return Decoder(name=name, model=model.to(device).eval(), config=config, sessions=list(sessions))


def _file(path: Path) -> Path:
    for place in PLACES:
        if (path / place).is_file():
            return path / place
    files = sorted(one for one in path.glob("*") if one.is_file()) if path.is_dir() else []
    if len(files) == 1:
        return files[0]
    raise ConfigError(f"{path}: holds no weights ({BEST}, or a directory of verified checkpoints); give another place")


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_64()
    with open(path, "rb") as file:
        while chunk := file.read(2**24):
            digest.update(chunk)
    return digest.hexdigest()


def write(
    folder: Path,
    name: str,
    weights: Mapping[str, torch.Tensor],
    *,
    config: BrainConfig,
    sessions: Sequence[str],
    step: int,
    val_per: float | None,
    val_loss: float | None,
) -> None:
    """`folder/name` as upstream writes it, and `args.yaml` beside it. Raises StoreError."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"model_state_dict": dict(weights), "step": step, "val_PER": val_per, "val_loss": val_loss}
    save_pt(content, folder / name)
    text = yaml.safe_dump(arguments.nested(config, sessions), sort_keys=False, allow_unicode=True)
    FileStore(folder).write(ARGUMENTS, text.encode())
