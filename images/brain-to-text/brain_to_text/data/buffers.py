"""Reuse the memory of batches, because touching a hundred megabytes of new pages costs more than filling them."""

from __future__ import annotations

import math
import threading
import weakref

import numpy as np
import torch

PAGE_BYTES = 4096
MAX_FREE = 2
"""Free buffers to keep. Batches between the reader and the step hold the others."""


class _Leased(np.ndarray):
    """A view whose buffer returns to the pool when the view is garbage collected."""


class BufferPool:
    """Tensors whose memory returns to the pool once nothing refers to it. Thread-safe."""

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []
        self._lock = threading.RLock()  # the garbage collector may return a buffer during `take`

    def prepare(self, *shape: int) -> None:
        """Allocate memory for a later `take` of this shape, and touch its pages."""
        count = math.prod(shape)
        with self._lock:
            if any(count <= len(buffer) for buffer in self._free):
                return
        buffer = self._allocate(count)
        buffer[:: PAGE_BYTES // buffer.itemsize] = 0.0
        self._return(buffer)

    def take(self, *shape: int) -> torch.Tensor:
        """Return an uninitialised float32[shape]."""
        count = math.prod(shape)
        with self._lock:
            fitting = [index for index, buffer in enumerate(self._free) if count <= len(buffer)]
            if fitting:
                buffer = self._free.pop(min(fitting, key=lambda index: len(self._free[index])))
            else:
                if self._free:  # all are too small, because batches have grown
                    self._free.pop(0)
                buffer = self._allocate(count)
        lease = buffer[:count].view(_Leased)  # a plain ndarray cannot be weakly referenced
        weakref.finalize(lease, self._return, buffer).atexit = False
        return torch.from_numpy(lease.reshape(shape))

    def _allocate(self, count: int) -> np.ndarray:
        return np.empty(count + count // 8, np.float32)  # room for a slightly longer batch

    def _return(self, buffer: np.ndarray) -> None:
        with self._lock:
            if len(self._free) < MAX_FREE:
                self._free.append(buffer)
