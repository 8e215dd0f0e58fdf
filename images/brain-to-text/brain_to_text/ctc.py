"""CTC over phonemes and diphones: losses, decoding, errors counted.

A diphone class is 41 * previous + current phoneme (40 phonemes and silence would be 41 with blank as number 0), so that
1,681 classes hold 41 x 41 pairs. Source: DCoND (Li et al. 2024) as the S3 version of the guide has it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from rapidfuzz.distance import Levenshtein
from torch import Tensor
from torch.nn.functional import ctc_loss

BLANK = 0
PHONEMES = 41
"""Blank, 39 phonemes of ARPAbet, silence."""
DIPHONES = PHONEMES * PHONEMES
NAMES = (
    "BLANK AA AE AH AO AW AY B CH D DH EH ER EY F G HH IH IY JH K L M N NG OW OY P R S SH T TH UH UW V W Y Z ZH |"
).split()
"""Of the 41 classes, by number."""


def marginal(logits: Tensor) -> Tensor:
    """Diphone logits [..., 1681] to phoneme logits [..., 41]: log-sum-exp over the previous phoneme."""
    return logits.unflatten(-1, (PHONEMES, PHONEMES)).logsumexp(-2)


def summed_loss(
    logits_BNK: Tensor,
    labels_BL: Tensor,
    frames: Sequence[int],
    label_lengths: Sequence[int],
    *,
    zero_infinity: bool = False,
) -> Tensor:
    """The negative log-likelihoods of all trials, summed.

    Lengths are plain numbers: as tensors on a GPU they would be read back, and every step would wait for that.
    """
    log_probs_NBK = logits_BNK.float().log_softmax(-1).transpose(0, 1)
    return ctc_loss(
        log_probs_NBK,
        labels_BL,
        tuple(frames),
        tuple(label_lengths),
        blank=BLANK,
        reduction="sum",
        zero_infinity=zero_infinity,
    )


def frames_needed(labels: np.ndarray) -> int:
    """Least outputs that can spell int[L] labels: one each, and a blank between two that are the same."""
    return len(labels) + int((labels[1:] == labels[:-1]).sum())


def greedy(logits_BNK: Tensor, frames: Sequence[int]) -> list[list[int]]:
    """The likeliest class of each output, repeats joined, blanks dropped; one list a trial.

    All trials at once on the device, and one copy to the host.
    """
    best_BN = logits_BNK.argmax(-1)
    changed_BN = torch.ones_like(best_BN, dtype=torch.bool)
    changed_BN[:, 1:] = best_BN[:, 1:] != best_BN[:, :-1]
    bounds_B1 = torch.tensor(frames)[:, None].to(best_BN.device, non_blocking=True)
    real_BN = torch.arange(best_BN.shape[1], device=best_BN.device) < bounds_B1
    kept_BN = torch.where(changed_BN & real_BN, best_BN, BLANK).cpu().numpy()
    return [row[row != BLANK].tolist() for row in kept_BN]


def phonemes_of(diphones: Sequence[int]) -> list[int]:
    """A sequence of diphones as phonemes: the current one of each, repeats joined, blanks dropped."""
    current = [diphone % PHONEMES for diphone in diphones]
    joined = [one for index, one in enumerate(current) if index == 0 or one != current[index - 1]]
    return [one for one in joined if one != BLANK]


def edits(predicted: Sequence[int], true: Sequence[int]) -> int:
    """Insertions, deletions and substitutions between two sequences."""
    return int(Levenshtein.distance(predicted, true))
