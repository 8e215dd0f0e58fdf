"""Requests from h5py_source.py to h5py_files.py, which may run in another process, and the responses and errors."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np

from brain_to_text.data.schema import ObjectVersion


@dataclass(frozen=True)
class ReadRequest:
    """One trial to read."""

    location: str
    """Path of a file, or BUCKET/KEY."""
    url: str
    version: ObjectVersion
    trial: str
    """Name of the HDF5 group: 'trial_0007'."""
    name: str
    """'t15.2023.08.11/trial_0007', for error messages."""
    shape: tuple[int, ...]
    """(T, C) according to the index."""
    size_bytes: int


@dataclass(frozen=True)
class ReadResponse:
    """float32[T, C] or an error, and the requests sent to the store since the last response."""

    result: np.ndarray | Exception
    gets: int
    bytes_fetched: int


class TransientError(Exception):
    """A failure of the network or the service, or a short response. Another attempt may succeed."""


class AccessDenied(Exception):
    """Access denied, or credentials expired. Other credentials may help."""


class ObjectReplaced(Exception):
    """The object changed or no longer exists. The text is its current version, if known."""


class RequestLog:
    """Counts requests, and keeps the reason for a failure, since h5py reports only that a read failed."""

    def __init__(self) -> None:
        self.failure: Exception | None = None
        self._gets = self._bytes = 0
        self._lock = threading.Lock()

    def add(self, size_bytes: int) -> None:
        with self._lock:
            self._gets += 1
            self._bytes += size_bytes

    def reset(self) -> tuple[int, int]:
        """Return (requests, bytes) since the last call."""
        with self._lock:
            counts, self._gets, self._bytes = (self._gets, self._bytes), 0, 0
        return counts
