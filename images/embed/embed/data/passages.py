"""Passages: the parts of long texts that are the rows of a window where the job runs with `--chunk`.

What is saved of such a window says where in which row each passage lies. Vectors can then be joined with rows, or their
mean be taken, without reading the text again.

A row range with very long texts has several windows: its *parts*. Each is saved as a partial chunk, and the range is
done when the last one is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa

from embed.data.chunks import PARTIAL, Encoded, RowRange, Status, from_bytes, key_of

ROW, START, END, TEXT_TOKENS = "row", "chunk_start", "chunk_end", "text_tokens"
"""Columns of a saved window, beside those of every chunk."""
_PART, _IS_LAST, _ROWS_DONE = b"part", b"is_last_part", b"rows_done"


@dataclass(frozen=True, kw_only=True)
class Passages:
    """The passages of one window. A row without text is one passage without a span."""

    row: np.ndarray
    """int32[passages]: the row, counted from the start of its row range. Ascending."""
    start: np.ndarray
    end: np.ndarray
    """int32[passages]: half-open span of the row's text, in characters; -1 without text."""
    text_tokens: np.ndarray
    """int32[passages]: tokens of the text, without prompt and special ones."""
    part: int
    is_last: bool
    """The row range has no more parts."""

    @cached_property
    def _texts(self) -> tuple[int, int]:
        """Passages with text, and rows with text that end in this window."""
        rows = self.row[self.start >= 0]
        goes_on = not self.is_last and len(rows) > 0 and rows[-1] == self.row[-1]
        return len(rows), len(np.unique(rows)) - int(goes_on)

    def rows_done(self, passages_done: int) -> int:
        """The share of rows that computed passages stand for: all passages stand for all rows that end here."""
        passages, rows = self._texts
        return min(passages_done, passages) * rows // max(1, passages)


# --- keys ----------------------------------------------------------------------------------------------------------


def part_key_of(file: str, rows: RowRange, part: int) -> str:
    """The key of a finished part of a range, if that is not the last one, which has the range's own key."""
    return f"{key_of(file, rows)}-{part:06d}"


def partial_part_key_of(file: str, rows: RowRange, part: int) -> str:
    """The key of a part until its range is done. That of the first one is the range's, since most have only one."""
    return f"{part_key_of(file, rows, part) if part else key_of(file, rows)}{PARTIAL}"


# --- contents ------------------------------------------------------------------------------------------------------


def with_passages(data: bytes | memoryview, passages: Passages, rows_done: int | None = None) -> memoryview:
    """A chunk that holds a window, with its passages, and if it is a partial one the rows that it stands for."""
    batch = from_bytes(data)
    columns = {
        ROW: pa.array(passages.row),
        START: pa.array(passages.start, mask=passages.start < 0),
        END: pa.array(passages.end, mask=passages.end < 0),
        TEXT_TOKENS: pa.array(passages.text_tokens),
    }
    metadata = {_PART: str(passages.part).encode(), _IS_LAST: str(int(passages.is_last)).encode()}
    if rows_done is not None:
        metadata[_ROWS_DONE] = str(rows_done).encode()
    whole = pa.RecordBatch.from_arrays(
        [*batch.columns, *columns.values()],
        schema=pa.schema(
            [*batch.schema, *(pa.field(name, array.type) for name, array in columns.items())],
            metadata={**(batch.schema.metadata or {}), **metadata},
        ),
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, whole.schema) as writer:
        writer.write_batch(whole)
    return memoryview(sink.getvalue()).cast("B")


def passages_from(batch: pa.RecordBatch) -> Passages:
    """What `with_passages` added to a chunk."""
    span = {name: batch.column(name).fill_null(-1).to_numpy() for name in (START, END)}
    return Passages(
        row=batch.column(ROW).to_numpy(),
        start=span[START],
        end=span[END],
        text_tokens=batch.column(TEXT_TOKENS).to_numpy(),
        part=part_of(batch),
        is_last=batch.schema.metadata[_IS_LAST] == b"1",
    )


def part_of(batch: pa.RecordBatch) -> int:
    """The number of a chunk's part; the range has as many parts before it."""
    return int(batch.schema.metadata[_PART])


def rows_done_of(batch: pa.RecordBatch) -> int:
    """The rows that a partial chunk stands for."""
    counted = (batch.schema.metadata or {}).get(_ROWS_DONE)
    return int((batch.column("status").to_numpy() == Status.OK).sum()) if counted is None else int(counted)


def mean_of(parts: Iterable[tuple[Encoded, Passages]], rows: int, *, normalize: bool) -> Encoded:
    """The vectors of `rows` rows: the mean of their passages' vectors, by the number of tokens of the text.

    It is summed in float64, passage by passage in the text's order. The vector of a row with one passage keeps its
    bits. A row with a passage without vector has none. A passage counts by its tokens, as in OpenAI's cookbook and
    LangChain's OpenAIEmbeddings: else a last one of three words would count as much as a full one.
    """
    status, counts = np.zeros(rows, np.uint8), np.zeros(rows, np.int64)
    n_tokens, weights = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
    sums = np.zeros((rows, 0))
    for encoded, passages in parts:
        if not sums.shape[1]:
            sums = np.zeros((rows, encoded.vectors.shape[1]))
        np.maximum.at(status, passages.row, encoded.status)
        np.add.at(counts, passages.row, 1)
        np.add.at(n_tokens, passages.row, encoded.n_tokens)
        np.add.at(weights, passages.row, passages.text_tokens)
        for row, vector, weight in zip(passages.row, encoded.vectors, passages.text_tokens, strict=True):
            sums[row] += vector.astype(np.float64) * weight
    sums /= np.maximum(weights, 1)[:, None]  # of one passage: exactly its own values
    if normalize:
        lengths = np.linalg.norm(sums, axis=1)
        status[(status == Status.OK) & ~(lengths > 0)] = Status.NOT_FINITE
        many = (counts > 1) & (status == Status.OK)
        sums[many] /= lengths[many, None]
    vectors = sums.astype(np.float32)
    status[(status == Status.OK) & ~np.isfinite(vectors).all(axis=1)] = Status.NOT_FINITE
    vectors[status != Status.OK], n_tokens[status != Status.OK] = 0, 0
    return Encoded(
        vectors=vectors,
        status=status,
        n_tokens=n_tokens.astype(np.int32),
        truncated=np.zeros(rows, bool),
        padded_tokens=0,
    )
