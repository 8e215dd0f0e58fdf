"""`--reader h5py`: trials by h5py, over s3fs or from files, in processes of their own or in a thread of this one.

The compatibility mode. Everything in front of it is the same: plan, look-ahead, caches, checks. Slower by far than
byte ranges, since each trial costs h5py a walk through the file's tables.
"""

from __future__ import annotations

import atexit
import queue
import random
import threading
import time
from concurrent.futures import Future
from typing import Any

import numpy as np

from brain_to_text.indexing.crew import Died, Worker
from brain_to_text.indexing.index import Pin
from brain_to_text.reading import ranges
from brain_to_text.reading.h5py_files import Again, Answer, H5Files, Order, Refused, Replaced
from brain_to_text.reading.ranges import Counts, changed
from brain_to_text.reading.reader import Known, Source
from estiba.errors import EstibaError, StoreError
from estiba.s3 import S3ObjectStore
from estiba.store import FileStore, Store

DEATHS = 3
"""Processes that one trial may cost before it is to blame."""
LAST_READ_S = 5.0
"""Of a thread, which gives up a request as soon as it sees that it is to end."""


class H5pySource(Source):
    """`workers` processes, started when they are needed; 0 is a thread of this process."""

    def __init__(self, store: Store, workers: int) -> None:
        self.counts = Counts()
        self.store, self.workers = store, workers
        self.closing = threading.Event()
        self.waiting: queue.SimpleQueue[tuple[Known, Future[Any]] | None] = queue.SimpleQueue()
        self.lock = threading.Lock()
        self._hands: list[_Hand] = []
        if workers == 0:
            atexit.register(self.close)

    def fetch(self, known: Known) -> Future[Any]:
        """float32[T, C]. Raises RuntimeError when closed."""
        future: Future[Any] = Future()
        with self.lock:
            if self.closing.is_set():
                raise RuntimeError("asked for a trial after it was closed")
            self.waiting.put((known, future))
            if len(self._hands) < max(1, self.workers):
                self._hands.append(_Hand(self, len(self._hands)))
        return future

    def values(self, known: Known, fetched: Any) -> np.ndarray:
        values: np.ndarray = fetched
        assert known.trial.features is not None and values.shape == known.trial.features.shape
        return values

    @property
    def pids(self) -> list[int]:
        """Of the processes that are there now."""
        with self.lock:
            return [hand.worker.pid for hand in self._hands if hand.worker is not None]

    def close(self) -> None:
        """A read that is under way is given up: a process is ended, a thread ends itself."""
        with self.lock:
            self.closing.set()
            hands = list(self._hands)
            for hand in hands:
                if hand.worker is not None:
                    hand.worker.kill()
        while True:
            try:
                never_begun = self.waiting.get_nowait()
            except queue.Empty:
                break
            if never_begun is not None:
                never_begun[1].cancel()
        for _ in hands:
            self.waiting.put(None)
        if self.workers == 0:
            # A thread that the interpreter's end catches inside of h5py keeps h5py's lock, and the end waits for that.
            for hand in hands:
                hand.thread.join(LAST_READ_S)
            atexit.unregister(self.close)

    def order(self, known: Known) -> Order:
        placement = known.trial.features
        assert placement is not None
        if isinstance(self.store, S3ObjectStore):
            place = "/".join(part for part in (self.store.bucket, self.store.prefix, known.path) if part)
        else:
            assert isinstance(self.store, FileStore)
            place = str(self.store.path_of(known.path))
        return Order(place, known.url, known.pin, known.trial.name, known.name, placement.shape, placement.size_bytes)


class _Hand:
    """A thread that has trials read one after another: by its own process, or by itself."""

    def __init__(self, source: H5pySource, number: int) -> None:
        self._source = source
        self.worker: Worker | None = None
        self._here = H5Files(source.closing) if source.workers == 0 else None
        self._random = random.Random()
        self.thread = threading.Thread(target=self._run, name=f"brain-h5py-{number}", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        source = self._source
        try:
            while (task := source.waiting.get()) is not None:
                known, future = task
                if source.closing.is_set():
                    future.cancel()
                if not future.set_running_or_notify_cancel():
                    continue
                try:
                    future.set_result(self._read(known))
                except BaseException as error:
                    future.set_exception(error)
        finally:
            self._renew()

    def _read(self, known: Known) -> np.ndarray:
        """However often it takes. Raises what the trial cannot be read for."""
        source, order = self._source, self._source.order(known)
        deadline, pause_s = time.monotonic() + ranges.RETRY_S, ranges.FIRST_PAUSE_S
        renewals = deaths = 0
        while True:
            try:
                answer = self._ask(order)
            except Died as error:
                self._renew()
                deaths += 1
                if deaths >= DEATHS and not source.closing.is_set():
                    raise EstibaError(
                        f"{known.url}: {known.name} cannot be read: {deaths} processes died over it, the last of "
                        f"{error}; run again with fewer of them (--num-dataloader-workers 1), or with --reader ranges"
                    ) from None
                result: np.ndarray | Exception = Again(str(error))
            else:
                result = answer.result
            if isinstance(result, np.ndarray):
                return result
            if isinstance(result, Replaced):
                raise self._changed(known, str(result))
            if isinstance(result, Refused):
                renewals += 1
                if renewals > ranges.RENEWALS:
                    raise _explained(known, result)
                self._renew()
                with source.lock:
                    source.counts.renewals += 1
            elif not isinstance(result, Again):
                raise result
            elif time.monotonic() + pause_s > deadline:
                raise _explained(known, result)
            with source.lock:
                source.counts.retries += 1
            if source.closing.wait(pause_s * (0.5 + self._random.random() / 2)):
                raise StoreError(f"{known.url}: {known.name} was not read to its end: the data were closed")
            pause_s = min(pause_s * 2, ranges.LONGEST_PAUSE_S)

    def _ask(self, order: Order) -> Answer:
        if self._here is not None:
            answer = self._here.read(order)
        else:
            with self._source.lock:
                if self._source.closing.is_set():
                    raise Died("closed")
                if self.worker is None:
                    self.worker = Worker("brain_to_text.reading.h5py_files")
                worker = self.worker
            said = worker.ask(order)
            answer = said if isinstance(said, Answer) else Answer(said, 0, 0)
        with self._source.lock:
            self._source.counts.gets += answer.gets
            self._source.counts.bytes_fetched += answer.bytes_fetched
        return answer

    def _renew(self) -> None:
        """Begin anew: with other credentials, or without the process that died."""
        if self._here is not None:
            self._here.renew()
        with self._source.lock:
            worker, self.worker = self.worker, None
        if worker is not None:
            worker.kill()

    def _changed(self, known: Known, found: str) -> EstibaError:
        if found:
            return changed(known.url, known.name, known.pin, found)
        try:
            entry = self._source.store.head(known.path)
        except StoreError as error:
            return error
        now = "no such object" if entry is None else Pin("etag", entry.size_bytes, entry.etag or "")
        return changed(known.url, known.name, known.pin, now)


def _explained(known: Known, result: Exception) -> StoreError:
    what, text = f"{known.url}: {known.name} cannot be read", str(result)
    if "ExpiredToken" in text:
        return StoreError(f"{what}: {text}; renew the credentials, or give the job a role that does")
    if isinstance(result, Refused):
        return StoreError(f"{what}: access denied ({text}); allow this role s3:GetObject")
    return StoreError(
        f"{what}: {text}; tried for {ranges.RETRY_S:.0f} s: check the endpoint and the network, and run again"
    )
