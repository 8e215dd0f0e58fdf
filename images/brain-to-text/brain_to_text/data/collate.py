"""Stack trials into a batch: features padded with zeros, labels, names."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from brain_to_text.data.buffers import BufferPool
from brain_to_text.data.schema import TrialRef


@dataclass(frozen=True)
class PaddingSpec:
    """How far a training step pads a batch. The reader allocates that much, so that the step need not copy."""

    multiple_of: int = 1
    min_steps: int = 1
    extra_steps: int = 0
    """Additional time steps, because some are cut from the start of the batch."""

    def steps(self, longest: int) -> int:
        return -(-max(longest, self.min_steps) // self.multiple_of) * self.multiple_of + self.extra_steps


NO_PADDING = PaddingSpec()


@dataclass(frozen=True)
class Batch:
    """B trials. Shapes: T time steps, padding included; C features; L labels of the trial that has most."""

    features: torch.Tensor
    """float32[B, T, C], with zeros after the end of each trial."""
    labels: torch.Tensor
    """int64[B, L]."""
    n_time_steps: torch.Tensor
    """int64[B]."""
    label_lengths: torch.Tensor
    """int64[B]."""
    day: torch.Tensor
    """int64[B]: index into `TrialDataset.sessions`."""
    phoneme_labels: torch.Tensor | None
    """int64[B, M], if the labels are diphones."""
    phoneme_lengths: torch.Tensor | None
    sentences: list[str | None]
    trial: list[str]
    """'t15.2023.08.11/trial_0007'."""


def collate(trials: Sequence[tuple[TrialRef, np.ndarray]], buffers: BufferPool, padding: PaddingSpec) -> Batch:
    """Pad and stack [(trial, float32[T, C]), ...]."""
    longest = max(values.shape[0] for _, values in trials)
    features = buffers.take(len(trials), padding.steps(longest), trials[0][1].shape[1])
    array = features.numpy()  # torch's threads would compete with those of the training step
    for row, (_, values) in enumerate(trials):
        array[row, : len(values)] = values
        array[row, len(values) :] = 0.0
    return dataclasses.replace(without_features([trial for trial, _ in trials]), features=features)


def without_features(refs: Sequence[TrialRef]) -> Batch:
    """Return a batch whose features are still to be filled in."""
    labels, lengths = _pad([ref.trial.labels for ref in refs])
    phonemes = phoneme_lengths = None
    if any(ref.trial.phoneme_labels is not None for ref in refs):
        phonemes, phoneme_lengths = _pad([ref.trial.phoneme_labels for ref in refs])
    return Batch(
        features=torch.empty(0),
        labels=labels,
        n_time_steps=torch.tensor([ref.n_time_steps for ref in refs]),
        label_lengths=lengths,
        day=torch.tensor([ref.day for ref in refs]),
        phoneme_labels=phonemes,
        phoneme_lengths=phoneme_lengths,
        sentences=[ref.trial.sentence for ref in refs],
        trial=[ref.name for ref in refs],
    )


def _pad(rows: Sequence[np.ndarray | None]) -> tuple[torch.Tensor, torch.Tensor]:
    tensors = [torch.empty(0, dtype=torch.int64) if row is None else torch.from_numpy(row) for row in rows]
    return pad_sequence(tensors, batch_first=True), torch.tensor([len(tensor) for tensor in tensors])
