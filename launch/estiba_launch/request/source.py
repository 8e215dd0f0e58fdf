"""A source directory as `code.tar.gz`: the same files give the same bytes. For a `code` channel and script mode."""

from __future__ import annotations

import fnmatch
import gzip
import hashlib
import io
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from estiba_launch.errors import LaunchError
from estiba_launch.paths import state_root

ARCHIVE = "code.tar.gz"
CHANNEL = "code"
PATH_IN_CONTAINER = f"/opt/ml/input/data/{CHANNEL}/{ARCHIVE}"
EXCLUDED = (
    ".git", ".hg", ".svn", ".venv", "venv", "__pycache__", "*.pyc", ".mypy_cache", ".ruff_cache", ".pytest_cache",
    ".ipynb_checkpoints", ".DS_Store", "node_modules", ".env", "*.egg-info", ".#*",
)  # fmt: skip
"""Never packed: caches, version control, editor locks, and .env, which may hold secrets."""
MAX_BYTES = 256 << 20
MAX_FILES = 50_000


def pack(files: dict[str, Path]) -> Path:
    """Write code.tar.gz into a directory named by its content, and return its path. Raises LaunchError."""
    data = archive(files)
    path = state_root() / "sources" / hashlib.sha256(data).hexdigest()[:32] / ARCHIVE
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{os.getpid()}.{ARCHIVE}")
        partial.write_bytes(data)
        partial.replace(path)
    return path


def archive(files: dict[str, Path]) -> bytes:
    """The bytes of code.tar.gz: names sorted, no times, no owners. Raises LaunchError."""
    size = sum(path.stat().st_size for path in files.values())
    if size > MAX_BYTES:
        raise LaunchError(f"the source has {size} bytes, at most {MAX_BYTES}; data belongs in a channel")
    raw = io.BytesIO()
    # A fixed time and no file name in the header: the content alone decides the bytes.
    with (
        gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=raw, mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for name, path in sorted(files.items()):
            entry = tarfile.TarInfo(name)
            entry.size = path.stat().st_size
            entry.mode = 0o755 if os.access(path, os.X_OK) else 0o644
            with path.open("rb") as file:
                tar.addfile(entry, file)
    return raw.getvalue()


def collect(
    folder: str | Path | None, dependencies: Sequence[str | Path] = (), program: str | None = None
) -> dict[str, Path]:
    """The files to pack by their archive names: those in `folder`, and each of `dependencies` (a folder or a file).

    Without a folder, the source is the file `program`. Raises LaunchError if one of them is missing or empty.
    """
    files = {Path(program).name: Path(program)} if folder is None and program else {}
    if folder is not None:
        root = Path(folder).expanduser()
        files = dict(_files(root))
        if not files:
            problem = "contains no files" if root.is_dir() else "no such folder"
            raise LaunchError(f"--source-dir {folder}: {problem}; give the folder with the program to run")
    for path in map(Path, dependencies):
        if path.is_dir():
            files |= {f"{path.resolve().name}/{name}": file for name, file in _files(path)}
        elif path.is_file():
            files[path.name] = path
        else:
            raise LaunchError(f"dependencies: {path}: no such folder or file")
    return files


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """All files to pack. A link is packed as its target, which must be inside `folder`."""
    root = Path(os.path.realpath(folder))
    pending: list[tuple[Path, tuple[Path, ...]]] = [(folder, (root,))] if folder.is_dir() else []
    count = 0
    while pending:
        current, ancestors = pending.pop()
        for path in current.iterdir():
            if _is_excluded(path.name):
                continue
            real = Path(os.path.realpath(path))
            if path.is_symlink():
                _check_link(path, real, folder, ancestors)
            if path.is_dir():
                pending.append((path, (*ancestors, real)))
            elif path.is_file():
                count += 1
                if count > MAX_FILES:
                    raise LaunchError(f"{folder}: more than {MAX_FILES} files; data belongs in a channel")
                yield path.relative_to(folder).as_posix(), path


def _check_link(path: Path, real: Path, folder: Path, ancestors: tuple[Path, ...]) -> None:
    if not real.is_relative_to(ancestors[0]):
        raise LaunchError(f"{path}: a link that points outside {folder}; replace it with a copy of the file")
    if not real.exists():
        raise LaunchError(f"{path}: a link to {os.readlink(path)}, which does not exist; remove it")
    if real in ancestors:
        raise LaunchError(f"{path}: a link to {os.readlink(path)}, which contains it; remove it")


def _is_excluded(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in EXCLUDED)


def check_program(files: dict[str, Path], entry_point: str | None) -> str:
    """The entry point, which must be in the source. Raises LaunchError naming the files there."""
    names = ", ".join(sorted(files)[:8])
    if entry_point is None:
        raise LaunchError(f"source: name the program to run with --entry-point ({names})")
    if entry_point not in files:
        raise LaunchError(f"--entry-point {entry_point}: not in the source ({names}); give its path inside the folder")
    return entry_point
