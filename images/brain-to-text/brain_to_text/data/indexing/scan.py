"""Scan an HDF5 file for everything that the index records about its trials. Runs once per object (scan_pool.py)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np
from obstore.exceptions import PreconditionError

from brain_to_text.data.indexing.hdf5 import locate, refuse_external
from brain_to_text.data.indexing.paged_file import PagedFile
from brain_to_text.data.reading.source import Retries
from brain_to_text.data.schema import FEATURES, LABELS, MAX_LABELS, PHONEME_LABELS, TRANSCRIPTION, Trial, trial_number
from estiba.errors import DataError, EstibaError, StoreError
from estiba.storage import Entry, FileStore, Store

COPY_AGAIN = "copy it again from its source"
OPEN_FOR_WRITING, OPEN_FOR_SWMR_WRITING = 1, 4
"""Flags in the superblock of HDF5's file format, version 3."""
MAX_STORED_LABELS = 2**20
"""A larger size means a damaged file, and would exhaust the memory."""


@dataclass(frozen=True)
class ScanResult:
    """The trials of one object, sorted by number, and why some of them cannot be used."""

    path: str
    trials: list[Trial]
    problems: dict[str, str]
    """Trial name -> why its values cannot be read by byte ranges."""


def scan_object(store: Store, entry: Entry) -> ScanResult:
    """Scan one object. Raises DataError for a file that is truncated or not HDF5; StoreError."""
    url = store.url_of(entry.path)
    pages: PagedFile | None = None
    with contextlib.ExitStack() as stack:
        if isinstance(store, FileStore):
            opened: Any = stack.enter_context(store.open(entry.path))
        else:
            pages = PagedFile(lambda start, length: _read(store, entry, start, length), entry.size_bytes)
            pages.prefetch([0, max(0, entry.size_bytes - 1)])
            opened = pages
        try:
            file = stack.enter_context(h5py.File(opened, "r"))
            opened.seek(file.userblock_size)
            _check_closed(opened.read(12), url)
            return _scan(file, entry.path, pages)
        except EstibaError:
            raise
        except MemoryError:
            raise DataError(
                f"{url}: its tables need more memory than there is; {COPY_AGAIN}, or give the job more memory"
            ) from None
        except Exception as error:  # h5py raises almost anything for damaged tables
            if isinstance(error, OSError) and error.errno:
                raise StoreError(f"{url}: cannot be read ({error.strerror}); check the disk and the mount") from error
            raise DataError(f"{url}: {_reason(error, entry)}") from error


def _read(store: Store, entry: Entry, start: int, length: int) -> bytes:
    """Read a range. After a 404 or 412, try again while the object is still there as it was listed."""
    retries = Retries()
    while True:
        try:
            return store.read(entry.path, start, length)
        except (StoreError, PreconditionError) as error:
            is_absent = isinstance(error, PreconditionError) or isinstance(error.__cause__, FileNotFoundError)
            if not is_absent or store.head(entry.path) != entry or not retries.may_repeat():
                raise
        time.sleep(retries.next_pause_s())


def _check_closed(superblock: bytes, url: str) -> None:
    """Raises DataError for a file flagged as open for writing. h5py does not check this for Python file objects."""
    if superblock[8] >= 3 and superblock[11] & (OPEN_FOR_WRITING | OPEN_FOR_SWMR_WRITING):
        raise DataError(
            f"{url}: is being written, or its writer was killed before closing it; wait for the writer or copy the "
            "file again. If it is complete, run `h5clear -s` on it"
        )


def _reason(error: BaseException, entry: Entry) -> str:
    text = " ".join(str(error).split())
    if "truncated file" in text:
        return f"is truncated: it has {entry.size_bytes:,} bytes, fewer than its header says ({text}); {COPY_AGAIN}"
    if "file signature not found" in text:
        return f"is not an HDF5 file ({entry.size_bytes:,} bytes); {COPY_AGAIN}"
    return f"its tables cannot be read ({_one_line(error)}); {COPY_AGAIN}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _scan(file: h5py.File, path: str, pages: PagedFile | None) -> ScanResult:
    # A name that is not valid text is bytes in h5py.
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
                raise DataError("is not a group; rewrite it")
            trials.append(_trial(name, group))
            continue
        except DataError as error:
            problems[name] = str(error)
        except (EstibaError, MemoryError):
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno:  # the disk failed, so another attempt may succeed
                raise
            problems[name] = f"its tables cannot be read ({_one_line(error)}); copy the file again"
        trials.append(Trial(name))
    return ScanResult(path, trials, problems)


def _child(group: h5py.Group, name: str) -> Any:
    """Return the member of this name, or None. Raises DataError for a link to another file.

    h5py would look for the link's target in this file, and return the values of another trial.
    """
    link = group.get(name, getlink=True)
    if link is None:
        return None
    path = f"{group.name.rstrip('/')}/{name}"
    if isinstance(link, h5py.ExternalLink):
        raise DataError(f"{path}: is a link to another file, {link.filename}; rewrite it with h5repack --merge")
    if isinstance(link, h5py.SoftLink):
        access = h5py.h5p.create(h5py.h5p.LINK_ACCESS)
        access.set_nlinks(1)  # do not follow a link to another link
        try:
            target = h5py.h5o.open(group.id, name.encode(), access)
        except KeyError as error:
            raise DataError(
                f"{path}: is a link to {link.path}, which does not exist or is another link ({_one_line(error)}); "
                "rewrite it"
            ) from None
        return h5py.Group(target) if isinstance(target, h5py.h5g.GroupID) else h5py.Dataset(target)
    return group[name]


def _dataset(group: h5py.Group, name: str) -> h5py.Dataset | None:
    child = _child(group, name)
    return child if isinstance(child, h5py.Dataset) else None


def _addresses(file: h5py.File, names: Sequence[str]) -> Iterator[int]:
    """Yield where the tables of each group start, which is stored in the tables of the root group."""
    for name in names:
        with contextlib.suppress(Exception):  # a soft link has no address; following it later costs one request
            address = file.id.links.get_info(name.encode()).u
            if isinstance(address, int):
                yield address


def _trial(name: str, group: h5py.Group) -> Trial:
    features = _dataset(group, FEATURES)
    length, phoneme_length = _integer(group, "seq_len"), _integer(group, "seq_len_phoneme")
    return Trial(
        name=name,
        features=None if features is None else locate(features),
        n_time_steps=_integer(group, "n_time_steps"),
        labels=_labels(group, LABELS, length),
        label_length=length,
        phoneme_labels=_labels(group, PHONEME_LABELS, phoneme_length),
        phoneme_length=phoneme_length,
        transcription=_characters(group),
        sentence=_text(group.attrs.get("sentence_label")),
        block=_integer(group, "block_num"),
        number=_integer(group, "trial_num"),
    )


def _labels(group: h5py.Group, name: str, length: int | None) -> np.ndarray | None:
    """Return the first `length` labels, or all labels without padding if `length` is None."""
    dataset = _dataset(group, name)
    if dataset is None:
        return None
    values = _integers(dataset)
    return values[:length] if length is not None else np.trim_zeros(values, "b")


def _integers(dataset: h5py.Dataset) -> np.ndarray:
    """Read int64[L]. Raises DataError for values that are not whole numbers."""
    refuse_external(dataset)
    if dataset.size is None or dataset.size > MAX_STORED_LABELS:
        raise DataError(f"{dataset.name}: has shape {dataset.shape}, but up to {MAX_LABELS} labels were expected")
    values = np.asarray(dataset[()]).reshape(-1)
    with np.errstate(invalid="ignore"):
        integers = values.astype(np.int64) if values.dtype.kind in "iufb" else None
    if integers is None or not np.array_equal(values, integers):
        raise DataError(f"{dataset.name}: holds {dataset.dtype}, not whole numbers; write it as int32")
    return integers


def _characters(group: h5py.Group) -> str | None:
    dataset = _dataset(group, TRANSCRIPTION)
    if dataset is None:
        return None
    if dataset.dtype.kind in "SO" and dataset.size == 1:
        return _text(dataset[()])
    codes = np.trim_zeros(_integers(dataset), "b")
    return "".join(
        chr(code) if 0 < code < 0x110000 and not 0xD800 <= code < 0xE000 else "\ufffd" for code in codes.tolist()
    )


def _integer(group: h5py.Group, name: str) -> int | None:
    """Return an attribute, or None. Raises DataError if it is not a whole number."""
    value = group.attrs.get(name)
    if value is None:
        return None
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        (scalar,) = np.asarray(value).reshape(-1).tolist()
        integer = int(scalar)
        if isinstance(scalar, (str, bytes)) or scalar == integer:
            return integer
    raise DataError(f"its attribute {name} is {str(value)[:40]!r}, not a whole number; correct the attribute")


def _text(value: Any) -> str | None:
    if isinstance(value, np.ndarray):
        value = value.reshape(-1)[0] if value.size else None
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if value is None or isinstance(value, h5py.Empty):
        return None
    return (
        str(value).encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    )  # h5py returns invalid bytes as surrogates
