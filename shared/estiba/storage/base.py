"""The interface of a store: a tree of objects below a URL.

Writes are atomic: a reader never sees a partial object, and a crash leaves none. Paths are relative and use
`/`.
"""

from __future__ import annotations

import contextlib
import io
import shutil
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

TEMPORARY_SUFFIX = ".estiba-tmp"


@dataclass(frozen=True)
class Entry:
    """One object: its path in the store, its size, and the store's version tag where it has one."""

    path: str
    size_bytes: int
    etag: str | None = None


class Store(ABC):
    """A tree of immutable objects. All methods raise StoreError, with the object's URL and a remedy."""

    url: str
    is_durable: bool
    """Whether objects outlive this machine."""

    def url_of(self, path: str) -> str:
        return f"{self.url.rstrip('/')}/{path}" if path else self.url

    @abstractmethod
    def list(self, prefix: str = "") -> list[Entry]:
        """Return every object below the folder `prefix`, sorted by path; empty if the folder is absent."""

    @abstractmethod
    def head(self, path: str) -> Entry | None:
        """Return the object's entry, or None if it is absent."""

    @abstractmethod
    def read(self, path: str, start: int = 0, length: int | None = None) -> bytes:
        """Return exactly `length` bytes from `start`. A short read is an error."""

    @abstractmethod
    def open(self, path: str, size_bytes: int | None = None, *, etag: str | None = None) -> BinaryIO:
        """Return a seekable, read-only file. A known size saves one request.

        With an `etag`, a read raises ObjectChangedError once the object is another version. A local file has no ETag.
        """

    @abstractmethod
    def writer(self, path: str) -> contextlib.AbstractContextManager[BinaryIO]:
        """Return a file that is published when the block ends, and discarded when the block raises."""

    @abstractmethod
    def write_new(self, path: str, data: bytes) -> bool:
        """Publish an object that does not exist yet. Returns False if it exists (If-None-Match: *)."""

    @abstractmethod
    def delete(self, path: str) -> None:
        """Remove an object, if it exists."""

    @abstractmethod
    def rename(self, path: str, new_path: str) -> None:
        """Move an object within the store."""

    def write(self, path: str, data: bytes | memoryview) -> None:
        """Publish one object, replacing the one at this path."""
        with self.writer(path) as file:
            file.write(data)

    def put_file(self, path: str, source: Path) -> None:
        """Publish a local file, replacing the object at this path. Raises OSError if the file cannot be read."""
        with open(source, "rb") as reading, self.writer(path) as writing:
            shutil.copyfileobj(reading, writing, 2**24)

    def answers(self) -> None:  # noqa: B027 - a directory always does
        """Raise StoreError if nothing answers within seconds, or if the bucket does not exist."""

    def abort_uploads(self) -> int:
        """Abort the uploads that killed processes left below this prefix. Returns their number."""
        return 0


def split_location(location: str) -> tuple[str, str]:
    """Split a URL or path into parent and name: 's3://b/a/x.parquet' -> ('s3://b/a', 'x.parquet')."""
    parent, _, name = location.rstrip("/").rpartition("/")
    return (parent or "/" if location.startswith("/") else parent or "."), name


def exact_reader(raw: io.RawIOBase, buffer_bytes: int) -> BinaryIO:
    return cast(BinaryIO, io.BufferedReader(raw, buffer_bytes))
