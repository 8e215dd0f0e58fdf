"""Training samples: windows of tokens, in an order that is a pure function of (seed, sample index)."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Sequence
from math import isqrt

import numpy as np
import torch
import xxhash

from estiba.errors import DataError
from estiba.log import get_logger

logger = get_logger(__name__)

VERSION = 1
"""Version of the order of samples; part of `Windows.identity`."""
ORDER_BLOCK = 2**16
"""Number of samples whose windows are computed and cached at once."""
_ROUNDS = 8


class Windows:
    """Windows of T + 1 tokens over a stream of several arrays; neighbouring windows share one token.

    Sample `i` belongs to epoch `i // len`. Each epoch has its own permutation of the windows, which is computed from
    (seed, epoch) and never stored.
    """

    identity: str
    """16 hexadecimal digits: a digest of the stream, T, the seed and the version of the order."""
    seq_length: int
    tokens: int
    """Length of the stream."""

    def __init__(self, parts: Sequence[np.ndarray], *, seq_length: int, seed: int, stream_identity: str) -> None:
        """`parts` are one-dimensional arrays of ids in stream order; `stream_identity` identifies their contents."""
        self._parts = [part for part in parts if len(part)]
        self._ends = np.cumsum([len(part) for part in self._parts], dtype=np.int64).tolist()
        self.seq_length, self._seed = seq_length, seed
        self.tokens = self._ends[-1] if self._ends else 0
        self._count = max(0, (self.tokens - 1) // seq_length)
        self._cached: tuple[tuple[int, int], np.ndarray] | None = None
        values = [VERSION, stream_identity, seq_length, seed]
        self.identity = xxhash.xxh3_64_hexdigest(json.dumps(values).encode())

    def __len__(self) -> int:
        """Return the number of windows per epoch."""
        return self._count

    def take(self, first: int, count: int) -> torch.Tensor:
        """Return samples `first` to `first + count`, across epochs, as int64[count, T + 1]."""
        width = self.seq_length + 1
        out = torch.empty((count, width), dtype=torch.int64)
        rows = out.numpy()
        parts, ends = self._parts, self._ends
        for row, start in enumerate((self.order(first, count) * self.seq_length).tolist()):
            index = bisect_right(ends, start)
            part, end = parts[index], ends[index]
            at = start - (end - len(part))
            if start + width <= end:
                rows[row] = part[at : at + width]
            else:
                self._stitch(rows[row], index, at)
        return out

    def order(self, first: int, count: int) -> np.ndarray:
        """Return the samples' window numbers, int64[count]. Raises DataError if there are no windows."""
        if not self._count:
            raise DataError(f"{self.tokens} tokens make no window of {self.seq_length} + 1; give more text")
        if first < 0 or count < 0:
            raise ValueError(f"invalid samples: {first} to {first + count}")
        blocks = [np.empty(0, np.int64)]
        while count > 0:
            epoch, index = divmod(first, self._count)
            block, offset = divmod(index, ORDER_BLOCK)
            numbers = self._block(epoch, block)[offset : offset + count]
            blocks.append(numbers)
            first += len(numbers)
            count -= len(numbers)
        return np.concatenate(blocks)

    def _block(self, epoch: int, block: int) -> np.ndarray:
        cached = self._cached  # read once: another thread may replace it
        if cached is not None and cached[0] == (epoch, block):
            return cached[1]
        indices = np.arange(block * ORDER_BLOCK, min(self._count, (block + 1) * ORDER_BLOCK), dtype=np.uint64)
        value = permuted(indices, self._count, self._seed, epoch)
        self._cached = ((epoch, block), value)
        return value

    def _stitch(self, row: np.ndarray, index: int, at: int) -> None:
        """Fill a row from a window that spans several parts."""
        filled = 0
        while filled < len(row):
            tokens = self._parts[index][at : at + len(row) - filled]
            row[filled : filled + len(tokens)] = tokens
            filled += len(tokens)
            index, at = index + 1, 0


def permuted(indices: np.ndarray, count: int, seed: int, epoch: int) -> np.ndarray:
    """Map `indices` by the permutation of range(count) that belongs to (seed, epoch). Returns int64, same shape.

    A Feistel network over a grid slightly larger than `count`, with cycle walking. Source: Black and Rogaway, Ciphers
    with arbitrary finite domains, 2002. A small `count` is sorted by hash, since the network mixes small domains badly.
    """
    names = (f"aura {VERSION} {seed} {epoch} {number}" for number in range(2 * _ROUNDS))
    keys = [np.uint64(xxhash.xxh3_64_intdigest(name.encode())) for name in names]
    if count <= ORDER_BLOCK:
        return np.argsort(_mixed(np.arange(count, dtype=np.uint64), keys[0]), kind="stable")[indices.astype(np.int64)]
    height = np.uint64(isqrt(count - 1) + 1)
    width = np.uint64(-(-count // int(height)))
    values = indices.astype(np.uint64)
    outside = np.arange(len(values))
    while len(outside):
        left, right = np.divmod(values[outside], width)
        for number in range(_ROUNDS):
            left = (left + _mixed(right, keys[2 * number])) % height
            right = (right + _mixed(left, keys[2 * number + 1])) % width
        values[outside] = left * width + right
        outside = outside[values[outside] >= count]
    return values.astype(np.int64)


def _mixed(values: np.ndarray, key: np.uint64) -> np.ndarray:
    """Hash values plus a key by splitmix64's finalizer. The result is below 2**63, so that a sum does not overflow."""
    mixed = values + key
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (mixed ^ (mixed >> np.uint64(31))) >> np.uint64(1)
