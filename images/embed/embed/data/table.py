"""One input file: as listed, as inspected, or why it cannot be embedded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

Stamp = tuple[int, ...]
"""Device, inode, size and times of a local file."""


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """One input file as listed."""

    path: str
    """Relative to the input, and so to the output."""
    size_bytes: int
    etag: str | None


@dataclass(frozen=True, kw_only=True)
class Table:
    """One readable parquet file."""

    file: InputFile
    identity: str
    """Depends on the content and not on the location: the ETag on S3, otherwise size and digest."""
    stamp: Stamp | None = field(compare=False)
    """Inode and times when it was inspected; None on S3."""
    schema: pa.Schema
    row_group_rows: tuple[int, ...]
    row_bytes: tuple[int, ...]
    """Mean decoded size of a row, by row group."""
    metadata: pq.FileMetaData = field(repr=False, compare=False)
    """The footer, kept because the file is opened again for each of its row groups, which may be thousands. Never ask
    it for a column chunk: pyarrow ends the process if that is encrypted."""
    encrypted: frozenset[str] = frozenset()
    """Names of columns that are encrypted one by one."""
    int96_unit: Literal["ns", "us"] = "ns"
    """The unit in which INT96 timestamps are read."""

    @property
    def path(self) -> str:
        return self.file.path

    @property
    def rows(self) -> int:
        return sum(self.row_group_rows)


@dataclass(frozen=True, kw_only=True)
class BadFile:
    """A file that cannot be embedded, and why."""

    path: str
    reason: str
    may_be_good: bool = False
    """It could not be read, or changed meanwhile: that says nothing about its content."""
