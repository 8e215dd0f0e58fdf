"""What BGE-M3's heads give for the tokens of a window: as they are computed, and as a chunk and an output hold them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embed.data.precision import MULTI_VECTOR, SPARSE, SPARSE_TYPE, vector_array

_IDS, _WEIGHTS, _VECTORS = "token_ids", "token_weights", "token_vectors"
"""Columns of a partial chunk."""


@dataclass(frozen=True, kw_only=True)
class TokenOutputs:
    """Values by token, row after row, in the order of the text."""

    starts: np.ndarray
    """int64[rows + 1]: row i has the tokens [starts[i], starts[i + 1])."""
    ids: np.ndarray
    """int32[tokens]"""
    weights: np.ndarray | None = None
    """float32[tokens], 0 for special tokens."""
    vectors: np.ndarray | None = None
    """float32[tokens, width], that of the first token of each row included."""

    @classmethod
    def zeros(cls, starts: np.ndarray, ids: np.ndarray, *, has_weights: bool, vector_width: int) -> TokenOutputs:
        """`vector_width` 0 leaves the vectors out."""
        return cls(
            starts=starts,
            ids=ids,
            weights=np.zeros(len(ids), np.float32) if has_weights else None,
            vectors=np.zeros((len(ids), vector_width), np.float32) if vector_width else None,
        )

    def put(self, rows: np.ndarray, weights: np.ndarray | None, vectors: np.ndarray | None) -> None:
        """Set the values of the rows' tokens, given row after row."""
        at = self._tokens_of(rows)
        if self.weights is not None and weights is not None:
            self.weights[at] = weights
        if self.vectors is not None and vectors is not None:
            self.vectors[at] = vectors

    def put_rows_of(self, other: TokenOutputs, rows: np.ndarray, at: np.ndarray | None = None) -> None:
        """Take the values of some rows of the same window, for themselves or for others with the same tokens."""
        found = other.of_rows(rows)
        self.put(rows if at is None else at, found.weights, found.vectors)

    def of_rows(self, rows: np.ndarray) -> TokenOutputs:
        """A copy of some rows, in that order."""
        at = self._tokens_of(rows)
        return TokenOutputs(
            starts=_starts(np.diff(self.starts)[rows]),
            ids=self.ids[at],
            weights=None if self.weights is None else self.weights[at],
            vectors=None if self.vectors is None else self.vectors[at],
        )

    def only(self, is_kept: np.ndarray) -> TokenOutputs:
        """A copy in which the rows that are not kept have no tokens."""
        of_token = np.repeat(is_kept, np.diff(self.starts))
        return TokenOutputs(
            starts=_starts(np.where(is_kept, np.diff(self.starts), 0)),
            ids=self.ids[of_token],
            weights=None if self.weights is None else self.weights[of_token],
            vectors=None if self.vectors is None else self.vectors[of_token],
        )

    def _tokens_of(self, rows: np.ndarray) -> np.ndarray:
        spans = [np.arange(self.starts[row], self.starts[row + 1]) for row in rows]
        return np.concatenate(spans) if spans else np.zeros(0, np.int64)

    # --- as the output holds them ------------------------------------------------------------------------------

    def columns(self, is_null: np.ndarray, dtype: str) -> dict[str, pa.Array]:
        """By row: the weight of each token id, and the vectors of all tokens after the first, in the stored precision.

        Rows that are null have no tokens here.
        """
        mask, columns = pa.array(is_null), {}
        if self.weights is not None:
            columns[SPARSE] = self._largest_weights(mask)
        if self.vectors is not None:
            is_first = np.zeros(len(self.ids), bool)
            is_first[self.starts[:-1][np.diff(self.starts) > 0]] = True
            vectors = vector_array(self.vectors[~is_first], dtype)
            starts = _starts(np.maximum(np.diff(self.starts) - 1, 0))
            columns[MULTI_VECTOR] = pa.ListArray.from_arrays(_offsets(starts), vectors, mask=mask)
        return columns

    def _largest_weights(self, mask: pa.Array) -> pa.Array:
        """The largest weight of each token id of a row, by id. Tokens without weight are left out."""
        assert self.weights is not None
        rows = np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))
        found = self.weights > 0
        rows, ids, weights = rows[found], self.ids[found], self.weights[found]
        order = np.lexsort((ids, rows))
        rows, ids, weights = rows[order], ids[order], weights[order]
        first = np.flatnonzero(np.diff(rows, prepend=-1) | np.diff(ids, prepend=-1))
        if len(first):
            weights = np.maximum.reduceat(weights, first)
        starts = _starts(np.bincount(rows[first], minlength=len(self.starts) - 1))
        keys, items = pa.array(ids[first], pa.int32()), pa.array(weights, pa.float32())
        return pa.MapArray.from_arrays(_offsets(starts), keys, items, type=SPARSE_TYPE, mask=mask)

    # --- as a partial chunk holds them -------------------------------------------------------------------------

    def partial_columns(self) -> dict[str, pa.Array]:
        offsets = _offsets(self.starts)
        columns = {_IDS: pa.ListArray.from_arrays(offsets, pa.array(self.ids, pa.int32()))}
        if self.weights is not None:
            columns[_WEIGHTS] = pa.ListArray.from_arrays(offsets, pa.array(self.weights))
        if self.vectors is not None:
            columns[_VECTORS] = pa.ListArray.from_arrays(offsets, vector_array(self.vectors, "float32"))
        return columns

    @classmethod
    def of_partial(cls, batch: pa.RecordBatch) -> TokenOutputs | None:
        """What `partial_columns` left in a chunk; None if there are no heads."""
        if _IDS not in batch.schema.names:
            return None
        ids = batch.column(_IDS)
        lengths = pc.list_value_length(ids).fill_null(0).to_numpy()
        outputs = cls(starts=_starts(lengths), ids=ids.flatten().to_numpy())
        if _WEIGHTS in batch.schema.names:
            outputs = replace(outputs, weights=batch.column(_WEIGHTS).flatten().to_numpy())
        if _VECTORS in batch.schema.names:
            vectors = batch.column(_VECTORS).flatten()
            outputs = replace(outputs, vectors=vectors.flatten().to_numpy().reshape(-1, vectors.type.list_size))
        return outputs


def _starts(lengths: np.ndarray) -> np.ndarray:
    starts = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=starts[1:])
    return starts


def _offsets(starts: np.ndarray) -> pa.Array:
    return pa.array(starts, pa.int32())
