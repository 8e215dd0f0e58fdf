"""One HDF5 file's trials: what the index says of them. Run once for each object (surveyors.py)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np

from brain_to_text.hdf5 import locate
from brain_to_text.paged import PagedFile
from brain_to_text.schema import FEATURES, LABELS, PHONEME_LABELS, TRANSCRIPTION, Trial, trial_number
from estiba.errors import DataError
from estiba.store import Entry, FileStore, Store


@dataclass(frozen=True)
class Survey:
    """The trials of one object, by number, and what is wrong with those that cannot be used."""

    path: str
    trials: list[Trial]
    problems: dict[str, str]
    """By trial: what keeps its values from being read by ranges."""


def survey(store: Store, entry: Entry) -> Survey:
    """Read one object's tables. Raises DataError for what is no HDF5, or is cut short; StoreError."""
    url = store.url_of(entry.path)
    pages: PagedFile | None = None
    with contextlib.ExitStack() as stack:
        if isinstance(store, FileStore):
            opened: Any = stack.enter_context(store.open(entry.path))
        else:
            pages = PagedFile(lambda start, length: store.read(entry.path, start, length), entry.size_bytes)
            pages.prefetch([0, max(0, entry.size_bytes - 1)])
            opened = pages
        try:
            file = stack.enter_context(h5py.File(opened, "r"))
            return _survey(file, entry, pages)
        except (OSError, RuntimeError, KeyError, ValueError) as error:
            raise DataError(f"{url}: {_reason(error, entry)}; copy it again from where it came from") from error


def _reason(error: BaseException, entry: Entry) -> str:
    text = " ".join(str(error).split())
    if "truncated file" in text:
        return f"cut short: it has {entry.size_bytes:,} bytes and says of itself that there are more ({text})"
    if "signature" in text:
        return f"not an HDF5 file ({entry.size_bytes:,} bytes)"
    return f"its tables cannot be read ({text[:300]})"


def _survey(file: h5py.File, entry: Entry, pages: PagedFile | None) -> Survey:
    names = sorted(
        (name for name in file if trial_number(name) is not None), key=lambda name: (trial_number(name) or 0, name)
    )
    if pages is not None:
        pages.prefetch(_addresses(file, names))
    trials, problems = [], {}
    for name in names:
        group = file.get(name)
        if not isinstance(group, h5py.Group):
            problems[name] = "is no group"
            trials.append(_empty(name))
            continue
        try:
            trials.append(_trial(name, group))
        except DataError as error:
            problems[name] = str(error)
            trials.append(_empty(name))
        except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
            problems[name] = _reason(error, entry)
            trials.append(_empty(name))
    return Survey(entry.path, trials, problems)


def _addresses(file: h5py.File, names: Sequence[str]) -> Iterator[int]:
    """Where each group's tables begin, from the root's own tables alone."""
    for name in names:
        with contextlib.suppress(Exception):  # a soft link: it will be found the slow way
            address = file.id.links.get_info(name.encode()).u
            if isinstance(address, int):
                yield address


def _trial(name: str, group: h5py.Group) -> Trial:
    attributes = group.attrs
    features = group.get(FEATURES)
    length, phoneme_length = _whole(attributes.get("seq_len")), _whole(attributes.get("seq_len_phoneme"))
    return Trial(
        name=name,
        features=locate(features) if isinstance(features, h5py.Dataset) else None,
        n_time_steps=_whole(attributes.get("n_time_steps")),
        labels=_labels(group, LABELS, length),
        label_length=length,
        phoneme_labels=_labels(group, PHONEME_LABELS, phoneme_length),
        phoneme_length=phoneme_length,
        transcription=_characters(group),
        sentence=_text(attributes.get("sentence_label")),
        block=_whole(attributes.get("block_num")),
        number=_whole(attributes.get("trial_num")),
    )


def _empty(name: str) -> Trial:
    return Trial(name, None, None, None, None, None, None, None, None, None, None)


def _labels(group: h5py.Group, name: str, length: int | None) -> np.ndarray | None:
    """As many as the attribute says; all but the padding where there is no attribute."""
    dataset = group.get(name)
    if not isinstance(dataset, h5py.Dataset):
        return None
    values = np.asarray(dataset[()]).reshape(-1)
    if values.dtype.kind not in "iu" and not np.array_equal(values, values.astype(np.int64)):
        raise DataError(f"{dataset.name}: holds {values.dtype}, not whole numbers; write it as int32")
    kept = values[:length] if length is not None else np.trim_zeros(values, "b")
    return kept.astype(np.int64)


def _characters(group: h5py.Group) -> str | None:
    dataset = group.get(TRANSCRIPTION)
    if not isinstance(dataset, h5py.Dataset):
        return None
    codes = np.trim_zeros(np.asarray(dataset[()]).reshape(-1).astype(np.int64), "b")
    return "".join(chr(code) if 0 < code < 0x110000 and not 0xD800 <= code < 0xE000 else "�" for code in codes.tolist())


def _whole(value: Any) -> int | None:
    return None if value is None else int(np.asarray(value).reshape(-1)[0])


def _text(value: Any) -> str | None:
    if isinstance(value, np.ndarray):
        value = value.reshape(-1)[0] if value.size else None
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if value is None or isinstance(value, h5py.Empty):
        return None
    return str(value).encode("utf-8", "surrogateescape").decode("utf-8", "replace")  # h5py keeps bad bytes that way
