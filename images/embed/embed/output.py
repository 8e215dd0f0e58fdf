"""One output file: the input's columns and metadata, the vectors of its pieces, written whole or not at all."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from embed.config import EmbedConfig
from embed.data import Bad, Table, batches
from embed.model import STATUS_WORDS, Status
from embed.vectors import Coverage, Span, file_key, from_bytes, key_of
from estiba.checkpoint import Pieces
from estiba.errors import ConfigError, StoreError
from estiba.store import Store

METADATA_KEY = b"estiba"
COUNTS_KEY = "estiba.counts"
GROUP_BYTES = 64 * 2**20
"""Decoded bytes held before a row group of the output is closed, whatever the input's size."""
TOKENS_COLUMN = "tokens_aproximados"
"""A column of the guide's corpora that its results add up."""


class PieceLost(Exception):
    """A piece did not verify; its rows must be computed again."""

    def __init__(self, span: Span) -> None:
        super().__init__(span)
        self.span = span


class Abandoned(Exception):
    """The job is stopping; the file is not written in this attempt."""


@dataclass(kw_only=True)
class Counts:
    """What happened to the rows of a file."""

    rows: int = 0
    tokens: int = 0
    truncated: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    tokens_aproximados: int | None = None


@dataclass(frozen=True, kw_only=True)
class Written:
    """One finished output file, as the ledger keeps it."""

    path: str
    identity: str
    size_bytes: int
    digest: str
    etag: str | None
    counts: dict[str, Any]


def check_names(tables: Sequence[Table], config: EmbedConfig, *, is_all: bool = True) -> tuple[list[Table], list[Bad]]:
    """Refuse what cannot be written: added names that exist, columns to keep that do not."""
    added = [config.embedding_column, config.status_column]
    added += ["n_tokens"] * config.n_tokens + ["truncated"] * config.truncated
    if len(set(added)) != len(added):
        raise ConfigError(f"the added columns {added} need different names; see --embedding-column and --status-column")
    good, bad = [], []
    for table in tables:
        kept = table.schema.names if config.columns is None else config.columns
        missing = [name for name in kept if name not in table.schema.names]
        clash = [name for name in added if name in kept]
        if missing:
            reason = f"no column {missing[0]!r} to keep (found {sorted(table.schema.names)}); correct --columns"
        elif clash:
            flag = {config.embedding_column: "--embedding-column", config.status_column: "--status-column"}.get(
                clash[0], "--columns"
            )
            reason = (
                f"already has a column {clash[0]!r}; choose another name with {flag}, or leave it out with --columns"
            )
        elif len(set(kept)) != len(kept):
            reason = f"has two columns of one name {sorted(kept)}; choose with --columns"
        else:
            good.append(table)
            continue
        bad.append(Bad(path=table.path, reason=reason))
    if bad and not good and is_all:
        raise ConfigError(f"{bad[0].path}: {bad[0].reason}")
    return good, bad


def write_output(
    *,
    source: Store,
    target: Store,
    table: Table,
    coverage: Coverage,
    pieces: Pieces,
    config: EmbedConfig,
    vector_type: pa.DataType,
    provenance: dict[str, Any],
    should_abandon: Callable[[], bool],
) -> Written:
    """Join a file's rows with its vectors. Raises PieceLost, DataError, StoreError or Abandoned, leaving nothing."""
    kept = table.schema.names if config.columns is None else config.columns
    schema = _output_schema(table, kept, config, vector_type, provenance)
    counts = Counts()
    with target.writer(table.path) as raw:
        hashed = _HashingFile(raw)
        with (
            pq.ParquetWriter(hashed, schema, **_encoding(schema, config)) as writer,
            source.open(table.path, table.source.size_bytes) as file,
        ):
            for row_group in range(len(table.row_group_rows)):
                vectors = _VectorReader(pieces, file_key(table), coverage.spans(row_group))
                held: list[pa.RecordBatch] = []
                held_bytes = 0
                for batch in _kept_batches(file, table, row_group, kept, vector_type):
                    if should_abandon():
                        raise Abandoned
                    joined = _join(batch, vectors.take(batch.num_rows), schema, config, counts)
                    held.append(joined)
                    held_bytes += joined.nbytes
                    if held_bytes >= GROUP_BYTES:
                        writer.write_table(pa.Table.from_batches(held, schema))
                        held, held_bytes = [], 0
                if held:
                    writer.write_table(pa.Table.from_batches(held, schema))
            writer.add_key_value_metadata({COUNTS_KEY: json.dumps(as_json(counts), sort_keys=True)})
    if counts.rows != table.rows:
        raise StoreError(f"{table.path}: {counts.rows} rows written of {table.rows}; the input changed under the job")
    entry = target.head(table.path)
    if entry is None or entry.size_bytes != hashed.size_bytes:
        seen = "nothing" if entry is None else f"{entry.size_bytes} bytes"
        raise StoreError(
            f"{target.url_of(table.path)}: {seen} found after writing {hashed.size_bytes}; who else writes there?"
        )
    return Written(
        path=table.path,
        identity=table.identity,
        size_bytes=hashed.size_bytes,
        digest=hashed.digest.hexdigest(),
        etag=entry.etag,
        counts=as_json(counts),
    )


def read_provenance(target: Store, path: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """What an existing output says of itself, and its counts; None where there is none or it cannot be read."""
    try:
        if target.head(path) is None:
            return None
        with target.open(path) as file:
            metadata = pq.read_metadata(file)
            said = metadata.metadata or {}
            return json.loads(said[METADATA_KEY]), json.loads(said[COUNTS_KEY.encode()])
    except (KeyError, ValueError, OSError, pa.ArrowException, StoreError):
        return None


def as_json(counts: Counts) -> dict[str, Any]:
    return {**vars(counts), "statuses": dict(sorted(counts.statuses.items()))}


def _output_schema(
    table: Table, kept: Sequence[str], config: EmbedConfig, vector_type: pa.DataType, provenance: dict[str, Any]
) -> pa.Schema:
    fields = [table.schema.field(name) for name in kept]
    fields += [pa.field(config.embedding_column, vector_type), pa.field(config.status_column, pa.string())]
    fields += [pa.field("n_tokens", pa.int32())] * config.n_tokens + [
        pa.field("truncated", pa.bool_())
    ] * config.truncated
    mine = {METADATA_KEY: json.dumps({**provenance, "source": table.identity}, sort_keys=True).encode()}
    return pa.schema(fields, metadata={**(table.schema.metadata or {}), **mine})


def _encoding(schema: pa.Schema, config: EmbedConfig) -> dict[str, Any]:
    """Byte-stream split and zstd for the floats, dictionaries for everything else (Parquet format, Encodings.md)."""
    sink = pa.BufferOutputStream()  # the options take leaf paths, which only a written schema knows
    with pq.ParquetWriter(sink, schema):
        pass
    names = pq.ParquetFile(pa.BufferReader(sink.getvalue())).schema
    paths = [names.column(index).path for index in range(len(names))]
    own = [path for path in paths if path.split(".")[0] == config.embedding_column]
    return {
        "compression": "zstd",
        "use_dictionary": [path for path in paths if path not in own],
        "column_encoding": dict.fromkeys(own, "BYTE_STREAM_SPLIT"),
        "write_statistics": [path for path in paths if path not in own],
    }


def _kept_batches(
    file: BinaryIO, table: Table, row_group: int, kept: Sequence[str], vector_type: pa.DataType
) -> Iterator[pa.RecordBatch]:
    row_bytes = table.row_bytes[row_group] + vector_type.list_size * 4
    if not kept:  # parquet cannot read rows without columns; count them out
        remaining = table.row_group_rows[row_group]
        while remaining:
            rows = min(1024, remaining)
            remaining -= rows
            yield pa.RecordBatch.from_struct_array(pa.array([{}] * rows, pa.struct([])))
        return
    for batch in batches(file, table, row_group, kept, row_bytes):
        yield batch.select(list(kept))


def _join(
    batch: pa.RecordBatch, vectors: pa.RecordBatch, schema: pa.Schema, config: EmbedConfig, counts: Counts
) -> pa.RecordBatch:
    status = vectors.column("status")
    words = pa.DictionaryArray.from_arrays(
        status.cast(pa.int8()), pa.array([STATUS_WORDS[item] for item in Status])
    ).cast(pa.string())
    columns = [*batch.columns, vectors.column("vectors"), words]
    columns += [vectors.column("n_tokens")] * config.n_tokens + [vectors.column("truncated")] * config.truncated
    counts.rows += batch.num_rows
    counts.tokens += pc.sum(vectors.column("n_tokens")).as_py() or 0
    counts.truncated += pc.sum(vectors.column("truncated")).as_py() or 0
    for item in pc.value_counts(status).to_pylist():
        counts.statuses[STATUS_WORDS[Status(item["values"])]] += item["counts"]
    if TOKENS_COLUMN in batch.schema.names and pa.types.is_integer(batch.column(TOKENS_COLUMN).type):
        counts.tokens_aproximados = (counts.tokens_aproximados or 0) + (
            pc.sum(batch.column(TOKENS_COLUMN)).as_py() or 0
        )
    return pa.RecordBatch.from_arrays(columns, schema=schema)


class _VectorReader:
    """The vectors of a row group in row order, one piece in memory at a time."""

    def __init__(self, pieces: Pieces, file: str, spans: Sequence[Span]) -> None:
        self._pieces, self._file, self._spans = pieces, file, iter(spans)
        self._batch: pa.RecordBatch | None = None
        self._used = 0

    def take(self, rows: int) -> pa.RecordBatch:
        found = []
        while rows:
            if self._batch is None or self._used == self._batch.num_rows:
                span = next(self._spans)
                data = self._pieces.load(key_of(self._file, span))
                if data is None:
                    raise PieceLost(span)
                self._batch, self._used = from_bytes(data), 0
            part = self._batch.slice(self._used, rows)
            self._used += part.num_rows
            rows -= part.num_rows
            found.append(part)
        return found[0] if len(found) == 1 else pa.concat_batches(found)


class _HashingFile:
    """A write-only file that knows its size and xxh3-128."""

    closed = False

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

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass

    def readable(self) -> bool:
        return False

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False
