"""Files over S3: a seekable reader of byte ranges, and a writer whose object appears when it is complete."""

from __future__ import annotations

import contextlib
import functools
import io
import queue
import threading
from collections.abc import Iterator
from typing import Any, Protocol

PART_BYTES = 16 * 2**20
"""Size of one part of a multipart upload. S3 accepts 10,000 parts, so an object can reach 160 GB."""
READ_AHEAD_BYTES = 2**20


class ObjectIO(Protocol):
    """The store requests that these files need."""

    def read(self, path: str, start: int = 0, length: int | None = None, *, etag: str | None = None) -> bytes: ...

    def put(self, path: str, data: bytes | Iterator[bytes]) -> None: ...


class RangedFile(io.RawIOBase):
    """A read-only, seekable file over ranged reads."""

    def __init__(self, store: ObjectIO, path: str, size: int, etag: str | None = None) -> None:
        self._read = store.read if etag is None else functools.partial(store.read, etag=etag)
        self._path, self._size, self._position = path, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        length = max(0, min(len(buffer), self._size - self._position))
        if length:
            buffer[:length] = self._read(self._path, self._position, length)
            self._position += length
        return length


class Upload(io.RawIOBase):
    """A writer whose object appears at `finish`. Small objects are one PUT, larger ones a multipart upload.

    obstore uploads from an iterator in a thread, and a queue of two parts bounds the memory. When the iterator raises,
    obstore aborts the multipart upload, so no parts are left behind to be billed.
    """

    def __init__(self, store: ObjectIO, path: str) -> None:
        self._store, self._path = store, path
        self._pending = bytearray()
        self._parts: queue.Queue[bytes | BaseException | None] = queue.Queue(maxsize=2)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._written = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._written

    def write(self, data: Any) -> int:
        self._pending += data
        size_bytes = memoryview(data).nbytes  # not len: an array of floats has fewer items than bytes
        self._written += size_bytes
        while len(self._pending) >= PART_BYTES:
            self._send(bytes(self._pending[:PART_BYTES]))
            del self._pending[:PART_BYTES]
        return size_bytes

    def finish(self) -> None:
        if self._thread is None:
            self._store.put(self._path, bytes(self._pending))
            return
        if self._pending:
            self._send(bytes(self._pending))
        self._put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error

    def abort(self) -> None:
        if self._thread is not None:
            self._put(_Abandoned())
            self._thread.join()

    def _send(self, part: bytes) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="estiba-upload", daemon=True)
            self._thread.start()
        self._put(part)
        if self._error is not None:
            raise self._error

    def _put(self, item: bytes | BaseException | None) -> None:
        while self._thread is not None and self._thread.is_alive():
            with contextlib.suppress(queue.Full):
                self._parts.put(item, timeout=0.2)
                return

    def _run(self) -> None:
        try:
            self._store.put(self._path, self._drain())
        except _Abandoned:
            pass
        except BaseException as error:
            self._error = error

    def _drain(self) -> Iterator[bytes]:
        while True:
            item = self._parts.get()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item


class _Abandoned(Exception):
    """The block that wrote the object raised."""
