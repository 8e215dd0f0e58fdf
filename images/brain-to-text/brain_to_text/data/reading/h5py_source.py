"""`--reader h5py`: read trials with h5py, over s3fs or from files, in worker processes or in a thread.

This is the compatibility mode. Sampler, read-ahead, caches and checks are the same as with byte ranges. It is far
slower, because h5py walks the tables of the file for each trial.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from brain_to_text.data.reading.h5py_files import H5Files
from brain_to_text.data.reading.read_request import (
    AccessDenied,
    ObjectReplaced,
    ReadRequest,
    ReadResponse,
    TransientError,
)
from brain_to_text.data.reading.source import Retries, Source, changed_error, read_error, replaced_error
from brain_to_text.data.schema import TrialRef
from estiba.errors import EstibaError, StoreError
from estiba.processes import Worker, WorkerDied
from estiba.storage import FileStore, Store
from estiba.storage.s3 import S3ObjectStore

MAX_DEATHS = 3
"""How many worker processes may die while reading the same trial before the run ends."""


class H5pySource(Source):
    """Reads in `workers` processes, which are started when needed; 0 reads in a thread of this process."""

    def __init__(self, store: Store, workers: int) -> None:
        super().__init__()
        self._store = store
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(max(1, workers), "brain-h5py")
        self._files = None if workers else H5Files(self._closing)
        self._thread_local = threading.local()
        """`worker` is the worker process of a thread in the pool."""
        self._workers: set[Worker] = set()

    def fetch(self, ref: TrialRef) -> Future[Any]:
        """Start to read float32[T, C]. Raises RuntimeError after `close`."""
        if self._closing.is_set():
            raise RuntimeError("a trial was requested after the source was closed")
        return self._pool.submit(self._read, ref)

    def decode(self, ref: TrialRef, fetched: Any) -> np.ndarray:
        values: np.ndarray = fetched
        assert values.shape == ref.layout.shape
        return values

    @property
    def pids(self) -> list[int]:
        """The process ids of the running workers."""
        with self._lock:
            return [worker.pid for worker in self._workers]

    def close(self) -> None:
        """Abandon reads in progress: kill worker processes, and abort the read in a thread."""
        with self._lock:
            self._closing.set()
            for worker in self._workers:
                worker.kill()
        self._pool.shutdown(wait=self._files is not None, cancel_futures=True)
        if self._files is not None:
            # The garbage collector could deadlock with another read (h5py_files.py).
            self._files.close_all()

    def _request_for(self, ref: TrialRef) -> ReadRequest:
        if isinstance(self._store, S3ObjectStore):
            location = "/".join(part for part in (self._store.bucket, self._store.prefix, ref.path) if part)
        else:
            assert isinstance(self._store, FileStore)
            location = str(self._store.path_of(ref.path))
        layout = ref.layout
        return ReadRequest(location, ref.url, ref.version, ref.trial.name, ref.name, layout.shape, layout.size_bytes)

    def _read(self, ref: TrialRef) -> np.ndarray:
        """Read a trial, with the same retries as for byte ranges. Raises the reason if it cannot be read."""
        request, retries, deaths = self._request_for(ref), Retries(), 0
        while True:
            try:
                result = self._attempt(request)
            except WorkerDied as error:
                self._reset()
                deaths += 1
                if deaths >= MAX_DEATHS and not self._closing.is_set():
                    raise EstibaError(
                        f"{ref.url}: {ref.name} cannot be read: {deaths} processes died reading it ({error}); run "
                        "again with --num-dataloader-workers 1, or with --reader ranges"
                    ) from None
                result = TransientError(str(error))
            if isinstance(result, np.ndarray):
                return result
            if isinstance(result, ObjectReplaced):
                current = str(result)
                replaced = changed_error(ref, current) if current else replaced_error(self._store, ref, retries)
                if replaced is not None:
                    raise replaced
                result = TransientError("a response without the ETag of the indexed version")
            is_denied = isinstance(result, AccessDenied)
            if not is_denied and not isinstance(result, TransientError):
                raise result
            if not (retries.may_renew() if is_denied else retries.may_repeat()):
                raise read_error(ref, str(result), denied=is_denied)
            if is_denied:
                self._reset()
            with self._lock:
                self.counts.renewals += is_denied
                self.counts.retries += 1
            if self._closing.wait(retries.next_pause_s()):
                raise StoreError(f"{ref.url}: {ref.name} was not read, because the data set was closed")

    def _attempt(self, request: ReadRequest) -> np.ndarray | Exception:
        if self._files is not None:
            response = self._files.read(request)
        else:
            with self._lock:
                if self._closing.is_set():
                    return TransientError("closed")
                if getattr(self._thread_local, "worker", None) is None:
                    target = "brain_to_text.data.reading.h5py_files:make_reader"
                    self._thread_local.worker = Worker(target, name="the process that reads HDF5 files")
                    self._workers.add(self._thread_local.worker)
            response = self._thread_local.worker.ask(request)
            assert isinstance(response, ReadResponse)
        with self._lock:
            self.counts.gets += response.gets
            self.counts.bytes_fetched += response.bytes_fetched
        return response.result

    def _reset(self) -> None:
        """Drop open files and this thread's worker process. The next read starts with the current credentials."""
        if self._files is not None:
            self._files.close_all()
        elif (worker := self._thread_local.worker) is not None:
            self._thread_local.worker = None
            with self._lock:
                self._workers.discard(worker)
            worker.kill()
