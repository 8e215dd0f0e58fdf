"""Trials to batches: the index checked, the plan drawn, features read ahead, tensors made.

trials = Trials.open("s3://bucket/hdf5_data_final", sessions=None, split="train", stop=stop, seed=1, batch_size=64, …)
batch = trials.batch(step)        # a pure function of (seed, step): a run goes on at any step
for ids in held_out.sweep(64): held_out.read(ids)
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import xxhash

from brain_to_text.indexing.index import find_objects, open_indexes
from brain_to_text.indexing.schema import Split
from brain_to_text.reading.buffers import Buffers
from brain_to_text.reading.check import Wanted, check_trials, choose_sessions
from brain_to_text.reading.collate import TIGHT, Batch, Room, collate, describe
from brain_to_text.reading.h5py_source import H5pySource
from brain_to_text.reading.plan import NEVER, Plan, SeededPlan, Upcoming, UpstreamPlan
from brain_to_text.reading.ranges import Outage, open_ranges
from brain_to_text.reading.reader import Known, RangeSource, Reader, Source
from brain_to_text.reading.resident import Resident
from brain_to_text.reading.tiers import DiskTier, MemoryTier
from estiba.errors import ConfigError, DataError, EstibaError
from estiba.stop import Stop, say
from estiba.store import open_store

HORIZON_STEPS = 2048
"""How far the caches look ahead; a trial comes up about once in 130 steps of the whole study."""
SWEEP_AHEAD = 2


class _Drawn(NamedTuple):
    """A batch of the plan, and the trials of it that the reader was asked for."""

    ids: list[int]
    asked: list[int]


class Trials:
    """One split of a data set. `bad` names what was left out, and why; nothing else ever is."""

    def __init__(
        self,
        known: Sequence[Known],
        reader: Reader,
        *,
        sessions: list[str],
        plan: Plan | None,
        identity: str,
        ahead_batches: int,
        skips: bool,
        bad: list[str],
        room: Room,
        stop: Stop,
    ) -> None:
        self.sessions, self.identity, self.bad = sessions, identity, bad
        self.known, self.reader, self.plan = known, reader, plan
        self._ahead, self._skips, self._room, self._stop = ahead_batches, skips, room, stop
        self._pending: dict[int, _Drawn] = {}
        self._resident: Resident | None = None
        self._device_hits = 0
        self._lock = threading.RLock()
        self._upcoming: Upcoming | None = None
        self._named: set[str] = set()
        self._buffers = Buffers()

    @classmethod
    def open(
        cls,
        location: str,
        *,
        sessions: Sequence[str] | None,
        split: Split,
        stop: Stop,
        seed: int,
        batch_size: int,
        days_per_batch: int = 4,
        cache_bytes: int,
        disk_cache: tuple[Path, int] | None,
        ahead_batches: int = 4,
        n_classes: int,
        n_features: int,
        on_bad_trial: Literal["fail", "skip"] = "fail",
        workers: int,
        read_by: Literal["ranges", "h5py"] = "ranges",
        index_path: str | None = None,
        upstream_plan: bool = False,
        rebuild_index: bool = False,
        feature_subset: Sequence[int] | None = None,
        must_include_days: Sequence[int] | None = None,
        bad_trials: Mapping[str, Mapping[str, Sequence[int]]] | None = None,
        room: Room = TIGHT,
    ) -> Trials:
        """Index what is not indexed yet and check all of it against what the model expects.

        `sessions` None takes every session with training data, by name. `cache_bytes` bounds the memory that keeps
        trials beyond the batches under way. `bad_trials` is the reference trainer's bad_trials_dict: {session: {block:
        [trial, …]}}. `read_by` h5py has `workers` processes read the trials, or a thread where there are none. Raises
        DataError, ConfigError, StoreError, Interrupted.
        """
        store = open_store(location)
        objects = find_objects(store)
        names, entries = choose_sessions(objects, sessions, split, store.url)
        indexes = open_indexes(
            location, entries, store=store, index_path=index_path, rebuild=rebuild_index, workers=workers, stop=stop
        )
        wanted = Wanted(
            split=split, n_classes=n_classes, n_features=n_features, feature_subset=feature_subset,
            bad_trials=bad_trials, skips=on_bad_trial == "skip",
        )  # fmt: skip
        known, bad = check_trials(indexes, names, wanted, store)
        for line in bad:
            say(f"left out ({len(bad)} in all): {line}")
        plan: Plan | None = None
        if split == "train":
            sizes = [sum(one.day == day for one in known) for day in range(len(names))]
            make = UpstreamPlan if upstream_plan else SeededPlan
            plan = make(
                sizes, batch_size=batch_size, days_per_batch=days_per_batch, seed=seed, must_include=must_include_days
            )
        contents = [index.digest for index in indexes]
        who = [one.name for one in known]  # some may be left out on request
        said = [contents, names, split, who, bad, seed, batch_size, days_per_batch, upstream_plan,
                list(feature_subset or ()), list(must_include_days or ())]  # fmt: skip
        identity = xxhash.xxh3_128_hexdigest(repr(said).encode())
        upcoming = None if plan is None else Upcoming(plan, HORIZON_STEPS)
        next_use = (lambda _: NEVER) if upcoming is None else upcoming.next_use
        disk = None
        if disk_cache is not None:
            pinned = xxhash.xxh3_64_hexdigest(
                repr([[str(index.pin) for index in indexes], contents, who, bad, list(feature_subset or ())]).encode()
            )
            disk = DiskTier(Path(disk_cache[0]), disk_cache[1], next_use, identity=pinned)
        source: Source = H5pySource(store, workers) if read_by == "h5py" else RangeSource(open_ranges(store))
        reader = Reader(
            known, source, memory=MemoryTier(cache_bytes, next_use), disk=disk,
            feature_subset=feature_subset, stop=stop,
        )  # fmt: skip
        trials = cls(
            known, reader, sessions=names, plan=plan, identity=identity, ahead_batches=ahead_batches,
            skips=on_bad_trial == "skip", bad=bad, room=room, stop=stop,
        )  # fmt: skip
        trials._upcoming = upcoming
        return trials

    @property
    def n_trials(self) -> int:
        return len(self.known)

    @property
    def width(self) -> int:
        """Features of a time step, as batches have them."""
        return self.reader.shape_of(0)[1]

    def steps_stored(self, position: int) -> int:
        """Time steps of one trial's features."""
        return self.reader.shape_of(position)[0]

    def keep_on(self, device: torch.device, *, limit_bytes: int, dtype: torch.dtype = torch.float32) -> bool:
        """Have `batch` keep every trial it has read on the device, and no longer in memory; False where not all fit."""
        lengths = [self.steps_stored(position) for position in range(self.n_trials)]
        if Resident.size_bytes(lengths, self.width, dtype) > limit_bytes:
            return False
        self._resident = Resident(lengths, self.width, device=device, dtype=dtype)
        self.reader.memory.shelf.limit_bytes = 0
        return True

    def batch(self, step: int) -> Batch:
        """The plan's batch of `step`; the trials of the steps behind it are asked for. Safe in threads."""
        if self.plan is None:
            raise ConfigError("only the training split has a plan of batches; use sweep() and read()")
        with self._lock:
            is_first = step not in self._pending
            # Nobody is ahead of the first batch: what comes after it waits until it is there.
            self._look_ahead(step, 0 if is_first else self._ahead)
            drawn = self._pending[step]
            futures = self.reader.ask(drawn.asked, again=True)
        if is_first and self._resident is None:  # there is time for it now
            longest = max(self.steps_stored(position) for position in drawn.ids)
            self._buffers.prepare(len(drawn.ids), self._room.steps(longest), self.width)
        try:
            arrived = self._arrived(drawn.asked, futures)
            made = self._side_by_side(arrived) if self._resident is None else self._gathered(drawn.ids, arrived)
            if is_first:  # and it is made: what arrives for the next ones would take the processor from it
                with self._lock:
                    self._look_ahead(step, self._ahead)
            return made
        finally:
            with self._lock:
                assert self._upcoming is not None
                self._upcoming.advance(step + 1)  # what is kept now is kept for the steps behind this one
                self.reader.release(drawn.asked)
                if self._pending.get(step) is drawn:
                    self.reader.release(self._pending.pop(step).asked)

    def _look_ahead(self, step: int, ahead: int) -> None:
        assert self.plan is not None and self._upcoming is not None
        wanted = range(step, step + 1 + ahead)
        for old in [one for one in self._pending if one not in wanted]:
            self.reader.release(self._pending.pop(old).asked)
        for one in wanted:
            if one not in self._pending:
                ids = self.plan.trials(one).tolist()
                resident = self._resident
                asked = ids if resident is None else [trial for trial in ids if trial not in resident]
                self._device_hits += len(ids) - len(asked)
                self.reader.ask(asked)
                self._pending[one] = _Drawn(ids, asked)
        self._upcoming.advance(step)  # while the first ones are on their way

    def sweep(self, batch_size: int) -> list[list[int]]:
        """Every trial once, in order, in batches of one day each, as the reference trainer evaluates."""
        batches: list[list[int]] = []
        for position, one in enumerate(self.known):
            last = batches[-1] if batches else []
            if last and len(last) < batch_size and self.known[last[0]].day == one.day:
                last.append(position)
            else:
                batches.append([position])
        return batches

    def read(self, ids: Sequence[int]) -> Batch:
        """These trials, in this order."""
        ids = list(ids)
        futures = self.reader.ask(ids)
        try:
            return self._side_by_side(self._arrived(ids, futures))
        finally:
            self.reader.release(ids)

    def read_all(self, batches: Sequence[Sequence[int]]) -> Iterator[Batch]:
        """`read` for each of many, with the next ones already asked for."""
        asked: list[list[int]] = []
        try:
            for at in range(len(batches)):
                while len(asked) < min(len(batches), at + 1 + SWEEP_AHEAD):
                    following = list(batches[len(asked)])
                    self.reader.ask(following)
                    asked.append(following)
                futures = self.reader.ask(asked[at], again=True)
                try:
                    batch = self._side_by_side(self._arrived(asked[at], futures))
                finally:
                    self.reader.release(asked[at])
                yield batch
                self.reader.release(asked[at])
                asked[at] = []
        finally:
            for left in asked:
                self.reader.release(left)

    def _arrived(self, ids: Sequence[int], futures: Sequence[Future[np.ndarray]]) -> list[tuple[int, np.ndarray]]:
        """What could be read of them; without the flag, all or an error."""
        kept: list[tuple[int, np.ndarray]] = []
        for position, future in zip(ids, futures, strict=True):
            try:
                kept.append((position, self.reader.wait(future)))
            except Outage:  # nothing is wrong with the trial, and the run can go on later
                raise
            except EstibaError as error:
                if not self._skips or self._stop():
                    raise
                self._leave_out(self.known[position], error)
        return kept

    def _side_by_side(self, arrived: Sequence[tuple[int, np.ndarray]]) -> Batch:
        _some([position for position, _ in arrived])
        return collate([(self.known[position], values) for position, values in arrived], self._buffers, self._room)

    def _gathered(self, ids: Sequence[int], arrived: Sequence[tuple[int, np.ndarray]]) -> Batch:
        """A batch on the device, once what came by for the first time is there as well."""
        resident = self._resident
        assert resident is not None
        for position, values in arrived:
            resident.put(position, values)
        kept = _some([position for position in ids if position in resident])  # the others were left out, by name
        length = self._room.steps(max(self.steps_stored(position) for position in kept))
        said = describe([self.known[position] for position in kept])
        return dataclasses.replace(said, features=resident.gather(kept, length))

    def _leave_out(self, known: Known, error: EstibaError) -> None:
        with self._lock:
            if known.name in self._named:
                return
            self._named.add(known.name)
            self.bad.append(f"{known.name}: {error}")
            say(f"left out ({len(self.bad)} in all): {error}")

    def statistics(self) -> dict[str, int]:
        """Counts since it was opened."""
        counts, reader = self.reader.source.counts, self.reader
        return {
            "gets": counts.gets,
            "bytes_fetched": counts.bytes_fetched,
            "bytes_used": reader.bytes_used,
            "hits": reader.hits,
            "disk_hits": reader.disk_hits,
            "device_hits": self._device_hits,
            "retries": counts.retries,
            "hedged": counts.hedged,
            "renewals": counts.renewals,
            "bad": len(self.bad),
        }

    def close(self) -> None:
        """End its threads. What is asked for afterwards is an error."""
        with self._lock:
            for drawn in self._pending.values():
                with contextlib.suppress(KeyError):
                    self.reader.release(drawn.asked)
            self._pending.clear()
        self.reader.close()

    def __enter__(self) -> Trials:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _some(positions: list[int]) -> list[int]:
    """Raises DataError where none is left."""
    if not positions:
        raise DataError("no trial of a batch can be used; see the lines above, and mend the data")
    return positions
