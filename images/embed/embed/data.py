"""Parquet files to windows of text: find the files, know their shape, read any stretch of rows in bounded memory."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from estiba.errors import ConfigError, DataError, StoreError
from estiba.store import Entry, Store, open_store, split_location

MAGIC = b"PAR1"
SCAN_BYTES = 4 * 2**20
"""Decoded bytes aimed at in one step through a row group."""
SCAN_ROWS = 1024
"""A cap for rows that decode to far more than their footer says, as dictionaries do."""
READ_BUFFER_BYTES = 2**20
WHOLE_HASH_BYTES = 64 * 2**20
SAMPLES, SAMPLE_BYTES = 64, 16 * 2**10


@dataclass(frozen=True, kw_only=True)
class Source:
    """One input file as listed."""

    path: str
    """Relative to the input, and so to the output."""
    size_bytes: int
    etag: str | None


@dataclass(frozen=True, kw_only=True)
class Table:
    """One readable parquet file."""

    source: Source
    identity: str
    """Changes when the file's content does, and not when it moves: ETag on S3, else size and digest."""
    schema: pa.Schema
    row_group_rows: tuple[int, ...]
    row_bytes: tuple[int, ...]
    """Mean decoded size of a row, by row group."""
    metadata: pq.FileMetaData = field(repr=False, compare=False)
    """The footer, read once: a file of thousands of row groups is opened once for each."""

    @property
    def path(self) -> str:
        return self.source.path

    @property
    def rows(self) -> int:
        return sum(self.row_group_rows)


@dataclass(frozen=True, kw_only=True)
class Bad:
    """A file that cannot be embedded, and why."""

    path: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Consecutive rows of one row group, as text."""

    row_group: int
    start: int
    """First row, counted from the start of the row group."""
    texts: list[str | bytes | None]
    """bytes where a row is not UTF-8."""


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """How large a stretch may grow. Its end is a function of the rows and of these alone, so a rerun cuts the same."""

    rows: int
    characters: int
    """Text beyond `row_characters` of a row does not count: the model will not see it."""
    row_characters: int
    raw_bytes: int = 16 * 2**20

    def rows_in(self, row_group_rows: int) -> int:
        """At most half a row group where that is worth a batch, so that a stretch being saved and one being computed
        are never more than one row group of work."""
        return min(self.rows, row_group_rows if row_group_rows < 128 else -(-row_group_rows // 2))


# --- finding files -------------------------------------------------------------------------------------------------


def open_input(location: str) -> tuple[Store, list[Source], list[str]]:
    """The input's store, its files, and the names that are nobody's data (hidden, `_SUCCESS`).

    Raises ConfigError where there is nothing at `location`.
    """
    store = open_store(location)
    entries = store.list()
    if not entries:
        parent, name = split_location(location)
        single = open_store(parent)
        entry = single.head(name)
        if entry is not None:
            return single, [_source(entry)], []
        raise _nothing(location)
    sources, ignored = [], []
    for entry in entries:
        hidden = any(part.startswith((".", "_")) for part in entry.path.split("/"))
        (ignored.append(entry.path) if hidden else sources.append(_source(entry)))
    return store, sources, ignored


def require_local(location: str) -> None:
    """Tell a missing directory at once, before anything slow is imported. Raises ConfigError."""
    if "://" not in location and not Path(location).exists():
        raise _nothing(location)


def _nothing(location: str) -> ConfigError:
    return ConfigError(
        f"{location}: no input files there{_what_is_beside(location)}; mount a directory of parquet files on it "
        "(-v DIR:/opt/ml/input/data/dataset), name the channel `dataset`, or pass --input-path"
    )


def _what_is_beside(location: str) -> str:
    """Names of the folders beside a missing one: a channel of another name is the usual mistake."""
    parent = Path(location).parent
    if "://" in location or not parent.is_dir():
        return ""
    names = sorted(path.name for path in parent.iterdir() if path.is_dir() and path != Path(location))
    return f" (beside it: {', '.join(names)})" if names else ""


def _source(entry: Entry) -> Source:
    return Source(path=entry.path, size_bytes=entry.size_bytes, etag=entry.etag)


def share_of(sources: Sequence[Source], host_index: int, host_count: int) -> list[Source]:
    """This host's files when every host sees all: largest first to the least loaded, the same on every host."""
    loads = [0] * host_count
    mine = []
    for source in sorted(sources, key=lambda item: (-item.size_bytes, item.path)):
        host = loads.index(min(loads))
        loads[host] += source.size_bytes + 1
        if host == host_index:
            mine.append(source)
    return sorted(mine, key=lambda item: item.path)


def inspect(store: Store, source: Source) -> Table | Bad:
    """Read the footer. A file that is not parquet is Bad; a store that does not answer raises StoreError."""
    try:
        with store.open(source.path, source.size_bytes) as file:
            if source.size_bytes < 12 or file.read(4) != MAGIC:
                return Bad(path=source.path, reason=f"not a parquet file ({source.size_bytes} bytes)")
            identity = _identity(file, source)
            metadata = pq.read_metadata(file)
            schema = metadata.schema.to_arrow_schema()
    except (pa.ArrowException, OSError, ValueError, struct.error) as error:
        return Bad(path=source.path, reason=f"corrupt parquet file: {_one_line(error)}")
    except StoreError as error:
        if store.is_durable:  # S3 not answering is no property of the file
            raise
        return Bad(path=source.path, reason=str(error))
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    return Table(
        source=source,
        identity=identity,
        schema=schema,
        row_group_rows=tuple(group.num_rows for group in groups),
        row_bytes=tuple(group.total_byte_size // max(1, group.num_rows) + 1 for group in groups),
        metadata=metadata,
    )


def _identity(file: BinaryIO, source: Source) -> str:
    if source.etag:
        return f"etag:{source.etag.strip(chr(34))}:{source.size_bytes}"
    digest = xxhash.xxh3_128(struct.pack("<q", source.size_bytes))
    if source.size_bytes <= WHOLE_HASH_BYTES:
        file.seek(0)
        while chunk := file.read(2**20):
            digest.update(chunk)
    else:  # the footer holds every column chunk's place, sizes and statistics; samples guard the rest
        file.seek(source.size_bytes - 8)
        footer_bytes = struct.unpack("<i", file.read(4))[0]
        step = source.size_bytes // SAMPLES
        for start, length in [
            (source.size_bytes - 8 - footer_bytes, footer_bytes),
            *((index * step, SAMPLE_BYTES) for index in range(SAMPLES)),
        ]:
            file.seek(max(0, start))
            digest.update(file.read(length))
    return f"xxh3:{digest.hexdigest()}:{source.size_bytes}"


# --- the text column -----------------------------------------------------------------------------------------------


def text_type(schema: pa.Schema, column: str) -> pa.DataType | None:
    """The type of a column, or of a struct's field by dotted name; None where there is none."""
    if column in schema.names:
        return schema.field(column).type
    head, *rest = column.split(".")
    if head not in schema.names:
        return None
    found = schema.field(head).type
    for name in rest:
        if not pa.types.is_struct(found) or found.get_field_index(name) < 0:
            return None
        found = found.field(name).type
    return found


def why_not_text(table: Table, column: str) -> str | None:
    """Why this file's column cannot be embedded, or None."""
    kind = text_type(table.schema, column)
    if kind is None:
        return f"no column {column!r} (found {sorted(table.schema.names)}); pass --text-column NAME"
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    if (
        pa.types.is_string(value)
        or pa.types.is_large_string(value)
        or pa.types.is_string_view(value)
        or pa.types.is_null(value)
    ):
        return None
    return f"column {column!r} is {kind}, not text; pass --text-column NAME"


def _text_of(batch: pa.RecordBatch, column: str) -> pa.Array:
    if column in batch.schema.names:
        array = batch.column(column)
    else:
        head, *rest = column.split(".")
        array = batch.column(head)
        for name in rest:
            array = pc.struct_field(array, name)
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array


def _texts(array: pa.Array) -> list[str | bytes | None]:
    """Python strings; a value that is not UTF-8 stays bytes, as the file may hold anything."""
    if pa.types.is_null(array.type):
        return [None] * len(array)
    found: list[str | bytes | None] = []
    for value in array.cast(pa.large_binary()).to_pylist():
        try:
            found.append(None if value is None else value.decode("utf-8"))
        except UnicodeDecodeError:
            found.append(value)
    return found


# --- reading rows --------------------------------------------------------------------------------------------------


def batches(
    file: BinaryIO, table: Table, row_group: int, columns: Sequence[str] | None, row_bytes: int | None = None
) -> Iterator[pa.RecordBatch]:
    """A row group in small record batches, decoded page by page: memory does not grow with the row group.

    Raises DataError where the pages are corrupt.
    """
    size = row_bytes or table.row_bytes[row_group]
    rows = max(1, min(SCAN_ROWS, SCAN_BYTES // size))
    try:
        parquet = pq.ParquetFile(file, metadata=table.metadata, pre_buffer=False, buffer_size=READ_BUFFER_BYTES)
        yield from parquet.iter_batches(
            batch_size=rows,
            row_groups=[row_group],
            columns=list(columns) if columns is not None else None,
            use_threads=False,
        )
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{table.path}: corrupt at row group {row_group}: {_one_line(error)}") from error


def stretches(
    store: Store,
    table: Table,
    row_group: int,
    column: str,
    bounds: Bounds,
    next_gap: Callable[[int], tuple[int, int] | None],
) -> Iterator[Stretch]:
    """The rows of a row group that are still to do, cut into stretches.

    `next_gap(row)` gives the first [start, end) at or after `row` that is not done, or None.
    """
    limit = bounds.rows_in(table.row_group_rows[row_group])
    gap = next_gap(0)
    if gap is None:
        return
    texts: list[str | bytes | None] = []
    characters = raw = position = 0
    with store.open(table.path, table.source.size_bytes) as file:
        for batch in batches(file, table, row_group, [column]):
            first, position = position, position + batch.num_rows
            if gap is None:
                return
            if position <= gap[0]:
                continue
            for row, text in enumerate(_texts(_text_of(batch, column)), start=first):
                if gap is None or row < gap[0]:
                    continue
                texts.append(text)
                size = 0 if text is None else len(text)
                characters += min(size, bounds.row_characters)
                raw += size
                end = row + 1
                full = len(texts) >= limit or characters >= bounds.characters or raw >= bounds.raw_bytes
                if full or end == gap[1]:
                    yield Stretch(row_group=row_group, start=end - len(texts), texts=texts)
                    texts, characters, raw = [], 0, 0
                    if end == gap[1]:
                        gap = next_gap(end)
    expected = table.row_group_rows[row_group]
    if position != expected:
        raise DataError(f"{table.path}: row group {row_group} holds {position} rows where its footer says {expected}")


def check_columns(tables: Sequence[Table], column: str, *, is_all: bool = True) -> tuple[list[Table], list[Bad]]:
    """Split off the files without a usable text column. Raises ConfigError where no file of the whole input has one."""
    good, bad = [], []
    for table in tables:
        reason = why_not_text(table, column)
        (good.append(table) if reason is None else bad.append(Bad(path=table.path, reason=reason)))
    if bad and not good and is_all:
        more = f" (and {len(bad) - 1} more files)" if len(bad) > 1 else ""
        raise ConfigError(f"{bad[0].path}: {bad[0].reason}{more}")
    return good, bad


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
