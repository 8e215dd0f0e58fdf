"""Checkpoints in other tools' forms: one `.pt` file, or a folder of torch.distributed.checkpoint.

export_pt(restored.state, Path("checkpoint-step-500.pt"))     # torch.load(path, weights_only=True) takes it
state = import_pt(Path("checkpoint-step-500.pt"))             # and so does a resume
"""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from estiba.errors import CheckpointError
from estiba.store import FileStore

MODEL, OPTIMIZER = "model_state_dict", "optimizer_state_dict"


def export_pt(state: Mapping[str, Any], path: Path, extra: Mapping[str, Any] | None = None) -> None:
    """One file with `model_state_dict`, `optimizer_state_dict`, `step` and everything else that a resume needs.

    Published whole. Raises StoreError where it cannot be written.
    """
    content = {
        "step": state["loop"]["step"],
        MODEL: dict(state["model"]),
        OPTIMIZER: state["optimizer"],
        **(extra or {}),
        "estiba": {name: value for name, value in state.items() if name not in ("model", "optimizer")},
    }
    save_pt(content, path)


def save_pt(content: Mapping[str, Any], path: Path) -> None:
    """`torch.save`, published whole. Raises StoreError."""
    with FileStore(path.parent).writer(path.name) as file:
        torch.save(dict(content), file)
    os.chmod(path, 0o666 & ~_umask())


def import_pt(path: Path) -> dict[str, Any]:
    """The state in a file of `export_pt`, or `model` alone of one that another program wrote.

    Nothing but tensors and plain values is read (`weights_only=True`). Raises CheckpointError.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: not a file of tensors and plain values ({first}); export it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}; a checkpoint is a dict with {MODEL!r}")
    if MODEL not in content:
        if content and all(isinstance(value, torch.Tensor) for value in content.values()):
            return {"model": content}  # a bare state dict
        raise CheckpointError(f"{path}: has no {MODEL!r} (found {sorted(map(str, content))[:10]}); export it again")
    if "estiba" not in content:
        return {"model": content[MODEL]}
    return {**content["estiba"], "model": content[MODEL], "optimizer": content[OPTIMIZER]}


def export_dcp(state: Mapping[str, Any], folder: Path) -> None:
    """Model and optimizer as torch.distributed.checkpoint writes them, for a job that shards them over its ranks.

    Its load reshards: every rank asks for its own part of each tensor. Raises CheckpointError.
    """
    import torch.distributed.checkpoint as dcp

    if folder.exists() and any(folder.iterdir()):
        raise CheckpointError(f"{folder}: is there already; give a new folder")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that this is one process, which is as it should be
            dcp.save(
                {"model": dict(state["model"]), "optimizer": state["optimizer"]}, checkpoint_id=folder, no_dist=True
            )
    except (OSError, dcp.CheckpointException) as error:  # the latter is no Exception, but a BaseException
        raise CheckpointError(f"{folder}: not exported ({error}); check the disk") from None


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value
