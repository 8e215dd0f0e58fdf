"""Read the features of trials ahead of time, from the memory cache, the disk cache or the store."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from brain_to_text.data.indexing.hdf5 import byte_ranges
from brain_to_text.data.reading.cache import DiskCache, MemoryCache
from brain_to_text.data.reading.source import BadTrial, Source
from brain_to_text.data.schema import BIN_S, FEATURES, TrialRef
from estiba.platform.stop import Stop

DECODER_THREADS = 2
POLL_S = 0.1


@dataclass(slots=True)
class _PendingTrial:
    """A trial that one or more batches have requested."""

    future: Future[np.ndarray]
    waiters: int = 0


class Reader:
    """Reads features float32[T, C] by position in a list of trials. Thread-safe; never reads a trial twice at once."""

    def __init__(
        self,
        refs: Sequence[TrialRef],
        source: Source,
        *,
        memory: MemoryCache,
        disk: DiskCache | None,
        feature_subset: Sequence[int] | None,
        stop: Stop,
    ) -> None:
        self.refs, self.source, self.memory, self.disk = refs, source, memory, disk
        self._subset = None if feature_subset is None else np.asarray(feature_subset, np.int64)
        self._stop = stop
        self._pending: dict[int, _PendingTrial] = {}
        self._lock = threading.RLock()
        self._pool = ThreadPoolExecutor(DECODER_THREADS, "brain-decode")
        self.hits = self.disk_hits = self.bytes_used = 0

    def request(self, ids: Sequence[int], *, again: bool = False) -> list[Future[np.ndarray]]:
        """Start to read trials that are not being read yet. Each call needs one matching `release` of the same ids.

        `again` says that they were requested before, so that they are not counted as hits a second time.
        """
        with self._lock:
            return [self._request(trial, again) for trial in ids]

    def _request(self, trial: int, again: bool) -> Future[np.ndarray]:
        pending = self._pending.get(trial)
        if pending is None:
            pending = self._pending[trial] = _PendingTrial(self._start(trial))
        elif not again:
            self.hits += 1
        pending.waiters += 1
        return pending.future

    def release(self, ids: Sequence[int]) -> None:
        """Release trials that were used or are no longer needed."""
        with self._lock:
            for trial in ids:
                pending = self._pending[trial]
                pending.waiters -= 1
                if pending.waiters:
                    continue
                del self._pending[trial]
                future = pending.future
                if future.done() and not future.cancelled() and future.exception() is None:
                    values = future.result()
                    self.memory.policy.update(trial)
                    self.memory.put(trial, values)
                    if self.disk is not None:
                        self.disk.put(trial, values)
                else:
                    future.cancel()

    def wait(self, future: Future[np.ndarray]) -> np.ndarray:
        """Wait for the values. Raises what the read raised; Interrupted when asked to stop."""
        while True:
            try:
                return future.result(timeout=POLL_S)
            except TimeoutError:
                if future.done():
                    return future.result()
                if self._stop():
                    raise self._stop.interrupted("trials were being read, and nothing is lost") from None

    def _start(self, trial: int) -> Future[np.ndarray]:
        values = self.memory.get(trial)
        if values is not None:
            self.hits += 1
            future: Future[np.ndarray] = Future()
            future.set_result(values)
            return future
        if self.disk is not None and trial in self.disk:
            return self._pool.submit(self._from_disk, trial)
        return self._from_store(trial)

    def _from_disk(self, trial: int) -> np.ndarray:
        assert self.disk is not None
        values = self.disk.get(trial, np.dtype(np.float32), self.shape_of(trial))
        if values is None:
            return self._decode(self.refs[trial], self.source.fetch(self.refs[trial]).result())
        self.disk_hits += 1
        return values

    def shape_of(self, trial: int) -> tuple[int, int]:
        """Return (T, C) of a trial's features, after --feature-subset."""
        steps, width = self.refs[trial].layout.shape
        return steps, width if self._subset is None else len(self._subset)

    def _from_store(self, trial: int) -> Future[np.ndarray]:
        ref = self.refs[trial]
        decoded: Future[np.ndarray] = Future()
        fetched = self.source.fetch(ref)

        def decode() -> None:
            if decoded.set_running_or_notify_cancel():
                try:
                    decoded.set_result(self._decode(ref, fetched.result()))
                except BaseException as error:
                    decoded.set_exception(error)

        def on_fetched(_: Future[Any]) -> None:
            try:
                if not fetched.cancelled():
                    self._pool.submit(decode)
                    return
            except RuntimeError:  # the reader was closed in the meantime
                pass
            decoded.cancel()

        fetched.add_done_callback(on_fetched)
        decoded.add_done_callback(lambda done: fetched.cancel() if done.cancelled() else None)
        return decoded

    def _decode(self, ref: TrialRef, fetched: Any) -> np.ndarray:
        values = finite_features(ref, self.source.decode(ref, fetched), self._subset)
        with self._lock:
            self.bytes_used += sum(length for _, length in byte_ranges(ref.layout))
        return values

    def close(self) -> None:
        self.source.close()
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self.disk is not None:
            self.disk.close()


def finite_features(ref: TrialRef, values: np.ndarray, subset: np.ndarray | None) -> np.ndarray:
    """Return float32[T, C] of the chosen features. Raises BadTrial for NaNs and infinities."""
    values = values.astype(np.float32, copy=False)
    if subset is not None:
        values = np.ascontiguousarray(values[:, subset])
    # A non-finite value makes the sum non-finite, and the sum needs no second array.
    with np.errstate(over="ignore", invalid="ignore"):
        total = np.add.reduce(values, axis=None)
    if not np.isfinite(total) and not np.isfinite(values).all():
        step, feature = np.argwhere(~np.isfinite(values))[0].tolist()
        raise BadTrial(
            f"{ref.url}: {ref.trial.name}: {FEATURES} holds {values[step, feature]} at time step {step} "
            f"({step * BIN_S:.2f} s), feature {feature}, one of {int((~np.isfinite(values)).sum())} non-finite "
            "values; correct the trial, or skip such trials with --on-bad-trial skip"
        )
    return values
