"""What the files of the study hold, by name: sessions, trials, phonemes, diphones.

    t15.2023.08.11/data_train.hdf5
        trial_0000                      attributes: n_time_steps, seq_len, block_num, trial_num, session, sentence_label
            input_features  f4[T, 512]  20 ms bins
            seq_class_ids   i4[500]     labels, zero padded; absent in the test split
            transcription   i4[500]     character codes, zero padded; absent in the test split
            seq_class_ids_phoneme i4[500], attribute seq_len_phoneme: only where the labels are diphones

Source: github.com/Neuroprosthetics-Lab/nejm-brain-to-text, and doi:10.5061/dryad.dncjsxm85.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

import numpy as np

Split = Literal["train", "val", "test"]

FEATURES, LABELS, TRANSCRIPTION, PHONEME_LABELS = (
    "input_features",
    "seq_class_ids",
    "transcription",
    "seq_class_ids_phoneme",
)
MAX_LABELS = 500
BIN_S = 0.02

PHONEMES = (
    "BLANK AA AE AH AO AW AY B CH D DH EH ER EY F G HH IH IY JH K L M N NG OW OY P R S SH T TH UH UW V W Y Z ZH SIL"
).split()
"""By class; 0 is CTC's blank, 40 the silence between words. Source: LOGIT_TO_PHONEME of the reference trainer."""
N_PHONEMES = len(PHONEMES)
N_DIPHONES = N_PHONEMES**2
BLANK, SILENCE = 0, N_PHONEMES - 1

_FILE = re.compile(r"(?:.*/)?(?P<session>[^/]+)/data_(?P<split>train|val|test)\.(?:hdf5|h5)")
_TRIAL = re.compile(r"trial_(?P<number>\d+)")


def session_of(path: str) -> tuple[str, Split] | None:
    """'a/t15.2023.08.11/data_val.hdf5' -> ('t15.2023.08.11', 'val'); None for anything else."""
    match = _FILE.fullmatch(path)
    return None if match is None else (match["session"], match["split"])  # type: ignore[return-value]


def trial_number(name: str) -> int | None:
    match = _TRIAL.fullmatch(name)
    return None if match is None else int(match["number"])


def diphones_of(phonemes: np.ndarray) -> np.ndarray:
    """Classes of (the phoneme before, this phoneme): int[L] -> int[L]; before the first there is silence.

    Class = before * 41 + this, so that `logits.reshape(41, 41)` has the phoneme in its last axis.
    """
    before = np.concatenate([[SILENCE], phonemes[:-1]]) if len(phonemes) else phonemes
    return before * N_PHONEMES + phonemes


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the values of one dataset lie in its file, and how they are stored there."""

    shape: tuple[int, ...]
    dtype: str
    """As numpy writes it, byte order included: '<f4'."""
    offset: int | None = None
    """Of the first byte, where they lie in one piece; None where in chunks or nowhere."""
    chunk_shape: tuple[int, ...] | None = None
    chunks: tuple[tuple[tuple[int, ...], int, int, int], ...] = ()
    """(first index of the chunk, offset, size in bytes, mask of the filters left out), in the file's order."""
    filters: tuple[tuple[int, int, tuple[int, ...]], ...] = ()
    """(HDF5's filter number, flags, values), in the order in which they were applied."""
    inline: bytes | None = None
    """The values themselves, where they lie inside the file's own tables."""
    fill: bytes = b""
    """One value, for what was never written."""

    @property
    def size_bytes(self) -> int:
        """Of the values, decoded."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    @property
    def end(self) -> int:
        """The first byte behind all of it."""
        if self.offset is not None:
            return self.offset + self.size_bytes
        return max((offset + size for _, offset, size, _ in self.chunks), default=0)


@dataclass(frozen=True, slots=True)
class Trial:
    """One trial as the index knows it: everything but its features."""

    name: str
    features: Placement | None
    """None where the file has no such dataset."""
    n_time_steps: int | None
    labels: np.ndarray | None
    """int32[L], unpadded; None where the split has none."""
    label_length: int | None
    """As its attribute says."""
    phoneme_labels: np.ndarray | None
    phoneme_length: int | None
    transcription: str | None
    sentence: str | None
    block: int | None
    number: int | None
