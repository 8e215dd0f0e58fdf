"""Which trials make a batch: the reference trainer's sampling, as a function of (seed, step), and that trainer's own.

Days are drawn without replacement, ceil(B / days) trials of each with replacement, and what is too much is taken off
days at random. Source: create_batch_index_train in nejm-brain-to-text/model_training/dataset.py, which draws the whole
plan before it begins; here any step's batch is known at once, so that a run goes on wherever it was.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from estiba.errors import ConfigError

NEVER = 2**62
"""The next use of a trial that is not in the plan as far as one looks."""
SNAPSHOT_EVERY = 256
DRAWN_AT_ONCE = 64
"""Steps of the plan that are drawn ahead for one that is done."""


class Plan(Protocol):
    """Trials by step. Safe in threads."""

    def trials(self, step: int) -> np.ndarray:
        """int64[B]: positions in the list of all trials; days follow each other."""


class _Days:
    """Where each day's trials lie in the list of all of them."""

    def __init__(
        self, day_sizes: Sequence[int], *, batch_size: int, days_per_batch: int, must_include: Sequence[int] | None
    ) -> None:
        self.sizes = np.asarray(day_sizes, np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)[:-1]])
        count = len(self.sizes)
        self.batch_size, self.days_per_batch = batch_size, days_per_batch
        if batch_size < 1 or days_per_batch < 1:
            raise ConfigError(f"--batch-size {batch_size}, --days-per-batch {days_per_batch}: both must be at least 1")
        if days_per_batch > count:
            raise ConfigError(
                f"--days-per-batch {days_per_batch}: there are only {count} sessions with training data; give "
                f"--days-per-batch {count} or less, or more sessions"
            )
        for day in must_include or ():
            if not -count <= day < count:
                raise ConfigError(
                    f"must_include_days has {day}: days are 0 to {count - 1} (or counted from the end: -1)"
                )
        self.must_include = [day % count for day in must_include or ()]
        if len(self.must_include) > days_per_batch or len(set(self.must_include)) < len(self.must_include):
            raise ConfigError(
                f"must_include_days has {list(must_include or ())}: name each day once, and at most {days_per_batch} "
                "(--days-per-batch)"
            )
        self.others = [day for day in range(count) if day not in set(self.must_include)]
        self.per_day = math.ceil(batch_size / days_per_batch)


class SeededPlan:
    """A batch as a pure function of (seed, step): each step has a Philox stream of its own."""

    def __init__(
        self,
        day_sizes: Sequence[int],
        *,
        batch_size: int,
        days_per_batch: int,
        seed: int,
        must_include: Sequence[int] | None = None,
    ) -> None:
        self._days = _Days(day_sizes, batch_size=batch_size, days_per_batch=days_per_batch, must_include=must_include)
        self._key = np.array([seed % 2**64, 0], np.uint64)

    def trials(self, step: int) -> np.ndarray:
        days = self._days
        surplus = days.per_day * days.days_per_batch - days.batch_size
        # The generator's raw words, not numpy's methods on top of it, whose stream may change with a version.
        raw = np.random.Philox(key=self._key, counter=[0, 0, step, 0]).random_raw(
            days.days_per_batch * (1 + days.per_day) + surplus
        )
        words = raw >> np.uint64(32)
        chosen = list(days.must_include)
        left = list(days.others)
        at = 0
        while len(chosen) < days.days_per_batch:
            chosen.append(left.pop(int(words[at]) * len(left) >> 32))
            at += 1
        count = days.days_per_batch * days.per_day
        drawn = words[at : at + count].reshape(days.days_per_batch, days.per_day)
        sizes, starts = days.sizes[chosen], days.starts[chosen]
        picks = (drawn * sizes[:, None].astype(np.uint64) >> np.uint64(32)).astype(np.int64) + starts[:, None]
        kept = [days.per_day] * days.days_per_batch
        for word in words[at + count : at + count + surplus].tolist():
            full = [day for day, number in enumerate(kept) if number]
            kept[full[word * len(full) >> 32]] -= 1
        return np.concatenate([row[:number] for row, number in zip(picks, kept, strict=True)])


class UpstreamPlan:
    """Draw for draw what the reference trainer draws with `dataset.seed`: numpy's legacy generator, from the start.

    A step far ahead means drawing all before it (90 us a batch); states are kept on the way, so that is done once.
    Its `[:-1]` on an empty day is kept too: with fewer trials than days a batch can be larger than B.
    """

    def __init__(
        self,
        day_sizes: Sequence[int],
        *,
        batch_size: int,
        days_per_batch: int,
        seed: int,
        must_include: Sequence[int] | None = None,
    ) -> None:
        self._days = _Days(day_sizes, batch_size=batch_size, days_per_batch=days_per_batch, must_include=must_include)
        if not 0 <= seed < 2**32:
            raise ConfigError(f"seed {seed}: the reference trainer's plan needs one from 0 to {2**32 - 1}")
        self._generator = np.random.RandomState(seed)
        self._next = 0
        self._snapshots = [self._generator.get_state()]
        self._recent: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    def trials(self, step: int) -> np.ndarray:
        with self._lock:
            if step in self._recent:
                return self._recent[step]
            nearest = min(step // SNAPSHOT_EVERY, len(self._snapshots) - 1)
            if not nearest * SNAPSHOT_EVERY <= self._next <= step:
                self._generator.set_state(self._snapshots[nearest])
                self._next = nearest * SNAPSHOT_EVERY
            while self._next <= step:
                if self._next == len(self._snapshots) * SNAPSHOT_EVERY:
                    self._snapshots.append(self._generator.get_state())
                drawn = self._draw()
                self._recent[self._next] = drawn
                self._next += 1
            while len(self._recent) > 8 * SNAPSHOT_EVERY:
                self._recent.pop(next(iter(self._recent)))
            return drawn

    def _draw(self) -> np.ndarray:
        days, random = self._days, self._generator
        if days.must_include:
            size = days.days_per_batch - len(days.must_include)
            chosen = np.concatenate((days.must_include, random.choice(days.others, size=size, replace=False)))
        else:
            chosen = random.choice(days.others, size=days.days_per_batch, replace=False)
        batch = {}
        for day in chosen:
            batch[int(day)] = random.choice(int(days.sizes[day]), size=days.per_day, replace=True)
        for _ in range(days.per_day * len(chosen) - days.batch_size):
            day = int(random.choice(chosen))
            batch[day] = batch[day][:-1]
        return np.concatenate([trials + days.starts[day] for day, trials in batch.items()]).astype(np.int64)


class Upcoming:
    """When each trial is used next, looking `horizon` steps ahead; the window moves with the run."""

    def __init__(self, plan: Plan, horizon: int) -> None:
        self._plan, self._horizon = plan, horizon
        self._uses: dict[int, deque[int]] = {}
        self._first = self._end = 0
        self._lock = threading.Lock()

    def advance(self, step: int) -> None:
        """Uses before `step` are over."""
        with self._lock:
            if step < self._first or step > self._end:
                self._uses.clear()
                self._end = step
            self._first = step
            # Some at a time, so that the first batch does not wait for all of them.
            for _ in range(min(DRAWN_AT_ONCE, step + self._horizon - self._end)):
                for trial in np.unique(self._plan.trials(self._end)).tolist():
                    self._uses.setdefault(trial, deque()).append(self._end)
                self._end += 1

    def next_use(self, trial: int) -> int:
        """A step; NEVER where it is beyond the horizon."""
        with self._lock:
            uses = self._uses.get(trial)
            while uses and uses[0] < self._first:
                uses.popleft()
            return uses[0] if uses else NEVER
