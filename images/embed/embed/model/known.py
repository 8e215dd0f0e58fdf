"""Rows of a window that need no computing: those whose vector an earlier run has, or with the tokens of an earlier row.

Which rows they are depends on the window and the earlier run alone, and not on the rows that an earlier attempt
finished, so that a resumed job computes the same batches.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xxhash

from embed.data.chunks import Origin, Status
from embed.data.known_vectors import DIGEST, KnownVectors
from embed.data.token_outputs import TokenOutputs
from embed.model.tokens import Window


def digests_of(window: Window, rows: np.ndarray) -> np.ndarray:
    """S16[len(rows)]: xxh3-128 of a row's token ids, or of its text if the model does its own tokenising.

    Texts that the model cuts off to the same tokens have the same digest.
    """
    if window.texts:
        read = [window.texts[row].encode() for row in rows.tolist()]
    else:
        bounds = zip(window.starts[rows].tolist(), window.starts[rows + 1].tolist(), strict=True)
        read = [window.ids[start:end].tobytes() for start, end in bounds]
    return np.frombuffer(b"".join(map(xxhash.xxh3_128_digest, read)), DIGEST)


@dataclass(frozen=True, kw_only=True)
class Division:
    """The rows of a window that have text, by where their vectors come from. All are int64 arrays of row numbers."""

    reused: np.ndarray
    places: np.ndarray
    """Where the vectors of the reused rows are, for KnownVectors."""
    computed: np.ndarray
    copies: np.ndarray
    originals: np.ndarray
    """The computed row of each copy."""

    def origin(self, rows: int) -> np.ndarray:
        """uint8[rows], an Origin each."""
        origin = np.full(rows, Origin.COMPUTED, np.uint8)
        origin[self.copies], origin[self.reused] = Origin.COPIED, Origin.REUSED
        return origin

    def fill(self, vectors: np.ndarray, tokens: TokenOutputs | None, known: KnownVectors | None) -> None:
        """Give the copies what the computed rows have, and the reused rows their known vectors."""
        vectors[self.copies] = vectors[self.originals]
        if tokens is not None:
            tokens.put_rows_of(tokens, self.originals, at=self.copies)
        if known is not None:
            vectors[self.reused] = known.vectors(self.places)

    def originals_of(self, is_needed: np.ndarray) -> np.ndarray:
        """bool[rows]: the row has copies that are needed."""
        found = np.zeros(len(is_needed), bool)
        found[self.originals[is_needed[self.copies]]] = True
        return found

    def with_copies(self, rows: np.ndarray) -> np.ndarray:
        """Computed rows, and the copies of them."""
        return np.concatenate([rows, self.copies[np.isin(self.originals, rows)]])


def divide(window: Window, known: KnownVectors | None) -> Division:
    rows = np.flatnonzero(window.status == Status.OK)
    digests = digests_of(window, rows)
    places = np.full(len(rows), -1) if known is None else known.find(digests)
    is_known = places >= 0
    others, digests = rows[~is_known], digests[~is_known]
    _, first, group = np.unique(digests, return_index=True, return_inverse=True)
    originals = others[first[group]]
    is_copy = originals != others
    return Division(
        reused=rows[is_known],
        places=places[is_known],
        computed=others[~is_copy],
        copies=others[is_copy],
        originals=originals[is_copy],
    )
