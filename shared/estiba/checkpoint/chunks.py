"""Chunks: finished parts of a job, each published atomically under a name that contains its digest.

A chunk is the file `<key>.<xxh3-128>.piece`. It is written to a temporary file, fsynced and renamed (or is one S3
object), so the name never exists without the bytes. Every load checks the digest in the name, so torn or flipped bytes
are detected, whatever copied the folder: SageMaker's sync, rsync or a person. A chunk that does not verify is
quarantined with a warning, and the caller uses the previous one or computes it again.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import xxhash

from estiba.errors import CheckpointError, StoreError
from estiba.log import get_logger
from estiba.paths import lock
from estiba.storage import FileStore, Store

logger = get_logger(__name__)

SUFFIX = ".piece"
_NAME = re.compile(r"(?P<key>.+)\.(?P<digest>[0-9a-f]{32})" + re.escape(SUFFIX))


def digest_of(data: bytes | memoryview) -> str:
    """Return the xxh3-128 of `data`, 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(data)


class ChunkStore:
    """The chunks below one folder of a store, by key. Keys are paths that sort in reading order."""

    def __init__(self, store: Store, prefix: str, *, listed: bool = True) -> None:
        """`listed` False skips listing earlier chunks, for a process that only commits."""
        self.store = store
        self.prefix = prefix.strip("/")
        self._names: dict[str, str] = {}
        for entry in store.list(self.prefix) if listed else ():
            if match := _NAME.fullmatch(entry.path[len(self.prefix) :].lstrip("/")):
                self._names[match["key"]] = entry.path

    def __contains__(self, key: str) -> bool:
        return key in self._names

    def keys(self, below: str = "") -> list[str]:
        """Return the keys that start with `below`, sorted. Listed once; this process's commits are added."""
        return sorted(key for key in list(self._names) if key.startswith(below))

    def commit(self, key: str, data: bytes | memoryview) -> str:
        """Write one chunk durably, replacing any chunk of the same key. Returns its path in the store."""
        path = self._path(f"{key}.{digest_of(data)}{SUFFIX}")
        self.store.write(path, data)
        old = self._names.get(key)
        self._names[key] = path
        if old is not None and old != path:
            self.store.delete(old)
        return path

    def name_of(self, key: str) -> str:
        """Return the path of a key's chunk in the store, for another process to adopt."""
        return self._names[key]

    def adopt(self, key: str, name: str) -> None:
        """Add a chunk that another process committed."""
        self._names[key] = name

    def forget(self, keys: Iterable[str]) -> None:
        """Leave out chunks that another process dropped."""
        for key in keys:
            self._names.pop(key, None)

    def load(self, key: str, *, may_be_gone: bool = False) -> bytes | None:
        """Return the verified bytes, or None if the chunk is absent or was quarantined.

        `may_be_gone` if another process may have dropped it since it was listed, which is no fault.

        Raises StoreError if S3 does not give it: that says nothing of its bytes.
        """
        path = self._names.get(key)
        if path is None:
            return None
        match = _NAME.fullmatch(path)
        assert match is not None
        try:
            data = self.store.read(path)
            problem = None if digest_of(data) == match["digest"] else "its bytes do not match its digest"
        except StoreError as error:
            is_gone = self.store.head(path) is None
            if may_be_gone and is_gone:
                self._names.pop(key, None)
                return None
            if self.store.is_durable and not is_gone:
                raise
            data, problem = b"", str(error)
        if problem is None:
            return data
        logger.warning(f"{self.store.url_of(path)}: {problem}; quarantined, this chunk is computed again")
        self._names.pop(key, None)
        with contextlib.suppress(StoreError):
            self.store.rename(path, path + ".bad")
        return None

    def drop(self, keys: Iterable[str]) -> None:
        """Delete chunks that are no longer needed."""
        for key in list(keys):
            path = self._names.pop(key, None)
            if path is not None:
                self.store.delete(path)

    def _path(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name


class Ledger:
    """A small record that is replaced as work proceeds. The newest two are kept; the newest that verifies is read."""

    KEPT = 2

    def __init__(self, store: Store, prefix: str, writer: str) -> None:
        """`writer` names this host, so that hosts that share a folder never overwrite each other's record."""
        self._chunks = ChunkStore(store, prefix)
        self._writer = writer
        numbers = [int(key.rsplit("/", 1)[1]) for key in self._chunks.keys(f"{writer}/")]
        self._next = max(numbers, default=0) + 1

    def newest(self) -> Iterator[bytes]:
        """Yield every host's newest record that verifies."""
        writers = sorted({key.rsplit("/", 1)[0] for key in self._chunks.keys()})  # noqa: SIM118 - not a mapping
        for writer in writers:
            for key in reversed(self._chunks.keys(f"{writer}/")):
                data = self._chunks.load(key)
                if data is not None:
                    yield data
                    break

    def write(self, data: bytes) -> None:
        self._chunks.commit(f"{self._writer}/{self._next:010d}", data)
        self._next += 1
        self._chunks.drop(self._chunks.keys(f"{self._writer}/")[: -self.KEPT])


@contextlib.contextmanager
def exclusive(store: Store, name: str, *, timeout_s: float = 0.0) -> Iterator[None]:
    """Lock a folder for this process. Raises CheckpointError if another process on this host holds the lock."""
    if not isinstance(store, FileStore):  # S3 has no locks, and every process writes the same bytes
        yield
        return
    path = Path(store.path_of(f".{name}.lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise CheckpointError(
            f"{path.parent}: cannot be written ({error.strerror}) by user {os.getuid()}; mount a writable directory "
            "there or pass --checkpoint-path, or --no-checkpoint to run without checkpoints"
        ) from None
    try:
        held = f"{path.parent}: another job is using this checkpoint directory; wait for it or give this one its own"
        lock(descriptor, timeout_s=timeout_s, held=held)
        yield
    finally:
        os.close(descriptor)
