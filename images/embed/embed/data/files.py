"""Input files: find them, read their footers, and separate those that can be embedded from those that cannot."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from embed.data.identity import identity_of, stamp_of
from embed.data.layouts import is_hidden, refuse_table_formats
from embed.data.table import BadFile, InputFile, Stamp, Table
from estiba.errors import ConfigError, DataError, EstibaError, ObjectChangedError, StoreError
from estiba.storage import Entry, Store, open_store, split_location

PARALLEL_READS = 16
"""Files that are looked at together: each costs a round trip to S3."""
MAGIC, ENCRYPTED_MAGIC = b"PAR1", b"PARE"
SIGNATURE_BYTES = 28
"""Nonce and tag behind a footer that is signed (Parquet Modular Encryption, 5.5)."""
ENCRYPTED = "is encrypted, and decryption keys are not supported; write it again without encryption"
READ_AS = {"arrow_extensions_enabled": True}
"""As pyarrow's read_table reads: a column annotated as UUID or JSON keeps that annotation."""
TEXT_LOGICAL_TYPES = frozenset(("STRING", "ENUM", "JSON"))


# --- finding files -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The names below the input."""

    store: Store
    files: list[InputFile]
    ignored: list[str]
    """Hidden files, such as `_SUCCESS`."""
    is_one_file: bool = False
    """The input names a file and not a folder."""


def open_input(location: str, *, may_be_empty: bool = False) -> Listing:
    """List the input. Raises ConfigError if `location` holds no files, or is a table of Delta, Iceberg or Hudi.

    `may_be_empty` for a channel of which other hosts may have all objects.
    """
    store = open_store(location)
    entries = store.list()
    if not entries:
        parent, name = split_location(location)
        single = open_store(parent)
        entry = single.head(name) if name else None
        if entry is not None:
            refuse_table_formats(location, [])
            return Listing(store=single, files=[_input_file(entry)], ignored=[], is_one_file=True)
        if may_be_empty:
            return Listing(store=store, files=[], ignored=[])
        raise _no_input(location)
    refuse_table_formats(location, [entry.path for entry in entries])
    ignored = [entry.path for entry in entries if is_hidden(entry.path)]
    files = [_input_file(entry) for entry in entries if not is_hidden(entry.path)]
    return Listing(store=store, files=files, ignored=ignored)


def require_input(location: str) -> None:
    """Raise ConfigError if `location` is a local path that does not exist."""
    if "://" not in location and not Path(location).exists():
        raise _no_input(location)


def _no_input(location: str) -> ConfigError:
    if location.startswith("s3://"):
        return ConfigError(f"--input-path {location}: no objects below this address; correct the bucket or the prefix")
    return ConfigError(
        f"{location}: no input files{_siblings(location)}; mount a directory of parquet files on it "
        "(-v DIR:/opt/ml/input/data/dataset), name the channel `dataset`, or pass --input-path"
    )


def _siblings(location: str) -> str:
    """The folders beside a missing one; a channel with another name is the usual mistake."""
    parent = Path(location).parent
    if not parent.is_dir():
        return ""
    names = sorted(path.name for path in parent.iterdir() if path.is_dir() and path != Path(location))
    return f" (beside it: {', '.join(names)})" if names else ""


def _input_file(entry: Entry) -> InputFile:
    return InputFile(path=entry.path, size_bytes=entry.size_bytes, etag=entry.etag)


def share_of(files: Sequence[InputFile], host_index: int, host_count: int) -> list[InputFile]:
    """This host's files if every host sees all of them: largest first, each to the least loaded host.

    Every host computes the same shares.
    """
    loads = [0] * host_count
    mine = []
    for file in sorted(files, key=lambda item: (-item.size_bytes, item.path)):
        host = loads.index(min(loads))
        loads[host] += file.size_bytes + 1
        if host == host_index:
            mine.append(file)
    return sorted(mine, key=lambda item: item.path)


# --- inspecting them -----------------------------------------------------------------------------------------------


def inspect(store: Store, file: InputFile) -> Table | BadFile:
    """Read the footer. A file that cannot be read gives a BadFile; an S3 that does not answer raises StoreError."""
    try:
        with store.open(file.path, file.size_bytes, etag=file.etag) as opened:
            head = opened.read(4)
            if file.size_bytes >= 12 and head == ENCRYPTED_MAGIC:
                return BadFile(path=file.path, reason=ENCRYPTED)
            if file.size_bytes < 12 or head != MAGIC:
                return BadFile(path=file.path, reason=f"not a parquet file ({file.size_bytes} bytes)")
            stamp = stamp_of(opened)
            identity = identity_of(opened, file)
            opened.seek(0)
            metadata = pq.read_metadata(opened)
            table = table_of(file, identity, stamp, pq.ParquetFile(opened, metadata=metadata, **READ_AS))
            return replace(table, encrypted=_encrypted_columns(opened, table))
    except StoreError as error:
        if store.is_durable and not isinstance(error, ObjectChangedError):  # which says nothing about the file
            raise
        return BadFile(path=file.path, reason=str(error), may_be_good=True)
    except Exception as error:  # a damaged footer can make a reader raise anything
        return BadFile(path=file.path, reason=f"corrupt parquet file: {one_line(error)}")


def _encrypted_columns(opened: BinaryIO, table: Table) -> frozenset[str]:
    """The columns that are encrypted where the footer is not: such a footer is signed, and so 28 bytes longer."""
    opened.seek(table.file.size_bytes - 8)
    footer_bytes = int.from_bytes(opened.read(4), "little")
    if footer_bytes - table.metadata.serialized_size != SIGNATURE_BYTES or not table.row_group_rows:
        return frozenset()
    found = set()
    for name in table.schema.names:
        try:
            reader = pq.ParquetFile(opened, metadata=table.metadata, pre_buffer=False)
            next(reader.iter_batches(batch_size=1, row_groups=[0], columns=[name], use_threads=False), None)
        except Exception as error:
            if is_encryption(error):
                found.add(name)
    return frozenset(found)


def is_encryption(error: BaseException) -> bool:
    return "decrypt" in str(error).lower()


def table_of(file: InputFile, identity: str, stamp: Stamp | None, parquet: pq.ParquetFile) -> Table:
    """Raises ValueError if the footer contradicts itself."""
    metadata, schema = parquet.metadata, parquet.schema_arrow
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    rows = tuple(group.num_rows for group in groups)
    if min(rows, default=0) < 0 or sum(rows) != metadata.num_rows:
        raise ValueError(f"its footer says {metadata.num_rows} rows, and {sum(rows)} in its row groups")
    schema.names  # noqa: B018 - raises if a name is not UTF-8
    return Table(
        file=file,
        identity=identity,
        stamp=stamp,
        schema=schema,
        row_group_rows=rows,
        row_bytes=tuple(max(0, group.total_byte_size) // max(1, group.num_rows) + 1 for group in groups),
        metadata=metadata,
    )


def separate_bad(
    tables: Sequence[Table], why_bad: Callable[[Table], str | None], *, is_whole_input: bool
) -> tuple[list[Table], list[BadFile]]:
    """Split tables by `why_bad`. Raises ConfigError if `tables` is the whole input and none is good."""
    good, bad = [], []
    for table in tables:
        reason = why_bad(table)
        if reason is None:
            good.append(table)
        else:
            bad.append(BadFile(path=table.path, reason=reason))
    if bad and not good and is_whole_input:
        more = f" (and {len(bad) - 1} more files)" if len(bad) > 1 else ""
        raise ConfigError(f"{bad[0].path}: {bad[0].reason}{more}")
    return good, bad


def why_not_text(table: Table, column: str, *, binary_as_text: bool = False) -> str | None:
    """Why this file's column cannot be embedded, or None if it can."""
    names = table.schema.names
    if names.count(column) > 1:
        return f"has {names.count(column)} columns {column!r}; write it again with one of that name"
    kind = _type_of(table.schema, column)
    if kind is None:
        return f"no column {column!r} (found {sorted(names)}); pass --text-column NAME"
    if column.split(".")[0] in table.encrypted or column in table.encrypted:
        return f"column {column!r} {ENCRYPTED}"
    value = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    value = value.value_type if pa.types.is_dictionary(value) else value
    text_checks = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    if any(is_text(value) for is_text in text_checks):
        return None
    binary_checks = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    if any(is_binary(value) for is_binary in binary_checks):
        if binary_as_text or _logical_type(table, column) in TEXT_LOGICAL_TYPES:
            return None
        return f"column {column!r} is {kind}; pass --binary-as-text if it holds UTF-8 text"
    return f"column {column!r} is {kind}, not text; pass --text-column NAME"


def _logical_type(table: Table, column: str) -> str | None:
    """The parquet annotation of a column; arrow shows an ENUM as binary."""
    schema = table.metadata.schema
    found = (schema.column(index) for index in range(len(schema)))
    return next((item.logical_type.type for item in found if item.path == column), None)


def _type_of(schema: pa.Schema, column: str) -> pa.DataType | None:
    """The type of a column, or of a struct's field by dotted name; None if there is no such column."""
    if column in schema.names:
        return schema.field(column).type
    head, *rest = column.split(".")
    if schema.names.count(head) != 1:
        return None
    kind = schema.field(head).type
    for name in rest:
        if not pa.types.is_struct(kind) or kind.get_field_index(name) < 0:
            return None
        kind = kind.field(name).type
    return kind


@contextlib.contextmanager
def file_faults(table: Table, row_group: int) -> Iterator[None]:
    """Whatever a reader raises on a file's pages becomes a DataError that names the file."""
    try:
        yield
    except EstibaError:
        raise
    except Exception as error:
        if is_encryption(error):
            raise DataError(f"{table.path}: {ENCRYPTED}") from error
        raise DataError(f"{table.path}: corrupt at row group {row_group}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """An error's message on one line, without a full stop, since the caller's sentence goes on."""
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
