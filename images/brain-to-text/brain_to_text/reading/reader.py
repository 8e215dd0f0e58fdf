"""Features of trials, asked for ahead of time: from memory, from the disk cache, or from the store."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass
from typing import Any

import numpy as np

from brain_to_text.indexing.hdf5 import decode, ranges_of
from brain_to_text.indexing.index import Pin
from brain_to_text.indexing.schema import BIN_S, Trial
from brain_to_text.reading.ranges import Counts, Ranges, Request
from brain_to_text.reading.tiers import DiskTier, MemoryTier
from estiba.errors import DataError
from estiba.stop import Stop

DECODERS = 2
POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Known:
    """A trial that can be used, and where it is."""

    trial: Trial
    path: str
    url: str
    pin: Pin
    session: str
    day: int

    @property
    def name(self) -> str:
        return f"{self.session}/{self.trial.name}"


class Source(ABC):
    """Where trials come from that no cache has."""

    counts: Counts

    @abstractmethod
    def fetch(self, known: Known) -> Future[Any]:
        """Begin to read; what it gives is for `values`. It may raise DataError, StoreError."""

    @abstractmethod
    def values(self, known: Known, fetched: Any) -> np.ndarray:
        """The features, [T, C]. Raises DataError for bytes that do not decode."""

    @abstractmethod
    def close(self) -> None: ...


class RangeSource(Source):
    """By the index: the bytes of a trial, and values out of them."""

    def __init__(self, ranges: Ranges) -> None:
        self.ranges, self.counts = ranges, ranges.counts

    def fetch(self, known: Known) -> Future[Any]:
        placement = known.trial.features
        assert placement is not None
        return self.ranges.fetch(Request(known.path, known.pin, ranges_of(placement), known.name))

    def values(self, known: Known, fetched: Any) -> np.ndarray:
        placement = known.trial.features
        assert placement is not None
        try:
            return decode(placement, fetched)
        except ValueError as error:
            raise DataError(f"{known.url}: {known.trial.name}: {error}; copy the file again") from None

    def close(self) -> None:
        self.ranges.close()


class _Asked:
    """A trial that some batch waits for."""

    __slots__ = ("future", "waiters")

    def __init__(self, future: Future[np.ndarray]) -> None:
        self.future, self.waiters = future, 0


class Reader:
    """Features by position in a list of trials, float32[T, C]. Safe in threads; reads nothing twice at a time."""

    def __init__(
        self,
        known: Sequence[Known],
        source: Source,
        *,
        memory: MemoryTier,
        disk: DiskTier | None,
        feature_subset: Sequence[int] | None,
        stop: Stop,
    ) -> None:
        self.known, self.source, self.memory, self.disk = known, source, memory, disk
        self._subset = None if feature_subset is None else np.asarray(feature_subset, np.int64)
        self._stop = stop
        self._asked: dict[int, _Asked] = {}
        self._lock = threading.RLock()
        self._pool = ThreadPoolExecutor(DECODERS, "brain-decode")
        self.hits = self.disk_hits = self.bytes_used = 0

    def ask(self, ids: Sequence[int], *, again: bool = False) -> list[Future[np.ndarray]]:
        """Begin to read what is not being read yet. Each ask is answered by one `release` of the same ids.

        `again` for what was asked for before and is not to be counted twice.
        """
        with self._lock:
            return [self._ask(trial, again) for trial in ids]

    def _ask(self, trial: int, again: bool) -> Future[np.ndarray]:
        asked = self._asked.get(trial)
        if asked is None:
            asked = self._asked[trial] = _Asked(self._begin(trial))
        elif not again:
            self.hits += 1
        asked.waiters += 1
        return asked.future

    def release(self, ids: Sequence[int]) -> None:
        """They were used, or will not be."""
        with self._lock:
            for trial in ids:
                asked = self._asked[trial]
                asked.waiters -= 1
                if asked.waiters:
                    continue
                del self._asked[trial]
                if asked.future.done() and not asked.future.cancelled() and asked.future.exception() is None:
                    values = asked.future.result()
                    self.memory.touched(trial)
                    self.memory.put(trial, values)
                    if self.disk is not None:
                        self.disk.put(trial, values)
                else:
                    asked.future.cancel()

    def wait(self, future: Future[np.ndarray]) -> np.ndarray:
        """Raises what reading it raised; Interrupted when asked to stop."""
        while True:
            try:
                return future.result(timeout=POLL_S)
            except NotYet:
                if future.done():
                    return future.result()
                if self._stop():
                    raise self._stop.interrupted("trials were being read; nothing of the run is lost") from None

    def _begin(self, trial: int) -> Future[np.ndarray]:
        values = self.memory.get(trial)
        if values is not None:
            self.hits += 1
            return _done(values)
        known = self.known[trial]
        placement = known.trial.features
        assert placement is not None
        if self.disk is not None and trial in self.disk:
            return self._pool.submit(self._from_disk, trial)
        return self._from_store(trial)

    def _from_disk(self, trial: int) -> np.ndarray:
        assert self.disk is not None
        values = self.disk.get(trial, np.dtype(np.float32), self.shape_of(trial))
        if values is None:
            answer = self._from_store(trial, decode_here=True)
            return answer.result()
        self.disk_hits += 1
        return values

    def shape_of(self, trial: int) -> tuple[int, int]:
        """(T, C) of a trial's features as they are given out."""
        placement = self.known[trial].trial.features
        assert placement is not None
        steps, width = placement.shape
        return steps, width if self._subset is None else len(self._subset)

    def _from_store(self, trial: int, *, decode_here: bool = False) -> Future[np.ndarray]:
        known = self.known[trial]
        answer: Future[np.ndarray] = Future()
        reading = self.source.fetch(known)

        def arrived(fetched: Future[Any]) -> None:
            if fetched.cancelled():
                answer.cancel()
            elif decode_here:
                self._decode(known, fetched, answer)
            else:
                try:
                    self._pool.submit(self._decode, known, fetched, answer)
                except RuntimeError:  # closed in between
                    answer.cancel()

        reading.add_done_callback(arrived)
        answer.add_done_callback(lambda done: reading.cancel() if done.cancelled() else None)
        return answer

    def _decode(self, known: Known, fetched: Future[Any], answer: Future[np.ndarray]) -> None:
        if not answer.set_running_or_notify_cancel():
            return
        try:
            values = features_of(known, self.source.values(known, fetched.result()), self._subset)
            with self._lock:
                placement = known.trial.features
                self.bytes_used += sum(length for _, length in ranges_of(placement)) if placement else 0
            answer.set_result(values)
        except BaseException as error:
            answer.set_exception(error)

    def close(self) -> None:
        self.source.close()
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self.disk is not None:
            self.disk.close()


def features_of(known: Known, values: np.ndarray, subset: np.ndarray | None) -> np.ndarray:
    """float32[T, C] as they are given out. Raises DataError for NaNs, infinities."""
    values = values.astype(np.float32, copy=False)
    if subset is not None:
        values = np.ascontiguousarray(values[:, subset])
    # A sum is finite where all values are, and is made without a second array.
    with np.errstate(over="ignore", invalid="ignore"):
        total = np.add.reduce(values, axis=None)
    if not np.isfinite(total) and not np.isfinite(values).all():
        step, feature = np.argwhere(~np.isfinite(values))[0].tolist()
        raise DataError(
            f"{known.url}: {known.trial.name}: input_features holds {values[step, feature]} at time step {step} "
            f"({step * BIN_S:.2f} s), feature {feature}, and {int((~np.isfinite(values)).sum())} values in all are not "
            "finite; mend the trial, or leave such ones out with --on-bad-trial skip"
        )
    return values


def _done(values: np.ndarray) -> Future[np.ndarray]:
    future: Future[np.ndarray] = Future()
    future.set_result(values)
    return future
