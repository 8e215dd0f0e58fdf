"""Reading checkpoints: one by its path, or the newest that verifies, in the folder or on S3."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from estiba.checkpoint import format as ckpt_format
from estiba.checkpoint import layout, tree_spec
from estiba.checkpoint.format import Manifest
from estiba.checkpoint.remote import Remote
from estiba.checkpoint.snapshot import MODEL_FILE, file_stem
from estiba.distributed import DistContext
from estiba.errors import CheckpointError, ConfigError, NewerFormatError, StoreError
from estiba.log import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Restored:
    """A verified state. Its tensors are on the CPU and belong to the caller."""

    state: dict[str, Any]
    step: int
    path: Path
    manifest: Manifest


def load(path: Path, dist: DistContext | None = None) -> Restored:
    """Load this rank's part of one checkpoint and verify every byte that is read. Raises CheckpointError."""
    dist = dist or DistContext()
    manifest = ckpt_format.read_manifest(path)
    if (position := ckpt_format.step_and_copy(path.name)) and position[0] != manifest.step:
        raise CheckpointError(f"{path}: holds step {manifest.step}; it was renamed, so give it its old name")
    if dist.is_main and manifest.ranks > 1:  # the other ranks then read their parts of a verified checkpoint
        ckpt_format.verify(path)
    state = _load_tree(path, manifest, "state", with_model=True)
    own = file_stem(dist.rank, manifest.ranks)
    if own != "state" and f"{own}.json" in manifest.files:
        state |= _load_tree(path, manifest, own, with_model=False)
    return Restored(state=state, step=manifest.step, path=path, manifest=manifest)


def load_newest(path: Path, *, flag: str, dist: DistContext | None = None) -> Restored:
    """Load a checkpoint, or the newest that verifies in a directory of them. Unlike a resume, quarantines nothing.

    `flag` is the setting that named the path, for messages. Raises CheckpointError, ConfigError.
    """
    if not path.is_dir():
        raise ConfigError(f"{flag} {path}: no such directory; give a checkpoint or a directory of checkpoints")
    if (path / ckpt_format.MANIFEST).exists():
        return load(path, dist)
    names = ckpt_format.checkpoint_names(path)
    if not names:
        raise ConfigError(
            f"{flag} {path}: contains no checkpoint (step-.../{ckpt_format.MANIFEST}); give another directory"
        )
    for name in names:
        try:
            return load(path / name, dist)
        except NewerFormatError:
            raise
        except CheckpointError as error:
            logger.warning(f"{error}; falling back to the previous checkpoint")
    raise CheckpointError(f"{flag} {path}: none of the {len(names)} checkpoints verifies; give another directory")


def newest_that_verifies(folder: Path, upload: str | None) -> Restored | None:
    """Load the newest checkpoint that verifies, in `folder` or at the S3 prefix `upload`; None if there is none.

    A checkpoint that does not verify is quarantined with a warning. Raises StoreError if `upload` cannot be listed
    and `folder` has no checkpoint.
    """
    local = ckpt_format.checkpoint_names(folder)
    remote, remote_names = _list_remote(folder, upload, is_required=not local)
    names = sorted({*local, *remote_names}, key=ckpt_format.sort_key, reverse=True)
    for name in names:
        if name in local:
            try:
                return load(folder / name)
            except NewerFormatError:
                raise
            except CheckpointError as error:
                new_name = ckpt_format.quarantine(folder, name)
                logger.warning(f"{error}; quarantined as {new_name}, falling back to the one before")
        if name in remote_names and remote is not None:
            try:
                fetched = remote.fetch(name, folder)
                logger.info(f"restored from {remote.url}/{name}")
                return load(folder / fetched)
            except NewerFormatError:
                raise
            except CheckpointError as error:
                logger.warning(f"{error}; quarantined, falling back to the one before")
                with contextlib.suppress(StoreError):
                    remote.quarantine(name)
    if names:
        logger.warning(f"{folder}: none of {len(names)} checkpoints verifies; this run starts from step 0")
    return None


def peek(folder: Path, upload: str | None = None) -> tuple[str, dict[str, Any]] | None:
    """Return where the newest checkpoint is and its state without tensors, which are None; None if there is none.

    Only the small file without tensors is read and verified. Quarantines nothing, and passes over what does not verify.
    """
    for name in ckpt_format.checkpoint_names(folder):
        with contextlib.suppress(CheckpointError):
            return str(folder / name), peek_at(folder / name)
    remote, names = _list_remote(folder, upload, is_required=True)
    for name in names:
        assert remote is not None
        with contextlib.suppress(CheckpointError):
            return f"{remote.url}/{name}", peek_remote(remote, name)
    return None


def peek_at(path: Path) -> dict[str, Any]:
    """Return one checkpoint's state with None in place of tensors. Raises CheckpointError."""
    manifest = ckpt_format.read_manifest(path)
    return _without_tensors(json.loads(bytes(ckpt_format.read_verified(path, manifest, "state.json"))))


def peek_remote(remote: Remote, name: str) -> dict[str, Any]:
    """Return the state of a checkpoint on S3 with None in place of tensors. Raises CheckpointError, StoreError."""
    return _without_tensors(json.loads(remote.read_verified(name, "state.json")))


def _without_tensors(spec: Any) -> dict[str, Any]:
    state: dict[str, Any] = tree_spec.unflatten(spec, lambda _name: None)  # type: ignore[arg-type, return-value]
    return state


def _list_remote(folder: Path, upload: str | None, *, is_required: bool) -> tuple[Remote | None, list[str]]:
    if upload is None:
        return None, []
    try:
        remote = Remote(upload)
        return remote, remote.names()
    except StoreError as error:
        if is_required:
            raise
        logger.warning(f"{upload}: cannot be listed ({error}); continuing from the checkpoints in {folder}")
        return None, []


def _load_tree(path: Path, manifest: Manifest, stem: str, *, with_model: bool) -> dict[str, Any]:
    tensors: dict[str, torch.Tensor] = {}
    for name, prefix in ((MODEL_FILE, "model/"), (f"{stem}.safetensors", "")):
        if name in manifest.files and (with_model or name != MODEL_FILE):
            for key, tensor in layout.read(ckpt_format.read_verified(path, manifest, name)).items():
                tensors[prefix + key] = tensor
    spec = json.loads(bytes(ckpt_format.read_verified(path, manifest, f"{stem}.json")))
    try:
        state: dict[str, Any] = tree_spec.unflatten(spec, tensors.__getitem__)
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: its files do not belong together ({error})") from None
    return state
