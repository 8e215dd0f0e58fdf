"""Objects by relative key below one address: `file://` directories and `s3://` prefixes (any endpoint)."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Protocol

from estiba_launch.errors import HostError, disk_error
from estiba_launch.jobs.keys import shown
from estiba_launch.jobs.mirror import PART, KeyRefused, Stored, walk
from estiba_launch.jobs.s3 import S3Store, disk_errors
from estiba_launch.request.contract import file_path


class Store(Protocol):
    """Objects below one address. Every method raises HostError when the store cannot be reached or written."""

    uri: str

    def list(self) -> dict[str, int]:
        """Key and size in bytes of every object."""

    def get(self, key: str, path: Path) -> None:
        """Write one object to `path`. Creates its directory."""

    def objects(self) -> dict[str, Stored]:
        """Key and description of every object."""

    def head(self, key: str) -> Stored | None:
        """One object; None when there is none."""

    def put(self, path: Path, key: str, modified_ns: int | None = None) -> str | None:
        """Store a file whole: readers see the old object or the new. Returns its etag where that is known at once.

        `modified_ns` is remembered with the object. Raises KeyRefused where another object might pass.
        """

    def delete(self, key: str) -> None:
        """Remove an object. A missing one is not an error."""

    def tidy(self, key: str) -> None:
        """Remove what a `put` that was cut off has left."""


def open_store(uri: str, report: Callable[[str], None] = lambda _: None) -> Store:
    """The store at `uri`; `report` is told of outages. Raises HostError for an address neither s3:// nor file://."""
    if uri.startswith("file://"):
        return FileStore(file_path(uri))
    if uri.startswith("s3://"):
        return S3Store(uri, report=report)
    raise HostError(f"{uri}: neither s3:// nor file://; correct the job file")


ABOUT_THE_KEY = (
    errno.EACCES,
    errno.EEXIST,
    errno.EFBIG,
    errno.EILSEQ,
    errno.EINVAL,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.EPERM,
)


@contextmanager
def _file_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise KeyRefused(f"{shown(str(path))}: cannot be read ({error.strerror or error})") from error


def _stored(stat: os.stat_result) -> Stored:
    return Stored(stat.st_size, stat.st_mtime_ns, f"{stat.st_size}-{stat.st_mtime_ns}-{stat.st_ino}")


class FileStore:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.uri = f"file://{root}"

    def list(self) -> dict[str, int]:
        with disk_errors(self.uri):
            return {key: stat.st_size for key, stat in walk(self.root)}

    def objects(self) -> dict[str, Stored]:
        with disk_errors(self.uri):
            return {key: _stored(stat) for key, stat in walk(self.root)}

    def get(self, key: str, path: Path) -> None:
        with disk_errors(f"{self.uri}/{shown(key)}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.root / key, path)

    def head(self, key: str) -> Stored | None:
        with self._key_errors(key):
            try:
                return _stored((self.root / key).lstat())
            except (FileNotFoundError, NotADirectoryError):
                return None

    def put(self, path: Path, key: str, modified_ns: int | None = None) -> str | None:
        place = self.root / key
        part = self._part(key)
        with ExitStack() as files:
            with _file_errors(path):
                source = files.enter_context(path.open("rb"))
                # A file that grows while it is read ends where it ended at the start.
                left = os.fstat(source.fileno()).st_size
            with self._key_errors(key):
                place.parent.mkdir(parents=True, exist_ok=True)
                try:
                    with part.open("wb") as target:
                        while left > 0:
                            with _file_errors(path):
                                chunk = source.read(min(left, 1 << 20))
                            if not chunk:
                                break
                            target.write(chunk)
                            left -= len(chunk)
                        target.flush()
                        os.fsync(target.fileno())
                    if modified_ns is not None:
                        os.utime(part, ns=(modified_ns, modified_ns))
                    etag = _stored(part.lstat()).etag
                    part.replace(place)
                except BaseException:
                    part.unlink(missing_ok=True)
                    raise
        return etag

    def tidy(self, key: str) -> None:
        with suppress(OSError):
            self._part(key).unlink()

    def _part(self, key: str) -> Path:
        place = self.root / key
        name = os.fsencode(place.name)
        # Names of up to 255 bytes leave no room for an ending.
        if len(name) > 200:
            name = hashlib.sha256(name).hexdigest().encode()
        return place.with_name(f".{os.fsdecode(name)}{PART}")

    @contextmanager
    def _key_errors(self, key: str) -> Iterator[None]:
        """Tells an object that this directory cannot hold from a directory that is not there or is full."""
        try:
            yield
        except OSError as error:
            one = error.errno in ABOUT_THE_KEY and self.root.is_dir() and os.access(self.root, os.W_OK)
            kind = KeyRefused if one else HostError
            raise kind(f"{self.uri}/{shown(key)}: {disk_error(error)}") from error

    def delete(self, key: str) -> None:
        with self._key_errors(key):
            (self.root / key).unlink(missing_ok=True)
            # Object stores have no empty directories. Leave none behind, but keep the root.
            for parent in (self.root / key).parents:
                if parent == self.root:
                    break
                try:
                    parent.rmdir()
                except OSError:
                    break
