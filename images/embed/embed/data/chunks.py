"""Chunks: the vectors of one row range, saved under a key that a resume can find, and the rows of a file they cover."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from embed.data.precision import vector_array
from embed.data.table import Table
from embed.data.token_outputs import TokenOutputs

_KEY = re.compile(r"(?P<file>[0-9a-f]{16})/(?P<group>\d+)-(?P<start>\d+)-(?P<rows>\d+)")


PARTIAL = "-partial"
PENDING = 255
"""The status of a row in a partial chunk that is not computed yet."""
COMPUTED_BY = b"computed_by"
ORIGINS = b"origins"
REUSED = "reused"
"""The engine of vectors that an earlier run computed."""


class Status(IntEnum):
    """Why a row has a vector or has none. The output column holds `STATUS_WORDS[status]`."""

    OK = 0
    NULL = 1
    EMPTY = 2
    INVALID_UTF8 = 3
    NOT_FINITE = 4
    UNKNOWN_TOKEN = 5


class Origin(IntEnum):
    """Where a row's vector comes from."""

    COMPUTED = 0
    COPIED = 1
    """An earlier row of the window has the same tokens."""
    REUSED = 2
    """An earlier run computed it."""


STATUS_WORDS: dict[Status, str] = {
    Status.OK: "ok",
    Status.NULL: "null",
    Status.EMPTY: "empty",
    Status.INVALID_UTF8: "invalid utf-8",
    Status.NOT_FINITE: "not finite",
    Status.UNKNOWN_TOKEN: "unknown token",
}


@dataclass(frozen=True, kw_only=True, order=True)
class RowRange:
    """Rows [start, start + rows) of a row group."""

    row_group: int
    start: int
    rows: int

    @property
    def end(self) -> int:
        return self.start + self.rows


class ChunkLost(Exception):
    """A chunk failed verification; its rows must be computed again."""

    def __init__(self, row_range: RowRange) -> None:
        super().__init__(row_range)
        self.row_range = row_range


@dataclass(frozen=True, kw_only=True)
class MissingRows:
    """The rows of one row group that have no vectors yet."""

    table: Table
    row_group: int
    missing: tuple[tuple[int, int], ...]
    """Half-open row ranges, in order."""


class Coverage:
    """The rows of a file that have saved vectors."""

    def __init__(self, table: Table, ranges: Iterable[RowRange] = ()) -> None:
        self._table = table
        self._ranges: list[dict[int, RowRange]] = [{} for _ in table.row_group_rows]
        for item in sorted(ranges):
            self.add(item)

    def add(self, new: RowRange) -> bool:
        """Add a range. Returns False, and adds nothing, if it overlaps another one or names rows that do not exist."""
        rows = self._table.row_group_rows
        if new.row_group >= len(rows) or new.rows < 1 or new.end > rows[new.row_group]:
            return False
        ranges = self._ranges[new.row_group]
        if any(other.start < new.end and new.start < other.end for other in ranges.values()):
            return False
        ranges[new.start] = new
        return True

    def remove(self, old: RowRange) -> None:
        self._ranges[old.row_group].pop(old.start, None)

    def ranges(self, row_group: int) -> list[RowRange]:
        return sorted(self._ranges[row_group].values())

    @property
    def all_ranges(self) -> list[RowRange]:
        return [item for row_group in range(len(self._ranges)) for item in self.ranges(row_group)]

    def gaps(self, row_group: int) -> tuple[tuple[int, int], ...]:
        """The half-open ranges of rows that are missing."""
        gaps, position = [], 0
        for item in self.ranges(row_group):
            if item.start > position:
                gaps.append((position, item.start))
            position = item.end
        if position < self._table.row_group_rows[row_group]:
            gaps.append((position, self._table.row_group_rows[row_group]))
        return tuple(gaps)

    @property
    def rows_done(self) -> int:
        return sum(item.rows for ranges in self._ranges for item in ranges.values())

    @property
    def is_complete(self) -> bool:
        return self.rows_done == self._table.rows


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """A loaded model, described for another process."""

    identity: dict[str, str]
    """What the vectors depend on; see the README's "Provenance"."""
    dimensions: int
    """Width of a vector."""
    device: str
    dtype: str
    token_budget: int
    """Largest number of padded tokens in a batch."""
    engine: str = "torch"
    """What computes the vectors: name, version and precision."""
    token_dimensions: int = 0
    """Width of a token's vector; 0 without --multi-vector."""
    products: tuple[tuple[int, int], ...] = ()
    """Inputs and outputs of each matrix that a token is multiplied with."""


# --- keys ----------------------------------------------------------------------------------------------------------


def file_key(table: Table) -> str:
    """The key of a file's chunks. It changes with the file's path and content, so stale chunks are never used."""
    return xxhash.xxh3_128_hexdigest(f"{table.path}\0{table.identity}".encode("utf-8", "surrogateescape"))[:16]


def key_of(file: str, rows: RowRange) -> str:
    return f"{file}/{rows.row_group:06d}-{rows.start:012d}-{rows.rows:08d}"


def partial_key_of(file: str, rows: RowRange) -> str:
    """The key of a range of which only some rows are computed yet."""
    return f"{key_of(file, rows)}{PARTIAL}"


def range_of(key: str) -> RowRange | None:
    """The row range in a chunk's key; None if it is not such a key."""
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    return RowRange(row_group=int(match["group"]), start=int(match["start"]), rows=int(match["rows"]))


# --- contents ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """The vectors of a window of rows, in the window's order."""

    vectors: np.ndarray
    """float32[rows, dimensions]; zeros where status is not OK."""
    status: np.ndarray
    """uint8[rows], a Status each."""
    n_tokens: np.ndarray
    """int32[rows], special tokens included; 0 if not OK."""
    truncated: np.ndarray
    """bool[rows]: the model read only the beginning."""
    padded_tokens: int
    """Tokens computed, padding and repeated batches included."""
    tokens: TokenOutputs | None = None
    """Rows whose status is not OK have no tokens here; None without --sparse and --multi-vector."""
    origin: np.ndarray | None = None
    """uint8[rows], an Origin each; None if all vectors are computed."""

    def origins_in(self, rows: slice, counted: np.ndarray | None = None) -> dict[str, int]:
        """How many of some rows are `copied` and `reused`; without those that are none. `counted` is a mask of them."""
        if self.origin is None:
            return {}
        origin = self.origin[rows] if counted is None else self.origin[rows][counted]
        counts = {kind.name.lower(): int((origin == kind).sum()) for kind in (Origin.COPIED, Origin.REUSED)}
        return {kind: count for kind, count in counts.items() if count}

    @property
    def rows_done(self) -> int:
        """Rows with text that have a vector; fewer than all in a partial chunk."""
        return int((self.status == Status.OK).sum())


def to_batch(encoded: Encoded, dtype: str) -> pa.RecordBatch:
    """A row whose status is not OK has a null vector; values keep their order and, in float32, their bits."""
    tokens = {} if encoded.tokens is None else encoded.tokens.columns(encoded.status != Status.OK, dtype)
    return _batch(encoded, dtype, tokens)


def partial_batch(encoded: Encoded) -> pa.RecordBatch:
    """As computed; the stored precision is applied when the window is complete."""
    return _batch(encoded, "float32", {} if encoded.tokens is None else encoded.tokens.partial_columns())


def _batch(encoded: Encoded, dtype: str, tokens: Mapping[str, pa.Array]) -> pa.RecordBatch:
    return pa.record_batch(
        {
            "vectors": vector_array(encoded.vectors, dtype, encoded.status != Status.OK),
            "status": pa.array(encoded.status, pa.uint8()),
            "n_tokens": pa.array(encoded.n_tokens, pa.int32()),
            "truncated": pa.array(encoded.truncated, pa.bool_()),
            **tokens,
        }
    )


def to_bytes(encoded: Encoded, dtype: str, computed_by: Sequence[Mapping[str, Any]] = ()) -> memoryview:
    """A chunk of a whole row range."""
    return batch_bytes(to_batch(encoded, dtype), computed_by)


def partial_to_bytes(encoded: Encoded, computed_by: Sequence[Mapping[str, Any]] = ()) -> memoryview:
    return batch_bytes(partial_batch(encoded), computed_by)


def batch_bytes(
    batch: pa.RecordBatch, computed_by: Sequence[Mapping[str, Any]] = (), origins: Mapping[str, int] | None = None
) -> memoryview:
    """Arrow IPC, with the engines that computed it in the schema, and the numbers of rows that they did not compute."""
    metadata: dict[bytes, Any] = {COMPUTED_BY: list(computed_by)} if computed_by else {}
    if origins:
        metadata[ORIGINS] = dict(origins)
    if metadata:
        batch = batch.replace_schema_metadata({key: json.dumps(each, sort_keys=True) for key, each in metadata.items()})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return memoryview(sink.getvalue()).cast("B")


def from_bytes(data: bytes | memoryview) -> pa.RecordBatch:
    """The batch that `to_bytes` wrote; zero-copy over `data`."""
    return pa.ipc.open_stream(pa.py_buffer(data)).read_next_batch()


def computed_by(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """The engines that computed a chunk; empty for a chunk of an earlier version."""
    return json.loads((batch.schema.metadata or {}).get(COMPUTED_BY, b"[]"))


def origins(batch: pa.RecordBatch) -> dict[str, int]:
    """How many rows of a chunk are `copied` and `reused`; empty if none is."""
    return json.loads((batch.schema.metadata or {}).get(ORIGINS, b"{}"))


def encoded_from(data: bytes | memoryview) -> Encoded:
    """A partial chunk as the encoder left it."""
    return encoded_of(from_bytes(data))


def encoded_of(batch: pa.RecordBatch) -> Encoded:
    """The rows of a batch as the encoder left them; a row of nulls is PENDING."""
    vectors = batch.column("vectors")
    return Encoded(
        vectors=vectors.values.to_numpy().astype(np.float32).reshape(len(vectors), -1),
        status=batch.column("status").fill_null(PENDING).to_numpy().copy(),
        n_tokens=batch.column("n_tokens").fill_null(0).to_numpy(),
        truncated=batch.column("truncated").fill_null(False).to_numpy(zero_copy_only=False),
        padded_tokens=0,
        tokens=TokenOutputs.of_partial(batch),
    )
