"""How many rows of a width fit on a GPU, from what two batches took at the start.

A batch takes a bytes for each of its tokens, in every layer, and b for each pair of tokens of a row where the scores of
attention or a mask are in memory: a*B*T + b*B*T*T for B rows of T tokens. Flash kernels keep no scores, and b is 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

SHORT, LONG = (256, 32), (16, 512)
"""Rows and tokens of the two batches: as many tokens in both."""
USED_SHARE = 0.8
"""Of the memory that the weights leave. The rest is for the cache's fragments and for the batch that waits."""


@dataclass(frozen=True, kw_only=True)
class MemoryModel:
    bytes_per_token: float
    bytes_per_pair: float
    room_bytes: float

    def rows_of(self, width: int) -> int:
        """How many rows of `width` tokens fit; one at least, which is tried in any case."""
        row = self.bytes_per_token * width + self.bytes_per_pair * width**2
        return max(1, int(self.room_bytes / row)) if row > 0 else 2**31


def fitted(peak_bytes: Callable[[int, int], int], room_bytes: float, longest: int) -> MemoryModel:
    """The model that two batches give. `peak_bytes` measures a batch of so many rows of so many tokens."""
    rows, width = SHORT[0], min(SHORT[1], longest)
    long_rows, long_width = LONG[0] * LONG[1] // min(LONG[1], longest), min(LONG[1], longest)
    peak_bytes(rows, width)  # kernels and workspaces are loaded by the first batch
    short, long = peak_bytes(rows, width), peak_bytes(long_rows, long_width)
    tokens = rows * width
    if long_width <= width:
        return MemoryModel(bytes_per_token=short / tokens, bytes_per_pair=0.0, room_bytes=room_bytes)
    per_pair = max(
        0.0, (long - short * long_rows * long_width / tokens) / (long_rows * long_width * (long_width - width))
    )
    per_token = max(0.0, short / tokens - per_pair * width)
    return MemoryModel(bytes_per_token=per_token, bytes_per_pair=per_pair, room_bytes=room_bytes)
