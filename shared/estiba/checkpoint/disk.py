"""Read, write and digest large files, bypassing the page cache if the file system allows it.

Direct I/O takes a steady time. Buffered writes compete with the job for memory and are flushed when the kernel chooses
to, up to ten times slower (benchmarks/checkpoint_save.py). A direct read returns the bytes on the disk.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

PAGE_BYTES = 4096
CHUNK_BYTES = 8 << 20
THREADS = 4
DIGEST_BYTES = 32 << 20
_libc = ctypes.CDLL(None, use_errno=True)


def padded(size_bytes: int) -> int:
    """Round up to whole pages, which direct I/O needs."""
    return -(-size_bytes // PAGE_BYTES) * PAGE_BYTES


def write(path: Path, memory: memoryview, start: int, size_bytes: int) -> str:
    """Write `memory[start:start + size_bytes]` to a new file and make it durable. Returns its xxh3-128.

    `start` is a multiple of the page size, and `memory` extends to the end of the last page. Raises OSError; a full
    disk fails before the first byte where the file system can reserve space.
    """
    direct = size_bytes >= CHUNK_BYTES
    while True:
        try:
            descriptor = os.open(path, CREATE | (os.O_DIRECT if direct else 0), 0o666)
            try:
                _reserve(descriptor, size_bytes)
                digest = _write(descriptor, memory, start, size_bytes, direct)
                os.ftruncate(descriptor, size_bytes)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            return digest
        except OSError as error:
            if not direct or error.errno != errno.EINVAL:
                raise
            direct = False  # the file system refuses the flag, or accepts it and refuses the writes


def read(path: Path, size_bytes: int) -> memoryview:
    """Read a whole file of a known size into writable, page-aligned memory. Raises OSError, EOFError."""
    whole_bytes = max(PAGE_BYTES, padded(size_bytes))
    buffer = mmap.mmap(-1, whole_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError, AttributeError):
        buffer.madvise(mmap.MADV_HUGEPAGE)  # touching a gigabyte in small pages takes as long as reading it
    view = memoryview(buffer)
    with _Reader(path, size_bytes) as reader:
        offsets = range(0, size_bytes, CHUNK_BYTES)

        def fill(offset: int) -> None:
            reader.fill(view[offset : offset + CHUNK_BYTES], offset)

        if len(offsets) > 1:
            with ThreadPoolExecutor(THREADS) as pool:
                list(pool.map(fill, offsets))
        elif offsets:
            fill(0)
    return view[:size_bytes]


def digest_of(path: Path, size_bytes: int) -> str:
    """Return the xxh3-128 of a file on the disk, in little memory and one thread. Raises OSError, EOFError."""
    digest = xxhash.xxh3_128()
    with mmap.mmap(-1, CHUNK_BYTES) as buffer, memoryview(buffer) as view, _Reader(path, size_bytes) as reader:
        for offset in range(0, size_bytes, CHUNK_BYTES):
            reader.fill(view, offset)
            digest.update(view[: min(CHUNK_BYTES, size_bytes - offset)])
    return digest.hexdigest()


class _Reader:
    """Positioned reads, direct where the file system allows it."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        self.path, self.size_bytes = path, size_bytes
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a FIFO would wait for a writer
            raise EOFError("is not a regular file")
        try:
            self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
            self.is_direct = True
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._open_buffered()
        if os.fstat(self.descriptor).st_size != size_bytes:
            size = os.fstat(self.descriptor).st_size
            os.close(self.descriptor)
            raise EOFError(f"{size} bytes where {size_bytes} were expected")

    def _open_buffered(self) -> None:
        self.descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        self.is_direct = False

    def fill(self, view: memoryview, offset: int) -> None:
        """Fill `view` from `offset`, up to the end of the file."""
        end = min(offset + len(view), self.size_bytes)
        at = offset
        while at < end:
            try:
                count = os.preadv(self.descriptor, [view[at - offset :]], at)
            except OSError as error:
                if not self.is_direct or error.errno != errno.EINVAL:
                    raise
                self._open_buffered()  # the direct one stays open for threads that are reading from it
                continue
            if count == 0:
                raise EOFError(f"ends at {at} bytes of {self.size_bytes}")
            at += count

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.descriptor)


CREATE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC


def _reserve(descriptor: int, size_bytes: int) -> None:
    """Reserve disk space. posix_fallocate would write every block if the file system does not support this."""
    if size_bytes == 0:
        return
    if _libc.fallocate(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(size_bytes)) != 0:
        code = ctypes.get_errno()
        if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(code, os.strerror(code))


def _write(descriptor: int, memory: memoryview, start: int, size_bytes: int, direct: bool) -> str:
    # Direct writes are whole pages; the caller truncates the last one.
    end = padded(size_bytes) if direct else size_bytes
    offsets = iter(range(0, end, CHUNK_BYTES))
    lock = threading.Lock()
    errors: list[OSError] = []

    def work() -> None:
        while not errors:
            with lock:
                offset = next(offsets, None)
            if offset is None:
                return
            stop = min(offset + CHUNK_BYTES, end)
            try:
                while offset < stop:
                    offset += os.pwrite(descriptor, memory[start + offset : start + stop], offset)
            except OSError as error:
                errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(THREADS if end > CHUNK_BYTES else 0)]
    for thread in threads:
        thread.start()
    digest = xxhash.xxh3_128()
    for offset in range(0, size_bytes, DIGEST_BYTES):
        digest.update(memory[start + offset : start + min(offset + DIGEST_BYTES, size_bytes)])
    if not threads:
        work()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return digest.hexdigest()
