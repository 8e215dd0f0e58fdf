"""Bounded caches of trials, in memory and on a local disk, with optimal eviction (Belady).

The order in which trials are used is known in advance. The cached trial whose next use is farthest away is evicted, and
a new trial whose next use is even farther away is not cached at all.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import heapq
import os
import queue
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import xxhash

from estiba.errors import ConfigError
from estiba.log import get_logger

logger = get_logger(__name__)

DIGEST_BYTES = 16
MAX_QUEUED_WRITES = 64
"""Maximum number of trials that wait to be written to disk. Beyond it, trials are not cached there."""


class CachePolicy:
    """Decides which trials to cache within `limit_bytes`. Knows their sizes; the values are elsewhere."""

    def __init__(self, limit_bytes: int, next_use: Callable[[int], int]) -> None:
        self.limit_bytes, self.used_bytes = limit_bytes, 0
        self.sizes: dict[int, int] = {}
        self._next_use = next_use
        self._farthest: list[tuple[int, int]] = []
        """Heap of (-next use, trial). Entries may be out of date; they are checked when popped."""

    def __contains__(self, trial: int) -> bool:
        return trial in self.sizes

    def admit(self, trial: int, size_bytes: int) -> list[int] | None:
        """Add the trial and return those to evict for it. Returns None if it should not be cached."""
        if trial in self.sizes or size_bytes > self.limit_bytes:
            return None
        next_use = self._next_use(trial)
        free_bytes = self.limit_bytes - self.used_bytes
        evicted: dict[int, int] = {}  # trial -> -next use
        while free_bytes < size_bytes:
            entry = self._pop(evicted)
            if entry is None or -entry[0] <= next_use:
                for restored in [*((key, other) for other, key in evicted.items()), *([entry] if entry else [])]:
                    heapq.heappush(self._farthest, restored)
                return None
            evicted[entry[1]] = entry[0]
            free_bytes += self.sizes[entry[1]]
        for other in evicted:
            self.remove(other)
        self.sizes[trial] = size_bytes
        self.used_bytes += size_bytes
        heapq.heappush(self._farthest, (-next_use, trial))
        return list(evicted)

    def remove(self, trial: int) -> None:
        self.used_bytes -= self.sizes.pop(trial, 0)

    def update(self, trial: int) -> None:
        """Update the next use of a trial that was just used."""
        if trial in self.sizes:
            heapq.heappush(self._farthest, (-self._next_use(trial), trial))
            if len(self._farthest) > 4 * len(self.sizes) + 1024:  # drop entries that are out of date
                self._farthest = [(-self._next_use(cached), cached) for cached in self.sizes]
                heapq.heapify(self._farthest)

    def _pop(self, excluded: Mapping[int, int]) -> tuple[int, int] | None:
        """Pop the cached trial that is needed last, as (-next use, trial)."""
        while self._farthest:
            pushed, trial = heapq.heappop(self._farthest)
            if trial not in self.sizes or trial in excluded:  # evicted, or a duplicate entry
                continue
            current = -self._next_use(trial)
            if current == pushed:
                return current, trial
            heapq.heappush(self._farthest, (current, trial))
        return None


class MemoryCache:
    """Decoded trials in memory. The caller holds a lock."""

    def __init__(self, limit_bytes: int, next_use: Callable[[int], int]) -> None:
        self.policy = CachePolicy(limit_bytes, next_use)
        self._values: dict[int, np.ndarray] = {}

    def get(self, trial: int) -> np.ndarray | None:
        return self._values.get(trial)

    def put(self, trial: int, values: np.ndarray) -> None:
        evicted = self.policy.admit(trial, values.nbytes)
        if evicted is not None:
            for other in evicted:
                del self._values[other]
            self._values[trial] = values


class DiskCache:
    """Decoded trials as files that end with a digest. They are written by a background thread that nothing waits for.

    A later run on the same machine uses them again. Each data set and process has its own folder. Unused folders of
    other data sets are removed, so that the size limit holds.
    """

    def __init__(self, folder: Path, limit_bytes: int, next_use: Callable[[int], int], *, identity: str) -> None:
        """Raises ConfigError if the folder is not writable."""
        self.policy = CachePolicy(limit_bytes, next_use)
        self._lock = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.folder, self._lock_fd = _claim(folder, identity)
            self._add_existing()
        except OSError as error:
            raise ConfigError(
                f"--disk-cache-dir {folder}: cannot be written ({error.strerror}) by user {os.getuid()}; give another "
                "directory, or remove the flag"
            ) from None
        self._writes: queue.Queue[tuple[int, np.ndarray] | None] = queue.Queue(MAX_QUEUED_WRITES)
        self._thread = threading.Thread(target=self._run, name="brain-disk", daemon=True)
        self._thread.start()

    def __contains__(self, trial: int) -> bool:
        return trial in self.policy

    def get(self, trial: int, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray | None:
        """Return the values, or None if the file is missing or damaged."""
        if trial not in self.policy:
            return None
        try:
            data = np.fromfile(self._path(trial), np.uint8)
        except OSError:
            data = np.empty(0, np.uint8)
        body, digest = data[:-DIGEST_BYTES], data[-DIGEST_BYTES:]
        expected = int(np.prod(shape)) * dtype.itemsize
        is_whole = len(body) == expected and xxhash.xxh3_128_digest(body) == digest.tobytes()
        with self._lock:
            if not is_whole:
                self.policy.remove(trial)
                with contextlib.suppress(OSError):  # the disk may have become read-only
                    self._path(trial).unlink(missing_ok=True)
                return None
            self.policy.update(trial)
        return body.view(dtype).reshape(shape)

    def put(self, trial: int, values: np.ndarray) -> None:
        if trial not in self.policy:
            with contextlib.suppress(queue.Full):
                self._writes.put_nowait((trial, values))

    def flush(self) -> None:
        """Wait until all queued trials are written; for tests."""
        self._writes.join()

    def close(self) -> None:
        self._writes.put(None)
        self._thread.join(timeout=10)
        os.close(self._lock_fd)

    def _path(self, trial: int) -> Path:
        return self.folder / f"{trial}.trial"

    def _run(self) -> None:
        while (item := self._writes.get()) is not None:
            try:
                self._write(*item)
            except OSError as error:
                reason = "is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else f"failed ({error.strerror})"
                logger.warning(f"the disk cache {self.folder} {reason}; no more trials are cached there")
                self.policy.limit_bytes = 0
            finally:
                self._writes.task_done()
        self._writes.task_done()

    def _write(self, trial: int, values: np.ndarray) -> None:
        size_bytes = values.nbytes + DIGEST_BYTES
        with self._lock:
            evicted = self.policy.admit(trial, size_bytes)
            if evicted is None:
                return
            self.policy.remove(trial)  # added again below, once the file is complete
            for other in evicted:
                self._path(other).unlink(missing_ok=True)
        path = self._path(trial)
        partial = path.with_suffix(".part")
        flat = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        try:
            with open(partial, "wb") as file:
                file.write(flat)
                file.write(xxhash.xxh3_128_digest(flat))
            partial.rename(path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
        with self._lock:
            evicted = self.policy.admit(trial, size_bytes)
            for other in [trial] if evicted is None else evicted:
                self._path(other).unlink(missing_ok=True)

    def _add_existing(self) -> None:
        """Add the files of an earlier process that fit within the limit, and delete the rest."""
        for path in sorted(self.folder.iterdir()):
            size_bytes = path.stat().st_size
            fits = self.policy.used_bytes + size_bytes <= self.policy.limit_bytes
            if path.suffix == ".trial" and path.stem.isascii() and path.stem.isdigit() and fits and path.is_file():
                self.policy.admit(int(path.stem), size_bytes)
            elif path.suffix in (".trial", ".part") and not path.is_dir():
                path.unlink(missing_ok=True)


def _claim(folder: Path, identity: str) -> tuple[Path, int]:
    """Create and lock a folder for this process, and remove unused folders of other data sets."""
    for other in folder.glob("trials-*"):
        if other.name != f"trials-{identity}" and (lock := _try_lock(other)) is not None:
            shutil.rmtree(other, ignore_errors=True)
            os.close(lock)
    for name in (f"trials-{identity}", f"trials-{identity}-{os.getpid()}"):
        own = folder / name
        own.mkdir(exist_ok=True)
        if (lock := _try_lock(own)) is not None:
            return own, lock
    own = folder / f"trials-{identity}-{os.getpid()}-{threading.get_ident()}"
    own.mkdir(exist_ok=True)
    return own, _open_lock(own)


def _open_lock(folder: Path) -> int:
    return os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)


def _try_lock(folder: Path) -> int | None:
    """Return the descriptor of the folder's lock; None if another process, or another cache in this one, holds it."""
    try:
        descriptor = _open_lock(folder)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        pass  # a file system without locks
    return descriptor
