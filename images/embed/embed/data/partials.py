"""Partial chunks: the finished rows of a window that is still being computed.

Each one holds the rows that are new since the one before, and names them by file, row group and row. When the window is
complete, the chunks of its row ranges replace them. Earlier versions saved all finished rows of one row range each
time, under a key of the range; these are still read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from embed.data.chunks import (
    PARTIAL,
    Coverage,
    Encoded,
    Status,
    batch_bytes,
    computed_by,
    encoded_of,
    file_key,
    from_bytes,
    range_of,
)
from embed.data.windows import Part

FOLDER = "windows/"
"""Not the folder of a file, which is deleted when that file is complete."""
PLACE = ("file", "row_group", "row")


def is_partial(key: str) -> bool:
    return key.endswith(PARTIAL)


def key_of_partial(data: bytes | memoryview) -> str:
    return f"{FOLDER}{xxhash.xxh3_64_hexdigest(data)}{PARTIAL}"


def partial_bytes(
    batch: pa.RecordBatch, rows: np.ndarray, parts: Sequence[Part], engines: Sequence[Mapping[str, Any]]
) -> memoryview:
    """`batch` with the places of its rows, which are rows `rows` of the window."""
    offsets = np.array([part.offset for part in parts])
    owner = np.searchsorted(offsets, rows, side="right") - 1
    files = pa.array([file_key(part.table) for part in parts])
    row_groups = np.array([part.row_range.row_group for part in parts])
    starts = np.array([part.row_range.start for part in parts])
    return batch_bytes(
        _with_places(batch, files.take(pa.array(owner)), row_groups[owner], starts[owner] + rows - offsets[owner]),
        engines,
    )


def _with_places(batch: pa.RecordBatch, files: pa.Array, row_groups: np.ndarray, rows: np.ndarray) -> pa.RecordBatch:
    places = (files, pa.array(row_groups, pa.int32()), pa.array(rows, pa.int64()))
    return pa.RecordBatch.from_arrays([*batch.columns, *places], names=[*batch.schema.names, *PLACE])


@dataclass(frozen=True, kw_only=True)
class Partial:
    """The rows of one partial chunk, each with its place."""

    batch: pa.RecordBatch
    engines: list[dict[str, Any]]

    @property
    def places(self) -> Places:
        files, row_groups, rows = (self.batch.column(name).to_numpy(zero_copy_only=False) for name in PLACE)
        return Places(
            rows={
                (file, row_group): rows[(files == file) & (row_groups == row_group)]
                for file, row_group in set(zip(files, row_groups, strict=True))
            }
        )


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where the rows of a partial chunk belong."""

    rows: dict[tuple[str, int], np.ndarray]
    """Rows of the row group, by key of the file and row group."""

    @property
    def files(self) -> set[str]:
        return {file for file, _ in self.rows}

    def are_in(self, parts: Iterable[Part]) -> bool:
        """Whether one of them is in one of the parts."""
        return any(
            ((part.row_range.start <= rows) & (rows < part.row_range.end)).any()
            for part in parts
            if (rows := self.rows.get((file_key(part.table), part.row_range.row_group))) is not None
        )

    def rows_in(self, coverages: Mapping[str, Coverage]) -> int:
        """How many of them have no chunk in these files, which are named by key."""
        return sum(
            int(((start <= rows) & (rows < end)).sum())
            for (file, row_group), rows in self.rows.items()
            if file in coverages
            for start, end in coverages[file].gaps(row_group)
        )


def read_partial(key: str, data: bytes) -> Partial:
    batch = from_bytes(data)
    engines = computed_by(batch)
    batch = batch.replace_schema_metadata(None)
    row_range = range_of(key.removesuffix(PARTIAL))
    if row_range is not None:  # of an earlier version
        rows = np.flatnonzero(batch.column("status").to_numpy() == Status.OK)
        files = pa.array([key.split("/")[0]] * len(rows), pa.string())  # there may be none
        row_groups = np.full(len(rows), row_range.row_group)
        batch = _with_places(batch.take(pa.array(rows)), files, row_groups, row_range.start + rows)
    return Partial(batch=batch, engines=engines)


@dataclass(frozen=True, kw_only=True)
class Prior:
    """What earlier attempts saved of a window."""

    encoded: Encoded | None
    """PENDING where a vector is missing. None if they saved nothing."""
    engines: list[list[dict[str, Any]]]
    """What computed the rows of each part."""


def prior_of(partials: Sequence[Partial], parts: Sequence[Part], n_tokens: np.ndarray) -> Prior:
    """`n_tokens` of the window: a row that the tokenizer of an earlier version read otherwise is computed again."""
    engines: list[list[dict[str, Any]]] = [[] for _ in parts]
    rows, places = [], []
    for partial in partials:
        place = _places_in(parts, partial.batch)
        is_used = place >= 0
        is_used[is_used] = partial.batch.column("n_tokens").to_numpy()[is_used] == n_tokens[place[is_used]]
        rows.append(partial.batch.filter(pa.array(is_used)))
        places.append(place[is_used])
        for part, found in zip(parts, engines, strict=True):
            if ((part.rows.start <= places[-1]) & (places[-1] < part.rows.stop)).any():
                found += [engine for engine in partial.engines if engine not in found]
    if not sum(map(len, places)):
        return Prior(encoded=None, engines=engines)
    index = np.full(len(n_tokens), -1)
    index[np.concatenate(places)] = np.arange(sum(map(len, places)))
    return Prior(encoded=encoded_of(pa.concat_batches(rows).take(pa.array(index, mask=index < 0))), engines=engines)


def _places_in(parts: Sequence[Part], batch: pa.RecordBatch) -> np.ndarray:
    """int64[rows of the batch]: the row of the window; -1 if it is in none of the parts."""
    files, row_groups, rows = (batch.column(name).to_numpy(zero_copy_only=False) for name in PLACE)
    places = np.full(len(rows), -1)
    for part in parts:
        row_range = part.row_range
        mine = (files == file_key(part.table)) & (row_groups == row_range.row_group)
        mine &= (rows >= row_range.start) & (rows < row_range.end)
        places[mine] = part.offset + rows[mine] - row_range.start
    return places
