"""Packing: deterministic, within the budget, every row once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embed.model.batches import default_token_budget, longest_first, padded_width
from embed.model.batches import pack as pack_window


def pack(lengths: np.ndarray, budget: int, max_rows: int = 0, multiple: int = 1) -> list[np.ndarray]:
    """Every batch of a window whose rows all have text, with a budget that does not fall."""
    return list(pack_window(lengths, np.arange(len(lengths)), lambda width: budget // width, max_rows, multiple))


LENGTHS = st.lists(st.integers(1, 600), max_size=300).map(lambda lengths: np.array(lengths, np.int32))


@given(LENGTHS, st.integers(1, 5000), st.integers(0, 40), st.sampled_from([1, 8]))
def test_every_row_is_in_one_batch_and_no_batch_exceeds_its_limits(
    lengths: np.ndarray, budget: int, max_rows: int, multiple: int
) -> None:
    batches = pack(lengths, budget, max_rows, multiple)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        width = padded_width(int(lengths[batch].max()), multiple)
        assert len(batch) == 1 or len(batch) * width <= budget
        assert max_rows == 0 or len(batch) <= max_rows


@given(LENGTHS, st.integers(1, 5000))
def test_batches_are_as_full_as_the_budget_allows(lengths: np.ndarray, budget: int) -> None:
    for batch in pack(lengths, budget)[:-1]:
        assert (len(batch) + 1) * int(lengths[batch].max()) > budget


@given(LENGTHS, st.integers(1, 5000))
def test_batches_depend_on_nothing_but_lengths_and_limits(lengths: np.ndarray, budget: int) -> None:
    once, again = pack(lengths, budget), pack(lengths.copy(), budget)
    assert len(once) == len(again)
    assert all((a == b).all() for a, b in zip(once, again, strict=True))


def test_the_longest_rows_come_first_and_equal_rows_keep_their_order() -> None:
    lengths = np.array([3, 9, 3, 9, 5], np.int32)
    assert longest_first(lengths, np.arange(5)).tolist() == [1, 3, 4, 0, 2]


def test_a_row_longer_than_the_budget_is_a_batch_of_its_own() -> None:
    assert [batch.tolist() for batch in pack(np.array([4, 900, 4], np.int32), 512)] == [[1], [0, 2]]


def test_sorted_batches_hold_little_padding() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(4.6, 0.8, 4000), 4, 512).astype(np.int32)
    padded = sum(len(batch) * int(lengths[batch].max()) for batch in pack(lengths, 1536))
    assert padded / lengths.sum() < 1.02


@pytest.mark.parametrize(
    ("longest", "multiple", "limit", "width"), [(9, 8, None, 16), (509, 8, 510, 510), (7, 1, 512, 7)]
)
def test_width_is_a_multiple_that_the_model_can_still_read(
    longest: int, multiple: int, limit: int | None, width: int
) -> None:
    assert padded_width(longest, multiple, limit) == width


def test_the_budget_grows_with_the_gpu_within_bounds() -> None:
    gib = 1024**3
    budgets = [default_token_budget("cuda", memory * gib) for memory in (1, 16, 24, 80)]
    assert budgets == [4_096, 32_768, 49_152, 65_536]
