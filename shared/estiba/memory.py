"""How much memory is left to this machine or container."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")
VERSIONS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)
"""Files of cgroup versions 2 and 1: limit, usage, statistics, and the name in them of the page cache."""


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
    for limit, usage, statistics, page_cache in VERSIONS:
        with contextlib.suppress(OSError, ValueError):  # no such version, or the limit is "max"
            left = int((CGROUP / limit).read_text()) - int((CGROUP / usage).read_text())
            counts = dict(line.split() for line in (CGROUP / statistics).read_text().splitlines())
            yield left + int(counts.get(page_cache, 0))
