"""A window while its batches are computed: which rows are done, and what a batch adds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from embed.data.chunks import PENDING, Encoded, Status
from embed.data.token_outputs import TokenOutputs
from embed.model.batches import BatchDone, BatchLimits
from embed.model.forward import InFlight
from embed.model.tokens import Window


@dataclass(frozen=True, kw_only=True)
class WindowWork:
    """The arrays are filled in place."""

    window: Window
    vectors: np.ndarray
    done: np.ndarray
    """bool[rows]: the row has a valid vector."""
    tokens: TokenOutputs | None
    on_batch: Callable[[BatchDone], None]
    limits: BatchLimits
    again: np.ndarray
    """bool[rows]: the row has a vector elsewhere, which its copies need here."""

    def add(self, batch: InFlight, computed: np.ndarray, is_invalid: np.ndarray, *, is_again: bool) -> None:
        """Take the vectors of a batch, except those of rows that are done, and tell `on_batch`."""
        is_fresh = ~self.done[batch.rows]
        self.vectors[batch.rows[is_fresh]] = computed[is_fresh]
        self.done[batch.rows[~is_invalid]] = True
        fresh = batch.rows[:0] if is_again else batch.rows[is_fresh]
        self.on_batch(
            BatchDone(
                rows=int((~self.again[fresh]).sum()),
                tokens=int(self.window.n_tokens[fresh].sum()),
                padded_tokens=batch.padded_tokens,
                done=self.done | self.again,
                snapshot=self.snapshot,
            )
        )

    def snapshot(self, rows: np.ndarray) -> Encoded:
        status, is_done = self.window.status[rows], self.done[rows]
        return Encoded(
            vectors=np.where(is_done[:, None], self.vectors[rows], 0),
            status=np.where((status == Status.OK) & ~is_done, PENDING, status).astype(np.uint8),
            n_tokens=self.window.n_tokens[rows],
            truncated=self.window.truncated[rows],
            padded_tokens=0,
            tokens=self.tokens and self.tokens.of_rows(rows).only(is_done),
        )
