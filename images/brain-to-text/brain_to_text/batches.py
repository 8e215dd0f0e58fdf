"""Trials as they come from the reader, made into what a step takes: cut, padded to few lengths, checked, in parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from brain_to_text.ctc import DIPHONES, PHONEMES, frames_needed, phonemes_of
from brain_to_text.model import Shape
from estiba.errors import DataError
from estiba.stop import say

if TYPE_CHECKING:
    from brain_to_text.reading.collate import Batch


class Micro(NamedTuple):
    """One part of a step. Numbers that the host needs are no tensors, so that nothing is read back from the device."""

    features: Tensor
    """float32[B, T, C], T a multiple of the bucket."""
    n_bins: Tensor
    """int64[B]: real bins of each trial."""
    day_index: Tensor
    """int64[B]: places in `days`."""
    labels: Tensor
    """int64[B, L], 0-padded."""
    phonemes: Tensor | None
    """int64[B, L'], where `labels` are diphones."""
    days: tuple[int, ...]
    """The different days of this part, as the model numbers them."""
    frames: tuple[int, ...]
    """Outputs of each trial."""
    label_lengths: tuple[int, ...]
    phoneme_lengths: tuple[int, ...]
    step: int
    """Of the plan; 0 in an evaluation."""


class Preparation:
    """How trials are prepared for one model. Callable from any thread."""

    def __init__(
        self,
        shape: Shape,
        *,
        seed: int,
        random_cut: int = 0,
        bucket: int = 64,
        skips_bad: bool = False,
        day_of: Callable[[int], int] = int,
    ) -> None:
        """`day_of` gives the model's number of a reader's day. `skips_bad`: trials too short for their labels count
        as a loss of 0 and are named once, instead of ending the run."""
        self.shape, self.seed, self.random_cut, self.bucket = shape, seed, random_cut, bucket
        self.skips_bad, self.day_of = skips_bad, day_of
        self.too_short: list[str] = []

    def cut_of(self, step: int) -> int:
        """Bins to drop at the beginning of a step's trials: a function of seed and step alone."""
        if self.random_cut < 1:
            return 0
        dice = np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, 0, step]))
        return int(dice.integers(0, self.random_cut))

    def __call__(self, batch: Batch, *, step: int = 0, parts: int = 1, is_training: bool = False) -> list[Micro]:
        """Raises DataError for labels that cannot be learnt, naming the trial."""
        cut = self.cut_of(step) if is_training else 0
        n_bins = np.asarray(batch.n_time_steps, dtype=np.int64) - cut
        labels, lengths = np.asarray(batch.labels), np.asarray(batch.label_lengths)
        if self.shape.n_classes == DIPHONES:
            self._check_diphones(batch, labels)
            phonemes, phoneme_lengths = self._phonemes(batch, labels, lengths)
        else:
            phonemes, phoneme_lengths = None, lengths
        frames = [self.shape.frames(int(bins)) for bins in n_bins]
        if is_training:  # in an evaluation, what cannot be spelt is an error of the decoder like any other
            self._check_lengths(batch, frames, labels, lengths)
        features = self._padded(torch.as_tensor(batch.features), n_bins, cut)
        rows = len(n_bins)
        micros = []
        for part in np.array_split(np.arange(rows), min(parts, rows)):
            first, last = int(part[0]), int(part[-1]) + 1
            days, index = np.unique([self.day_of(int(day)) for day in batch.day[first:last]], return_inverse=True)
            micros.append(
                Micro(
                    features=features[first:last],
                    n_bins=torch.from_numpy(n_bins[first:last]),
                    day_index=torch.from_numpy(index.astype(np.int64)),
                    labels=_trimmed(labels, lengths, first, last),
                    phonemes=None if phonemes is None else _trimmed(phonemes, phoneme_lengths, first, last),
                    days=tuple(int(day) for day in days),
                    frames=tuple(max(0, frame) for frame in frames[first:last]),
                    label_lengths=tuple(int(length) for length in lengths[first:last]),
                    phoneme_lengths=tuple(int(length) for length in phoneme_lengths[first:last]),
                    step=step,
                )
            )
        return micros

    def _padded(self, features_BTC: Tensor, n_bins: np.ndarray, cut: int) -> Tensor:
        longest = int(n_bins.max())
        length = -(-max(longest, self.shape.patch_size, 1) // self.bucket) * self.bucket
        if features_BTC.shape[1] >= cut + length:  # the reader left room
            view = features_BTC[:, cut : cut + length]
            view[:, longest:] = 0.0  # bins that a trial has beyond its n_time_steps
            return view
        padded = features_BTC.new_zeros(features_BTC.shape[0], length, features_BTC.shape[2])
        padded[:, :longest] = features_BTC[:, cut : cut + longest]
        return padded

    def _check_lengths(self, batch: Batch, frames: Sequence[int], labels: np.ndarray, lengths: np.ndarray) -> None:
        for row, (frame, length) in enumerate(zip(frames, lengths, strict=True)):
            needed = frames_needed(labels[row, : int(length)]) if length else 1
            if frame >= needed:
                continue
            name = batch.trial[row]
            text = (
                f"{name}: {int(batch.n_time_steps[row])} bins are {max(0, frame)} outputs (patches of "
                f"{self.shape.patch_size} at stride {self.shape.patch_stride}), and its {int(length)} labels need "
                f"{needed}"
            )
            if not self.skips_bad:
                raise DataError(
                    f"{text}; lower --patch-stride, take the trial out of the data, or pass --on-bad-trial skip"
                )
            if name not in self.too_short:
                self.too_short.append(name)
                say(f"warning: {text}; nothing is learnt from it, as --on-bad-trial skip says")

    def _check_diphones(self, batch: Batch, labels: np.ndarray) -> None:
        if labels.size and labels.any() and int(labels.max()) < PHONEMES:
            raise DataError(
                f"{batch.trial[0]}: its labels are phonemes (all below {PHONEMES}), and --n-classes {DIPHONES} is for "
                "diphones; give data with diphones, or --n-classes 41"
            )

    def _phonemes(self, batch: Batch, labels: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As the data have them; else as the diphones spell them."""
        if batch.phoneme_labels is not None and batch.phoneme_lengths is not None:
            return np.asarray(batch.phoneme_labels), np.asarray(batch.phoneme_lengths)
        spelt = [phonemes_of(labels[row, : int(length)].tolist()) for row, length in enumerate(lengths)]
        found = np.zeros((len(spelt), max(1, *(len(one) for one in spelt), 1)), dtype=np.int64)
        for row, one in enumerate(spelt):
            found[row, : len(one)] = one
        return found, np.array([len(one) for one in spelt])


def _trimmed(labels: np.ndarray, lengths: np.ndarray, first: int, last: int) -> Tensor:
    width = max(1, int(lengths[first:last].max()))
    return torch.from_numpy(np.ascontiguousarray(labels[first:last, :width]).astype(np.int64))
