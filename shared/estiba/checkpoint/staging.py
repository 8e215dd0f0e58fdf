"""The staging buffer: snapshots are copied into it, and the writer process writes files from it.

It is allocated once, and pinned if there is a GPU. It is a memfd whose descriptor the writer inherits, not a file in
/dev/shm, which Docker limits to 64 MB.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import threading

import torch

from estiba.checkpoint.disk import padded
from estiba.log import get_logger
from estiba.memory import available_memory_bytes

logger = get_logger(__name__)

POPULATE_STEP_BYTES = 64 << 20
MADV_POPULATE_WRITE = 23  # Linux 5.14
_libc = ctypes.CDLL(None, use_errno=True)


class StagingBuffer:
    """Shared memory that grows. A thread touches its pages in advance, since that takes longer than the copy."""

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("estiba-staging", os.MFD_CLOEXEC)
        self.size_bytes = 0
        self._map: mmap.mmap | None = None
        self._populating: threading.Thread | None = None
        self._pinned_at: int | None = None

    @property
    def memory(self) -> mmap.mmap:
        assert self._map is not None
        return self._map

    def reserve(self, size_bytes: int) -> None:
        """Make room for `size_bytes`. When the buffer grows, its content is lost."""
        size_bytes = padded(size_bytes)
        if size_bytes <= self.size_bytes:
            return
        self._wait()
        self._unpin()
        if (room := available_memory_bytes()) is not None and size_bytes - self.size_bytes > room:
            logger.warning(
                f"a snapshot for checkpoints needs {size_bytes / 1e9:.1f} GB of host memory and "
                f"{room / 1e9:.1f} GB are free; give the container more if it is killed"
            )
        os.ftruncate(self.descriptor, size_bytes)
        self._map = mmap.mmap(self.descriptor, size_bytes)  # the old map lives as long as its views
        self.size_bytes = size_bytes
        self._populating = threading.Thread(target=self._populate, name="estiba-staging", daemon=True)
        self._populating.start()

    def wait_until_populated(self) -> None:
        """Block until every page is touched. Benchmarks need it; a snapshot does not."""
        self._wait()

    def pin(self) -> None:
        """Page-lock the buffer for fast copies from a GPU, if that is allowed."""
        if not torch.cuda.is_available() or self._pinned_at is not None or self._map is None:
            return
        self._wait()
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        with contextlib.suppress(RuntimeError):
            if int(torch.cuda.cudart().cudaHostRegister(address, self.size_bytes, 0)) == 0:
                self._pinned_at = address
                return
        with contextlib.suppress(RuntimeError):  # CUDA keeps the error for the next kernel, which is this one
            torch.zeros(1, device="cuda")

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
        for offset in range(0, size, POPULATE_STEP_BYTES):  # in steps, so that an exit waits for at most one
            step = min(POPULATE_STEP_BYTES, size - offset)
            address = ctypes.c_void_p(start + offset)
            if _libc.madvise(address, ctypes.c_size_t(step), MADV_POPULATE_WRITE) != 0:
                return  # the kernel is too old; the first snapshot touches the pages
