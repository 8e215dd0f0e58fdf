"""Trials are cut, padded, checked and split as a function of the step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from brain_to_text.data.batches import MicroBatcher
from brain_to_text.data.collate import Batch
from brain_to_text.model import DecoderShape
from estiba.errors import DataError

SHAPE = DecoderShape(n_features=3, n_units=4, n_layers=1, n_days=5)
PHONEMES = [[1, 2, 2], [3], [4, 5]]


def batch(labels: list[list[int]] | None = None, bins: tuple[int, ...] = (90, 70, 80), **changes: Any) -> Batch:
    rows = labels or PHONEMES
    padded = torch.zeros(len(rows), max(len(row) for row in rows), dtype=torch.long)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = torch.tensor(row)
    features = torch.arange(max(bins), dtype=torch.float32)[None, :, None].repeat(len(bins), 1, 3)
    for row, length in enumerate(bins):
        features[row, length:] = 0.0
    values = {
        "features": features, "labels": padded, "n_time_steps": torch.tensor(bins),
        "label_lengths": torch.tensor([len(row) for row in rows]), "day": torch.tensor([2, 0, 2]),
        "phoneme_labels": None, "phoneme_lengths": None, "sentences": [None] * len(rows),
        "trial": [f"t15/trial_{row:04d}" for row in range(len(rows))],
    }  # fmt: skip
    return Batch(**{**values, **changes})


def test_lengths_are_padded_with_zeros_to_a_multiple_of_the_bucket() -> None:
    (micro,) = MicroBatcher(SHAPE, seed=1, length_bucket=64)(batch())
    assert micro.features.shape == (3, 128, 3)
    assert not micro.features[:, 90:].any()
    assert torch.equal(micro.features[0, :90, 0], torch.arange(90.0))
    assert micro.frames == ((90 - 14) // 4 + 1, (70 - 14) // 4 + 1, (80 - 14) // 4 + 1)


def test_a_batch_with_allocated_padding_is_not_copied() -> None:
    prepare = MicroBatcher(SHAPE, seed=1, random_cut=3, length_bucket=64)
    step = next(step for step in range(60) if prepare.cut_at(step) == 2)
    plain, roomy = batch(), batch()
    roomy = batch(features=torch.cat([roomy.features, torch.full((3, 40, 3), 7.0)], dim=1))
    for is_training in (True, False):
        (copied,) = prepare(plain, step=step, is_training=is_training)
        (viewed,) = prepare(roomy, step=step, is_training=is_training)
        assert torch.equal(copied.features, viewed.features)
        assert viewed.features.untyped_storage().data_ptr() == roomy.features.untyped_storage().data_ptr()


def test_the_cut_is_a_function_of_seed_and_step_with_every_possible_value() -> None:
    prepare = MicroBatcher(SHAPE, seed=1, random_cut=3)
    cuts = [prepare.cut_at(step) for step in range(60)]
    assert cuts == [MicroBatcher(SHAPE, seed=1, random_cut=3).cut_at(step) for step in range(60)]
    assert set(cuts) == {0, 1, 2}
    assert cuts != [MicroBatcher(SHAPE, seed=2, random_cut=3).cut_at(step) for step in range(60)]


def test_the_start_is_cut_off_only_in_training() -> None:
    prepare = MicroBatcher(SHAPE, seed=1, random_cut=3, length_bucket=1)
    step = next(step for step in range(60) if prepare.cut_at(step) == 2)
    (micro,) = prepare(batch(), step=step, is_training=True)
    assert micro.features.shape == (3, 88, 3)
    assert micro.features[0, 0, 0] == 2.0
    assert micro.n_bins.tolist() == [88, 68, 78]
    (whole,) = prepare(batch(), step=step)
    assert whole.n_bins.tolist() == [90, 70, 80]


def test_micro_batches_contain_every_trial_once_with_their_own_days_and_labels() -> None:
    micros = MicroBatcher(SHAPE, seed=1, layer_of_day=lambda day: day + 1)(batch(), parts=2)
    assert [micro.days for micro in micros] == [(1, 3), (3,)]
    assert [micro.day_index.tolist() for micro in micros] == [[1, 0], [0]]
    assert [micro.label_lengths for micro in micros] == [(3, 1), (2,)]
    assert micros[1].labels.tolist() == [[4, 5]]
    assert torch.equal(
        torch.cat([micro.features for micro in micros]), MicroBatcher(SHAPE, seed=1)(batch())[0].features
    )


def test_there_are_never_more_micro_batches_than_trials() -> None:
    assert len(MicroBatcher(SHAPE, seed=1)(batch(), parts=9)) == 3


def test_an_evaluation_includes_a_trial_that_is_too_short_for_its_labels() -> None:
    assert MicroBatcher(SHAPE, seed=1)(batch(bins=(21, 70, 80)))[0].frames[0] == 2


def test_phonemes_are_derived_from_diphones_if_the_data_has_none() -> None:
    shape = DecoderShape(n_features=3, n_units=4, n_layers=1, n_classes=1681, n_days=5)
    diphones = [[1, 42, 43, 84, 82], [3, 126, 123], [5, 210, 205]]
    (micro,) = MicroBatcher(shape, seed=1)(batch(diphones))
    assert micro.phonemes is not None
    assert micro.phonemes.tolist() == [[1, 2], [3, 0], [5, 0]]
    assert micro.phoneme_lengths == (2, 1, 1)
    labelled = batch(diphones, phoneme_labels=torch.tensor([[7], [8], [9]]), phoneme_lengths=torch.tensor([1, 1, 1]))
    (micro,) = MicroBatcher(shape, seed=1)(labelled)
    assert micro.phonemes is not None and micro.phonemes.tolist() == [[7], [8], [9]]


def test_phoneme_labels_for_a_diphone_model_are_refused() -> None:
    shape = DecoderShape(n_features=3, n_units=4, n_layers=1, n_classes=1681, n_days=5)
    with pytest.raises(DataError, match=r"t15/trial_0000: its labels are phonemes"):
        MicroBatcher(shape, seed=1)(batch())


def test_a_trial_without_labels_is_prepared_for_prediction() -> None:
    unlabelled = batch(labels=[[0], [0], [0]], label_lengths=torch.tensor([0, 0, 0]))
    (micro,) = MicroBatcher(SHAPE, seed=1)(unlabelled)
    assert micro.label_lengths == (0, 0, 0)
