"""The study's file format (sessions, trials, phonemes, diphones), and a trial as the index describes it.

    t15.2023.08.11/data_train.hdf5
        trial_0000                      attributes: n_time_steps, seq_len, block_num, trial_num, session, sentence_label
            input_features  f4[T, 512]  20 ms bins
            seq_class_ids   i4[500]     labels, zero-padded; absent in the test split
            transcription   i4[500]     character codes, zero-padded; absent in the test split
            seq_class_ids_phoneme i4[500], attribute seq_len_phoneme: only if the labels are diphones

Source: github.com/Neuroprosthetics-Lab/nejm-brain-to-text, and doi:10.5061/dryad.dncjsxm85.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from estiba.errors import StoreError
from estiba.storage import Entry

Split = Literal["train", "val", "test"]

FEATURES, LABELS, TRANSCRIPTION = "input_features", "seq_class_ids", "transcription"
PHONEME_LABELS = "seq_class_ids_phoneme"
MAX_LABELS = 500
BIN_S = 0.02

PHONEMES = (
    "BLANK AA AE AH AO AW AY B CH D DH EH ER EY F G HH IH IY JH K L M N NG OW OY P R S SH T TH UH UW V W Y Z ZH SIL"
).split()
"""By class number: 0 is CTC's blank, 40 the silence between words. Source: LOGIT_TO_PHONEME in upstream."""
N_PHONEMES = len(PHONEMES)
N_DIPHONES = N_PHONEMES**2
BLANK, SILENCE = 0, N_PHONEMES - 1

_FILE = re.compile(r"(?:.*/)?(?P<session>[^/]+)/data_(?P<split>train|val|test)\.(?:hdf5|h5)")
_TRIAL = re.compile(r"trial_(?P<number>\d+)")


def parse_path(path: str) -> tuple[str, Split] | None:
    """Return session and split: 'a/t15.2023.08.11/data_val.hdf5' gives ('t15.2023.08.11', 'val'); None if neither."""
    match = _FILE.fullmatch(path)
    return None if match is None else (match["session"], match["split"])  # type: ignore[return-value]


def trial_number(name: str) -> int | None:
    match = _TRIAL.fullmatch(name)
    return None if match is None else int(match["number"])


def to_diphones(phonemes: np.ndarray) -> np.ndarray:
    """Return the diphone that each phoneme forms with the previous one: int[L] to int[L]. The first follows a silence.

    Class = previous * 41 + current, so `logits.reshape(41, 41)` has the current phoneme in its last axis.
    """
    previous = np.concatenate([[SILENCE], phonemes[:-1]]) if len(phonemes) else phonemes
    return previous * N_PHONEMES + phonemes


@dataclass(frozen=True)
class ObjectVersion:
    """A version of an object: its ETag in an object store, its size and modification time in a file system."""

    kind: Literal["etag", "mtime"]
    size_bytes: int
    tag: str
    """The ETag, or the modification time in nanoseconds."""
    place: str = ""
    """The path of the file, or the URL of the object. A version says nothing about a copy at another place. Indexes
    of earlier releases do not name the place of an object."""

    def __str__(self) -> str:
        return f"{'ETag' if self.kind == 'etag' else 'changed at'} {self.tag}, {self.size_bytes:,} bytes"

    @classmethod
    def from_stat(cls, status: os.stat_result, place: str = "") -> ObjectVersion:
        return cls("mtime", status.st_size, str(status.st_mtime_ns), place)

    @classmethod
    def from_file(cls, path: Path) -> ObjectVersion:
        """Raises StoreError."""
        try:
            return cls.from_stat(path.stat(), str(path))
        except OSError as error:
            raise StoreError(f"{path}: {error.strerror}; check the path") from None

    @classmethod
    def from_entry(cls, entry: Entry, url: str) -> ObjectVersion:
        return cls("etag", entry.size_bytes, entry.etag or "", url)

    def is_same_content(self, other: ObjectVersion) -> bool:
        """Return whether both have the same content: an object by its ETag at any place, a file only at its own."""
        names = ("kind", "size_bytes", "tag") if self.kind == "etag" else ("kind", "size_bytes", "tag", "place")
        return all(getattr(self, name) == getattr(other, name) for name in names)

    def is_elsewhere(self, other: ObjectVersion) -> bool:
        """Return whether `other` is known to describe a copy at another place."""
        return self.place != other.place and bool(other.place or self.kind == "mtime")

    def matches(self, status: os.stat_result) -> bool:
        return (status.st_size, str(status.st_mtime_ns)) == (self.size_bytes, self.tag)


@dataclass(frozen=True, slots=True)
class DatasetLayout:
    """Where an HDF5 file stores the values of a dataset, and how."""

    shape: tuple[int, ...]
    dtype: str
    """In numpy's notation, with byte order: '<f4'."""
    offset: int | None = None
    """First byte of contiguous storage; None for chunked or unallocated storage."""
    chunk_shape: tuple[int, ...] | None = None
    chunks: tuple[tuple[tuple[int, ...], int, int, int], ...] = ()
    """(first index, offset, size in bytes, bit mask of skipped filters) of each chunk, in file order."""
    filters: tuple[tuple[int, int, tuple[int, ...]], ...] = ()
    """(HDF5 filter number, flags, values) of each filter, in the order in which they were applied."""
    inline: bytes | None = None
    """The values themselves, if HDF5 keeps them in the object header (compact storage)."""
    fill: bytes = b""
    """The value of elements that were never written."""

    @property
    def size_bytes(self) -> int:
        """The size of the decoded values."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    @property
    def end(self) -> int:
        """The offset after the last stored byte."""
        if self.offset is not None:
            return self.offset + self.size_bytes
        return max((offset + size for _, offset, size, _ in self.chunks), default=0)


@dataclass(frozen=True, slots=True)
class Trial:
    """A trial as the index describes it: everything except the feature values.

    The index file stores the fields in this order.
    """

    name: str
    features: DatasetLayout | None = None
    """None if the trial has no such dataset."""
    n_time_steps: int | None = None
    labels: np.ndarray | None = None
    """int64[L], without padding; None if the trial has no labels."""
    label_length: int | None = None
    """The attribute `seq_len`."""
    phoneme_labels: np.ndarray | None = None
    phoneme_length: int | None = None
    transcription: str | None = None
    sentence: str | None = None
    block: int | None = None
    number: int | None = None


@dataclass(frozen=True, slots=True)
class TrialRef:
    """A valid trial, and the object that contains it."""

    trial: Trial
    path: str
    url: str
    version: ObjectVersion
    session: str
    day: int

    @property
    def name(self) -> str:
        """'t15.2023.08.11/trial_0007'."""
        return f"{self.session}/{self.trial.name}"

    @property
    def layout(self) -> DatasetLayout:
        assert self.trial.features is not None, "validation rejects trials without features"
        return self.trial.features

    @property
    def n_time_steps(self) -> int:
        """The trial's attribute, or the length of its features if it has no such attribute."""
        steps = self.trial.n_time_steps
        return self.layout.shape[0] if steps is None else steps
