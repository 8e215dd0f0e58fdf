"""Turn a batch from the reader into the micro-batches of a step: cut, padded to one of a few lengths, checked."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from brain_to_text.ctc import to_phonemes
from brain_to_text.data.collate import Batch
from brain_to_text.data.schema import N_DIPHONES, N_PHONEMES
from brain_to_text.model import DecoderShape
from estiba.errors import DataError


class MicroBatch(NamedTuple):
    """Part of a batch. Values that the host needs are not tensors, so that nothing is read back from the device."""

    features: Tensor
    """float32[B, T, C], where T is a multiple of `length_bucket`."""
    n_bins: Tensor
    """int64[B]: bins of each trial, without padding."""
    day_index: Tensor
    """int64[B]: index into `days`."""
    labels: Tensor
    """int64[B, L], 0-padded."""
    phonemes: Tensor | None
    """int64[B, L'], if `labels` are diphones."""
    days: tuple[int, ...]
    """The distinct days of this micro-batch, as indices of the model's input layers."""
    frames: tuple[int, ...]
    """Output frames of each trial."""
    label_lengths: tuple[int, ...]
    phoneme_lengths: tuple[int, ...]
    step: int
    """The training step; 0 in an evaluation."""


class MicroBatcher:
    """Prepares batches for a model. Thread-safe."""

    def __init__(
        self,
        shape: DecoderShape,
        *,
        seed: int,
        random_cut: int = 0,
        length_bucket: int = 64,
        layer_of_day: Callable[[int], int] = int,
    ) -> None:
        """`layer_of_day` maps a day of the data set to the model's input layer."""
        self.shape, self.seed, self.random_cut, self.length_bucket = shape, seed, random_cut, length_bucket
        self.layer_of_day = layer_of_day

    def cut_at(self, step: int) -> int:
        """Return how many bins to cut from the start of a step's trials: a function of seed and step."""
        if self.random_cut < 1:
            return 0
        generator = np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, 0, step]))
        return int(generator.integers(0, self.random_cut))

    def __call__(self, batch: Batch, *, step: int = 0, parts: int = 1, is_training: bool = False) -> list[MicroBatch]:
        """Raises DataError for labels that the model cannot be trained on, naming the trial."""
        cut = self.cut_at(step) if is_training else 0
        n_bins = np.asarray(batch.n_time_steps, dtype=np.int64) - cut
        labels, lengths = np.asarray(batch.labels), np.asarray(batch.label_lengths)
        if self.shape.n_classes == N_DIPHONES:
            self._check_diphones(batch, labels)
            phonemes, phoneme_lengths = self._phonemes(batch, labels, lengths)
        else:
            phonemes, phoneme_lengths = None, lengths
        frames = [self.shape.frames(int(bins)) for bins in n_bins]
        features = self._pad(torch.as_tensor(batch.features), n_bins, cut)
        n_trials = len(n_bins)
        micro_batches = []
        for part in np.array_split(np.arange(n_trials), min(parts, n_trials)):
            rows = slice(int(part[0]), int(part[-1]) + 1)
            days, index = np.unique([self.layer_of_day(int(day)) for day in batch.day[rows]], return_inverse=True)
            micro_batches.append(
                MicroBatch(
                    features=features[rows],
                    n_bins=torch.from_numpy(n_bins[rows]),
                    day_index=torch.from_numpy(index.astype(np.int64)),
                    labels=_trim(labels[rows], lengths[rows]),
                    phonemes=None if phonemes is None else _trim(phonemes[rows], phoneme_lengths[rows]),
                    days=tuple(days.tolist()),
                    frames=tuple(max(0, n_frames) for n_frames in frames[rows]),
                    label_lengths=tuple(lengths[rows].tolist()),
                    phoneme_lengths=tuple(phoneme_lengths[rows].tolist()),
                    step=step,
                )
            )
        return micro_batches

    def _pad(self, features_BTC: Tensor, n_bins: np.ndarray, cut: int) -> Tensor:
        longest = int(n_bins.max())
        length = -(-max(longest, self.shape.patch_size, 1) // self.length_bucket) * self.length_bucket
        if features_BTC.shape[1] >= cut + length:  # the reader has allocated the padding
            view = features_BTC[:, cut : cut + length]
            view[:, longest:] = 0.0  # bins that a trial stores beyond its n_time_steps
            return view
        padded = features_BTC.new_zeros(features_BTC.shape[0], length, features_BTC.shape[2])
        padded[:, :longest] = features_BTC[:, cut : cut + longest]
        return padded

    def _check_diphones(self, batch: Batch, labels: np.ndarray) -> None:
        if labels.size and labels.any() and int(labels.max()) < N_PHONEMES:
            raise DataError(
                f"{batch.trial[0]}: its labels are phonemes (all below {N_PHONEMES}), but --n-classes {N_DIPHONES} "
                "needs diphones; give data with diphone labels, or --n-classes 41"
            )

    def _phonemes(self, batch: Batch, labels: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the phoneme labels of the data, or derive them from the diphones if there are none."""
        if batch.phoneme_labels is not None and batch.phoneme_lengths is not None:
            return np.asarray(batch.phoneme_labels), np.asarray(batch.phoneme_lengths)
        rows = [to_phonemes(labels[row, : int(length)].tolist()) for row, length in enumerate(lengths)]
        phoneme_lengths = np.array([len(row) for row in rows])
        padded = np.zeros((len(rows), max(1, phoneme_lengths.max())), dtype=np.int64)
        for index, row in enumerate(rows):
            padded[index, : len(row)] = row
        return padded, phoneme_lengths


def _trim(labels: np.ndarray, lengths: np.ndarray) -> Tensor:
    width = max(1, int(lengths.max()))
    return torch.from_numpy(np.ascontiguousarray(labels[:, :width]).astype(np.int64))
