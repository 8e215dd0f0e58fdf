"""CTC over phonemes and diphones: losses, greedy decoding, edit distance.

A diphone is a pair of phonemes. Its class is 41 * previous + current, so there are 41 x 41 = 1,681 classes.
Source: DCoND (Li et al. 2024) as implemented in the guide's trainer.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
import torch
from rapidfuzz.distance import Levenshtein
from torch import Tensor
from torch.nn.functional import ctc_loss

from brain_to_text.data.schema import BLANK, N_PHONEMES, PHONEMES

PHONEME_NAMES = [*PHONEMES[:-1], "|"]
"""The 41 classes in the form that a language model expects, with | for silence."""


def marginalize(logits: Tensor) -> Tensor:
    """Turn diphone logits [..., 1681] into phoneme logits [..., 41]: log-sum-exp over the previous phoneme."""
    return logits.unflatten(-1, (N_PHONEMES, N_PHONEMES)).logsumexp(-2)


def summed_loss(
    logits_BNK: Tensor,
    labels_BL: Tensor,
    frames: Sequence[int],
    label_lengths: Sequence[int],
    *,
    zero_infinity: bool = False,
) -> Tensor:
    """Return the CTC loss summed over trials.

    Lengths are plain integers, because reading tensors back from a GPU would make every step wait.
    """
    log_probs_NBK = logits_BNK.float().log_softmax(-1).transpose(0, 1)
    return ctc_loss(
        log_probs_NBK, labels_BL, tuple(frames), tuple(label_lengths),
        blank=BLANK, reduction="sum", zero_infinity=zero_infinity,
    )  # fmt: skip


def frames_needed(labels: np.ndarray) -> int:
    """Return how many output frames the labels int[L] need: one each, and a blank between two equal neighbours."""
    return len(labels) + int((labels[1:] == labels[:-1]).sum())


def greedy(logits_BNK: Tensor, frames: Sequence[int]) -> list[list[int]]:
    """Decode each trial to the likeliest class of each frame, with repeats collapsed and blanks dropped.

    All trials are decoded together on the device and copied to the host once.
    """
    best_BN = logits_BNK.argmax(-1)
    changed_BN = torch.ones_like(best_BN, dtype=torch.bool)
    changed_BN[:, 1:] = best_BN[:, 1:] != best_BN[:, :-1]
    bounds_B1 = torch.tensor(frames)[:, None].to(best_BN.device, non_blocking=True)
    real_BN = torch.arange(best_BN.shape[1], device=best_BN.device) < bounds_B1
    kept_BN = torch.where(changed_BN & real_BN, best_BN, BLANK).cpu().numpy()
    return [row[row != BLANK].tolist() for row in kept_BN]


def to_phonemes(diphones: Sequence[int]) -> list[int]:
    """Return the current phoneme of each diphone, with repeats collapsed and blanks dropped."""
    return [phoneme for phoneme, _ in groupby(diphone % N_PHONEMES for diphone in diphones) if phoneme != BLANK]


def edits(predicted: Sequence[int], true: Sequence[int]) -> int:
    """Return the edit distance: insertions, deletions and substitutions."""
    return int(Levenshtein.distance(predicted, true))
