"""Follows the links in folders: in a user's input, and in a job's results.

A user's link may lead anywhere on this machine. A job's link is resolved as in its container: within the
folders that were mounted there, never to another file of this machine.
"""

from __future__ import annotations

import os
import stat as modes
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from estiba_launch.jobs.mirror import PART

MAX_LINKED_FOLDERS = 10_000
"""Links to folders that are followed. Folders of links to each other double with every level."""
MAX_CHAIN = 40
"""Links that lead to links, as in Linux."""
Resolve = Callable[[Path], Path | None]
"""The file or folder that a link leads to in the end; None when there is none."""


@dataclass(frozen=True)
class Found:
    key: str
    path: Path
    """The file itself, no link; with `keep_inside` the link."""
    size_bytes: int
    link: str | None = None
    """Of a link that was kept: its target, relative to the link."""


def on_this_machine(link: Path) -> Path | None:
    real = Path(os.path.realpath(link))
    return real if real.exists() else None


class InContainer:
    """Resolves links as the container did. `mounts` are its folders, and where they are on this machine."""

    def __init__(self, mounts: Mapping[str, Path]) -> None:
        # The longest first: a mount may be below another.
        self._mounts = sorted(mounts.items(), key=lambda mount: -len(mount[0]))
        self._sources = sorted(mounts.items(), key=lambda mount: -len(str(mount[1])))

    def __call__(self, link: Path) -> Path | None:
        mount = next(mount for mount in self._sources if link.is_relative_to(mount[1]))
        inside = PurePosixPath(mount[0]) / link.relative_to(mount[1])
        pending = list(reversed(inside.parts[1:]))
        at: list[str] = []
        chain = 0
        while pending:
            part = pending.pop()
            if part == "..":
                at = at[:-1]
                continue
            at.append(part)
            here = self._local_path(at)
            if here is None or not here.is_symlink() or any(here == source for _, source in self._mounts):
                continue
            chain += 1
            if chain > MAX_CHAIN:
                return None
            target = os.readlink(here)
            at = [] if target.startswith("/") else at[:-1]
            pending += [one for one in reversed(target.split("/")) if one not in ("", ".")]
        found = self._local_path(at)
        return found if found and found.exists() else None

    def _local_path(self, parts: list[str]) -> Path | None:
        """The path on this machine; None outside the mounts."""
        path = PurePosixPath("/", *parts)
        for target, source in self._mounts:
            if path.is_relative_to(target):
                return source / path.relative_to(target)
        return None


def follow(
    root: Path,
    broken: Callable[[str], None],
    odd: Callable[[str], None] = lambda _: None,
    *,
    resolve: Resolve = on_this_machine,
    starts: str = "",
    keep_inside: bool = False,
) -> Iterator[Found]:
    """Every file below `root`, sorted, links followed.

    A link that leads nowhere or in a circle is not yielded: `broken` is called with its key and the reason. `odd` is
    called for sockets and their like. `starts` limits the names in `root` itself. `keep_inside` yields a link to
    something below `root` as a link. Raises OSError for a folder that cannot be listed.
    """
    followed = 0
    pending: list[tuple[Path, str, tuple[tuple[int, int], ...]]] = [(root, "", (_identity(root.stat()),))]
    found: list[Found] = []
    while pending:
        folder, prefix, above = pending.pop()
        for entry in os.scandir(folder):
            key, path = prefix + entry.name, Path(entry.path)
            if (not prefix and not entry.name.startswith(starts)) or entry.name.endswith(PART):
                continue
            is_link, target = entry.is_symlink(), ""
            if is_link:
                target, real = os.readlink(path), resolve(path)
                if real is None:
                    broken(f"{key} is a link to {target}, which is not there")
                    continue
                if keep_inside and real.is_relative_to(root):
                    relative = os.path.relpath(real.relative_to(root), os.path.dirname(key) or ".")
                    found.append(Found(key, path, 0, relative))
                    continue
                path = real
            try:
                stat = path.stat()
            except FileNotFoundError:
                continue
            if modes.S_ISREG(stat.st_mode):
                found.append(Found(key, path, stat.st_size))
            elif not modes.S_ISDIR(stat.st_mode):
                odd(f"{key} is neither a file nor a folder")
            elif _identity(stat) in above:
                broken(f"{key} is a link to {target}, a folder around it")
            elif is_link and (followed := followed + 1) > MAX_LINKED_FOLDERS:
                broken(f"{key}: more than {MAX_LINKED_FOLDERS} links to folders")
                return
            else:
                pending.append((path, f"{key}/", (*above, _identity(stat))))
    yield from sorted(found, key=lambda one: one.key)


def stays_inside(root: Path) -> bool:
    """Whether every link below `root` also works where only `root` is mounted: relative, and never above it."""
    real_root = os.path.realpath(root)
    for folder, folders, names in os.walk(root):
        for name in (*folders, *names):
            path = os.path.join(folder, name)
            if not os.path.islink(path):
                continue
            target = os.readlink(path)
            lexical = os.path.normpath(os.path.join(os.path.relpath(folder, root), target))
            real = os.path.realpath(path)
            if os.path.isabs(target) or lexical.split("/")[0] == ".." or not real.startswith(f"{real_root}/"):
                return False
    return True


def _identity(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_dev, stat.st_ino
