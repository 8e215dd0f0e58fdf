"""The warm pool's cache: a directory that survives from one job to the next on the same instance.

What is staged lies there, and the target directory links to it. A later job verifies it and fetches only what changed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import xxhash

from estiba.log import get_logger
from estiba.staging.files import disk_error
from estiba.staging.pieces import PieceTable
from estiba.storage import TEMPORARY_SUFFIX

logger = get_logger(__name__)

VARIABLE = "SAGEMAKER_MANAGED_WARMPOOL_CACHE_DIRECTORY"
_FOLDER = "estiba-stage"


def cache_directory(table: PieceTable, target: Path, environ: Mapping[str, str] = os.environ) -> Path | None:
    """Return where to stage a source in the warm pool's cache; None without one, or if it has too little room.

    Older entries of other sources are removed to make room.
    """
    root = environ.get(VARIABLE)
    if not root or Path(root) in target.parents:
        return None
    folder = Path(root) / _FOLDER
    entry = folder / xxhash.xxh3_64_hexdigest(table.source.encode("utf-8", "surrogateescape"))
    try:
        entry.mkdir(parents=True, exist_ok=True)
        others = [path for path in folder.iterdir() if path.is_dir() and path != entry]
        needed_bytes = table.size_bytes - _used_bytes(entry)
        for other in sorted(others, key=lambda path: path.stat().st_mtime):
            if shutil.disk_usage(entry).free >= needed_bytes:
                break
            shutil.rmtree(other, ignore_errors=True)
            logger.info("staging: %s was removed from the warm pool's cache to make room", other)
        if shutil.disk_usage(entry).free < needed_bytes:
            logger.info("staging: the warm pool's cache %s has too little room; it is not used", root)
            return None
        os.utime(entry)
    except OSError as error:
        logger.warning("staging: the warm pool's cache is not used: %s", disk_error(folder, error))
        return None
    return entry


def link_files(table: PieceTable, cached: Path, target: Path) -> None:
    """Give the target the cached files: hard links, or symbolic ones where the cache is another file system.

    An empty target becomes a link itself, since `s5cmd sync` does not follow links below its target. Raises StoreError.
    """
    try:
        if not _can_link(cached / table.files[0].path, target):
            with contextlib.suppress(OSError):  # it is not empty, or a mount: its files become links
                target.rmdir()
                target.symlink_to(cached)
        for entry in table.files:
            link, file = target / entry.path, cached / entry.path
            link.parent.mkdir(parents=True, exist_ok=True)
            if link.exists() and os.path.samefile(link, file):
                continue
            link.unlink(missing_ok=True)
            try:
                os.link(file, link)
            except OSError:
                link.symlink_to(file)
    except OSError as error:
        raise disk_error(target, error) from None


def _can_link(file: Path, folder: Path) -> bool:
    probe = folder / f".link{TEMPORARY_SUFFIX}"
    try:
        os.link(file, probe)
    except OSError:
        return False
    probe.unlink()
    return True


def _used_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_blocks * 512
    return total
