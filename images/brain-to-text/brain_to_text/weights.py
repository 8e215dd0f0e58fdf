"""Read and write the weights of trained decoders, together with their settings.

A trained decoder is either a torch file (the `best_checkpoint` of upstream, the guide or this image) with `args.yaml`
next to it, or a verified checkpoint of a run.
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

from brain_to_text import yaml_config
from brain_to_text.config import MAY_CHANGE, BrainConfig, checkpoint_channel
from brain_to_text.model import GRUDecoder, canonical, load_weights
from brain_to_text.resolve import decoder_shape
from estiba.checkpoint import format as ckpt_format
from estiba.checkpoint.exports import DIGEST_SUFFIX, import_pt, save_pt
from estiba.checkpoint.restore import load_newest
from estiba.errors import ConfigError
from estiba.storage import FileStore

BEST, FINAL, ARGUMENTS = "best_checkpoint", "final_checkpoint", "args.yaml"
WEIGHT_PATHS = ("", BEST, f"checkpoint/{BEST}")
"""Where weights are looked for, relative to the path that the user gives."""
NUMPY_SCALARS: list[Any] = [
    np.dtype,
    np._core.multiarray.scalar,  # type: ignore[attr-defined]
    type(np.dtype(np.float32)),
    type(np.dtype(np.float64)),
]
"""Types that torch.load must allow, because upstream's files contain losses as numpy scalars."""


@dataclass(frozen=True, kw_only=True)
class TrainedDecoder:
    """A trained decoder, with the settings and sessions that it was trained with."""

    name: str
    model: GRUDecoder
    config: BrainConfig
    sessions: list[str]


def initial_weights(config: BrainConfig) -> tuple[str, dict[str, torch.Tensor]] | None:
    """Return the origin and the weights that a new run starts from. Returns None to start from random weights.

    The origin is a file name with a digest. Raises ConfigError, CheckpointError.
    """
    location = config.init_checkpoint_path if config.init_from_checkpoint else None
    if location is None:
        channel = checkpoint_channel()
        if not channel.is_dir() or not any(channel.iterdir()):
            return None
        location = str(channel)
    path = _find_file(Path(location))
    return f"{path.name} {xxhash.xxh3_64_hexdigest(path.read_bytes())}", read(path)


def read(path: Path) -> dict[str, torch.Tensor]:
    """Read the weights in a torch file, under upstream's parameter names. Raises CheckpointError."""
    with torch.serialization.safe_globals(NUMPY_SCALARS):
        return canonical(import_pt(path)["model"])


def open_decoder(location: str, device: torch.device) -> TrainedDecoder:
    """Load a trained decoder, in evaluation mode. Raises ConfigError, CheckpointError."""
    path = Path(location)
    if path.is_dir() and ((path / ckpt_format.MANIFEST).exists() or ckpt_format.checkpoint_names(path)):
        return _from_checkpoint(path, device)
    path = _find_file(path)
    arguments = path.with_name(ARGUMENTS)
    if not arguments.exists():
        raise ConfigError(f"{path}: has no {ARGUMENTS} next to it, with its sizes and sessions; copy it there")
    values, _ = yaml_config.read(arguments, BrainConfig)
    config = BrainConfig.model_validate(values)
    if not config.sessions:
        raise ConfigError(f"{arguments}: has no dataset.sessions, the order of the per-day input layers; add them")
    return _build(str(path), read(path), config, config.sessions, device)


def _from_checkpoint(path: Path, device: torch.device) -> TrainedDecoder:
    checkpoint = load_newest(path, flag="--model")
    fingerprint = checkpoint.state["plan"]
    weights = checkpoint.state["work"]["averaged"] or checkpoint.state["model"]
    settings = {name: value for name, value in fingerprint["config"].items() if name not in MAY_CHANGE}
    config = BrainConfig.model_validate(settings)
    return _build(str(checkpoint.path), weights, config, fingerprint["sessions"], device)


def _build(
    name: str, weights: Mapping[str, torch.Tensor], config: BrainConfig, sessions: list[str], device: torch.device
) -> TrainedDecoder:
    model = GRUDecoder(decoder_shape(config, len(sessions)), seed=0)
    load_weights(model, weights, name)
    return TrainedDecoder(name=name, model=model.to(device).eval(), config=config, sessions=list(sessions))


def _find_file(path: Path) -> Path:
    for name in WEIGHT_PATHS:
        if (path / name).is_file():
            return path / name
    files = [file for file in path.glob("*") if file.is_file() and file.suffix not in (DIGEST_SUFFIX, ".yaml")]
    if len(files) == 1:
        return files[0]
    raise ConfigError(f"{path}: has no weights ({BEST}, or a directory of verified checkpoints); give another path")


def write(
    folder: Path,
    name: str,
    weights: Mapping[str, torch.Tensor],
    *,
    config: BrainConfig,
    sessions: Sequence[str],
    metrics: Mapping[str, Any],
) -> None:
    """Write `folder/name` in upstream's format, and `args.yaml` next to it. Raises StoreError.

    `metrics` has `step`, and after an evaluation `val_per` and `val_loss`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    numbers = {"step": metrics["step"], "val_PER": metrics.get("val_per"), "val_loss": metrics.get("val_loss")}
    save_pt({"model_state_dict": dict(weights), **numbers}, folder / name)
    content = yaml_config.to_sections(config.training_settings(), sessions)
    FileStore(folder).write(ARGUMENTS, yaml.safe_dump(content, sort_keys=False, allow_unicode=True).encode())
