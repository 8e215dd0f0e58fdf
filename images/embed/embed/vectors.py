"""The vectors of one stretch of rows, as a piece of finished work that can be saved, checked and found again."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import xxhash

from embed.data import Table
from embed.model import Encoded, Status

_KEY = re.compile(r"(?P<file>[0-9a-f]{16})/(?P<group>\d+)-(?P<start>\d+)-(?P<rows>\d+)")


@dataclass(frozen=True, kw_only=True, order=True)
class Span:
    """Rows [start, start + rows) of a row group."""

    row_group: int
    start: int
    rows: int

    @property
    def end(self) -> int:
        return self.start + self.rows


def file_key(table: Table) -> str:
    """Where a file's pieces are: changes with its path and with its content, so stale work is never used."""
    return xxhash.xxh3_128_hexdigest(f"{table.path}\0{table.identity}".encode("utf-8", "surrogateescape"))[:16]


def key_of(file: str, span: Span) -> str:
    return f"{file}/{span.row_group:06d}-{span.start:012d}-{span.rows:08d}"


def span_of(key: str) -> Span | None:
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    return Span(row_group=int(match["group"]), start=int(match["start"]), rows=int(match["rows"]))


class Coverage:
    """Which rows of a file are done."""

    def __init__(self, table: Table, spans: Iterable[Span] = ()) -> None:
        self._rows = table.row_group_rows
        self._spans: list[dict[int, Span]] = [{} for _ in self._rows]
        for span in sorted(spans):
            self.add(span)

    def add(self, span: Span) -> bool:
        """Count a span in; False where it does not fit (another cut of the same rows, or rows that are not there)."""
        if span.row_group >= len(self._rows) or span.rows < 1 or span.end > self._rows[span.row_group]:
            return False
        spans = self._spans[span.row_group]
        if any(other.start < span.end and span.start < other.end for other in spans.values()):
            return False
        spans[span.start] = span
        return True

    def remove(self, span: Span) -> None:
        self._spans[span.row_group].pop(span.start, None)

    def spans(self, row_group: int) -> list[Span]:
        return sorted(self._spans[row_group].values())

    def gaps(self, row_group: int) -> list[tuple[int, int]]:
        """Half-open ranges of rows still to do."""
        found, position = [], 0
        for span in self.spans(row_group):
            if span.start > position:
                found.append((position, span.start))
            position = span.end
        if position < self._rows[row_group]:
            found.append((position, self._rows[row_group]))
        return found

    @property
    def rows_done(self) -> int:
        return sum(span.rows for spans in self._spans for span in spans.values())

    @property
    def is_complete(self) -> bool:
        return self.rows_done == sum(self._rows)


def vector_type(dimensions: int, dtype: str) -> pa.DataType:
    return pa.list_(pa.float16() if dtype == "float16" else pa.float32(), dimensions)


def piece_schema(dimensions: int, dtype: str) -> pa.Schema:
    return pa.schema(
        [
            ("vectors", vector_type(dimensions, dtype)),
            ("status", pa.uint8()),
            ("n_tokens", pa.int32()),
            ("truncated", pa.bool_()),
        ]
    )


def to_bytes(encoded: Encoded, dtype: str) -> bytes:
    """Arrow IPC; a row whose status is not ok has a null vector. Values keep their order and bits."""
    rows, dimensions = encoded.vectors.shape
    schema = piece_schema(dimensions, dtype)
    values = np.ascontiguousarray(encoded.vectors, dtype=np.float16 if dtype == "float16" else np.float32)
    vectors = pa.FixedSizeListArray.from_arrays(
        pa.array(values.reshape(-1)), dimensions, mask=pa.array(encoded.status != Status.OK)
    )
    batch = pa.record_batch(
        [
            vectors.cast(schema.field("vectors").type),
            pa.array(encoded.status, pa.uint8()),
            pa.array(encoded.n_tokens, pa.int32()),
            pa.array(encoded.truncated, pa.bool_()),
        ],
        schema=schema,
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(batch)
    assert batch.num_rows == rows
    return sink.getvalue().to_pybytes()


def from_bytes(data: bytes) -> pa.RecordBatch:
    """The batch that `to_bytes` wrote; zero-copy over `data`."""
    return pa.ipc.open_stream(pa.py_buffer(data)).read_next_batch()
