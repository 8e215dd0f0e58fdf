"""Trials side by side: features padded with zeros, labels and names beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from brain_to_text.reading.buffers import Buffers
from brain_to_text.reading.reader import Known


@dataclass(frozen=True)
class Room:
    """Time steps that a batch's features have room for: what a step will pad them to, so that it need not copy them."""

    multiple_of: int = 1
    least: int = 1
    spare: int = 0
    """Behind all that, for what will be cut off the beginning."""

    def steps(self, longest: int) -> int:
        return -(-max(longest, self.least) // self.multiple_of) * self.multiple_of + self.spare


TIGHT = Room()
"""For the longest trial and nothing more."""


@dataclass(frozen=True)
class Batch:
    """B trials. Shapes: T what there is room for, at least the longest trial; C features, L the most labels."""

    features: torch.Tensor
    """float32[B, T, C], zeros behind the end of each trial."""
    labels: torch.Tensor
    """int64[B, L]."""
    n_time_steps: torch.Tensor
    """int64[B]."""
    label_lengths: torch.Tensor
    """int64[B]."""
    day: torch.Tensor
    """int64[B]: index into `Trials.sessions`."""
    phoneme_labels: torch.Tensor | None
    """int64[B, M], where the labels are diphones."""
    phoneme_lengths: torch.Tensor | None
    sentences: list[str | None]
    trial: list[str]
    """'t15.2023.08.11/trial_0007'."""


def collate(trials: Sequence[tuple[Known, np.ndarray]], buffers: Buffers, room: Room) -> Batch:
    """Pad and stack: [(trial, float32[T, C]), …] to a Batch."""
    longest = max(values.shape[0] for _, values in trials)
    width = trials[0][1].shape[1]
    features = buffers.take(len(trials), room.steps(longest), width)
    filled = features.numpy()
    for row, (_, values) in enumerate(trials):
        # numpy and not torch, whose threads here would only wait for those of the step.
        filled[row, : len(values)] = values
        filled[row, len(values) :] = 0.0
    return dataclasses.replace(describe([one for one, _ in trials]), features=features)


def describe(trials: Sequence[Known]) -> Batch:
    """All of a Batch but its features, which are empty."""
    labels, lengths = _padded([one.trial.labels for one in trials])
    phonemes = phoneme_lengths = None
    if any(one.trial.phoneme_labels is not None for one in trials):
        phonemes, phoneme_lengths = _padded([one.trial.phoneme_labels for one in trials])
    return Batch(
        features=torch.empty(0),
        labels=labels,
        n_time_steps=torch.tensor([steps_of(one) for one in trials]),
        label_lengths=lengths,
        day=torch.tensor([one.day for one in trials]),
        phoneme_labels=phonemes,
        phoneme_lengths=phoneme_lengths,
        sentences=[one.trial.sentence for one in trials],
        trial=[one.name for one in trials],
    )


def steps_of(known: Known) -> int:
    """As its attribute says; all of its features where it has none."""
    placement = known.trial.features
    assert placement is not None
    steps = known.trial.n_time_steps
    return placement.shape[0] if steps is None else steps


def _padded(rows: Sequence[np.ndarray | None]) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = [0 if row is None else len(row) for row in rows]
    padded = np.zeros((len(rows), max(lengths)), np.int64)
    for at, row in enumerate(rows):
        if row is not None:
            padded[at, : len(row)] = row
    return torch.from_numpy(padded), torch.tensor(lengths)
