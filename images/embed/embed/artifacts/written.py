"""Finished output files: what the ledger records about them, and whether they are still intact."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from embed.data.table import Table
from estiba.errors import StoreError
from estiba.storage import FileStore, Store

METADATA_KEY = b"estiba"
COUNTS_KEY = "estiba.counts"
ENGINES_KEY = "estiba.computed_by"


@dataclass(frozen=True, kw_only=True)
class Written:
    """One finished output file, as the ledger records it."""

    path: str
    identity: str
    size_bytes: int
    digest: str
    """xxh3-128; empty if the file was found rather than written."""
    etag: str | None
    counts: dict[str, Any]


def from_ledger(target: Store, table: Table, record: dict[str, Any], output_id: str) -> Written | None:
    """A recorded output, if it was made from this input and configuration and is undamaged."""
    if record["output_id"] != output_id:
        return None
    written = Written(**{name: record[name] for name in Written.__dataclass_fields__})
    return written if written.identity == table.identity and _is_intact(target, written) else None


def from_metadata(target: Store, table: Table, output_id: str) -> Written | None:
    """An output that the ledger does not record, if its own metadata names this input and configuration."""
    try:
        entry = target.head(table.path)
        if entry is None:
            return None
        with target.open(table.path) as file:
            metadata = pq.read_metadata(file).metadata or {}
        provenance, counts = json.loads(metadata[METADATA_KEY]), json.loads(metadata[COUNTS_KEY.encode()])
    except (KeyError, ValueError, OSError, pa.ArrowException, StoreError):
        return None
    if (provenance.get("output_id"), provenance.get("source"), counts.get("rows")) != (
        output_id,
        table.identity,
        table.rows,
    ):
        return None
    return Written(
        path=table.path,
        identity=table.identity,
        size_bytes=entry.size_bytes,
        digest="",
        etag=entry.etag,
        counts=counts,
    )


def _is_intact(target: Store, written: Written) -> bool:
    entry = target.head(written.path)
    if entry is None or entry.size_bytes != written.size_bytes:
        return False
    if not isinstance(target, FileStore) or not written.digest:
        return entry.etag == written.etag
    digest = xxhash.xxh3_128()
    try:
        with target.open(written.path) as file:
            while block := file.read(2**22):
                digest.update(block)
    except (OSError, StoreError):
        return False
    return digest.hexdigest() == written.digest
