"""One HDF5 file's trials: what the index says of them. Run once for each object (surveyors.py)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np

from brain_to_text.indexing.hdf5 import locate, refuse_elsewhere
from brain_to_text.indexing.paged import PagedFile
from brain_to_text.indexing.schema import (
    FEATURES,
    LABELS,
    MAX_LABELS,
    PHONEME_LABELS,
    TRANSCRIPTION,
    Trial,
    trial_number,
)
from estiba.errors import DataError, EstibaError, StoreError
from estiba.store import Entry, FileStore, Store

AGAIN = "copy it again from where it came from"
WRITTEN, WRITTEN_AND_READ = 1, 4
"""Flags in the superblock of HDF5's file format, version 3."""
MOST_LABELS = 2**20
"""More than anybody says in a trial: such a size is damage, and would fill the memory."""


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
            opened.seek(file.userblock_size)
            _refuse_unfinished(opened.read(12), url)
            return _survey(file, entry.path, pages)
        except EstibaError:
            raise
        except MemoryError:
            raise DataError(
                f"{url}: its tables ask for more memory than there is; {AGAIN}, or give the job more"
            ) from None
        except Exception as error:  # of a file whose tables are damaged h5py raises whatever it comes upon
            if isinstance(error, OSError) and error.errno:
                raise StoreError(f"{url}: cannot be read ({error.strerror}); check the disk and the mount") from error
            raise DataError(f"{url}: {_reason(error, entry)}") from error


def _refuse_unfinished(superblock: bytes, url: str) -> None:
    """Raises DataError where the flags say that somebody writes it; h5py looks at them in files of its own only."""
    if superblock[8] >= 3 and superblock[11] & (WRITTEN | WRITTEN_AND_READ):
        raise DataError(
            f"{url}: is being written, or its writer was killed before it closed it; wait for it, or copy it again, or "
            "where it is known to be whole, run `h5clear -s` on it"
        )


def _reason(error: BaseException, entry: Entry) -> str:
    text = " ".join(str(error).split())
    if "truncated file" in text:
        return f"cut short: it has {entry.size_bytes:,} bytes and says of itself that there are more ({text}); {AGAIN}"
    if "file signature not found" in text:
        return f"not an HDF5 file ({entry.size_bytes:,} bytes); {AGAIN}"
    return f"its tables cannot be read ({_short(error)}); {AGAIN}"


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _survey(file: h5py.File, path: str, pages: PagedFile | None) -> Survey:
    # A name that is no text comes as bytes.
    names = sorted(
        (name for name in file if isinstance(name, str) and trial_number(name) is not None),
        key=lambda name: (trial_number(name) or 0, name),
    )
    if pages is not None:
        pages.prefetch(_addresses(file, names))
    trials, problems = [], {}
    for name in names:
        try:
            group = _child(file, name)
            if not isinstance(group, h5py.Group):
                raise DataError("is no group; write it anew")
            trials.append(_trial(name, group))
            continue
        except DataError as error:
            problems[name] = str(error)
        except (EstibaError, MemoryError):
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno:  # of the disk and not of HDF5: the next time it may be read
                raise
            problems[name] = f"its tables cannot be read ({_short(error)}); copy the file again"
        trials.append(_empty(name))
    return Survey(path, trials, problems)


def _child(group: h5py.Group, name: str) -> Any:
    """The object of this name; None where there is none. Raises DataError for one that is in another file.

    h5py would look for that one in this very file, and find another trial's values there.
    """
    link = group.get(name, getlink=True)
    if link is None:
        return None
    where = f"{group.name.rstrip('/')}/{name}"
    if isinstance(link, h5py.ExternalLink):
        raise DataError(f"{where}: is a link to {link.filename}, another file; write it anew with h5repack --merge")
    if isinstance(link, h5py.SoftLink):
        try:
            found = h5py.h5o.open(group.id, name.encode(), _one_link())
        except KeyError as error:
            raise DataError(
                f"{where}: is a link to {link.path}, which leads nowhere or further on ({_short(error)}); write it anew"
            ) from None
        return h5py.Group(found) if isinstance(found, h5py.h5g.GroupID) else h5py.Dataset(found)
    return group[name]


def _one_link() -> Any:
    """Opens what a soft link leads to, unless that is a link once more."""
    access = h5py.h5p.create(h5py.h5p.LINK_ACCESS)
    access.set_nlinks(1)
    return access


def _dataset(group: h5py.Group, name: str) -> h5py.Dataset | None:
    found = _child(group, name)
    return found if isinstance(found, h5py.Dataset) else None


def _addresses(file: h5py.File, names: Sequence[str]) -> Iterator[int]:
    """Where each group's tables begin, from the root's own tables alone."""
    for name in names:
        with contextlib.suppress(Exception):  # a soft link: it will be found the slow way
            address = file.id.links.get_info(name.encode()).u
            if isinstance(address, int):
                yield address


def _trial(name: str, group: h5py.Group) -> Trial:
    features = _dataset(group, FEATURES)
    length, phoneme_length = _whole(group, "seq_len"), _whole(group, "seq_len_phoneme")
    return Trial(
        name=name,
        features=None if features is None else locate(features),
        n_time_steps=_whole(group, "n_time_steps"),
        labels=_labels(group, LABELS, length),
        label_length=length,
        phoneme_labels=_labels(group, PHONEME_LABELS, phoneme_length),
        phoneme_length=phoneme_length,
        transcription=_characters(group),
        sentence=_text(group.attrs.get("sentence_label")),
        block=_whole(group, "block_num"),
        number=_whole(group, "trial_num"),
    )


def _empty(name: str) -> Trial:
    return Trial(name, None, None, None, None, None, None, None, None, None, None)


def _labels(group: h5py.Group, name: str, length: int | None) -> np.ndarray | None:
    """As many as the attribute says; all but the padding where there is no attribute."""
    dataset = _dataset(group, name)
    if dataset is None:
        return None
    values = _numbers(dataset)
    return values[:length] if length is not None else np.trim_zeros(values, "b")


def _numbers(dataset: h5py.Dataset) -> np.ndarray:
    """int64[L]. Raises DataError for anything else."""
    refuse_elsewhere(dataset)
    if dataset.size is None or dataset.size > MOST_LABELS:
        raise DataError(f"{dataset.name}: has the shape {dataset.shape}, and up to {MAX_LABELS} labels were expected")
    values = np.asarray(dataset[()]).reshape(-1)
    with np.errstate(invalid="ignore"):
        whole = values.astype(np.int64) if values.dtype.kind in "iufb" else None
    if whole is None or not np.array_equal(values, whole):
        raise DataError(f"{dataset.name}: holds {dataset.dtype}, not whole numbers; write it as int32")
    return whole


def _characters(group: h5py.Group) -> str | None:
    dataset = _dataset(group, TRANSCRIPTION)
    if dataset is None:
        return None
    if dataset.dtype.kind in "SO" and dataset.size == 1:
        return _text(dataset[()])
    codes = np.trim_zeros(_numbers(dataset), "b")
    return "".join(chr(code) if 0 < code < 0x110000 and not 0xD800 <= code < 0xE000 else "�" for code in codes.tolist())


def _whole(group: h5py.Group, name: str) -> int | None:
    """An attribute. Raises DataError for one that is no whole number."""
    value = group.attrs.get(name)
    if value is None:
        return None
    try:
        (one,) = np.asarray(value).reshape(-1).tolist()
        whole = int(one)
        if isinstance(one, (str, bytes)) or one == whole:
            return whole
    except (ValueError, TypeError, OverflowError):
        pass
    raise DataError(f"its attribute {name} is {str(value)[:40]!r}, not a whole number; mend the attribute")


def _text(value: Any) -> str | None:
    if isinstance(value, np.ndarray):
        value = value.reshape(-1)[0] if value.size else None
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if value is None or isinstance(value, h5py.Empty):
        return None
    return str(value).encode("utf-8", "surrogateescape").decode("utf-8", "replace")  # h5py keeps bad bytes that way
