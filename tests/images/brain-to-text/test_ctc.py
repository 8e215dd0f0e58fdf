"""Losses, decoding and edit distances match their definitions."""

from __future__ import annotations

from itertools import groupby, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from brain_to_text.ctc import PHONEME_NAMES, edits, frames_needed, greedy, marginalize, summed_loss, to_phonemes
from brain_to_text.data.schema import N_DIPHONES


def test_phoneme_probabilities_are_diphone_probabilities_summed_over_the_previous_phoneme() -> None:
    logits = torch.randn(2, 3, N_DIPHONES)
    expected = torch.stack([logits[..., number::41].logsumexp(-1) for number in range(41)], dim=-1)
    torch.testing.assert_close(marginalize(logits), expected)


def test_the_loss_is_the_sum_over_all_paths_of_all_trials() -> None:
    logits = torch.randn(2, 4, 3)
    labels = torch.tensor([[1, 2], [2, 0]])
    total = 0.0
    for row, (frames, true) in enumerate(((4, [1, 2]), (3, [2]))):
        probabilities = logits[row].softmax(-1)
        paths = [path for path in product(range(3), repeat=frames) if collapsed(path) == true]
        total -= float(torch.log(sum(probabilities[range(frames), list(path)].prod() for path in paths)))
    assert float(summed_loss(logits, labels, (4, 3), (2, 1))) == pytest.approx(total, rel=1e-5)


def test_a_trial_with_too_few_frames_has_no_loss_with_zero_infinity() -> None:
    logits = torch.randn(2, 4, 3, requires_grad=True)
    labels = torch.tensor([[1, 1, 1], [1, 2, 0]])
    loss = summed_loss(logits, labels, (4, 4), (3, 2), zero_infinity=True)
    loss.backward()
    assert logits.grad is not None
    assert torch.isfinite(loss) and not logits.grad[0].any() and logits.grad[1].any()
    assert torch.isinf(summed_loss(logits, labels, (4, 4), (3, 2)))


def collapsed(path: tuple[int, ...]) -> list[int]:
    return [label for label, _ in groupby(path) if label != 0]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=12), min_size=1, max_size=5), st.data())
def test_greedy_decoding_collapses_repeats_and_drops_blanks_within_each_trials_length(
    paths: list[list[int]], data: st.DataObject
) -> None:
    width = max(len(path) for path in paths) + 2
    logits = torch.full((len(paths), width, 5), -1.0)
    for row, path in enumerate(paths):
        noise = data.draw(st.lists(st.integers(0, 4), min_size=width - len(path), max_size=width - len(path)))
        for frame, label in enumerate([*path, *noise]):  # frames after the end of a trial are ignored
            logits[row, frame, label] = 1.0
    assert greedy(logits, [len(path) for path in paths]) == [collapsed(tuple(path)) for path in paths]


@given(st.lists(st.integers(1, 3), max_size=6), st.lists(st.integers(1, 3), max_size=6))
def test_edits_are_the_smallest_number(predicted: list[int], true: list[int]) -> None:
    table = np.zeros((len(predicted) + 1, len(true) + 1), dtype=int)
    table[:, 0], table[0, :] = range(len(predicted) + 1), range(len(true) + 1)
    for i, a in enumerate(predicted, 1):
        for j, b in enumerate(true, 1):
            table[i, j] = min(table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (a != b))
    assert edits(predicted, true) == table[-1, -1]


@given(st.lists(st.integers(1, 2), min_size=2, max_size=5))
def test_frames_needed_is_the_smallest_number_that_has_a_path(labels: list[int]) -> None:
    needed = frames_needed(np.array(labels))
    logits, target = torch.zeros(1, needed, 3), torch.tensor([labels])
    assert torch.isfinite(summed_loss(logits, target, (needed,), (len(labels),)))
    assert torch.isinf(summed_loss(logits[:, :-1], target, (needed - 1,), (len(labels),)))


def test_diphones_convert_to_phonemes_as_in_the_guides_converter() -> None:
    assert to_phonemes([1, 42, 43, 84, 85, 126, 123]) == [1, 2, 3]
    assert to_phonemes([]) == []


def test_there_are_41_names() -> None:
    assert len(PHONEME_NAMES) == 41
    assert PHONEME_NAMES[0] == "BLANK" and PHONEME_NAMES[40] == "|" and PHONEME_NAMES[1] == "AA"
