"""The output with a row for each chunk of a text (`--chunk-output rows`): the columns of a row are repeated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from embed.data.chunks import ChunkLost, RowRange, computed_by, from_bytes, key_of
from embed.data.passages import END, ROW, START, part_key_of, part_of
from estiba.checkpoint import ChunkStore
from estiba.errors import DataError

CHUNK = "chunk"
FIELDS = (pa.field(CHUNK, pa.int32()), pa.field(START, pa.int32()), pa.field(END, pa.int32()))
PIECE_BYTES = 16 * 2**20
MAX_REPEATED_BYTES = 4 * 2**30
"""Of one row of the input. A text of 100 MB has 50,000 chunks, and repeating it for each would fill any disk."""

_PLAIN = {pa.string_view(): pa.large_string(), pa.binary_view(): pa.large_binary()}


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Consecutive rows of the output."""

    rows: np.ndarray
    """int64, the row of the input batch that each one repeats."""
    vectors: pa.RecordBatch


def repeat(batch: pa.RecordBatch, rows: np.ndarray) -> list[pa.Array]:
    """The batch's columns, with each of `rows`, which ascend, as often as it is named."""
    first, last = int(rows[0]), int(rows[-1])
    indices = pa.array(rows - first)
    columns = []
    for column in batch.slice(first, last - first + 1).columns:
        try:
            taken = _plain(column).take(indices)
            columns.append(taken if taken.type == column.type else taken.cast(column.type))
        except pa.ArrowNotImplementedError:  # views within a list or a struct
            columns.append(pa.concat_arrays([column.slice(row, 1) for row in indices.to_pylist()]))
    return columns


def _plain(column: pa.Array) -> pa.Array:
    """A column of views with memory of its own: a slice of one, or a row of it repeated, holds all of its text."""
    kind = _PLAIN.get(column.type)
    return column if kind is None else column.cast(kind)


def _row_bytes(batch: pa.RecordBatch) -> np.ndarray:
    """int64[rows]: what repeating a row takes. Its value in a dictionary is not repeated."""
    columns = [column.indices if pa.types.is_dictionary(column.type) else _plain(column) for column in batch.columns]
    own = pa.RecordBatch.from_arrays(columns, names=[str(index) for index in range(len(columns))])
    return np.array([own.slice(row, 1).nbytes for row in range(batch.num_rows)], np.int64)


class PassageReader:
    """The passages of a row group in order, with one chunk in memory at a time."""

    def __init__(
        self, chunks: ChunkStore, file: str, ranges: Sequence[RowRange], engines: list[dict[str, Any]]
    ) -> None:
        """Adds the engines that computed the chunks to `engines`."""
        self._chunks, self._file, self._engines = chunks, file, engines
        self._windows = self._load(ranges)
        self._position = 0
        self._window: Piece | None = None
        self._last = (-1, 0)
        """Row and number of the passage before."""
        self.origins: Counter[str] = Counter()
        """Empty: a copied passage is not a copied row."""

    def _load(self, ranges: Sequence[RowRange]) -> Iterator[Piece]:
        for rows in ranges:
            last = self._verified(key_of(self._file, rows), rows)
            for part in range(part_of(last)):
                yield self._numbered(self._verified(part_key_of(self._file, rows, part), rows), rows)
            yield self._numbered(last, rows)

    def _verified(self, key: str, rows: RowRange) -> pa.RecordBatch:
        data = self._chunks.load(key)
        if data is None:
            raise ChunkLost(rows)
        return from_bytes(data)

    def _numbered(self, batch: pa.RecordBatch, rows: RowRange) -> Piece:
        self._engines += [engine for engine in computed_by(batch) if engine not in self._engines]
        row = batch.column(ROW).to_numpy().astype(np.int64) + rows.start
        number = np.arange(len(row)) - np.searchsorted(row, row)
        last_row, last_number = self._last
        number[row == last_row] += last_number + 1
        self._last = (int(row[-1]), int(number[-1]))
        batch = batch.replace_schema_metadata(None).append_column(CHUNK, pa.array(number, pa.int32()))
        return Piece(rows=row, vectors=batch)

    def pieces(self, batch: pa.RecordBatch, path: str) -> Iterator[Piece]:
        """The passages of the next rows of the row group, which are `batch`, in pieces of bounded size.

        Raises DataError if a row would be repeated so often that the output could not be stored.
        """
        sizes = _row_bytes(batch)
        for piece in self._until(self._position + batch.num_rows):
            rows = piece.rows - self._position
            numbers = piece.vectors.column(CHUNK).to_numpy().astype(np.int64)
            largest = int(np.argmax(sizes[rows] * (numbers + 1)))
            if sizes[rows[largest]] * (numbers[largest] + 1) > MAX_REPEATED_BYTES:
                raise DataError(
                    f"{path}: a row of {sizes[rows[largest]]} bytes has more than {numbers[largest]} chunks, and the "
                    "output would repeat its columns for each; leave the long ones out with --columns, since "
                    "chunk_start and chunk_end say where in the input's text a chunk is"
                )
            bytes_before = np.cumsum(sizes[rows] + piece.vectors.nbytes // max(1, len(rows)))
            cuts = np.flatnonzero(np.diff(bytes_before // PIECE_BYTES)) + 1
            for first, last in zip([0, *cuts], [*cuts, len(rows)], strict=True):
                yield Piece(rows=rows[first:last], vectors=piece.vectors.slice(first, last - first))
        self._position += batch.num_rows

    def _until(self, end: int) -> Iterator[Piece]:
        """The passages of the rows before `end` that were not yielded yet."""
        while (window := self._window or next(self._windows, None)) is not None:
            count = int(np.searchsorted(window.rows, end))
            rest = len(window.rows) - count
            self._window = Piece(rows=window.rows[count:], vectors=window.vectors.slice(count)) if rest else None
            if count:
                yield Piece(rows=window.rows[:count], vectors=window.vectors.slice(0, count))
            if rest:
                return
