"""The identity of an input file: what its chunks and its output are bound to, checked whenever the file is read.

A file that is replaced while the job runs must never get the vectors of its old text. On S3 every read names the ETag
(If-Match). A local file is recognised by its inode, size and times; if these differ, its bytes are digested again.
"""

from __future__ import annotations

import contextlib
import os
import struct
import threading
from collections.abc import Iterator
from typing import BinaryIO

import xxhash

from embed.data.table import InputFile, Stamp, Table
from estiba.errors import DataError, ObjectChangedError, StoreError
from estiba.storage import Store

BLOCK_BYTES = 2**22


class FileChangedError(DataError):
    """An input file was replaced, changed or deleted after the job had looked at it."""


def stamp_of(opened: BinaryIO) -> Stamp | None:
    """Device, inode, size and times of an open local file; None for an object on S3."""
    try:
        found = os.fstat(opened.fileno())
    except OSError:  # io.UnsupportedOperation: no file descriptor
        return None
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def identity_of(opened: BinaryIO, file: InputFile) -> str:
    """The ETag on S3, otherwise size and digest of the whole file. It does not depend on the location."""
    if file.etag:
        return f"etag:{file.etag.strip(chr(34))}:{file.size_bytes}"
    digest = xxhash.xxh3_128(struct.pack("<q", file.size_bytes))
    opened.seek(0)
    while block := opened.read(BLOCK_BYTES):
        digest.update(block)
    return f"xxh3:{digest.hexdigest()}:{file.size_bytes}"


_same: dict[tuple[str, str], Stamp] = {}
"""The stamp with which a file was last found to have an identity, by path and identity. A copy or a `chmod` changes the
stamp and not the content; the file is then digested once more and not for each of its row groups."""
_same_lock = threading.Lock()


@contextlib.contextmanager
def open_unchanged(store: Store, table: Table) -> Iterator[BinaryIO]:
    """Open a table's file. Raises FileChangedError, at any read or at the end, if it is not the one inspected."""
    try:
        with store.open(table.path, table.file.size_bytes, etag=table.file.etag) as file:
            require_same(file, table)
            try:
                yield file
            except Exception:  # a file that changed half-way reads like a corrupt one
                require_same(file, table)
                raise
            require_same(file, table)
    except ObjectChangedError as error:
        raise changed(table) from error
    except StoreError as error:
        if store.is_durable:
            raise
        raise FileChangedError(f"{table.path}: cannot be read any more: {error}") from error


def changed(table: Table) -> FileChangedError:
    return FileChangedError(f"{table.path}: changed while the job ran; run the job again to embed its new content")


def require_same(file: BinaryIO, table: Table) -> None:
    """Raise FileChangedError if a local file changed since it was inspected. On S3 every read checks that itself."""
    stamp = stamp_of(file)
    if stamp is None or stamp == table.stamp:
        return
    key = (table.path, table.identity)
    with _same_lock:
        if _same.get(key) == stamp:
            return
        position = file.tell()
        if stamp[2] != table.file.size_bytes or identity_of(file, table.file) != table.identity:
            raise changed(table)
        file.seek(position)
        _same[key] = stamp
