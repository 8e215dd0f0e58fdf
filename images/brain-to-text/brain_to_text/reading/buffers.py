"""Memory for batches, used again: fresh pages of a hundred megabytes cost more than filling them."""

from __future__ import annotations

import threading
import weakref

import numpy as np
import torch

PAGE_BYTES = 4096
KEPT = 8
"""Buffers that wait to be used again; as many batches as lie between the reader and the step, and some."""


class _Leased(np.ndarray):
    """A view whose end gives its buffer back. Unlike an ndarray it can be watched."""


class Buffers:
    """Tensors whose memory comes back by itself when nothing refers to it any more. Safe in threads."""

    def __init__(self, *, kept: int = KEPT) -> None:
        self._kept = kept
        self._free: list[np.ndarray] = []
        self._lock = threading.RLock()  # the collector may give back in the middle of taking
        self.made = 0

    def prepare(self, *shape: int) -> None:
        """Have memory ready for a `take` of that shape; new pages cost most when they are touched first."""
        count = int(np.prod(shape))
        with self._lock:
            if any(count <= len(buffer) for buffer in self._free):
                return
        buffer = self._make(count)
        buffer[:: PAGE_BYTES // buffer.itemsize] = 0.0
        self._give_back(buffer)

    def _make(self, count: int) -> np.ndarray:
        self.made += 1
        return np.empty(count + count // 8, np.float32)  # room for a batch that is a little longer

    def take(self, *shape: int) -> torch.Tensor:
        """float32[shape], of any values."""
        count = int(np.prod(shape))
        with self._lock:
            fitting = [at for at, buffer in enumerate(self._free) if count <= len(buffer)]
            if fitting:
                buffer = self._free.pop(min(fitting, key=lambda at: len(self._free[at])))
            else:
                if len(self._free) == self._kept:  # all too small: batches have grown
                    self._free.pop(0)
                buffer = self._make(count)
        lease = buffer[:count].view(_Leased)
        weakref.finalize(lease, self._give_back, buffer).atexit = False
        return torch.from_numpy(lease.reshape(shape))

    def _give_back(self, buffer: np.ndarray) -> None:
        with self._lock:
            if len(self._free) < self._kept:
                self._free.append(buffer)
