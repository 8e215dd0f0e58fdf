"""Vectors of an earlier run on local disk, found by the digest of what the model read.

The file has no name in its directory, so that a job that is killed leaves nothing; other processes of the job open it
through the one that wrote it. The vectors are read one by one, and only the digests (24 bytes a row) are mapped:
memory does not grow with the size of a vector.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from typing import Any

import numpy as np

DIGEST = np.dtype("S16")
PLACE = np.dtype(np.int64)
ALIGNMENT = 16
BLOCK_ROWS = 2**20
"""Digests that are written at once, so that they are in memory once."""


@dataclass(frozen=True, kw_only=True)
class KnownFile:
    """A finished file: vectors as they came, then their digests in order, then which vector each digest has."""

    path: str
    rows: int
    dimensions: int
    dtype: str
    computed_by: dict[str, Any]
    """What a file says of a row group with reused vectors."""

    @property
    def row_bytes(self) -> int:
        return self.dimensions * np.dtype(self.dtype).itemsize

    @property
    def digests_at(self) -> int:
        return -(-self.rows * self.row_bytes // ALIGNMENT) * ALIGNMENT


def size_bytes(rows: int, dimensions: int, dtype: str) -> int:
    return rows * (dimensions * np.dtype(dtype).itemsize + DIGEST.itemsize + PLACE.itemsize)


class KnownVectorsWriter:
    """Writes the file, which exists as long as this object or a KnownVectors holds it. May raise OSError."""

    def __init__(self, dimensions: int, dtype: str) -> None:
        self._file = tempfile.TemporaryFile(prefix="estiba-reuse-")  # noqa: SIM115 - it outlives this function
        self._dimensions, self._dtype = dimensions, dtype
        self._digests: list[np.ndarray] = []
        self.rows = 0

    def add(self, digests: np.ndarray, vectors: np.ndarray) -> None:
        """Append vectors of [rows, dimensions] with their digests."""
        self._file.write(np.ascontiguousarray(vectors, self._dtype).data)
        self._digests.append(digests)
        self.rows += len(digests)

    def keep(self, rows: int) -> None:
        """Drop all but the first rows."""
        self._file.seek(rows * self._dimensions * np.dtype(self._dtype).itemsize)
        self._file.truncate()
        self._digests = [np.concatenate([np.empty(0, DIGEST), *self._digests])[:rows]]
        self.rows = rows

    def finish(self, computed_by: dict[str, Any]) -> KnownFile:
        """Write the digests. The first of several rows with one digest is the one that is found."""
        digests = np.concatenate([np.empty(0, DIGEST), *self._digests])
        self._digests.clear()
        places = np.argsort(digests, kind="stable")
        known = KnownFile(
            path=f"/proc/{os.getpid()}/fd/{self._file.fileno()}",
            rows=self.rows,
            dimensions=self._dimensions,
            dtype=self._dtype,
            computed_by=computed_by,
        )
        self._file.seek(known.digests_at)
        for start in range(0, len(places), BLOCK_ROWS):
            self._file.write(digests[places[start : start + BLOCK_ROWS]].data)
        self._file.write(places.astype(PLACE, copy=False).data)
        self._file.flush()
        return known


class KnownVectors:
    """Reads the file. Safe in one thread at a time."""

    def __init__(self, known: KnownFile) -> None:
        self._known = known
        self.computed_by = known.computed_by
        self._file = open(known.path, "rb", buffering=0)  # noqa: SIM115 - read as long as the job runs
        self._digests = self._mapped(DIGEST, known.digests_at)
        self._places = self._mapped(PLACE, known.digests_at + known.rows * DIGEST.itemsize)

    def _mapped(self, dtype: np.dtype[Any], offset: int) -> np.ndarray:
        if not self._known.rows:  # a map cannot be empty
            return np.empty(0, dtype)
        return np.memmap(self._file, dtype, "r", offset, (self._known.rows,))

    def find(self, digests: np.ndarray) -> np.ndarray:
        """int64[len(digests)]: where the vector of each one is; -1 if there is none."""
        if not self._known.rows:
            return np.full(len(digests), -1, PLACE)
        places = np.minimum(np.searchsorted(self._digests, digests), self._known.rows - 1)
        return np.where(self._digests[places] == digests, self._places[places], -1)

    def vectors(self, places: np.ndarray) -> np.ndarray:
        """float32[len(places), dimensions], exactly as stored."""
        vectors = np.empty((len(places), self._known.dimensions), self._known.dtype)
        for vector, place in zip(vectors, places, strict=True):
            os.preadv(self._file.fileno(), [vector.data], int(place) * self._known.row_bytes)
        return vectors.astype(np.float32)
