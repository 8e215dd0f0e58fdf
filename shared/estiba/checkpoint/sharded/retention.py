"""Which sharded checkpoints to keep, in a folder and on S3. A committed one was read back by every rank."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Collection
from pathlib import Path

from estiba.checkpoint.format import Manifest, sort_key, step_and_copy
from estiba.checkpoint.retention import Retention
from estiba.checkpoint.sharded import format as sharded
from estiba.errors import CheckpointError, StoreError
from estiba.storage import Store


def prune_store(store: Store, retention: Retention, *, keep: str) -> list[str]:
    """Delete surplus checkpoints, manifest first, and parts without a manifest that are older than `keep`.

    Returns the names that remain. Raises StoreError.
    """
    entries = store.list()
    checkpoints = []
    for name in sharded.committed(entries):
        with contextlib.suppress(CheckpointError):
            first = sharded.read_manifest(store, name).parts[0]
            manifest = Manifest(step=first.step, kind=first.kind, metrics=first.metrics, files={})
            checkpoints.append((name, manifest))
    surplus = set(retention.surplus(checkpoints, [name for name, _ in checkpoints]))
    kept = [name for name, _ in checkpoints if name not in surplus]
    names = {entry.path.partition("/")[0] for entry in entries}
    stale = {name for name in names if step_and_copy(name) and name not in kept and sort_key(name) < sort_key(keep)}
    for name in sorted(surplus | stale):
        sharded.delete_all(store, name, entries)
        root = getattr(store, "root", None)
        if root is not None:
            shutil.rmtree(root / name, ignore_errors=True)
    return kept


def prune_folder(folder: Path, *, kept: Collection[str]) -> None:
    """Delete what the main rank no longer keeps, on a disk that it does not see."""
    if not kept:
        return
    newest = max(kept, key=sort_key)
    with contextlib.suppress(OSError, StoreError):
        for entry in list(os.scandir(folder)):
            is_older = step_and_copy(entry.name) is not None and sort_key(entry.name) < sort_key(newest)
            if is_older and entry.name not in kept:
                shutil.rmtree(entry.path, ignore_errors=True)
