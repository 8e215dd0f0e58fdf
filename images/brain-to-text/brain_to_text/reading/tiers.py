"""Caches of trials with a bound in bytes: memory, and a local disk. What is needed last goes first (Belady).

The plan is known, so what to keep is no guess: of all that is cached, the trial whose next use lies farthest ahead
makes room; and a trial that is needed later than that is not kept at all.
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
from estiba.stop import say

DIGEST_BYTES = 16
WRITES_WAITING = 64
"""Trials on their way to the disk; more are not kept there, since nothing may wait for a cache."""


class Shelf:
    """Which trials to keep within `limit_bytes`; holds names and sizes, not values."""

    def __init__(self, limit_bytes: int, next_use: Callable[[int], int]) -> None:
        self.limit_bytes, self.used_bytes = limit_bytes, 0
        self.sizes: dict[int, int] = {}
        self._next_use = next_use
        self._farthest: list[tuple[int, int]] = []
        """(-next use, trial): a guess that may be old; the truth is asked for when it comes up."""

    def __contains__(self, trial: int) -> bool:
        return trial in self.sizes

    def admit(self, trial: int, size_bytes: int) -> list[int] | None:
        """Keep it; returns what has to go for it. None where it is not worth it."""
        if trial in self.sizes or size_bytes > self.limit_bytes:
            return None
        mine = self._next_use(trial)
        room = self.limit_bytes - self.used_bytes
        going: dict[int, int] = {}
        while room < size_bytes:
            found = self._pop(going)
            if found is None or -found[0] <= mine:
                for one, key in [*going.items(), *([(found[1], found[0])] if found else [])]:
                    heapq.heappush(self._farthest, (key, one))
                return None
            going[found[1]] = found[0]
            room += self.sizes[found[1]]
        for one in going:
            self.remove(one)
        self.sizes[trial] = size_bytes
        self.used_bytes += size_bytes
        heapq.heappush(self._farthest, (-mine, trial))
        return list(going)

    def remove(self, trial: int) -> None:
        self.used_bytes -= self.sizes.pop(trial, 0)

    def touched(self, trial: int) -> None:
        """It was used, so its next use is another one."""
        if trial in self.sizes:
            heapq.heappush(self._farthest, (-self._next_use(trial), trial))
            if len(self._farthest) > 4 * len(self.sizes) + 1024:  # old guesses add up
                self._farthest = [(-self._next_use(one), one) for one in self.sizes]
                heapq.heapify(self._farthest)

    def _pop(self, but_not: Mapping[int, int]) -> tuple[int, int] | None:
        """The kept trial that is needed last, with its true next use."""
        while self._farthest:
            guess, trial = heapq.heappop(self._farthest)
            if trial not in self.sizes or trial in but_not:  # gone, or there twice
                continue
            truth = -self._next_use(trial)
            if truth == guess:
                return truth, trial
            heapq.heappush(self._farthest, (truth, trial))
        return None


class MemoryTier:
    """Decoded trials in memory. The caller holds a lock."""

    def __init__(self, limit_bytes: int, next_use: Callable[[int], int]) -> None:
        self.shelf = Shelf(limit_bytes, next_use)
        self._values: dict[int, np.ndarray] = {}

    def get(self, trial: int) -> np.ndarray | None:
        return self._values.get(trial)

    def put(self, trial: int, values: np.ndarray) -> None:
        gone = self.shelf.admit(trial, values.nbytes)
        if gone is not None:
            for loser in gone:
                del self._values[loser]
            self._values[trial] = values

    def touched(self, trial: int) -> None:
        self.shelf.touched(trial)


class DiskTier:
    """Decoded trials as files, each with a digest behind it. Written by a thread of its own; never waited for.

    A run that begins again on the same machine finds what is there. One folder for each data set and process; those of
    other data sets that no process uses are removed, so that the bound holds.
    """

    def __init__(self, folder: Path, limit_bytes: int, next_use: Callable[[int], int], *, identity: str) -> None:
        self.shelf = Shelf(limit_bytes, next_use)
        self._lock = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.folder, self._held = _claim(folder, identity)
            self._adopt()
        except OSError as error:
            raise ConfigError(
                f"the disk cache {folder}: cannot be written ({error.strerror}) by user {os.getuid()}; name another "
                "folder, or leave it out"
            ) from None
        self._writes: queue.Queue[tuple[int, np.ndarray] | None] = queue.Queue(WRITES_WAITING)
        self._thread = threading.Thread(target=self._run, name="brain-disk", daemon=True)
        self._thread.start()

    def __contains__(self, trial: int) -> bool:
        return trial in self.shelf

    def get(self, trial: int, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray | None:
        """The values, or None where they are not there (any more), or not what they were."""
        if trial not in self.shelf:
            return None
        try:
            data = np.fromfile(self._path(trial), np.uint8)
        except OSError:
            data = np.empty(0, np.uint8)
        body, digest = data[:-DIGEST_BYTES], data[-DIGEST_BYTES:]
        expected = int(np.prod(shape)) * dtype.itemsize
        if len(body) != expected or xxhash.xxh3_128_digest(body) != digest.tobytes():
            with self._lock:
                self._drop(trial)
            return None
        with self._lock:
            self.shelf.touched(trial)
        return body.view(dtype).reshape(shape)

    def put(self, trial: int, values: np.ndarray) -> None:
        if trial not in self.shelf:
            with contextlib.suppress(queue.Full):
                self._writes.put_nowait((trial, values))

    def flush(self) -> None:
        """Wait until what was put is written; for tests and benchmarks."""
        self._writes.join()

    def close(self) -> None:
        self._writes.put(None)
        self._thread.join(timeout=10)
        os.close(self._held)

    def _path(self, trial: int) -> Path:
        return self.folder / f"{trial}.trial"

    def _run(self) -> None:
        while (item := self._writes.get()) is not None:
            try:
                self._write(*item)
            except OSError as error:
                words = "full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
                say(f"warning: the disk cache {self.folder}: {words}; it is used no further")
                self.shelf.limit_bytes = 0
            finally:
                self._writes.task_done()
        self._writes.task_done()

    def _write(self, trial: int, values: np.ndarray) -> None:
        with self._lock:
            gone = self.shelf.admit(trial, values.nbytes + DIGEST_BYTES)
            if gone is None:
                return
            self.shelf.remove(trial)  # not there before it is whole
            for loser in gone:
                self._path(loser).unlink(missing_ok=True)
        path = self._path(trial)
        beside = path.with_suffix(".part")
        flat = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        try:
            with open(beside, "wb") as file:
                file.write(flat)
                file.write(xxhash.xxh3_128_digest(flat))
            beside.rename(path)
        except OSError:
            beside.unlink(missing_ok=True)
            raise
        with self._lock:
            gone = self.shelf.admit(trial, values.nbytes + DIGEST_BYTES)
            for loser in [trial] if gone is None else gone:
                self._path(loser).unlink(missing_ok=True)

    def _drop(self, trial: int) -> None:
        self.shelf.remove(trial)
        with contextlib.suppress(OSError):  # a disk that became read-only: the trial is in the store all the same
            self._path(trial).unlink(missing_ok=True)

    def _adopt(self) -> None:
        """What an earlier process left, as far as it fits."""
        for path in sorted(self.folder.iterdir()):
            size_bytes = path.stat().st_size
            fits = self.shelf.used_bytes + size_bytes <= self.shelf.limit_bytes
            if path.suffix == ".trial" and path.stem.isascii() and path.stem.isdigit() and fits and path.is_file():
                self.shelf.admit(int(path.stem), size_bytes)
            elif path.suffix in (".trial", ".part") and not path.is_dir():
                path.unlink(missing_ok=True)


def _claim(folder: Path, identity: str) -> tuple[Path, int]:
    """A folder for this process, locked; unused ones of other data sets are removed."""
    for other in folder.glob("trials-*"):
        if other.name != f"trials-{identity}" and (lock := _locked(other)) is not None:
            shutil.rmtree(other, ignore_errors=True)
            os.close(lock)
    for name in (f"trials-{identity}", f"trials-{identity}-{os.getpid()}"):
        own = folder / name
        own.mkdir(exist_ok=True)
        if (lock := _locked(own)) is not None:
            return own, lock
    own = folder / f"trials-{identity}-{os.getpid()}-{threading.get_ident()}"
    own.mkdir(exist_ok=True)
    return own, os.open(own / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)


def _locked(folder: Path) -> int | None:
    """The descriptor of its lock; None where another process, or another set of trials in this one, holds it."""
    try:
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
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
