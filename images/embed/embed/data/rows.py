"""Rows of a parquet file: record batches in bounded memory, and the text column cut into ranges."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embed.data.chunks import MissingRows
from embed.data.files import READ_AS, file_faults
from embed.data.identity import open_unchanged, require_same
from embed.data.table import Table
from estiba.errors import DataError
from estiba.storage import Store

SCAN_BYTES = 4 * 2**20
"""Target size of a decoded record batch."""
SCAN_ROWS = 1024
"""Bounds a record batch whose rows decode to far more than the footer says, as dictionary-encoded rows do."""
READ_BUFFER_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class TextRange:
    """The text of consecutive rows of one row group."""

    start: int
    """First row, counted from the start of the row group."""
    texts: list[str | bytes | None]
    """bytes if a row is not UTF-8."""
    characters: int
    raw_bytes: int
    """As counted for the limits."""


@dataclass(frozen=True, kw_only=True)
class RangeLimits:
    """How large a text range may grow. Its end depends only on the rows and these limits, so a rerun cuts it again."""

    rows: int
    characters: int
    """Characters of a row beyond `row_characters` do not count: the model will not see them."""
    row_characters: int
    raw_bytes: int = 16 * 2**20

    def rows_in(self, row_group_rows: int) -> int:
        return min(self.rows, half_of(row_group_rows))


def half_of(row_group_rows: int) -> int:
    """Half a row group, if half of it is enough for a batch; otherwise the whole.

    One half being saved and one being computed are together at most one row group of work.
    """
    return row_group_rows if row_group_rows < 128 else -(-row_group_rows // 2)


def record_batches(
    file: BinaryIO,
    table: Table,
    row_group: int,
    columns: Sequence[str],
    row_bytes: int | None = None,
    int96_unit: str | None = None,
) -> Iterator[pa.RecordBatch]:
    """A row group in small record batches, decoded page by page, so memory does not grow with the row group.

    Raises DataError if the pages are corrupt, or hold another number of rows than the footer says.
    """
    rows = max(1, min(SCAN_ROWS, SCAN_BYTES // (row_bytes or table.row_bytes[row_group])))
    found, expected = 0, table.row_group_rows[row_group]
    with file_faults(table, row_group):
        parquet = pq.ParquetFile(
            file,
            metadata=table.metadata,
            pre_buffer=False,
            buffer_size=READ_BUFFER_BYTES,
            coerce_int96_timestamp_unit=int96_unit or table.int96_unit,
            **READ_AS,
        )
        for batch in parquet.iter_batches(
            batch_size=rows, row_groups=[row_group], columns=list(columns), use_threads=False
        ):
            found += batch.num_rows
            if found > expected:
                break
            yield batch
    if found != expected:
        more = "more than " if found > expected else ""
        raise DataError(
            f"{table.path}: corrupt at row group {row_group}: it holds {more}{min(found, expected)} rows where its "
            f"footer says {expected}"
        )


def text_ranges(store: Store, rows: MissingRows, column: str, limits: RangeLimits) -> Iterator[TextRange]:
    """The missing rows of a row group, cut into text ranges. Raises DataError if the file is corrupt or was changed.

    The row group is read to its end, even if its last rows are not missing: only then is it known to be sound.
    """
    table, row_group, missing = rows.table, rows.row_group, iter(rows.missing)
    limit = limits.rows_in(table.row_group_rows[row_group])
    gap = next(missing, None)
    texts: list[str | bytes | None] = []
    characters = raw = position = 0
    with open_unchanged(store, table) as file:
        for batch in record_batches(file, table, row_group, [column]):
            first, position = position, position + batch.num_rows
            if gap is None or position <= gap[0]:
                continue
            with file_faults(table, row_group):
                values = texts_of(batch, column)
            for row, text in enumerate(values, start=first):
                if gap is None or row < gap[0]:
                    continue
                texts.append(text)
                size = 0 if text is None else len(text)
                characters += min(size, limits.row_characters)
                raw += size
                end = row + 1
                is_full = len(texts) >= limit or characters >= limits.characters or raw >= limits.raw_bytes
                if is_full or end == gap[1]:
                    require_same(file, table)  # a chunk of another text must not be saved under this identity
                    yield TextRange(start=end - len(texts), texts=texts, characters=characters, raw_bytes=raw)
                    texts, characters, raw = [], 0, 0
                    if end == gap[1]:
                        gap = next(missing, None)


COMPARED_TEXTS = 16
"""Texts of the input on which an engine is compared with torch at the start, but for longer ones."""
CALIBRATION_TEXTS = 64
"""More texts of the input, from which products in int8 get their ranges. Of MiniLM-L6 300 give no better ones."""


def first_texts(store: Store, tables: Sequence[Table], column: str, count: int) -> list[str]:
    """At most `count` texts, from the beginnings of the first row groups that can be read.

    Raises StoreError if S3 does not answer.
    """
    found: list[str] = []
    for table in tables:
        for row_group, rows in enumerate(table.row_group_rows):
            with contextlib.suppress(DataError), open_unchanged(store, table) as file, file_faults(table, row_group):
                batch = next(record_batches(file, table, row_group, [column]), None) if rows else None
                values = texts_of(batch, column) if batch else []
                found += [text for text in values if isinstance(text, str) and text.strip()]
            if len(found) >= count:
                return found[:count]
    return found


def _text_column(batch: pa.RecordBatch, column: str) -> pa.Array:
    if column in batch.schema.names:
        array = batch.column(column)
    else:
        head, *rest = column.split(".")
        array = batch.column(head)
        for name in rest:
            array = pc.struct_field(array, name)
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array


def texts_of(batch: pa.RecordBatch, column: str) -> list[str | bytes | None]:
    """Python strings; a value that is not UTF-8 stays bytes, since parquet files may hold anything."""
    array = _text_column(batch, column)
    if pa.types.is_null(array.type):
        return [None] * len(array)
    texts: list[str | bytes | None] = []
    for value in array.cast(pa.large_binary()).to_pylist():
        try:
            texts.append(None if value is None else value.decode("utf-8"))
        except UnicodeDecodeError:
            texts.append(value)
    return texts
