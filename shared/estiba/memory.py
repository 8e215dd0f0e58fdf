"""How much memory is left to this machine or container."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")
VERSIONS = {
    "": ("", "memory.max", "memory.current", "inactive_file"),
    "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""Of cgroup versions 2 and 1, by the controllers in OWN_CGROUP: the folder in CGROUP, the files of limit and usage, and
the name of the page cache in memory.stat."""


def available_memory_bytes() -> int | None:
    """Return the memory that is left to this machine or to the container, whichever is less; None if neither says.

    The page cache of files counts as free, since the kernel drops it when a process needs the memory.
    """
    left = [*_of_machine(), *_of_container()]
    return max(0, min(left)) if left else None


def _of_machine() -> Iterator[int]:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                yield int(line.split()[1]) * 1024


def _of_container() -> Iterator[int]:
    for controllers, (top, limit, usage, page_cache) in VERSIONS.items():
        for folder in _own_groups(controllers, CGROUP / top):
            with contextlib.suppress(OSError, ValueError):  # no such version, or the limit is "max"
                left = int((folder / limit).read_text()) - int((folder / usage).read_text())
                counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                yield left + int(counts.get(page_cache, 0))


def _own_groups(controllers: str, top: Path) -> list[Path]:
    """Return this process's cgroup and those above it, each of which may have a limit.

    In a container `top` is its own. A process of Slurm or systemd is in a group further down.
    """
    own = PurePosixPath("/")
    with contextlib.suppress(OSError, ValueError):
        for line in OWN_CGROUP.read_text().splitlines():
            _, names, path = line.split(":", 2)
            if controllers in names.split(","):
                own = PurePosixPath(path)
    return [top / folder.relative_to("/") for folder in (own, *own.parents) if folder.is_absolute()]
