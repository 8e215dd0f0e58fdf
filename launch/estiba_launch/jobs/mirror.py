"""What a folder holds and what a store holds, as far as a sync must know it.

Standard library only: the ssh target copies this file to remote hosts, so that both sides sync by the same rules.
"""

from __future__ import annotations

import os
import stat as modes
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from estiba_launch.errors import HostError

PART = ".estiba-part"
"""Suffix of files that a store has not finished writing."""
UPLOADING, UPLOADED = ".sagemaker-uploading", ".sagemaker-uploaded"
"""Suffixes of the empty files that SageMaker leaves beside a checkpoint file while and after it uploads it."""
NOT_SYNCED = (PART, UPLOADING, UPLOADED)
Signature = tuple[int, int, int]
"""Size in bytes, time of change in ns, inode."""

Folder = tuple[str, Path, tuple[str, ...]]
"""A folder's key, its path, and the real paths on the way to it. A link must not lead back to one of them."""


class KeyRefused(HostError):
    """The store or the file system refuses this one object. Others may pass."""


@dataclass(frozen=True)
class Stored:
    """An object, as its store describes it."""

    size_bytes: int
    modified_ns: int
    """When its content was written, at the latest."""
    etag: str
    """Changes with the content."""


@dataclass
class Scan:
    """The files of a folder, and what is known to be missing from that list."""

    files: dict[str, Signature] = field(default_factory=dict)
    linked: dict[str, Path] = field(default_factory=dict)
    """Where the bytes of a key are that was found through a link."""
    skipped: dict[str, str] = field(default_factory=dict)
    """What no store can hold, such as a socket, and why."""
    unlisted: dict[str, str] = field(default_factory=dict)
    """Folders and files that could not be looked at, and why. Nothing below them counts as deleted."""

    def hides(self, key: str) -> bool:
        return any(key == one or key.startswith(f"{one}/") for one in self.unlisted)


def walk(root: Path) -> Iterator[tuple[str, os.stat_result]]:
    """(key, stat) of every regular file below `root`, sorted. Leaves out links and half-written store parts.

    Raises OSError for a folder that cannot be listed.
    """
    pending = [root]
    found: list[tuple[str, os.stat_result]] = []
    while pending:
        directory = pending.pop()
        try:
            entries = list(os.scandir(directory))
        except FileNotFoundError:
            continue
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                pending.append(Path(entry.path))
            elif entry.is_file(follow_symlinks=False) and not entry.name.endswith(NOT_SYNCED):
                try:
                    found.append((os.path.relpath(entry.path, root), entry.stat(follow_symlinks=False)))
                except FileNotFoundError:
                    continue
    yield from sorted(found, key=lambda pair: pair[0])


def signature(stat: os.stat_result) -> Signature:
    return (stat.st_size, stat.st_mtime_ns, stat.st_ino)


def scan(
    root: Path,
    list_denied: Callable[[str], dict[str, Signature]] | None = None,
    resolve: Callable[[Path], Path | None] = lambda link: Path(os.path.realpath(link)),
) -> Scan:
    """Everything below `root`. A link inside the folder counts as what it leads to, which `resolve` finds.

    `list_denied` lists a folder that this user may not list. Raises OSError when `root` itself cannot be listed.
    """
    found = Scan()
    pending: list[Folder] = [("", root, (os.path.realpath(root),))]
    while pending:
        folder, path, above = pending.pop()
        try:
            names = os.listdir(path)
        except FileNotFoundError:
            if not folder:
                raise
            continue
        except OSError as error:
            try:
                if list_denied is None or not isinstance(error, PermissionError):
                    raise
                denied = list_denied(folder)
                found.files.update({key: seen for key, seen in denied.items() if not key.endswith(NOT_SYNCED)})
            except (OSError, HostError) as failed:
                if not folder:
                    raise
                found.unlisted[folder] = _reason(failed)
            continue
        for name in names:
            key = f"{folder}/{name}" if folder else name
            try:
                _look(found, pending, key, path / name, root, above, resolve)
            except FileNotFoundError:
                continue
            except OSError as error:
                found.unlisted[key] = _reason(error)
    return found


def _look(
    found: Scan,
    pending: list[Folder],
    key: str,
    path: Path,
    root: Path,
    above: tuple[str, ...],
    resolve: Callable[[Path], Path | None],
) -> None:
    stat = path.lstat()
    at = path
    if modes.S_ISLNK(stat.st_mode):
        link, real = os.readlink(path), resolve(path)
        if real is None or not real.exists():
            found.skipped[key] = f"a link to nothing here ({link})"
            return
        if not os.path.realpath(real).startswith(f"{above[0]}{os.sep}"):
            found.skipped[key] = f"a link out of the folder ({link})"
            return
        at, stat = real, real.stat()
    if modes.S_ISDIR(stat.st_mode):
        real_path = os.path.realpath(at)
        if real_path in above:
            found.skipped[key] = "a link to a folder around it"
        else:
            pending.append((key, at, (*above, real_path)))
    elif not modes.S_ISREG(stat.st_mode):
        found.skipped[key] = "neither a file nor a folder"
    elif not key.endswith(NOT_SYNCED):
        found.files[key] = signature(stat)
        if at != root / key:
            found.linked[key] = at


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
