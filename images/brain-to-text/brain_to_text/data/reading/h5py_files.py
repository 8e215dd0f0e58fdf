"""Read trials with h5py from files that are kept open, for the compatibility mode (h5py_source.py).

There is one attempt per request. Errors that another attempt or other credentials may resolve are returned to the
caller as TransientError or AccessDenied. A file must be the version that was indexed.
"""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import h5py
import numpy as np

from brain_to_text.data.reading.read_request import (
    AccessDenied,
    ObjectReplaced,
    ReadRequest,
    ReadResponse,
    RequestLog,
    TransientError,
)
from brain_to_text.data.reading.source import BadTrial
from brain_to_text.data.schema import FEATURES, ObjectVersion
from estiba.errors import DataError, EstibaError, StoreError

MAX_OPEN_FILES = 48
"""Enough for the study's 45 sessions. Opening a file again costs several requests."""


_gc_lock = threading.Lock()
_gc_paused: list[bool] = []
"""One entry per read in progress: whether garbage collection was enabled before the first of them."""


@contextlib.contextmanager
def _gc_pause() -> Iterator[None]:
    """Pause garbage collection while h5py reads.

    Freeing h5py's objects needs h5py's lock. A read holds that lock while it waits for s3fs's thread, so garbage
    collection in that thread would deadlock.
    """
    with _gc_lock:
        _gc_paused.append(_gc_paused[0] if _gc_paused else gc.isenabled())
        gc.disable()
    try:
        yield
    finally:
        with _gc_lock:
            if _gc_paused.pop() and not _gc_paused:
                gc.enable()


class _OpenFile(NamedTuple):
    """A file opened by h5py, and the S3 object that it reads; None for a local file."""

    file: h5py.File
    s3_file: Any

    def check_version(self, version: ObjectVersion) -> None:
        """Raises ObjectReplaced if a local file changed. For an S3 object, every response is checked already."""
        if self.s3_file is None:
            _check_version(os.fstat(self.file.id.get_vfd_handle()), version)

    def close(self) -> None:
        self.file.close()
        if self.s3_file is not None:
            self.s3_file.close()


class H5Files:
    """Reads trials in one thread at a time, and keeps the most recently used files open.

    `closing` aborts a read in progress with a TransientError.
    """

    def __init__(self, closing: threading.Event | None = None) -> None:
        self._closing = closing or threading.Event()
        self._open: OrderedDict[str, _OpenFile] = OrderedDict()
        self._filesystem: Any = None
        self._log = RequestLog()

    def read(self, request: ReadRequest) -> ReadResponse:
        """Read one trial. Errors are returned in the response, not raised."""
        result: np.ndarray | Exception
        self._log.failure = None
        with _gc_pause():
            try:
                result = self._read_values(request)
            except (EstibaError, TransientError, AccessDenied, ObjectReplaced) as error:
                result = error
            except Exception as error:
                result = self._log.failure or _explained(request, error)
        if isinstance(result, Exception):
            result = result.with_traceback(None)  # its frames would keep the failed file alive
            self._close(request.location)
        return ReadResponse(result, *self._log.reset())

    def _read_values(self, request: ReadRequest) -> np.ndarray:
        opened = self._open_file(request)
        opened.check_version(request.version)
        group = opened.file.get(request.trial)
        dataset = group.get(FEATURES) if isinstance(group, h5py.Group) else None
        if not isinstance(dataset, h5py.Dataset) or tuple(dataset.shape) != request.shape:
            problem = "is missing" if dataset is None else f"has shape {list(getattr(dataset, 'shape', ()))}"
            raise DataError(
                f"{request.url}: {request.trial}: {FEATURES} {problem}, but the index has {list(request.shape)}; index "
                "it again: `brain-to-text index LOCATION --rebuild`"
            )
        values = dataset[()]
        opened.check_version(request.version)  # HDF5 returns zeros if the file is truncated during the read
        if opened.s3_file is None:
            self._log.add(dataset.id.get_storage_size())
        with np.errstate(over="ignore"):  # the reader reports infinities
            return np.ascontiguousarray(values, np.float32)

    def _open_file(self, request: ReadRequest) -> _OpenFile:
        opened = self._open.get(request.location)
        if opened is not None and opened.s3_file is not None:
            from brain_to_text.data.reading.s3fs_files import blocks_for

            if blocks_for(request.size_bytes) > opened.s3_file.blocks:
                self._close(request.location)
                opened = None
        if opened is None:
            while len(self._open) >= MAX_OPEN_FILES:
                self._close(next(iter(self._open)))
            if request.version.kind == "etag":
                opened = self._open_object(request)
            else:
                _check_local_file(request)
                opened = _OpenFile(h5py.File(request.location, "r", locking=False), None)
            self._open[request.location] = opened
        self._open.move_to_end(request.location)
        return opened

    def _open_object(self, request: ReadRequest) -> _OpenFile:
        # Takes a second to import, and only S3 needs it.
        from brain_to_text.data.reading.s3fs_files import PinnedFile, blocks_for, filesystem

        if self._filesystem is None:
            self._filesystem = filesystem()
        blocks = blocks_for(request.size_bytes)
        s3_file = PinnedFile(self._filesystem, request.location, request.version, blocks, self._log, self._closing)
        try:
            return _OpenFile(h5py.File(s3_file, "r"), s3_file)
        except BaseException:
            s3_file.close()
            raise

    def _close(self, location: str) -> None:
        if (opened := self._open.pop(location, None)) is not None:
            opened.close()

    def close_all(self) -> None:
        """Close all files. Later reads use the credentials that are current then."""
        for location in list(self._open):
            self._close(location)
        self._filesystem = None


def make_reader() -> Callable[[ReadRequest], ReadResponse]:
    """Return the function that a worker process runs for each request."""
    return H5Files().read


def _check_version(status: os.stat_result, version: ObjectVersion) -> None:
    if not version.matches(status):
        raise ObjectReplaced(str(ObjectVersion.from_stat(status)))


def _check_local_file(request: ReadRequest) -> None:
    """Check a file before h5py opens it, whose errors hardly distinguish a missing file from a truncated one."""
    try:
        with open(request.location, "rb", buffering=0) as file:
            status = os.fstat(file.fileno())
    except OSError as error:
        raise StoreError(
            f"{request.url}: {request.name} cannot be read ({error.strerror}) by user {os.getuid()}; check the path "
            "and its permissions"
        ) from None
    _check_version(status, request.version)


def _explained(request: ReadRequest, error: Exception) -> Exception:
    """Return why h5py failed: the file changed or cannot be read, or else its stored values do not decode."""
    if request.version.kind == "mtime":
        try:
            _check_local_file(request)
        except (ObjectReplaced, StoreError) as reason:
            return reason
    text = " ".join(str(error).split())[:400] or type(error).__name__
    if request.version.kind == "mtime" and "errno = " in text:  # from the operating system, not from a filter
        return StoreError(f"{request.url}: {request.name} cannot be read ({text}); check the disk and the mount")
    return BadTrial(f"{request.url}: {request.trial}: {text}; copy the file again")
