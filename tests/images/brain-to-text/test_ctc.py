"""Losses, decoding and counted errors against their definitions."""

from __future__ import annotations

from itertools import groupby, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from brain_to_text.ctc import DIPHONES, NAMES, edits, frames_needed, greedy, marginal, phonemes_of, summed_loss


def test_phonemes_are_diphones_summed_over_the_one_before() -> None:
    logits = torch.randn(2, 3, DIPHONES)
    expected = torch.stack([logits[..., number::41].logsumexp(-1) for number in range(41)], dim=-1)
    torch.testing.assert_close(marginal(logits), expected)


def test_the_loss_is_the_sum_over_all_paths_of_all_trials() -> None:
    logits = torch.randn(2, 4, 3)
    labels = torch.tensor([[1, 2], [2, 0]])
    total = 0.0
    for row, (frames, true) in enumerate(((4, [1, 2]), (3, [2]))):
        probabilities = logits[row].softmax(-1)
        paths = [path for path in product(range(3), repeat=frames) if collapsed(path) == true]
        total -= float(torch.log(sum(probabilities[range(frames), list(path)].prod() for path in paths)))
    assert float(summed_loss(logits, labels, (4, 3), (2, 1))) == pytest.approx(total, rel=1e-5)


def test_a_trial_that_cannot_be_spelt_counts_nothing_where_that_is_asked_for() -> None:
    logits = torch.randn(2, 4, 3, requires_grad=True)
    labels = torch.tensor([[1, 1, 1], [1, 2, 0]])
    loss = summed_loss(logits, labels, (4, 4), (3, 2), zero_infinity=True)
    loss.backward()
    assert logits.grad is not None
    assert torch.isfinite(loss) and not logits.grad[0].any() and logits.grad[1].any()
    assert torch.isinf(summed_loss(logits, labels, (4, 4), (3, 2)))


def collapsed(path: tuple[int, ...]) -> list[int]:
    return [one for one, _ in groupby(path) if one != 0]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=12), min_size=1, max_size=5), st.data())
def test_greedy_joins_repeats_and_drops_blanks_in_each_trials_own_length(
    paths: list[list[int]], data: st.DataObject
) -> None:
    width = max(len(path) for path in paths) + 2
    logits = torch.full((len(paths), width, 5), -1.0)
    for row, path in enumerate(paths):
        noise = data.draw(st.lists(st.integers(0, 4), min_size=width - len(path), max_size=width - len(path)))
        for frame, one in enumerate([*path, *noise]):  # what lies behind a trial's end is no part of it
            logits[row, frame, one] = 1.0
    assert greedy(logits, [len(path) for path in paths]) == [collapsed(tuple(path)) for path in paths]


@given(st.lists(st.integers(1, 3), max_size=6), st.lists(st.integers(1, 3), max_size=6))
def test_edits_are_the_least_number(one: list[int], other: list[int]) -> None:
    table = np.zeros((len(one) + 1, len(other) + 1), dtype=int)
    table[:, 0], table[0, :] = range(len(one) + 1), range(len(other) + 1)
    for i, a in enumerate(one, 1):
        for j, b in enumerate(other, 1):
            table[i, j] = min(table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (a != b))
    assert edits(one, other) == table[-1, -1]


@given(st.lists(st.integers(1, 2), min_size=2, max_size=5))
def test_frames_needed_is_the_least_that_has_a_path(labels: list[int]) -> None:
    needed = frames_needed(np.array(labels))
    logits, target = torch.zeros(1, needed, 3), torch.tensor([labels])
    assert torch.isfinite(summed_loss(logits, target, (needed,), (len(labels),)))
    assert torch.isinf(summed_loss(logits[:, :-1], target, (needed - 1,), (len(labels),)))


def test_diphones_spell_phonemes_as_the_guides_converter_does() -> None:
    assert phonemes_of([1, 42, 43, 84, 85, 126, 123]) == [1, 2, 3]
    assert phonemes_of([]) == []


def test_there_are_41_names() -> None:
    assert len(NAMES) == 41
    assert NAMES[0] == "BLANK" and NAMES[40] == "|" and NAMES[1] == "AA"
