"""The files of a staged model: written under temporary names, in any order, and renamed when all are complete."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import xxhash

from estiba.errors import StoreError
from estiba.staging.pieces import Piece, PieceTable
from estiba.storage import TEMPORARY_SUFFIX

_READ_BYTES = 2**20


class DiskError(StoreError):
    """This host's disk cannot take the data."""


class StagedFiles:
    """The local files of a table. Pieces are written and read by several threads at a time."""

    def __init__(self, table: PieceTable, folder: Path) -> None:
        self.table, self.folder = table, folder
        self._descriptors: dict[int, int] = {}
        self._published: set[int] = set()

    def final_path(self, file: int) -> Path:
        return self.folder / self.table.files[file].path

    def temporary_path(self, file: int) -> Path:
        return _temporary(self.final_path(file))

    def discard(self, path: str) -> None:
        """Remove what was staged of an object that the source no longer has."""
        with contextlib.suppress(OSError):
            _temporary(self.folder / path).unlink()

    def open(self, published: Iterable[int]) -> None:
        """Open every file: those that are `published` for reading, all others under their temporary names.

        Raises StoreError if the disk has too little room.
        """
        ready = self._published = set(published)
        try:
            self._require_room(ready)
            for file, entry in enumerate(self.table.files):
                if file in ready:
                    self._descriptors[file] = os.open(self.final_path(file), os.O_RDONLY | os.O_CLOEXEC)
                    continue
                path = self.temporary_path(file)
                path.parent.mkdir(parents=True, exist_ok=True)
                self._descriptors[file] = descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                os.ftruncate(descriptor, entry.size_bytes)
        except OSError as error:
            raise disk_error(self.folder, error) from None

    def write(self, piece: Piece, chunks: Iterable[bytes | memoryview]) -> bytes:
        """Write a piece as it arrives. Returns its digest. Raises StoreError for this disk and for a short piece."""
        digest = xxhash.xxh3_128()
        at, end = piece.start, piece.start + piece.size_bytes
        for chunk in chunks:
            view = memoryview(chunk)
            digest.update(view)
            if at + len(view) > end:
                raise StoreError(f"{self.table.url_of(piece)}: more bytes arrived than were asked for; try again")
            try:
                while view:
                    count = os.pwrite(self._descriptors[piece.file], view, at)
                    view, at = view[count:], at + count
            except OSError as error:
                raise disk_error(self.folder, error) from None
        if at != end:
            raise StoreError(f"{self.table.url_of(piece)}: {end - at} bytes are missing at {at}; try again")
        return digest.digest()

    def location(self, piece: Piece) -> tuple[int, int, int]:
        """Return descriptor, offset and size of a piece, for sendfile."""
        return self._descriptors[piece.file], piece.start, piece.size_bytes

    def digest(self, piece: Piece) -> bytes:
        """Return the digest of the bytes on the disk."""
        return digest_of(self._descriptors[piece.file], piece)

    def publish(self) -> None:
        """Rename all files. Their time is now, so that `s5cmd sync` and `aws s3 sync` take them as up to date."""
        try:
            for file in range(len(self.table.files)):
                temporary = self.temporary_path(file)
                if file in self._published:
                    temporary.unlink(missing_ok=True)
                    with contextlib.suppress(PermissionError):
                        os.utime(self.final_path(file))
                    continue
                os.utime(temporary)
                os.rename(temporary, self.final_path(file))
                self._published.add(file)
        except OSError as error:
            raise disk_error(self.folder, error) from None

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            with contextlib.suppress(OSError):
                os.close(descriptor)
        self._descriptors.clear()

    def _require_room(self, ready: set[int]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        needed_bytes = 0
        for file, entry in enumerate(self.table.files):
            if file not in ready:
                with contextlib.suppress(FileNotFoundError):
                    needed_bytes -= min(entry.size_bytes, os.stat(self.temporary_path(file)).st_blocks * 512)
                needed_bytes += entry.size_bytes
        free_bytes = shutil.disk_usage(self.folder).free
        if needed_bytes > free_bytes:
            raise DiskError(
                f"{self.folder}: {needed_bytes / 1e9:.3g} GB are still to be staged and {free_bytes / 1e9:.3g} GB are "
                "free; free some, stage into another directory, or give the job a larger volume"
            )


def _temporary(final: Path) -> Path:
    """Return a name of fixed length, since the final one may already have the 255 bytes that a name can have."""
    name = xxhash.xxh3_64_hexdigest(final.name.encode("utf-8", "surrogateescape"))
    return final.with_name(f".{name}{TEMPORARY_SUFFIX}")


def digest_of(descriptor: int, piece: Piece) -> bytes:
    """Return the digest of a piece in an open file; of fewer bytes if the file is shorter."""
    digest = xxhash.xxh3_128()
    at, end = piece.start, piece.start + piece.size_bytes
    while at < end:
        data = os.pread(descriptor, min(_READ_BYTES, end - at), at)
        if not data:
            break
        digest.update(data)
        at += len(data)
    return digest.digest()


def disk_error(path: Path, error: OSError) -> DiskError:
    """Return an error of the local disk, with its remedy."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = "free some space, stage into another directory, or give the job a larger volume"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        remedy = f"user {os.getuid()} cannot write there; choose another directory"
    elif error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
        remedy = f"{error.filename or path} is in the way; remove it or choose another directory"
    else:
        remedy = "check the disk and the mount"
    return DiskError(f"{path}: {error.strerror or error}; {remedy}")
