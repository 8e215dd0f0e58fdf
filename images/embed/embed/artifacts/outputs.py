"""One output file: the input's columns and metadata plus the vectors of its chunks, written whole or not at all."""

from __future__ import annotations

import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from embed.artifacts.passage_rows import CHUNK, FIELDS, PassageReader, Piece, repeat
from embed.artifacts.vector_rows import VectorReader
from embed.artifacts.written import COUNTS_KEY, ENGINES_KEY, METADATA_KEY, Written
from embed.config import EmbedConfig
from embed.data.chunks import STATUS_WORDS, Coverage, Status, file_key
from embed.data.files import file_faults, one_line
from embed.data.identity import open_unchanged
from embed.data.precision import MULTI_VECTOR, SPARSE, is_float, vector_fields
from embed.data.rows import record_batches
from embed.data.table import Table
from estiba.checkpoint import ChunkStore
from estiba.errors import ConfigError, DataError, StoreError
from estiba.storage import FileStore, Store
from estiba.storage.local import MAX_NAME_BYTES

GROUP_BYTES = 64 * 2**20
"""Decoded bytes in a row group of the output, at most about this; the input's row groups may be larger."""
BAD_ROWS_NAMED = 10
RESULTS_NAME = re.compile(r"results(-[^/]+)?\.json")
TOKENS_COLUMN = "tokens_aproximados"
"""A column in the corpora of the tokenizer guide; results.json holds its sum, as the guide's own results do."""


class Abandoned(Exception):
    """The job is stopping; the file is not written in this attempt."""


@dataclass(kw_only=True)
class Counts:
    """Row counts of one file, by outcome."""

    rows: int = 0
    tokens: int = 0
    truncated: int = 0
    copied: int = 0
    reused: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    bad_rows: list[int] = field(default_factory=list)
    """Rows with an unknown token, counted from 0 in the file; at most ten."""
    tokens_aproximados: int | None = None
    chunks: int | None = None
    """Rows of the output, where that has one for each chunk of a text."""

    def add_rows(self, batch: pa.RecordBatch, status: np.ndarray) -> None:
        """Count rows of the input. uint8[rows], a Status each."""
        if len(self.bad_rows) < BAD_ROWS_NAMED:
            bad = np.flatnonzero(status == Status.UNKNOWN_TOKEN)[: BAD_ROWS_NAMED - len(self.bad_rows)]
            self.bad_rows += [self.rows + int(row) for row in bad]
        self.rows += batch.num_rows
        for value, count in zip(*np.unique(status, return_counts=True), strict=True):
            self.statuses[STATUS_WORDS[Status(value)]] += int(count)
        if TOKENS_COLUMN in batch.schema.names and pa.types.is_integer(batch.column(TOKENS_COLUMN).type):
            more = pc.sum(batch.column(TOKENS_COLUMN)).as_py() or 0
            self.tokens_aproximados = (self.tokens_aproximados or 0) + more

    def add_vectors(self, vectors: pa.RecordBatch) -> None:
        """Count what the model read."""
        self.tokens += pc.sum(vectors.column("n_tokens")).as_py() or 0
        self.truncated += pc.sum(vectors.column("truncated")).as_py() or 0
        if CHUNK in vectors.schema.names:
            self.chunks = (self.chunks or 0) + vectors.num_rows

    def as_json(self) -> dict[str, Any]:
        counts = {**vars(self), "statuses": dict(sorted(self.statuses.items()))}
        if self.chunks is None:
            del counts["chunks"]
        return counts


def added_columns(config: EmbedConfig) -> list[str]:
    """The names of the added columns. Raises ConfigError if two are the same."""
    added = [config.embedding_column, config.status_column]
    added += ["n_tokens"] * config.n_tokens + ["truncated"] * config.truncated
    added += [field.name for field in _passage_fields(config)]
    added += [SPARSE] * config.sparse + [MULTI_VECTOR] * config.multi_vector
    if len(set(added)) != len(added):
        raise ConfigError(f"the added columns {added} need different names; see --embedding-column and --status-column")
    return added


def kept_columns(table: Table, config: EmbedConfig) -> list[str]:
    """The input's columns that the output keeps."""
    return table.schema.names if config.columns is None else config.columns


def why_not_writable(table: Table, config: EmbedConfig) -> str | None:
    """Why no output can be written from this file's columns and the added ones; None if it can."""
    kept = kept_columns(table, config)
    missing = [name for name in kept if name not in table.schema.names]
    clash = [name for name in added_columns(config) if name in kept]
    twice = sorted({name for name in kept if table.schema.names.count(name) > 1 or kept.count(name) > 1})
    encrypted = sorted(table.encrypted.intersection(kept))
    if missing:
        return f"no column {missing[0]!r} to keep (found {sorted(table.schema.names)}); correct --columns"
    if clash:
        flags = {config.embedding_column: "--embedding-column", config.status_column: "--status-column"}
        flag = flags.get(clash[0], "--columns")
        return f"already has a column {clash[0]!r}; choose another name with {flag}, or leave it out with --columns"
    if twice:
        return f"has two columns with the same name {twice}; leave them out with --columns"
    if encrypted:
        return (
            f"columns {encrypted} are encrypted, and decryption keys are not supported; leave them out with --columns"
        )
    return _why_not_kept(table, kept, config)


MAX_KEY_BYTES = 1024
"""Of an object on S3."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def why_not_named(path: str, target: Store) -> str | None:
    """Why no output can have this file's name; None if one can."""
    if RESULTS_NAME.fullmatch(path):
        return "has the name of the job's own results; rename it"
    if isinstance(target, FileStore):
        longest = max(len(os.fsencode(part)) for part in path.split("/"))
        if longest > MAX_NAME_BYTES:
            return f"its name has {longest} bytes, and a local output at most {MAX_NAME_BYTES} bytes; rename it"
        return None
    key = target.url_of(path).removeprefix("s3://").partition("/")[2]
    try:
        size = len(key.encode("utf-8"))
    except UnicodeEncodeError:
        return "its name is not UTF-8, and an object on S3 cannot have it; rename it"
    if size > MAX_KEY_BYTES:
        return f"its output's key would have {size} bytes, and S3 takes at most {MAX_KEY_BYTES}; rename it"
    if _CONTROL.search(path):
        return "its name holds a control character, which an object on S3 cannot have here; rename it"
    return None


def _why_not_kept(table: Table, kept: Sequence[str], config: EmbedConfig) -> str | None:
    """Write an empty output and read its schema: every kept column must come back with its type and metadata."""
    schema = _output_schema(table, kept, config, vector_fields(config, 8, 8), {})
    sink = pa.BufferOutputStream()
    try:
        with pq.ParquetWriter(sink, schema, **writer_options(schema, config)) as writer:
            writer.write_table(schema.empty_table())
        written = pq.read_schema(pa.BufferReader(sink.getvalue()))
    except Exception as error:  # arrow's, for a type that parquet cannot hold
        return f"its columns cannot be written ({one_line(error)}); leave out the one at fault with --columns"
    for name in kept:
        if not written.field(name).equals(schema.field(name), check_metadata=True):
            kind, other = schema.field(name).type, written.field(name).type
            return f"column {name!r} is {kind} and would become {other}; leave it out with --columns"
    return None


def write_output(
    *,
    source: Store,
    target: Store,
    table: Table,
    coverage: Coverage,
    chunks: ChunkStore,
    config: EmbedConfig,
    vectors: Sequence[pa.Field],
    provenance: dict[str, Any],
    should_abandon: Callable[[], bool],
) -> Written:
    """Join a file's rows with its vectors. Raises ChunkLost, DataError, StoreError or Abandoned, leaving no file."""
    kept = kept_columns(table, config)
    schema = _output_schema(table, kept, config, vectors, provenance)
    counts, engines = Counts(), _Engines()
    reader_of = PassageReader if config.chunk_output == "rows" else VectorReader
    with target.writer(table.path) as raw:
        hashed = _HashingFile(raw)
        with (
            pq.ParquetWriter(hashed, schema, **writer_options(schema, config)) as writer,
            open_unchanged(source, table) as file,
        ):
            for row_group in range(len(table.row_group_rows)):
                ranges = coverage.ranges(row_group)
                reader = reader_of(chunks, file_key(table), ranges, engines.of(row_group))
                held: list[pa.RecordBatch] = []
                held_bytes = 0
                for batch in _kept_batches(file, table, row_group, kept, vectors[0].type):
                    status = np.zeros(batch.num_rows, np.uint8)
                    for piece in reader.pieces(batch, table.path):
                        if should_abandon():
                            raise Abandoned
                        np.maximum.at(status, piece.rows, piece.vectors.column("status").to_numpy())
                        counts.add_vectors(piece.vectors)
                        with file_faults(table, row_group):
                            joined = _join(batch, piece, schema, config)
                        held.append(joined)
                        held_bytes += joined.nbytes
                        if held_bytes >= GROUP_BYTES:
                            writer.write_table(pa.Table.from_batches(held, schema))
                            held, held_bytes = [], 0
                    counts.add_rows(batch, status)
                counts.copied += reader.origins["copied"]
                counts.reused += reader.origins["reused"]
                if held:
                    writer.write_table(pa.Table.from_batches(held, schema))
            writer.add_key_value_metadata({ENGINES_KEY: json.dumps(engines.as_json(), sort_keys=True)})
            writer.add_key_value_metadata({COUNTS_KEY: json.dumps(counts.as_json(), sort_keys=True)})
        if counts.rows != table.rows:
            raise DataError(f"{table.path}: {counts.rows} rows read where its footer says {table.rows}")
    entry = target.head(table.path)
    if entry is None or entry.size_bytes != hashed.size_bytes:
        found = "nothing" if entry is None else f"{entry.size_bytes} bytes"
        raise StoreError(
            f"{target.url_of(table.path)}: {found} found after writing {hashed.size_bytes}; another job may "
            "be writing there, so give this one its own --output-path"
        )
    return Written(
        path=table.path,
        identity=table.identity,
        size_bytes=hashed.size_bytes,
        digest=hashed.digest.hexdigest(),
        etag=entry.etag,
        counts=counts.as_json(),
    )


def _output_schema(
    table: Table, kept: Sequence[str], config: EmbedConfig, vectors: Sequence[pa.Field], provenance: dict[str, Any]
) -> pa.Schema:
    fields = [table.schema.field(name) for name in kept]
    fields += [vectors[0], pa.field(config.status_column, pa.string())]
    fields += [pa.field("n_tokens", pa.int32())] * config.n_tokens + [
        pa.field("truncated", pa.bool_())
    ] * config.truncated
    fields += _passage_fields(config)
    fields += vectors[1:]
    own = {METADATA_KEY: json.dumps({**provenance, "source": table.identity}, sort_keys=True).encode()}
    return pa.schema(fields, metadata={**(table.schema.metadata or {}), **own})


def _passage_fields(config: EmbedConfig) -> list[pa.Field]:
    return list(FIELDS) if config.chunk_output == "rows" else []


def writer_options(schema: pa.Schema, config: EmbedConfig) -> dict[str, Any]:
    """Byte-stream split and zstd for the floats, dictionaries for everything else (Parquet format, Encodings.md)."""
    paths = _leaf_paths(schema)

    def leaves(columns: Sequence[str]) -> list[str]:
        last = [_last_leaf(schema, paths, column) for column in columns]
        # A column may be named like the path of the vectors; the options cannot tell the two apart.
        return [path for path in last if paths.count(path) == 1]

    vectors = leaves([config.embedding_column, *[MULTI_VECTOR] * config.multi_vector])
    floats = (vectors if is_float(config.embedding_dtype) else []) + leaves([SPARSE] * config.sparse)
    return {
        "compression": "zstd",
        "use_dictionary": [path for path in paths if path not in floats],
        "column_encoding": dict.fromkeys(floats, "BYTE_STREAM_SPLIT"),
        "write_statistics": [path for path in paths if path not in vectors],
    }


def _last_leaf(schema: pa.Schema, paths: list[str], column: str) -> str:
    """Of the leaf paths of a schema, the last one below a column."""
    until = [schema.field(index) for index in range(schema.names.index(column) + 1)]
    return paths[len(_leaf_paths(pa.schema(until))) - 1]


def _leaf_paths(schema: pa.Schema) -> list[str]:
    """The options need leaf paths, which only a written schema has."""
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, schema):
        pass
    leaves = pq.ParquetFile(pa.BufferReader(sink.getvalue())).schema
    return [leaves.column(index).path for index in range(len(leaves))]


def _kept_batches(
    file: BinaryIO, table: Table, row_group: int, kept: Sequence[str], vector_type: pa.DataType
) -> Iterator[pa.RecordBatch]:
    row_bytes = table.row_bytes[row_group] + vector_type.list_size * 4
    for batch in record_batches(file, table, row_group, kept, row_bytes):
        yield batch.select(list(kept))


def _join(batch: pa.RecordBatch, piece: Piece, schema: pa.Schema, config: EmbedConfig) -> pa.RecordBatch:
    vectors = piece.vectors
    status = vectors.column("status")
    words = pa.DictionaryArray.from_arrays(
        status.cast(pa.int8()), pa.array([STATUS_WORDS[item] for item in Status])
    ).cast(pa.string())
    is_repeated = CHUNK in vectors.schema.names
    kept = repeat(batch, piece.rows) if is_repeated else batch.slice(piece.rows[0], len(piece.rows)).columns
    columns = [*kept, vectors.column("vectors"), words]
    columns += [vectors.column("n_tokens")] * config.n_tokens + [vectors.column("truncated")] * config.truncated
    columns += [vectors.column(field.name) for field in _passage_fields(config)]
    columns += [vectors.column(name) for name in (SPARSE, MULTI_VECTOR) if name in vectors.schema.names]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


class _Engines:
    """Which engines computed which row groups of the input."""

    def __init__(self) -> None:
        self._by_group: list[tuple[int, list[dict[str, Any]]]] = []

    def of(self, row_group: int) -> list[dict[str, Any]]:
        """The list to which the row group's engines are added."""
        self._by_group.append((row_group, []))
        return self._by_group[-1][1]

    def as_json(self) -> list[dict[str, Any]]:
        """Half-open ranges of row groups with the same engines."""
        ranges: list[dict[str, Any]] = []
        for row_group, engines in self._by_group:
            if ranges and ranges[-1]["engines"] == engines:
                ranges[-1]["row_groups"][1] = row_group + 1
            else:
                ranges.append({"row_groups": [row_group, row_group + 1], "engines": engines})
        return ranges


class _HashingFile(io.RawIOBase):
    """A write-only file that tracks its size and digest (xxh3-128)."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = xxhash.xxh3_128()
        self.size_bytes = 0

    def write(self, data: Any) -> int:
        view = memoryview(data)
        self.digest.update(view)
        self._file.write(view)
        self.size_bytes += view.nbytes
        return view.nbytes

    def tell(self) -> int:
        return self.size_bytes

    def writable(self) -> bool:
        return True
