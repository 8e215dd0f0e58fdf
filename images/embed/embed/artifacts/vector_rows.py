"""The vectors of a file's rows, from its chunks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embed.artifacts.passage_rows import Piece
from embed.data.chunks import ChunkLost, RowRange, computed_by, from_bytes, key_of, origins
from embed.data.precision import MULTI_VECTOR
from estiba.checkpoint import ChunkStore

PIECE_BYTES = 16 * 2**20
"""Vectors of tokens in a piece, at most about this: those of a few thousand rows may take gigabytes."""


class VectorReader:
    """The vectors of a row group in row order, with one chunk in memory at a time."""

    def __init__(
        self, chunks: ChunkStore, file: str, ranges: Sequence[RowRange], engines: list[dict[str, Any]]
    ) -> None:
        """Adds the engines that computed the chunks to `engines`."""
        self._engines = engines
        self.origins: Counter[str] = Counter()
        """How many rows were `copied` and `reused`."""
        self._chunks, self._file, self._ranges = chunks, file, iter(ranges)
        self._batch: pa.RecordBatch | None = None
        self._used = 0

    def pieces(self, batch: pa.RecordBatch, path: str) -> Iterator[Piece]:  # noqa: ARG002 - as PassageReader's
        """The vectors of the next rows of the row group, which are `batch`.

        One piece, or several of bounded size where each token has a vector. Their ends depend on the rows alone.
        """
        first = 0
        for vectors in self._bounded(self._take(batch.num_rows)):
            yield Piece(rows=np.arange(first, first + vectors.num_rows), vectors=vectors)
            first += vectors.num_rows

    def _take(self, rows: int) -> Iterator[pa.RecordBatch]:
        while rows:
            if self._batch is None or self._used == self._batch.num_rows:
                row_range = next(self._ranges)
                data = self._chunks.load(key_of(self._file, row_range))
                if data is None:
                    raise ChunkLost(row_range)
                batch = from_bytes(data)
                self._engines += [engine for engine in computed_by(batch) if engine not in self._engines]
                self.origins.update(origins(batch))
                self._batch, self._used = batch.replace_schema_metadata(None), 0
            part = self._batch.slice(self._used, rows)
            self._used += part.num_rows
            rows -= part.num_rows
            yield part

    @staticmethod
    def _bounded(parts: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """The same rows, cut behind each row that completes PIECE_BYTES."""
        held: list[pa.RecordBatch] = []
        size_bytes = 0
        for part in parts:
            ends = size_bytes + np.cumsum(_token_bytes(part))
            cuts = np.flatnonzero(np.diff(ends // PIECE_BYTES, prepend=size_bytes // PIECE_BYTES)) + 1
            first = 0
            for cut in cuts.tolist():
                yield _joined([*held, part.slice(first, cut - first)])
                held, first = [], cut
            if first < part.num_rows:
                held.append(part.slice(first))
            size_bytes = int(ends[-1])
        if held:
            yield _joined(held)


def _token_bytes(vectors: pa.RecordBatch) -> np.ndarray:
    """int64[rows]: what the vectors of a row's tokens take."""
    if MULTI_VECTOR not in vectors.schema.names:
        return np.zeros(vectors.num_rows, np.int64)
    column = vectors.column(MULTI_VECTOR)
    kind = column.type.value_type
    tokens = pc.list_value_length(column).fill_null(0).to_numpy().astype(np.int64)
    return tokens * (kind.list_size * kind.value_type.bit_width // 8)


def _joined(parts: Sequence[pa.RecordBatch]) -> pa.RecordBatch:
    return parts[0] if len(parts) == 1 else pa.concat_batches(parts)
