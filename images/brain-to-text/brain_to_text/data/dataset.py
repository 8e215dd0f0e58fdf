"""One split of a data set: trials sampled by step, read ahead, and collated into batches.

with open_trials(config, "train", stop, sessions=None) as trials:    # opening.py
    batch = trials.batch(step)    # a pure function of (seed, step), so a run can resume at any step
for ids in val.sweep(64):
    batch = val.read(ids)
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np
import torch

from brain_to_text.data.buffers import BufferPool
from brain_to_text.data.collate import Batch, PaddingSpec, collate, without_features
from brain_to_text.data.reading.device_cache import DeviceCache
from brain_to_text.data.reading.reader import Reader
from brain_to_text.data.reading.source import BadTrial
from brain_to_text.data.sampler import NextUse, Sampler
from brain_to_text.data.schema import TrialRef
from estiba.errors import ConfigError, DataError, EstibaError
from estiba.log import get_logger
from estiba.platform.stop import Stop

logger = get_logger(__name__)
SWEEP_AHEAD = 2


class _PendingBatch(NamedTuple):
    """The trials of a future batch, and those of them that were requested from the reader."""

    ids: list[int]
    requested: list[int]


class TrialDataset:
    """The trials of one split, in batches. `skipped` lists every trial that was left out, with the reason."""

    def __init__(
        self,
        refs: Sequence[TrialRef],
        reader: Reader,
        *,
        sessions: list[str],
        sampler: Sampler | None,
        next_use: NextUse | None,
        identity: str,
        ahead_batches: int,
        skip_bad: bool,
        skipped: list[str],
        padding: PaddingSpec,
        stop: Stop,
    ) -> None:
        self.sessions, self.identity, self.skipped = sessions, identity, skipped
        self.refs, self.reader, self.sampler = refs, reader, sampler
        self._next_use, self._ahead_batches = next_use, ahead_batches
        self._skip_bad, self._padding, self._stop = skip_bad, padding, stop
        self._pending: dict[int, _PendingBatch] = {}
        """By step."""
        self._device_cache: DeviceCache | None = None
        self._device_hits = 0
        self._lock = threading.RLock()
        self._skipped_names = {_name_in(line) for line in skipped}
        self._buffers = BufferPool()

    @property
    def n_trials(self) -> int:
        return len(self.refs)

    @property
    def width(self) -> int:
        """The number of features in a batch."""
        return self.reader.shape_of(0)[1]

    def steps_stored(self, position: int) -> int:
        """Return the number of time steps stored for a trial."""
        return self.reader.shape_of(position)[0]

    def keep_on(self, device: torch.device, *, limit_bytes: int, dtype: torch.dtype = torch.float32) -> bool:
        """From now on, cache trials on the device instead of in host memory. Returns False if they do not all fit."""
        lengths = [self.steps_stored(position) for position in range(self.n_trials)]
        if DeviceCache.size_bytes(lengths, self.width, dtype) > limit_bytes:
            return False
        self._device_cache = DeviceCache(lengths, self.width, device=device, dtype=dtype)
        self.reader.memory.policy.limit_bytes = 0
        return True

    def batch(self, step: int) -> Batch:
        """Return the batch of `step`, and request the trials of the following steps. Thread-safe."""
        if self.sampler is None or self._next_use is None:
            raise ConfigError("only the training split has batches by step; use sweep() and read() for the others")
        with self._lock:
            is_first = step not in self._pending
            # A step is waiting for the first batch, so its trials are read before those of later batches.
            self._request_ahead(self.sampler, self._next_use, step, 0 if is_first else self._ahead_batches)
            pending = self._pending[step]
            futures = self.reader.request(pending.requested, again=True)
        if is_first and self._device_cache is None:  # no trial has arrived yet, so there is time to touch pages
            longest = max(self.steps_stored(position) for position in pending.ids)
            self._buffers.prepare(len(pending.ids), self._padding.steps(longest), self.width)
        try:
            trials = self._wait_for(pending.requested, futures)
            batch = self._collate(trials) if self._device_cache is None else self._gather(pending.ids, trials)
            if is_first:
                with self._lock:
                    self._request_ahead(self.sampler, self._next_use, step, self._ahead_batches)
            return batch
        finally:
            with self._lock:
                self._next_use.advance(step + 1)  # caches now decide by the uses after this step
                self.reader.release(pending.requested)
                if self._pending.get(step) is pending:
                    self.reader.release(self._pending.pop(step).requested)

    def _request_ahead(self, sampler: Sampler, next_use: NextUse, step: int, ahead_batches: int) -> None:
        steps = range(step, step + 1 + ahead_batches)
        for stale in [pending for pending in self._pending if pending not in steps]:
            self.reader.release(self._pending.pop(stale).requested)
        for future_step in steps:
            if future_step not in self._pending:
                ids = sampler.trials(future_step).tolist()
                cache = self._device_cache
                requested = ids if cache is None else [trial for trial in ids if trial not in cache]
                self._device_hits += len(ids) - len(requested)
                self.reader.request(requested)
                self._pending[future_step] = _PendingBatch(ids, requested)
        next_use.advance(step)  # last, so that it runs while the requests are in flight

    def sweep(self, batch_size: int) -> list[list[int]]:
        """Return every trial once, in order, in batches of a single day, as upstream evaluates."""
        batches: list[list[int]] = []
        for position, ref in enumerate(self.refs):
            last = batches[-1] if batches else []
            if last and len(last) < batch_size and self.refs[last[0]].day == ref.day:
                last.append(position)
            else:
                batches.append([position])
        return batches

    def read(self, ids: Sequence[int]) -> Batch:
        """Read the given trials, in the given order."""
        return next(self.read_all([ids]))

    def read_all(self, batches: Sequence[Sequence[int]]) -> Iterator[Batch]:
        """Read the given batches, one after another, with the next ones already requested."""
        requested: deque[list[int]] = deque()
        try:
            for index in range(len(batches)):
                for ids in batches[index + len(requested) : index + 1 + SWEEP_AHEAD]:
                    self.reader.request(ids)
                    requested.append(list(ids))
                futures = self.reader.request(requested[0], again=True)
                try:
                    batch = self._collate(self._wait_for(requested[0], futures))
                finally:
                    self.reader.release(requested[0])
                self.reader.release(requested.popleft())
                yield batch
        finally:
            for ids in requested:
                self.reader.release(ids)

    def _wait_for(self, ids: Sequence[int], futures: Sequence[Future[np.ndarray]]) -> list[tuple[int, np.ndarray]]:
        """Return (position, values) of these trials. A bad trial is skipped if allowed; any other failure raises."""
        trials: list[tuple[int, np.ndarray]] = []
        for position, future in zip(ids, futures, strict=True):
            try:
                trials.append((position, self.reader.wait(future)))
            except BadTrial as error:
                if not self._skip_bad:
                    raise
                self._skip(self.refs[position], error)
        return trials

    def _collate(self, trials: Sequence[tuple[int, np.ndarray]]) -> Batch:
        _require_some([position for position, _ in trials])
        return collate([(self.refs[position], values) for position, values in trials], self._buffers, self._padding)

    def _gather(self, ids: Sequence[int], new_trials: Sequence[tuple[int, np.ndarray]]) -> Batch:
        """Add new trials to the device cache, and return a batch from it."""
        cache = self._device_cache
        assert cache is not None
        for position, values in new_trials:
            cache.put(position, values)
        positions = _require_some([position for position in ids if position in cache])  # the others were skipped
        length = self._padding.steps(max(self.steps_stored(position) for position in positions))
        batch = without_features([self.refs[position] for position in positions])
        return dataclasses.replace(batch, features=cache.gather(positions, length))

    def _skip(self, ref: TrialRef, error: EstibaError) -> None:
        with self._lock:
            if ref.name in self._skipped_names:
                return
            self._skipped_names.add(ref.name)
            self.skipped.append(f"{ref.name}: {error}")
            logger.info(f"skipped trial ({len(self.skipped)} in total): {error}")

    def add_skipped(self, lines: Sequence[str]) -> None:
        """Add the trials that earlier attempts of this run skipped."""
        with self._lock:
            for line in lines:
                if _name_in(line) not in self._skipped_names:
                    self._skipped_names.add(_name_in(line))
                    self.skipped.append(line)

    def statistics(self) -> dict[str, int]:
        """Return counts since the data set was opened."""
        return {
            **dataclasses.asdict(self.reader.source.counts),
            "bytes_used": self.reader.bytes_used,
            "hits": self.reader.hits,
            "disk_hits": self.reader.disk_hits,
            "device_hits": self._device_hits,
            "bad": len(self.skipped),
        }

    def close(self) -> None:
        """End the reader's threads. Later requests are errors."""
        with self._lock:
            for pending in self._pending.values():
                with contextlib.suppress(KeyError):
                    self.reader.release(pending.requested)
            self._pending.clear()
        self.reader.close()

    def __enter__(self) -> TrialDataset:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _name_in(line: str) -> str:
    """Return the name of the trial in a line of `skipped`."""
    return line.partition(": ")[0]


def _require_some(positions: list[int]) -> list[int]:
    """Return the list. Raises DataError if it is empty."""
    if not positions:
        raise DataError("no trial of a batch can be used (the log has the reason for each); fix the data")
    return positions
