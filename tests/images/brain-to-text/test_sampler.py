"""Batches are drawn as upstream draws them."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brain_to_text.data.sampler import NEVER, NextUse, SeededSampler, UpstreamSampler
from estiba.errors import ConfigError

SIZES = [40, 5, 200, 90, 17, 60]
STARTS = np.concatenate([[0], np.cumsum(SIZES)])


def day_of(trials: np.ndarray) -> np.ndarray:
    return np.searchsorted(STARTS, trials, side="right") - 1


def seeded(**options: int) -> SeededSampler:
    return SeededSampler(SIZES, **{"batch_size": 64, "days_per_batch": 4, "seed": 1, **options})


def as_upstream_draws(
    sizes: list[int], batches: int, *, batch_size: int, days_per_batch: int, seed: int
) -> list[list[int]]:
    """Draw as upstream does, with numpy's global generator and in the same order."""
    starts = np.concatenate([[0], np.cumsum(sizes)])
    np.random.seed(seed)
    trials = {day: list(range(size)) for day, size in enumerate(sizes)}
    drawn_batches = []
    for _ in range(batches):
        days = np.random.choice(list(trials), size=days_per_batch, replace=False)
        each = math.ceil(batch_size / days_per_batch)
        drawn = {day: np.random.choice(trials[day], size=each, replace=True) for day in days}
        for _ in range(each * days_per_batch - batch_size):
            day = np.random.choice(days)
            drawn[day] = drawn[day][:-1]
        drawn_batches.append([int(starts[day] + trial) for day, own in drawn.items() for trial in own])
    return drawn_batches


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 300), min_size=1, max_size=12),
    batch_size=st.integers(1, 70),
    days=st.integers(1, 6),
    seed=st.integers(0, 2**40),
    step=st.integers(0, 10**6),
)
def test_a_batch_has_the_requested_size_and_days_and_depends_only_on_seed_and_step(
    sizes: list[int], batch_size: int, days: int, seed: int, step: int
) -> None:
    days = min(days, len(sizes))
    sampler = SeededSampler(sizes, batch_size=batch_size, days_per_batch=days, seed=seed)
    trials = sampler.trials(step)
    assert len(trials) == batch_size and trials.min() >= 0 and trials.max() < sum(sizes)
    ends = np.cumsum(sizes)
    per_day = Counter(np.searchsorted(ends, trials, side="right").tolist())
    assert len(per_day) <= days and max(per_day.values()) <= math.ceil(batch_size / days)
    if batch_size % days == 0:
        assert set(per_day.values()) == {batch_size // days}
    again = SeededSampler(sizes, batch_size=batch_size, days_per_batch=days, seed=seed)
    again.trials(step + 1)
    np.testing.assert_array_equal(again.trials(step), trials)


def test_days_and_trials_are_drawn_evenly() -> None:
    sampler = seeded()
    days: Counter[int] = Counter()
    trials: Counter[int] = Counter()
    steps = 3000
    for step in range(steps):
        batch = sampler.trials(step)
        days.update(set(day_of(batch).tolist()))
        trials.update(batch.tolist())
    for day, size in enumerate(SIZES):
        assert days[day] == pytest.approx(steps * 4 / 6, rel=0.06)
        counts = [trials[trial] for trial in range(STARTS[day], STARTS[day + 1])]
        expected = steps * 4 / 6 * 16 / size
        assert np.mean(counts) == pytest.approx(expected, rel=0.06)
        assert np.std(counts) < 2 * math.sqrt(expected) + 0.06 * expected


def test_the_surplus_is_dropped_from_random_days() -> None:
    sampler = seeded(batch_size=61)
    short: Counter[int] = Counter()
    for step in range(2000):
        rows = day_of(sampler.trials(step))
        _, first, counts = np.unique(rows, return_index=True, return_counts=True)
        order = np.argsort(first)
        for position, count in enumerate(counts[order].tolist()):
            short[position] += 16 - count
    assert sum(short.values()) == 6000
    assert all(1300 < short[position] < 1700 for position in range(4))


def test_seeds_and_steps_differ() -> None:
    drawn = {tuple(seeded(seed=seed).trials(step).tolist()) for seed in range(5) for step in range(5)}
    assert len(drawn) == 25


def test_the_random_stream_is_fixed_so_that_old_checkpoints_continue_with_the_same_batches() -> None:
    np.testing.assert_array_equal(seeded(batch_size=5, days_per_batch=2, seed=7).trials(123), PINNED)


PINNED = [411, 400, 9, 28, 19]


@pytest.mark.parametrize(("batch_size", "days"), [(64, 4), (48, 4), (7, 3), (1, 1)])
def test_upstreams_batches_are_reproduced_draw_for_draw(batch_size: int, days: int) -> None:
    expected = as_upstream_draws(SIZES, 40, batch_size=batch_size, days_per_batch=days, seed=1)
    sampler = UpstreamSampler(SIZES, batch_size=batch_size, days_per_batch=days, seed=1)
    assert [sampler.trials(step).tolist() for step in range(40)] == expected


def test_upstreams_batches_can_be_drawn_in_any_order() -> None:
    steps = 700
    expected = as_upstream_draws(SIZES, steps, batch_size=8, days_per_batch=2, seed=5)
    sampler = UpstreamSampler(SIZES, batch_size=8, days_per_batch=2, seed=5)
    random = np.random.default_rng(0)
    for step in [steps - 1, 0, *random.integers(0, steps, 60).tolist()]:
        assert sampler.trials(step).tolist() == expected[step], step


def test_must_include_days_are_in_every_batch() -> None:
    for sampler in (
        SeededSampler(SIZES, batch_size=8, days_per_batch=4, seed=1, must_include=[-1, 2]),
        UpstreamSampler(SIZES, batch_size=8, days_per_batch=4, seed=1, must_include=[-1, 2]),
    ):
        for step in range(50):
            assert {2, 5} <= set(day_of(sampler.trials(step)).tolist())


def test_impossible_settings_are_refused_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match="--days-per-batch 7: there are only 6 sessions"):
        seeded(days_per_batch=7)
    with pytest.raises(ConfigError, match="must_include_days has 9"):
        SeededSampler(SIZES, batch_size=8, days_per_batch=2, seed=1, must_include=[9])


def test_the_next_use_is_known_up_to_the_horizon() -> None:
    sampler = seeded(batch_size=8)
    forecast = NextUse(sampler, 30)
    for step in (0, 1, 2, 17, 60, 5):
        forecast.advance(step)
        forecast.advance(step)
        for trial in range(0, sum(SIZES), 7):
            uses = [at for at in range(step, step + 30) if trial in sampler.trials(at)]
            assert forecast.next_use(trial) == (uses[0] if uses else NEVER)


@pytest.mark.filterwarnings("error")
def test_every_seed_draws_different_batches() -> None:
    """numpy would convert a list with an integer beyond 63 bits to floats, which merge neighbouring seeds."""
    seeds = (-2, -1, 0, 1, 2**63, 2**63 + 1, 2**64 - 3)
    assert len({seeded(seed=seed).trials(5).tobytes() for seed in seeds}) == len(seeds)
