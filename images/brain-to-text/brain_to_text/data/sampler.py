"""Draw the trials of a batch: upstream's sampling as a function of (seed, step), or exactly upstream's draws.

Days are drawn without replacement, then ceil(B / days) trials of each day with replacement, and the surplus is dropped
from random days. Source: create_batch_index_train in nejm-brain-to-text/model_training/dataset.py. Upstream draws all
batches before training; here the batch of any step can be computed directly, so a run can resume at any step.
"""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from estiba.errors import ConfigError

NEVER = 2**62
"""The next use of a trial that is not drawn within the horizon."""
STEPS_PER_ADVANCE = 64
"""Steps that the forecast is extended by at most when it advances."""


class Sampler(ABC):
    """Draws the trials of a step. Thread-safe."""

    def __init__(
        self,
        day_sizes: Sequence[int],
        *,
        batch_size: int,
        days_per_batch: int,
        seed: int,
        must_include: Sequence[int] | None = None,
    ) -> None:
        """`day_sizes` are the numbers of trials of each day. The list of all trials is sorted by day.

        Raises ConfigError.
        """
        self.sizes = np.asarray(day_sizes, np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)[:-1]])
        count = len(self.sizes)
        self.batch_size, self.days_per_batch, self.seed = batch_size, days_per_batch, seed
        if batch_size < 1 or days_per_batch < 1:
            raise ConfigError(f"--batch-size {batch_size}, --days-per-batch {days_per_batch}: both must be at least 1")
        if days_per_batch > count:
            raise ConfigError(
                f"--days-per-batch {days_per_batch}: there are only {count} sessions with training data; give "
                f"--days-per-batch {count} or less, or more sessions"
            )
        must_include = list(must_include or ())
        for day in must_include:
            if not -count <= day < count:
                raise ConfigError(
                    f"must_include_days has {day}: give 0 to {count - 1}, or -1 to {-count} to count from the end"
                )
        self.must_include = [day % count for day in must_include]
        if len(must_include) > days_per_batch or len(set(self.must_include)) < len(must_include):
            raise ConfigError(
                f"must_include_days has {must_include}: name each day once, and at most {days_per_batch} days "
                "(--days-per-batch)"
            )
        self.others = [day for day in range(count) if day not in set(self.must_include)]
        self.per_day = math.ceil(batch_size / days_per_batch)
        self.surplus = self.per_day * days_per_batch - batch_size

    @abstractmethod
    def trials(self, step: int) -> np.ndarray:
        """Return int64[B]: positions in the list of all trials, grouped by day."""


class SeededSampler(Sampler):
    """A batch is a pure function of (seed, step): each step has its own Philox stream."""

    def trials(self, step: int) -> np.ndarray:
        # Raw words of the generator, because numpy's methods may draw differently in another version. The key is an
        # array of integers, because numpy converts a list that has a value beyond 63 bits to floats.
        key = np.array([self.seed % 2**64, 0], np.uint64)
        count = self.days_per_batch * self.per_day
        raw = np.random.Philox(key=key, counter=[0, 0, step, 0]).random_raw(self.days_per_batch + count + self.surplus)
        words = raw >> np.uint64(32)
        days, candidates, used = list(self.must_include), list(self.others), 0
        while len(days) < self.days_per_batch:
            days.append(candidates.pop(int(words[used]) * len(candidates) >> 32))
            used += 1
        trial_words = words[used : used + count].reshape(self.days_per_batch, self.per_day)
        sizes, starts = self.sizes[days], self.starts[days]
        trials = (trial_words * sizes[:, None].astype(np.uint64) >> np.uint64(32)).astype(np.int64) + starts[:, None]
        counts = [self.per_day] * self.days_per_batch
        for word in words[used + count : used + count + self.surplus].tolist():
            nonempty = [row for row, n_trials in enumerate(counts) if n_trials]
            counts[nonempty[word * len(nonempty) >> 32]] -= 1
        return np.concatenate([row[:n_trials] for row, n_trials in zip(trials, counts, strict=True)])


class UpstreamSampler(Sampler):
    """Draws exactly what upstream draws with `dataset.seed`, with numpy's legacy generator, from the first step on.

    The first call for a late step draws all steps before it (90 us each). Draws stay in memory: 50 MB after 120,000
    steps. As in upstream, the surplus may be dropped from a day that is empty already, so a batch can exceed B.
    """

    def __init__(self, day_sizes: Sequence[int], *, seed: int, **options: Any) -> None:
        super().__init__(day_sizes, seed=seed, **options)
        if not 0 <= seed < 2**32:
            raise ConfigError(f"--dataset-seed {seed}: --upstream-plan needs a seed from 0 to {2**32 - 1}")
        self._generator = np.random.RandomState(seed)
        self._drawn: list[np.ndarray] = []
        self._lock = threading.Lock()

    def trials(self, step: int) -> np.ndarray:
        with self._lock:
            while len(self._drawn) <= step:
                self._drawn.append(self._draw().astype(np.int32))
            return self._drawn[step].astype(np.int64)

    def _draw(self) -> np.ndarray:
        random = self._generator
        days = random.choice(self.others, size=self.days_per_batch - len(self.must_include), replace=False)
        if self.must_include:
            days = np.concatenate((self.must_include, days))
        batch = {}
        for day in days:
            batch[int(day)] = random.choice(int(self.sizes[day]), size=self.per_day, replace=True)
        for _ in range(self.surplus):
            day = int(random.choice(days))
            batch[day] = batch[day][:-1]
        return np.concatenate([trials + self.starts[day] for day, trials in batch.items()])


class NextUse:
    """Forecasts the next step that draws a trial, up to `horizon` steps ahead. The window moves with the run."""

    def __init__(self, sampler: Sampler, horizon: int) -> None:
        self._sampler, self._horizon = sampler, horizon
        self._uses: dict[int, deque[int]] = {}
        self._first = self._end = 0
        self._lock = threading.Lock()

    def advance(self, step: int) -> None:
        """Move the window to start at `step`."""
        with self._lock:
            if step < self._first or step > self._end:
                self._uses.clear()
                self._end = step
            self._first = step
            # Not the whole horizon at once, because the first batch would wait for that.
            for _ in range(min(STEPS_PER_ADVANCE, step + self._horizon - self._end)):
                for trial in np.unique(self._sampler.trials(self._end)).tolist():
                    self._uses.setdefault(trial, deque()).append(self._end)
                self._end += 1

    def next_use(self, trial: int) -> int:
        """Return the next step that draws the trial, or NEVER if that is beyond the horizon."""
        with self._lock:
            uses = self._uses.get(trial)
            while uses and uses[0] < self._first:
                uses.popleft()
            return uses[0] if uses else NEVER
