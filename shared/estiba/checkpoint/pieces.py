"""Saved work that verifies itself: pieces published whole, each under a name that holds its own digest.

A piece is `<key>.<xxh3-128>.piece`. It is written beside, fsynced and renamed (or one S3 object), so the name never
exists without the bytes; and whatever copies the folder about (SageMaker's sync, rsync, a person) cannot pass off torn
or flipped bytes as work, because the digest in the name is checked on every load. A piece that does not verify is set
aside with a warning, and the caller uses the one before or does the work again.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import xxhash

from estiba.errors import CheckpointError, StoreError
from estiba.stop import say
from estiba.store import FileStore, Store

SUFFIX = ".piece"
_NAME = re.compile(r"(?P<key>.+)\.(?P<digest>[0-9a-f]{32})" + re.escape(SUFFIX))


def digest_of(data: bytes | memoryview) -> str:
    """xxh3-128, 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(data)


class Pieces:
    """Finished pieces of work below one folder of a store, by key. Keys are paths; they sort as they should be read."""

    def __init__(self, store: Store, prefix: str, *, listed: bool = True) -> None:
        """`listed` False knows of no earlier pieces: for a process that only commits."""
        self.store = store
        self.prefix = prefix.strip("/")
        self._names: dict[str, str] = {}
        for entry in store.list(self.prefix) if listed else ():
            if match := _NAME.fullmatch(entry.path[len(self.prefix) :].lstrip("/")):
                self._names[match["key"]] = entry.path

    def __contains__(self, key: str) -> bool:
        return key in self._names

    def keys(self, below: str = "") -> list[str]:
        """Keys that start with `below`, sorted. Listed once at the start and kept in step with what is committed."""
        return sorted(key for key in self._names if key.startswith(below))

    def commit(self, key: str, data: bytes) -> str:
        """Make one piece durable, replacing the one of the same key. Returns its name in the store."""
        path = self._path(f"{key}.{digest_of(data)}{SUFFIX}")
        self.store.write(path, data)
        old = self._names.get(key)
        self._names[key] = path
        if old is not None and old != path:
            self.store.delete(old)
        return path

    def adopt(self, key: str, name: str) -> None:
        """Know of a piece that another process committed."""
        self._names[key] = name

    def load(self, key: str) -> bytes | None:
        """The verified bytes, or None where the piece is absent or was set aside."""
        path = self._names.get(key)
        if path is None:
            return None
        match = _NAME.fullmatch(path)
        assert match is not None
        try:
            data = self.store.read(path)
            problem = None if digest_of(data) == match["digest"] else "its bytes do not match its digest"
        except StoreError as error:
            data, problem = b"", str(error)
        if problem is None:
            return data
        say(f"warning: {self.store.url_of(path)}: {problem}; set aside, this piece is computed again")
        del self._names[key]
        with contextlib.suppress(StoreError):
            self.store.rename(path, path + ".bad")
        return None

    def drop(self, keys: Iterable[str]) -> None:
        """Delete pieces that are no longer needed."""
        for key in list(keys):
            path = self._names.pop(key, None)
            if path is not None:
                self.store.delete(path)

    def _path(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name


class Ledger:
    """A small record that is replaced as work goes on: the newest two are kept, the newest that verifies is read."""

    KEPT = 2

    def __init__(self, store: Store, prefix: str, writer: str) -> None:
        """`writer` names this host, so that hosts sharing one folder never write each other's record."""
        self._pieces = Pieces(store, prefix)
        self._writer = writer
        numbers = [int(key.rsplit("/", 1)[1]) for key in self._pieces.keys(f"{writer}/")]
        self._next = max(numbers, default=0) + 1

    def newest(self) -> Iterator[bytes]:
        """Every host's newest record that verifies."""
        writers = sorted({key.rsplit("/", 1)[0] for key in self._pieces.keys()})  # noqa: SIM118 - not a mapping
        for writer in writers:
            for key in reversed(self._pieces.keys(f"{writer}/")):
                data = self._pieces.load(key)
                if data is not None:
                    yield data
                    break

    def write(self, data: bytes) -> None:
        self._pieces.commit(f"{self._writer}/{self._next:010d}", data)
        self._next += 1
        self._pieces.drop(self._pieces.keys(f"{self._writer}/")[: -self.KEPT])


@contextlib.contextmanager
def exclusive(store: Store, name: str, *, patience_s: float = 0.0) -> Iterator[None]:
    """Hold a folder for one process. Raises CheckpointError where another one on this machine holds it for longer."""
    if not isinstance(store, FileStore):  # objects have no locks; their pieces are the same bytes whoever writes them
        yield
        return
    path = Path(store.path_of(f".{name}.lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise CheckpointError(
            f"{path.parent}: cannot be written ({error.strerror}) by user {os.getuid()}; mount a writable directory "
            "there or pass --checkpoint-path, or --no-checkpoint to go without"
        ) from None
    try:
        try:
            _lock(descriptor, time.monotonic() + patience_s)
        except BlockingIOError:
            raise CheckpointError(
                f"{path.parent}: another job is using this checkpoint directory; wait for it or give this one its own"
            ) from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, deadline: float) -> None:
    """Raises BlockingIOError where it is held until the deadline."""
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(0.05)
