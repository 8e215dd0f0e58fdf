"""Trials read by h5py itself, out of files that are kept open: the compatibility mode's hands (h5py_source.py).

One attempt at a time and no patience: what may go better another time is answered as Again or Refused, and whoever
asked decides. A file is the version that was indexed, or is Replaced.
"""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np

from brain_to_text.indexing.index import Pin
from brain_to_text.indexing.schema import FEATURES
from estiba.errors import DataError, EstibaError, StoreError

if TYPE_CHECKING:
    from brain_to_text.reading.s3fs_files import PinnedFile

OPEN_FILES = 48
"""The study has 45 sessions: opening one again costs a handful of requests."""


@dataclass(frozen=True)
class Order:
    """One trial that is wanted."""

    place: str
    """A file's path, or BUCKET/KEY."""
    url: str
    pin: Pin
    trial: str
    """'trial_0007', its group."""
    name: str
    """'t15.2023.08.11/trial_0007'; with `url` named in errors."""
    shape: tuple[int, ...]
    """(T, C) as the index has it."""
    size_bytes: int
    """Of its values."""


@dataclass(frozen=True)
class Answer:
    """float32[T, C], or why not; and what was asked of the store since the last answer."""

    result: np.ndarray | Exception
    gets: int
    bytes_fetched: int


class Again(Exception):
    """A network, a service or a short answer: it may go well another time."""


class Refused(Exception):
    """Denied, or expired: other credentials may help."""


class Replaced(Exception):
    """Another object is there now, or none. The text is what was found, where that is known."""


class _Uncollected:
    """No garbage is collected while h5py reads.

    h5py's objects need h5py's lock to go. A read holds that lock and waits for s3fs's thread; were old objects
    collected in that thread, both would wait for good.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reads, self._was_on = 0, False

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if not self._reads:
                self._was_on = gc.isenabled()
                gc.disable()
            self._reads += 1
        try:
            yield
        finally:
            with self._lock:
                self._reads -= 1
                if not self._reads and self._was_on:
                    gc.enable()


_uncollected = _Uncollected()


class _Opened:
    """One file that h5py has open: of a file system, or over s3fs."""

    def __init__(self, file: h5py.File, pinned: PinnedFile | None) -> None:
        self.file, self.pinned = file, pinned

    def has_room(self, order: Order) -> bool:
        """Whether the blocks that are kept in memory do for this trial."""
        if self.pinned is None:
            return True
        from brain_to_text.reading.s3fs_files import blocks_for

        return blocks_for(order.size_bytes) <= self.pinned.blocks

    def check(self, pin: Pin) -> None:
        """Raises Replaced where a local file was written to. Of an object every single answer is checked."""
        if self.pinned is None:
            _check(os.fstat(self.file.id.get_vfd_handle()), pin)

    def close(self) -> None:
        self.file.close()
        if self.pinned is not None:
            self.pinned.close()


class H5Files:
    """Reads trials; of one thread at a time. Keeps the files that were used last open.

    `closing` ends a read that is under way, as Again.
    """

    def __init__(self, closing: threading.Event | None = None, open_files: int = OPEN_FILES) -> None:
        self._closing, self._limit = closing or threading.Event(), open_files
        self._open: OrderedDict[str, _Opened] = OrderedDict()
        self._filesystem: Any = None
        self._gets = self._bytes = 0

    def read(self, order: Order) -> Answer:
        """Raises nothing: an error is an answer."""
        result: np.ndarray | Exception
        pinned: list[PinnedFile] = []
        with _uncollected():
            try:
                result = self._values(order, pinned)
            except (EstibaError, Again, Refused, Replaced) as error:
                result = error
            except Exception as error:
                result = _explained(order, error, pinned[0].failure if pinned else None)
        if isinstance(result, Exception):
            result = result.with_traceback(None)  # whose frames would keep a failed file alive
            self._drop(order.place)
        return self._counted(result)

    def _counted(self, result: np.ndarray | Exception) -> Answer:
        for opened in self._open.values():
            if opened.pinned is not None:
                self._note(opened.pinned)
        answer = Answer(result, self._gets, self._bytes)
        self._gets = self._bytes = 0
        return answer

    def _note(self, pinned: PinnedFile) -> None:
        gets, size_bytes = pinned.take_counts()
        self._gets += gets
        self._bytes += size_bytes

    def _values(self, order: Order, pinned: list[PinnedFile]) -> np.ndarray:
        opened = self._open.get(order.place)
        if opened is not None and not opened.has_room(order):
            self._drop(order.place)
            opened = None
        if opened is None:
            opened = self._opened(order, pinned)
        elif opened.pinned is not None:
            pinned.append(opened.pinned)
        self._open.move_to_end(order.place)
        opened.check(order.pin)
        group = opened.file.get(order.trial)
        dataset = group.get(FEATURES) if isinstance(group, h5py.Group) else None
        if not isinstance(dataset, h5py.Dataset) or tuple(dataset.shape) != order.shape:
            found = "is not there" if dataset is None else f"has shape {list(getattr(dataset, 'shape', ()))}"
            raise DataError(
                f"{order.url}: {order.trial}: {FEATURES} {found}, where the index has {list(order.shape)}; index it "
                "anew with the command `index LOCATION --rebuild`"
            )
        values = dataset[()]
        opened.check(order.pin)  # HDF5 gives zeros for what is cut off a file under its hands
        if opened.pinned is None:
            self._gets += 1
            self._bytes += dataset.id.get_storage_size()
        with np.errstate(over="ignore"):  # an infinity is found and named where it is used
            return np.ascontiguousarray(values, np.float32)

    def _opened(self, order: Order, pinned: list[PinnedFile]) -> _Opened:
        while len(self._open) >= self._limit:
            self._drop(next(iter(self._open)))
        if order.pin.kind == "etag":
            opened = self._opened_object(order, pinned)
        else:
            _check_path(order)
            opened = _Opened(h5py.File(order.place, "r", locking=False), None)
        self._open[order.place] = opened
        return opened

    def _opened_object(self, order: Order, pinned: list[PinnedFile]) -> _Opened:
        from brain_to_text.reading.s3fs_files import (  # a second's import, for S3 alone
            PinnedFile,
            blocks_for,
            filesystem,
        )

        if self._filesystem is None:
            self._filesystem = filesystem()
        blocks = blocks_for(order.size_bytes)
        file = PinnedFile(self._filesystem, order.place, order.pin, blocks, self._closing)
        pinned.append(file)
        try:
            return _Opened(h5py.File(file, "r"), file)
        except BaseException:
            self._note(file)
            file.close()
            raise

    def _drop(self, place: str) -> None:
        opened = self._open.pop(place, None)
        if opened is not None:
            if opened.pinned is not None:
                self._note(opened.pinned)
            opened.close()

    def renew(self) -> None:
        """A new file system, with what credentials there are now."""
        for place in list(self._open):
            self._drop(place)
        self._filesystem = None

    close = renew


def answering() -> Callable[[Order], Answer]:
    """What one of the processes does (crew.py)."""
    files = H5Files()
    gc.disable()  # it is done between the reads, so that no read waits for it
    gc.freeze()

    def answer(order: Order) -> Answer:
        found = files.read(order)
        gc.collect()
        return found

    return answer


def _check(status: os.stat_result, pin: Pin) -> None:
    if (status.st_size, str(status.st_mtime_ns)) != (pin.size_bytes, pin.mark):
        raise Replaced(str(Pin("mtime", status.st_size, str(status.st_mtime_ns))))


def _check_path(order: Order) -> None:
    """Before h5py sees it, whose errors for a file that is not there or too short are hard to tell apart."""
    try:
        with open(order.place, "rb", buffering=0) as file:
            status = os.fstat(file.fileno())
    except OSError as error:
        raise StoreError(
            f"{order.url}: {order.name} cannot be read ({error.strerror}); this process runs as user {os.getuid()}"
        ) from None
    _check(status, order.pin)


def _explained(order: Order, error: Exception, failure: Exception | None) -> Exception:
    """What h5py says, or what kept s3fs from giving it the bytes."""
    if failure is not None:
        return failure
    text = " ".join(str(error).split())[:400] or type(error).__name__
    if order.pin.kind == "mtime" and "errno = " in text:  # the system's, and not a filter's
        return StoreError(f"{order.url}: {order.name} cannot be read ({text}); check the disk and the mount")
    return DataError(f"{order.url}: {order.trial}: {text}; copy the file again")
