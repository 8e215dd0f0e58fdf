"""A local directory as a store."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
import shutil
import stat
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from estiba.errors import ConfigError, StoreError
from estiba.storage.base import TEMPORARY_SUFFIX, Entry, Store

MAX_NAME_BYTES = 255
"""Of one part of a path, on every usual Linux file system."""


class FileStore(Store):
    """A directory. A write goes to a temporary file, which is fsynced and renamed; then the directory is fsynced."""

    is_durable = False

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.url = str(self.root)

    def path_of(self, path: str) -> Path:
        return self.root / path if path else self.root

    def list(self, prefix: str = "") -> list[Entry]:
        found = []
        above: dict[str, frozenset[tuple[int, int]]] = {}
        with _explained(self.url_of(prefix)):
            for folder, folders, names in os.walk(self.path_of(prefix), followlinks=True, onerror=_raise_unless_absent):
                here = os.stat(folder)
                parents = above.get(os.path.dirname(folder), frozenset())
                if (here.st_dev, here.st_ino) in parents:  # a link to a parent would never end
                    folders.clear()
                    continue
                above[folder] = parents | {(here.st_dev, here.st_ino)}
                for name in names:
                    if name.endswith(TEMPORARY_SUFFIX):  # not published yet
                        continue
                    full = os.path.join(folder, name)
                    try:
                        size = os.stat(full).st_size
                    except OSError:  # a dangling link is listed; reading it names it in the error
                        size = 0
                    found.append(Entry(os.path.relpath(full, self.root), size))
        return sorted(found, key=lambda entry: entry.path)

    def head(self, path: str) -> Entry | None:
        with _explained(self.url_of(path)):
            try:
                status = self.path_of(path).stat()
            except (FileNotFoundError, NotADirectoryError):
                return None
        return Entry(path, status.st_size) if stat.S_ISREG(status.st_mode) else None

    def read(self, path: str, start: int = 0, length: int | None = None) -> bytes:
        with _explained(self.url_of(path)), open(self.path_of(path), "rb") as file:
            file.seek(start)
            data = file.read() if length is None else file.read(length)
        if length is not None and len(data) != length:
            raise StoreError(
                f"{self.url_of(path)}: {len(data)} bytes at {start} where {length} were asked for; it is truncated"
            )
        return data

    def open(self, path: str, size_bytes: int | None = None, *, etag: str | None = None) -> BinaryIO:  # noqa: ARG002
        with _explained(self.url_of(path)):
            return open(self.path_of(path), "rb")

    @contextlib.contextmanager
    def writer(self, path: str) -> Iterator[BinaryIO]:
        final = self.path_of(path)
        # The name is derived from the final one, so the next attempt overwrites what a killed process left.
        temporary = _temporary_beside(final)
        url = self.url_of(path)
        with _explained(url):
            final.parent.mkdir(parents=True, exist_ok=True)
            descriptor = _open_locked(temporary, url)
        file = io.BufferedWriter(_Output(descriptor, url))
        try:
            yield file
            with _explained(url):
                file.flush()
                os.fsync(descriptor)
                os.rename(temporary, final)
                sync_directory(final.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        finally:
            with contextlib.suppress(OSError, StoreError):  # a full disk reports its error again on close
                file.close()

    def write_new(self, path: str, data: bytes) -> bool:
        final = self.path_of(path)
        temporary = _temporary_beside(final, f".{os.getpid()}-{threading.get_ident()}")
        with _explained(self.url_of(path)):
            final.parent.mkdir(parents=True, exist_ok=True)
            try:
                with open(temporary, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.link(temporary, final)
                sync_directory(final.parent)
            except FileExistsError:
                return False
            finally:
                temporary.unlink(missing_ok=True)
        return True

    def delete(self, path: str) -> None:
        with _explained(self.url_of(path)):
            self.path_of(path).unlink(missing_ok=True)

    def rename(self, path: str, new_path: str) -> None:
        with _explained(self.url_of(path)):
            self.path_of(new_path).parent.mkdir(parents=True, exist_ok=True)
            os.rename(self.path_of(path), self.path_of(new_path))


def copy_tree(source: Store, folder: Path) -> Path:
    """Copy a store into `folder` unless it exists; it appears when complete. Returns it."""
    if folder.is_dir():
        return folder
    entries = source.list()
    if not entries:
        raise ConfigError(f"{source.url}: nothing there to copy; check the bucket and the prefix")
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    target = FileStore(temporary)
    try:
        with ThreadPoolExecutor(8) as pool:
            for _ in pool.map(lambda entry: _copy(source, entry, target), entries):
                pass
        try:
            os.rename(temporary, folder)
        except OSError:
            if not folder.is_dir():  # another process published the same bytes first
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _copy(source: Store, entry: Entry, target: Store) -> None:
    if entry.path.startswith("/") or ".." in entry.path.split("/"):
        raise StoreError(f"{source.url_of(entry.path)}: its name leads outside the folder; rename the object")
    with source.open(entry.path) as reading, target.writer(entry.path) as writing:
        shutil.copyfileobj(reading, writing, 2**22)
    copied = target.head(entry.path)
    if copied is None or copied.size_bytes != entry.size_bytes:
        raise StoreError(f"{source.url_of(entry.path)}: changed while it was copied; try again")


def sync_directory(path: Path) -> None:
    """Make a rename in `path` durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network mounts cannot; the rename is done
            raise
    finally:
        os.close(descriptor)


class _Output(io.FileIO):
    """A writer's file. Write errors become StoreError; other errors in the writer's block do not."""

    def __init__(self, descriptor: int, url: str) -> None:
        super().__init__(descriptor, "w")
        self._url = url

    def write(self, data: Any) -> int:
        with _explained(self._url):
            return super().write(data)


def _temporary_beside(final: Path, writer: str = "") -> Path:
    """Return the temporary name of a file; a digest replaces the name where the two together would be too long."""
    name = f".{final.name}{writer}{TEMPORARY_SUFFIX}"
    if len(os.fsencode(name)) > MAX_NAME_BYTES:
        name = f".{xxhash.xxh3_64_hexdigest(os.fsencode(final.name))}{writer}{TEMPORARY_SUFFIX}"
    return final.with_name(name)


def _open_locked(path: Path, url: str) -> int:
    """Open and lock an empty file. Raises StoreError if another process holds it."""
    while True:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise StoreError(
                        f"{url}: another process is writing it; two jobs share this directory, give each its own"
                    ) from None
            if _is_at(descriptor, path):
                os.ftruncate(descriptor, 0)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # another process published this file before the lock; open it again


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _raise_unless_absent(error: OSError) -> None:
    if error.errno not in (errno.ENOENT, errno.ENOTDIR):
        raise error


@contextlib.contextmanager
def _explained(url: str) -> Iterator[None]:
    """Turn an OSError into a StoreError with a remedy."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = f"{_free_text(url)}; free some or give the job a larger volume"
        elif error.errno in (errno.EACCES, errno.EPERM):
            remedy = f"this process runs as user {os.getuid()}; make it accessible to that user, or change --user"
        elif error.errno == errno.EROFS:
            remedy = "it is mounted read-only; mount it without :ro or choose another path"
        elif error.errno == errno.ENAMETOOLONG:
            remedy = f"a file system takes names of at most {MAX_NAME_BYTES} bytes; shorten it"
        elif error.errno in (errno.EEXIST, errno.ENOTDIR, errno.EISDIR):
            remedy = "a file stands where a folder is needed, or a folder where a file is; move one of them"
        elif error.errno == errno.ENOENT:
            remedy = "there is no such file"
        else:
            remedy = "check the disk and the mount"
        raise StoreError(f"{url}: {error.strerror or error} ({remedy})") from error


def _free_text(url: str) -> str:
    path = Path(url)
    while not path.exists() and path != path.parent:
        path = path.parent
    with contextlib.suppress(OSError):
        return f"{shutil.disk_usage(path).free / 1e6:.0f} MB free"
    return "no space left"
