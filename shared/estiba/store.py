"""Object storage by URL: `s3://bucket/prefix`, `file:///dir` or a plain path, behind one small interface.

Every write is all or nothing: a reader never sees half an object, a crash leaves none. Relative paths use `/`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
import shutil
import stat
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import unquote

from estiba.errors import ConfigError, StoreError

TEMPORARY_SUFFIX = ".estiba-tmp"


@dataclass(frozen=True)
class Entry:
    """One object: path relative to its store, size in bytes, and the store's own version mark where it has one."""

    path: str
    size_bytes: int
    etag: str | None = None


class Store(ABC):
    """A tree of immutable objects. All methods raise StoreError, with the object's URL and what to do."""

    url: str
    is_durable: bool
    """True where an object outlives this machine."""

    def url_of(self, path: str) -> str:
        return f"{self.url.rstrip('/')}/{path}" if path else self.url

    @abstractmethod
    def list(self, prefix: str = "") -> list[Entry]:
        """Every object below `prefix` (a folder), sorted by path; empty where there is no such folder."""

    @abstractmethod
    def head(self, path: str) -> Entry | None:
        """The object's entry, or None where there is none."""

    @abstractmethod
    def read(self, path: str, start: int = 0, length: int | None = None) -> bytes:
        """Exactly the bytes asked for; short answers are errors."""

    @abstractmethod
    def open(self, path: str, size_bytes: int | None = None) -> BinaryIO:
        """A seekable, read-only file. A size that is known already saves asking for it."""

    @abstractmethod
    def writer(self, path: str) -> contextlib.AbstractContextManager[BinaryIO]:
        """A file that is published when the block ends, and never was when the block raises."""

    @abstractmethod
    def write_new(self, path: str, data: bytes) -> bool:
        """Publish unless there is one already; False where there was (If-None-Match: *)."""

    @abstractmethod
    def delete(self, path: str) -> None:
        """Remove; no error where there is none."""

    @abstractmethod
    def rename(self, path: str, new_path: str) -> None:
        """Move within the store."""

    def write(self, path: str, data: bytes | memoryview) -> None:
        """Publish one object, replacing."""
        with self.writer(path) as file:
            file.write(data)

    def put_file(self, path: str, source: Path) -> None:
        """Publish a local file, replacing. Raises OSError where it cannot be read."""
        with open(source, "rb") as reading, self.writer(path) as writing:
            shutil.copyfileobj(reading, writing, 2**24)

    def abort_uploads(self) -> int:
        """Abort uploads below this prefix that killed processes began. Returns how many there were."""
        return 0


def open_store(location: str | os.PathLike[str]) -> Store:
    """The store at a URL or path. Raises ConfigError for a scheme that is not known."""
    text = os.fspath(location)
    scheme, separator, rest = text.partition("://")  # not urlsplit: a # or ? in a name is part of the name
    scheme = scheme.lower()
    if not separator:
        return FileStore(Path(text))
    if scheme == "file":
        host, _, path = rest.partition("/")
        if host not in ("", "localhost"):
            raise ConfigError(f"{text}: names the host {host!r}; a file URL has three slashes: file:///{rest}")
        return FileStore(Path("/" + unquote(path)))
    if scheme == "s3":
        from estiba.s3 import S3ObjectStore  # keeps start-up light where no S3 is used

        return S3ObjectStore(text)
    raise ConfigError(f"{text}: storage of kind {scheme!r} is not supported; use s3://, file:// or a path")


def split_location(location: str) -> tuple[str, str]:
    """A URL or path as (parent, last name): 's3://b/a/x.parquet' -> ('s3://b/a', 'x.parquet')."""
    parent, _, name = location.rstrip("/").rpartition("/")
    return (parent or "/" if location.startswith("/") else parent or "."), name


class FileStore(Store):
    """A directory. Writes go beside, are fsynced, renamed, and the directory fsynced."""

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
                if (here.st_dev, here.st_ino) in parents:  # a link back up would never end
                    folders.clear()
                    continue
                above[folder] = parents | {(here.st_dev, here.st_ino)}
                for name in names:
                    if name.endswith(TEMPORARY_SUFFIX):  # not published, as an upload on its way to S3
                        continue
                    full = os.path.join(folder, name)
                    try:
                        size = os.stat(full).st_size
                    except OSError:  # a dangling link is still an input; reading it names it
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
                f"{self.url_of(path)}: {len(data)} bytes at {start} where {length} were asked for; it was cut short"
            )
        return data

    def open(self, path: str, size_bytes: int | None = None) -> BinaryIO:  # noqa: ARG002 - the file knows
        with _explained(self.url_of(path)):
            return open(self.path_of(path), "rb")

    @contextlib.contextmanager
    def writer(self, path: str) -> Iterator[BinaryIO]:
        final = self.path_of(path)
        # The name is a function of the final one, so that what a killed process left is overwritten by the next.
        beside = final.with_name(f".{final.name}{TEMPORARY_SUFFIX}")
        url = self.url_of(path)
        with _explained(url):
            final.parent.mkdir(parents=True, exist_ok=True)
            descriptor = _open_locked(beside, url)
        file = io.BufferedWriter(_Output(descriptor, url))
        try:
            yield file
            with _explained(url):
                file.flush()
                os.fsync(descriptor)
                os.rename(beside, final)
                sync_directory(final.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                beside.unlink()
            raise
        finally:
            with contextlib.suppress(OSError, StoreError):  # a full disk says so once more on close
                file.close()

    def write_new(self, path: str, data: bytes) -> bool:
        final = self.path_of(path)
        beside = final.with_name(f".{final.name}.{os.getpid()}-{threading.get_ident()}{TEMPORARY_SUFFIX}")
        with _explained(self.url_of(path)):
            final.parent.mkdir(parents=True, exist_ok=True)
            try:
                with open(beside, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.link(beside, final)
                sync_directory(final.parent)
            except FileExistsError:
                return False
            finally:
                beside.unlink(missing_ok=True)
        return True

    def delete(self, path: str) -> None:
        with _explained(self.url_of(path)):
            self.path_of(path).unlink(missing_ok=True)

    def rename(self, path: str, new_path: str) -> None:
        with _explained(self.url_of(path)):
            self.path_of(new_path).parent.mkdir(parents=True, exist_ok=True)
            os.rename(self.path_of(path), self.path_of(new_path))


def stage(location: str, folder: Path) -> Path:
    """Copy everything below a URL into `folder`, once: the folder appears when it is whole. Returns it."""
    if folder.is_dir():
        return folder
    source = open_store(location)
    entries = source.list()
    if not entries:
        raise ConfigError(f"{location}: nothing there to copy; check the bucket and the prefix")
    beside = folder.with_name(f"{folder.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    target = FileStore(beside)
    try:
        with ThreadPoolExecutor(8) as pool:
            for _ in pool.map(lambda entry: _copy(source, entry, target), entries):
                pass
        try:
            os.rename(beside, folder)
        except OSError:
            if not folder.is_dir():  # another process was first with the same bytes
                raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder


def _copy(source: Store, entry: Entry, target: Store) -> None:
    if entry.path.startswith("/") or ".." in entry.path.split("/"):
        raise StoreError(f"{source.url_of(entry.path)}: a name that leads outside its folder; rename the object")
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
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network mounts cannot; the rename stands
            raise
    finally:
        os.close(descriptor)


def exact_reader(raw: io.RawIOBase, buffer_bytes: int) -> BinaryIO:
    return cast(BinaryIO, io.BufferedReader(raw, buffer_bytes))


class _Output(io.FileIO):
    """The file of a writer. Errors of writing it are its object's; whatever else the writer's block raises is not."""

    def __init__(self, descriptor: int, url: str) -> None:
        super().__init__(descriptor, "w")
        self._url = url

    def write(self, data: Any) -> int:
        with _explained(self._url):
            return super().write(data)


def _open_locked(path: Path, url: str) -> int:
    """An empty file to write, held for this process. Raises StoreError where another one holds it."""
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
        os.close(descriptor)  # between opening and locking another process published this very file: not ours to empty


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
    """An OSError as a StoreError with a remedy."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = f"{_free_text(url)}; free some or give the job a larger volume"
        elif error.errno in (errno.EACCES, errno.EPERM):
            remedy = f"this process runs as user {os.getuid()}; make it accessible to that user, or change --user"
        elif error.errno == errno.EROFS:
            remedy = "it is mounted read-only; mount it without :ro or choose another path"
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
