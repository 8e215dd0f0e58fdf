"""Memory that snapshots are copied into and that the writer process writes from: allocated once, pinned on a GPU box.

Not /dev/shm, which Docker limits to 64 MB: an anonymous file in memory (memfd), handed to the writer as a descriptor.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import threading
from pathlib import Path

import torch

from estiba.checkpoint.disk import padded
from estiba.stop import say

POPULATE_STEP_BYTES = 64 << 20
MADV_POPULATE_WRITE = 23  # Linux 5.14
_libc = ctypes.CDLL(None, use_errno=True)


class Arena:
    """A growing block of shared memory. Its pages are touched ahead in a thread, as that costs more than the copy."""

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("estiba-arena", os.MFD_CLOEXEC)
        self.size_bytes = 0
        self._map: mmap.mmap | None = None
        self._populating: threading.Thread | None = None
        self._pinned_at: int | None = None

    @property
    def buffer(self) -> mmap.mmap:
        assert self._map is not None
        return self._map

    def reserve(self, size_bytes: int) -> None:
        """Have room for so many bytes. What was in the arena is void when it grows."""
        size_bytes = padded(size_bytes)
        if size_bytes <= self.size_bytes:
            return
        self._wait()
        self._unpin()
        if (room := available_memory_bytes()) is not None and size_bytes - self.size_bytes > room:
            say(
                f"warning: a snapshot for checkpoints needs {size_bytes / 1e9:.1f} GB of host memory and "
                f"{room / 1e9:.1f} GB are free; give the container more if it is killed"
            )
        os.ftruncate(self.descriptor, size_bytes)
        self._map = mmap.mmap(self.descriptor, size_bytes)  # an older map lives as long as views of it do
        self.size_bytes = size_bytes
        self._populating = threading.Thread(target=self._populate, name="estiba-arena", daemon=True)
        self._populating.start()

    def wait_until_populated(self) -> None:
        """Block until every page is there: a benchmark's business, a snapshot need not wait."""
        self._wait()

    def pin(self) -> None:
        """Page-lock for fast copies from a GPU. No harm done where that is refused."""
        if not torch.cuda.is_available() or self._pinned_at is not None or self._map is None:
            return
        self._wait()
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        with contextlib.suppress(RuntimeError):
            if int(torch.cuda.cudart().cudaHostRegister(address, self.size_bytes, 0)) == 0:
                self._pinned_at = address

    def _unpin(self) -> None:
        if self._pinned_at is not None:
            with contextlib.suppress(RuntimeError):
                torch.cuda.cudart().cudaHostUnregister(self._pinned_at)
            self._pinned_at = None

    def _wait(self) -> None:
        if self._populating is not None:
            self._populating.join()

    def _populate(self) -> None:
        map_, size = self._map, self.size_bytes
        assert map_ is not None
        start = ctypes.addressof(ctypes.c_char.from_buffer(map_))
        for offset in range(0, size, POPULATE_STEP_BYTES):  # in steps, so that an exit does not wait for all of it
            step = min(POPULATE_STEP_BYTES, size - offset)
            address = ctypes.c_void_p(start + offset)
            if _libc.madvise(address, ctypes.c_size_t(step), MADV_POPULATE_WRITE) != 0:
                return  # an older kernel: the first snapshot touches the pages itself


def available_memory_bytes() -> int | None:
    """What can still be allocated here: the machine's, or the container's limit where that is less."""
    found = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):
            found.append(int(Path(limit).read_text()) - int(Path(used).read_text()))
    return max(0, min(found)) if found else None
