"""Read the byte ranges that the index names, with many requests in flight, in this process.

S3: one thread with an event loop drives obstore. Each request names the ETag from the index. Failed requests and short
responses are retried for three minutes, with growing pauses. A late response is hedged: a second request is sent, and
the faster response is used. Expired credentials are renewed. Files: a few threads.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import obstore
from obstore.exceptions import BaseError, PreconditionError

from brain_to_text.data.indexing.hdf5 import byte_ranges, decode
from brain_to_text.data.reading.source import BadTrial, Retries, Source, changed_error, read_error, replaced_error
from brain_to_text.data.schema import ObjectVersion, TrialRef
from estiba.errors import StoreError
from estiba.storage import FileStore, Store
from estiba.storage.s3 import S3ObjectStore
from estiba.storage.s3_errors import first_line, is_denied, may_be_expired

MAX_IN_FLIGHT = 48
"""A connection carries about 90 MB/s and a request takes about 25 ms, so 48 requests keep a 10 Gbit/s network busy."""
FILE_THREADS = 4
HEDGE_AFTER_P95 = 2.0
MIN_HEDGE_S = 0.05
HEDGE_SHARE = 0.1
"""Maximum share of requests that are hedged, so that a slow service does not get twice the load."""
LATENCIES_KEPT = 256
LATENCIES_NEEDED = 20


def open_ranges(store: Store) -> RangeSource:
    if isinstance(store, S3ObjectStore):
        return ObjectRanges(store)
    assert isinstance(store, FileStore)
    return FileRanges(store)


class RangeSource(Source):
    """Fetches one buffer per byte range."""

    def decode(self, ref: TrialRef, fetched: Sequence[Any]) -> np.ndarray:
        try:
            return decode(ref.layout, fetched)
        except ValueError as error:
            raise BadTrial(f"{ref.url}: {ref.trial.name}: {error}; copy the file again") from None


class FileRanges(RangeSource):
    """Reads files in a folder. Each is opened once, and its version is checked before each read."""

    def __init__(self, store: FileStore) -> None:
        super().__init__()
        self._store = store
        self._pool = ThreadPoolExecutor(FILE_THREADS, "brain-files")
        self._open: dict[Path, int] = {}
        self._lock = threading.Lock()

    def fetch(self, ref: TrialRef) -> Future[list[Any]]:
        return self._pool.submit(self._fetch, ref)

    def _fetch(self, ref: TrialRef) -> list[Any]:
        path = self._store.path_of(ref.path)
        try:
            with self._lock:
                if path not in self._open:
                    self._open[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            status = os.fstat(self._open[path])
            if not ref.version.matches(status):
                raise changed_error(ref, ObjectVersion.from_stat(status))
            buffers = [_read(self._open[path], start, length, ref) for start, length in byte_ranges(ref.layout)]
        except OSError as error:
            raise StoreError(
                f"{path}: {ref.name} cannot be read ({error.strerror}) by user {os.getuid()}; check the disk, the "
                "mount and the permissions"
            ) from error
        with self._lock:
            self.counts.gets += len(buffers)
            self.counts.bytes_fetched += sum(len(buffer) for buffer in buffers)
        return buffers

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()


def _read(descriptor: int, start: int, length: int, ref: TrialRef) -> np.ndarray:
    """Read into writable memory; os.pread would return immutable bytes."""
    buffer = np.empty(length, np.uint8)
    view, done = memoryview(buffer), 0
    while done < length:
        count = os.preadv(descriptor, [view[done:]], start + done)
        if count == 0:  # truncated since its version was checked
            raise changed_error(ref, ObjectVersion.from_stat(os.fstat(descriptor)))
        done += count
    return buffer


class ObjectRanges(RangeSource):
    """Reads objects in a bucket."""

    def __init__(self, store: S3ObjectStore) -> None:
        super().__init__()
        self._store = store
        self._latencies: deque[float] = deque(maxlen=LATENCIES_KEPT)
        self._responses = 0
        self._hedge_after_s: float | None = None
        self._loop = asyncio.new_event_loop()
        self._in_flight = asyncio.Semaphore(MAX_IN_FLIGHT)
        self._thread = threading.Thread(target=self._run, name="brain-ranges", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    def fetch(self, ref: TrialRef) -> Future[list[Any]]:
        return asyncio.run_coroutine_threadsafe(self._fetch(ref), self._loop)

    def close(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(timeout=5)

    async def _fetch(self, ref: TrialRef) -> list[Any]:
        return list(await asyncio.gather(*(self._get(ref, start, length) for start, length in byte_ranges(ref.layout))))

    async def _get(self, ref: TrialRef, start: int, length: int) -> Any:
        """Get one range, with retries. While it pauses between attempts, other requests may be in flight."""
        retries = Retries()
        while True:
            client = self._store.client
            try:
                async with self._in_flight:
                    return await self._get_hedged(ref, start, length)
            except (PreconditionError, FileNotFoundError, _OtherVersion) as error:
                replaced = await self._loop.run_in_executor(None, replaced_error, self._store, ref, retries)
                if replaced is not None:
                    raise replaced from error
                if not retries.may_repeat():
                    raise read_error(ref, first_line(error), denied=False) from error
                self.counts.retries += 1
            except (BaseError, OSError, _ShortResponse) as error:
                is_short = isinstance(error, _ShortResponse)
                is_expired = not is_short and may_be_expired(error)
                if not (retries.may_renew() if is_expired else retries.may_repeat()):
                    reason = str(error) if is_short else first_line(error)
                    part = f" (bytes {start:,} to {start + length:,})"
                    raise read_error(ref, reason, denied=is_denied(error), part=part) from error
                # S3ObjectStore renews only once for all requests that failed with the same credentials.
                if is_expired and await self._loop.run_in_executor(None, self._store.renew, client):
                    self.counts.renewals += 1
                self.counts.retries += 1
            await asyncio.sleep(retries.next_pause_s())

    async def _get_hedged(self, ref: TrialRef, start: int, length: int) -> Any:
        """Get one range with one request, or if that is late with the faster of two."""

        def send() -> asyncio.Future[Any]:
            task = asyncio.ensure_future(self._get_once(ref, start, length))
            task.add_done_callback(_retrieve_exception)
            return task

        waiting = {send()}
        after_s = self._hedge_after_s
        if self.counts.hedged > HEDGE_SHARE * self.counts.gets:
            after_s = None
        try:
            done, _ = await asyncio.wait(waiting, timeout=after_s)
            if not done:
                self.counts.hedged += 1
                waiting.add(send())
            while True:
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                succeeded = [task for task in done if task.exception() is None]
                if succeeded or not waiting:
                    return (succeeded or [*done])[0].result()
        finally:
            for task in waiting:
                task.cancel()

    async def _get_once(self, ref: TrialRef, start: int, length: int) -> Any:
        started = time.monotonic()
        self.counts.gets += 1
        options: Any = {"range": (start, start + length)}
        expected = ref.version.tag
        if expected:
            options["if_match"] = expected
        response = await obstore.get_async(self._store.client, ref.path, options=options)
        etag = response.meta["e_tag"]
        if expected and etag and etag != expected:  # this store ignores If-Match
            raise _OtherVersion(f"the response has ETag {etag} instead of {expected}")
        data = await response.bytes_async()
        self.counts.bytes_fetched += len(data)
        if len(data) != length:
            raise _ShortResponse(f"got {len(data):,} bytes instead of {length:,}")
        self._record_latency(time.monotonic() - started)
        return data

    def _record_latency(self, latency_s: float) -> None:
        self._latencies.append(latency_s)
        self._responses += 1
        if self._responses >= LATENCIES_NEEDED and (self._responses % 8 == 0 or self._hedge_after_s is None):
            ordered = sorted(self._latencies)
            p95 = ordered[int(0.95 * (len(ordered) - 1))]
            # If more than 5% of responses are slow, p95 is slow too, but the median is not.
            typical = 4 * ordered[len(ordered) // 2]
            self._hedge_after_s = max(MIN_HEDGE_S, min(HEDGE_AFTER_P95 * p95, typical))


class _ShortResponse(Exception):
    """A response with too few bytes."""


class _OtherVersion(Exception):
    """A response of another version of the object, from a store that ignores If-Match."""


def _retrieve_exception(task: asyncio.Future[Any]) -> None:
    """Keep asyncio from reporting the failure of the slower of two requests, which nothing waits for."""
    if not task.cancelled():
        task.exception()
