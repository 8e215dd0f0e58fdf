"""One record as tokens, and several of them as one packed micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from finetune.model.packed_attention import Segment, Segments

NO_COLUMN = 0
"""The column of tokens that answer no question about a table."""


@dataclass(frozen=True, kw_only=True)
class TokenSequence:
    """One conversation or text: its tokens, and which of them are trained."""

    ids: np.ndarray
    """int32[n]."""
    trained: np.ndarray
    """bool[n]."""
    column: int = NO_COLUMN
    is_truncated: bool = False


@dataclass(frozen=True, kw_only=True)
class Example:
    """One record: sequences that share a trunk, as one run of tokens `trunk, branch, branch, ...`.

    Without a trunk there is one branch, or there are several that have nothing in common.
    """

    ids: np.ndarray
    """int32[n]."""
    trained: np.ndarray
    """bool[n]. The loss predicts these tokens. Never the first of a sequence."""
    ends: tuple[int, ...]
    """Where the trunk and each branch end; the trunk may be empty."""
    columns: tuple[int, ...]
    """The column that each branch asks for."""
    truncated: int = 0
    """How many of its sequences were shortened."""

    @property
    def trunk_length(self) -> int:
        return self.ends[0]

    @property
    def trained_tokens(self) -> int:
        return int(self.trained.sum())

    def sequences(self) -> list[TokenSequence]:
        """Return each branch with its trunk before it."""
        trunk = slice(0, self.ends[0])
        found = []
        for start, end, column in zip(self.ends, self.ends[1:], self.columns, strict=False):
            ids, trained = (np.concatenate((both[trunk], both[start:end])) for both in (self.ids, self.trained))
            found.append(TokenSequence(ids=ids, trained=trained, column=column))
        return found


def join(sequences: Sequence[TokenSequence], *, share_trunk: bool = True) -> Example:
    """Make one example of a record's sequences. What all begin with, and none trains, becomes the trunk."""
    trunk = _common_length(sequences) if share_trunk and len(sequences) > 1 else 0
    ids = [sequences[0].ids[:trunk], *(sequence.ids[trunk:] for sequence in sequences)]
    trained = [sequences[0].trained[:trunk], *(sequence.trained[trunk:] for sequence in sequences)]
    return Example(
        ids=np.concatenate(ids).astype(np.int32),
        trained=np.concatenate(trained),
        ends=tuple(int(end) for end in np.cumsum([len(part) for part in ids])),
        columns=tuple(sequence.column for sequence in sequences),
        truncated=sum(sequence.is_truncated for sequence in sequences),
    )


def _common_length(sequences: Sequence[TokenSequence]) -> int:
    shortest = min(len(sequence.ids) for sequence in sequences) - 1  # every branch keeps a token
    first = sequences[0]
    same = ~first.trained[:shortest]
    for other in sequences[1:]:
        same &= (first.ids[:shortest] == other.ids[:shortest]) & ~other.trained[:shortest]
    return int(shortest if same.all() else same.argmin())


class PackedBatch(NamedTuple):
    """A micro-batch: T tokens in one row, P of them trained."""

    input_ids: torch.Tensor
    """int64[1, T]."""
    position_ids: torch.Tensor
    """int64[1, T]; each sequence starts at 0, each branch after its trunk."""
    predictors: torch.Tensor
    """int64[P]: where the logits of each trained token are. A trunk's last token may predict for several branches."""
    targets: torch.Tensor
    """int64[P]."""
    columns: torch.Tensor
    """int64[P]: the column that each target belongs to."""
    segments: Segments


def pack(examples: Sequence[Example], *, use_varlen: bool = False) -> PackedBatch:
    """Concatenate examples into one row, without padding."""
    positions, predictors, targets, columns, segments = [], [], [], [], []
    offset = 0
    for example in examples:
        trunk = example.ends[0]
        positions.append(np.arange(trunk))
        if trunk:
            segments.append(Segment(offset, offset + trunk))
        for start, end, column in zip(example.ends, example.ends[1:], example.columns, strict=False):
            positions.append(np.arange(trunk, trunk + end - start))
            segments.append(Segment(offset + start, offset + end, offset, offset + trunk))
            trained = start + np.flatnonzero(example.trained[start:end])
            before = np.where(trained == start, trunk - 1, trained - 1)
            predictors.append(offset + before)
            targets.append(example.ids[trained])
            columns.append(np.full(len(trained), column))
        offset += len(example.ids)
    return PackedBatch(
        input_ids=_row([example.ids for example in examples])[None],
        position_ids=_row(positions)[None],
        predictors=_row(predictors),
        targets=_row(targets),
        columns=_row(columns),
        segments=Segments(tuple(segments), use_varlen=use_varlen),
    )


def _row(parts: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))
