"""A source directory as `code.tar.gz`: the same bytes for the same files, for a `code` channel and script mode."""

from __future__ import annotations

import fnmatch
import gzip
import hashlib
import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

from . import state
from .errors import LaunchError

ARCHIVE = "code.tar.gz"
CHANNEL = "code"
SUBMIT_DIRECTORY = f"/opt/ml/input/data/{CHANNEL}/{ARCHIVE}"
LEFT_OUT = (
    ".git", ".hg", ".svn", ".venv", "venv", "__pycache__", "*.pyc", ".mypy_cache", ".ruff_cache", ".pytest_cache",
    ".ipynb_checkpoints", ".DS_Store", "node_modules", ".env", "*.egg-info",
)  # fmt: skip
"""Never part of a source: caches, version control, and .env, where secrets live."""
MAX_BYTES = 256 << 20


def pack(folder: Path) -> Path:
    """Pack `folder` and return the directory that holds the archive, named by its content. Raises LaunchError."""
    data = archive(folder)
    place = state.state_root() / "sources" / hashlib.sha256(data).hexdigest()[:32]
    path = place / ARCHIVE
    if not path.exists():
        place.mkdir(parents=True, exist_ok=True)
        partial = place / f".{os.getpid()}.{ARCHIVE}"
        partial.write_bytes(data)
        partial.replace(path)
    return place


def archive(folder: Path) -> bytes:
    """The bytes of code.tar.gz: names sorted, no times, no owners. Raises LaunchError."""
    names = list(files(folder))
    if not names:
        raise LaunchError(f"--source-dir {folder}: holds no files; give the folder with the program to run")
    size = sum((folder / name).stat().st_size for name in names)
    if size > MAX_BYTES:
        raise LaunchError(f"--source-dir {folder}: {size} bytes, at most {MAX_BYTES}; data belongs in a channel")
    raw = io.BytesIO()
    # A fixed time and no file name in the header: nothing but the content decides the bytes.
    with (
        gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=raw, mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for name in names:
            path = folder / name
            entry = tarfile.TarInfo(name)
            entry.size = path.stat().st_size
            entry.mode = 0o755 if os.access(path, os.X_OK) else 0o644
            with path.open("rb") as file:
                tar.addfile(entry, file)
    return raw.getvalue()


def files(folder: Path) -> Iterator[str]:
    """Relative names of everything that is packed, sorted. A link is packed as what it leads to, inside `folder`."""
    if not folder.is_dir():
        raise LaunchError(f"--source-dir {folder}: no such folder; give the folder with the program to run")
    root = folder.resolve()
    found = []
    for here, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not _is_left_out(name)]
        for name in names:
            path = Path(here, name)
            if _is_left_out(name) or not path.is_file():
                continue
            if not path.resolve().is_relative_to(root):
                raise LaunchError(f"{path}: a link that leads out of {folder}; put a copy of the file there")
            found.append(path.relative_to(folder).as_posix())
    yield from sorted(found)


def _is_left_out(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in LEFT_OUT)


def program(folder: Path, entry_point: str | None) -> str:
    """The entry point, which must be a file of the source. Raises LaunchError naming what is there."""
    names = list(files(folder))
    if entry_point is None:
        raise LaunchError(f"--source-dir {folder}: name the program to run with --entry-point ({', '.join(names[:8])})")
    if entry_point not in names:
        raise LaunchError(
            f"--entry-point {entry_point}: not in {folder} ({', '.join(names[:8])}); give its path inside the folder"
        )
    return entry_point
