"""Bytes of many objects by range, many requests in flight, from one engine in this process.

S3: one thread with an event loop drives obstore; each request is pinned to the ETag of the index. A failed one is
asked again with growing pauses for three minutes, an answer that is too short counts as failed, one that is late is
asked a second time and the first answer counts, and expired credentials are fetched anew.
Files: a few threads that read into memory of their own.
"""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import obstore
from obstore.exceptions import BaseError, PreconditionError

from brain_to_text.indexing.index import Pin
from estiba.errors import DataError, EstibaError, StoreError
from estiba.s3 import S3ObjectStore
from estiba.s3_errors import first_line, is_denied, may_be_expired
from estiba.store import FileStore, Store

IN_FLIGHT = 48
"""One connection carries some 90 MB/s and a request takes some 25 ms: so many keep a 10 Gbit/s line busy."""
RETRY_S = 180.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0
RENEWALS = 4
"""Of credentials, for one request, before it is called denied."""
FILE_THREADS = 4

HEDGE_AFTER_P95 = 2.0
HEDGE_LEAST_S = 0.05
HEDGE_SHARE = 0.1
"""Of all requests at most, so that a slow service does not get twice the load."""
LATENCIES_KEPT = 256
LATENCIES_NEEDED = 20


@dataclass(frozen=True)
class Request:
    """Pieces of one object, for one trial."""

    path: str
    pin: Pin
    pieces: Sequence[tuple[int, int]]
    """(start, length)."""
    trial: str
    """Named in errors."""


@dataclass
class Counts:
    """What was asked of the store; `bytes_used` are the ones that were wanted."""

    gets: int = 0
    bytes_fetched: int = 0
    retries: int = 0
    hedged: int = 0
    renewals: int = 0


class Ranges(ABC):
    """Where pieces come from. Futures give one buffer for each piece, or raise StoreError or DataError."""

    def __init__(self) -> None:
        self.counts = Counts()

    @abstractmethod
    def fetch(self, request: Request) -> Future[list[Any]]: ...

    @abstractmethod
    def close(self) -> None: ...


class Outage(StoreError):
    """The store does not answer, or no longer knows us: nothing is wrong with the trial that was asked for."""


def open_ranges(store: Store, *, in_flight: int = IN_FLIGHT) -> Ranges:
    if isinstance(store, S3ObjectStore):
        return ObjectRanges(store, in_flight)
    assert isinstance(store, FileStore)
    return FileRanges(store)


def changed(url: str, trial: str, expected: Pin, found: object) -> DataError:
    return DataError(
        f"{url}: is no longer the object that was indexed, at {trial}: expected {expected}; found {found}. Bring the "
        "old one back; or, if the new one is meant, index it anew with the command `index LOCATION --rebuild`"
    )


class FileRanges(Ranges):
    """Files of a folder. Each is opened once and looked at before it is read."""

    def __init__(self, store: FileStore) -> None:
        super().__init__()
        self._store = store
        self._pool = ThreadPoolExecutor(FILE_THREADS, "brain-files")
        self._open: dict[str, int] = {}
        self._lock = threading.Lock()

    def fetch(self, request: Request) -> Future[list[Any]]:
        return self._pool.submit(self._fetch, request)

    def _fetch(self, request: Request) -> list[Any]:
        path = self._store.path_of(request.path)
        descriptor = self._descriptor(request, path)
        status = os.fstat(descriptor)
        if (status.st_size, str(status.st_mtime_ns)) != (request.pin.size_bytes, request.pin.mark):
            now = Pin("mtime", status.st_size, str(status.st_mtime_ns))
            raise changed(str(path), request.trial, request.pin, now)
        found: list[Any] = []
        for start, length in request.pieces:
            buffer = np.empty(length, np.uint8)
            view, done = memoryview(buffer), 0
            while done < length:
                try:
                    count = os.preadv(descriptor, [view[done:]], start + done)
                except OSError as error:
                    raise StoreError(
                        f"{path}: {request.trial} cannot be read ({error.strerror}); check the disk and the mount"
                    ) from error
                if count == 0:
                    raise DataError(
                        f"{path}: ends at byte {start + done:,}, in the middle of {request.trial}; copy it again"
                    )
                done += count
            with self._lock:
                self.counts.gets += 1
                self.counts.bytes_fetched += length
            found.append(buffer)
        return found

    def _descriptor(self, request: Request, path: Path) -> int:
        with self._lock:
            if request.path not in self._open:
                try:
                    self._open[request.path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise StoreError(
                        f"{path}: {request.trial} cannot be read ({error.strerror}); this process runs as user "
                        f"{os.getuid()}"
                    ) from error
            return self._open[request.path]

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()


class ObjectRanges(Ranges):
    """Objects of a bucket."""

    def __init__(self, store: S3ObjectStore, in_flight: int = IN_FLIGHT) -> None:
        super().__init__()
        self._store = store
        self._random = random.Random()
        self._latencies: deque[float] = deque(maxlen=LATENCIES_KEPT)
        self._answers = 0
        self._hedge_after_s: float | None = None
        self._loop = asyncio.new_event_loop()
        self._in_flight = asyncio.Semaphore(in_flight)
        self._thread = threading.Thread(target=self._run, name="brain-ranges", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    def fetch(self, request: Request) -> Future[list[Any]]:
        return asyncio.run_coroutine_threadsafe(self._fetch(request), self._loop)

    def close(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(timeout=5)

    async def _fetch(self, request: Request) -> list[Any]:
        if len(request.pieces) == 1:
            return [await self._piece(request, *request.pieces[0])]
        return list(await asyncio.gather(*(self._piece(request, *piece) for piece in request.pieces)))

    async def _piece(self, request: Request, start: int, length: int) -> Any:
        """One range, however often it takes. Pauses do not hold a place among those in flight."""
        deadline, pause_s, renewals = time.monotonic() + RETRY_S, FIRST_PAUSE_S, 0
        while True:
            client = self._store.client
            try:
                async with self._in_flight:
                    return await self._hedged(request, start, length)
            except asyncio.CancelledError:
                raise
            except (BaseError, OSError, _Short) as error:
                if isinstance(error, (PreconditionError, FileNotFoundError)):
                    raise await self._changed(request) from error
                if not isinstance(error, _Short) and may_be_expired(error):
                    renewals += 1
                    if renewals > RENEWALS:
                        raise self._explained(request, start, length, error) from error
                    await self._renew(client)
                elif time.monotonic() + pause_s > deadline:
                    raise self._explained(request, start, length, error) from error
                self.counts.retries += 1
            await asyncio.sleep(pause_s * (0.5 + self._random.random() / 2))
            pause_s = min(pause_s * 2, LONGEST_PAUSE_S)

    async def _renew(self, client: Any) -> None:
        """New credentials, once for all the requests that failed with the same old ones; S3ObjectStore sees to that."""
        if await self._loop.run_in_executor(None, self._store.renew, client):
            self.counts.renewals += 1

    async def _hedged(self, request: Request, start: int, length: int) -> Any:
        """One answer out of one request, or of two where the first is late."""
        first = asyncio.ensure_future(self._get(request, start, length))
        after = self._hedge_after_s
        if after is None or self.counts.hedged > HEDGE_SHARE * self.counts.gets:
            return await _awaited(first)
        done, _ = await _waited({first}, after)
        if done:
            return first.result()
        self.counts.hedged += 1
        waiting = {first, asyncio.ensure_future(self._get(request, start, length))}
        failure: BaseException | None = None
        while waiting:
            done, waiting = await _waited(waiting, None)
            for task in done:
                error = task.exception()
                if error is None:
                    for other in waiting:
                        other.cancel()
                    return task.result()
                failure = error
        assert failure is not None
        raise failure

    async def _get(self, request: Request, start: int, length: int) -> Any:
        began = time.monotonic()
        self.counts.gets += 1
        options: Any = {"range": (start, start + length)}
        if request.pin.mark:
            options["if_match"] = request.pin.mark
        answer = await obstore.get_async(self._store.client, request.path, options=options)
        etag = answer.meta["e_tag"]
        if request.pin.mark and etag and etag != request.pin.mark:
            raise _Changed(changed(self._store.url_of(request.path), request.trial, request.pin, f"ETag {etag}"))
        data = await answer.bytes_async()
        self.counts.bytes_fetched += len(data)
        if len(data) != length:
            raise _Short(f"{len(data):,} bytes came where {length:,} were asked for")
        self._note(time.monotonic() - began)
        return data

    def _note(self, latency_s: float) -> None:
        self._latencies.append(latency_s)
        self._answers += 1
        if self._answers >= LATENCIES_NEEDED and (self._answers % 8 == 0 or self._hedge_after_s is None):
            ordered = sorted(self._latencies)
            p95 = ordered[int(0.95 * (len(ordered) - 1))]
            # Where more than a few are slow, the 95th of a hundred is itself a slow one; the middle still is not.
            typical = 4 * ordered[len(ordered) // 2]
            self._hedge_after_s = max(HEDGE_LEAST_S, min(HEDGE_AFTER_P95 * p95, typical))

    async def _changed(self, request: Request) -> EstibaError:
        url = self._store.url_of(request.path)
        try:
            entry = await self._loop.run_in_executor(None, self._store.head, request.path)
        except StoreError as error:
            return error
        found = "no such object" if entry is None else Pin("etag", entry.size_bytes, entry.etag or "")
        return changed(url, request.trial, request.pin, found)

    def _explained(self, request: Request, start: int, length: int, error: BaseException) -> StoreError:
        url, text = self._store.url_of(request.path), str(error) if isinstance(error, _Short) else first_line(error)
        what = f"{url}: {request.trial} (bytes {start:,} to {start + length:,}) cannot be read"
        if "ExpiredToken" in text:
            return Outage(f"{what}: {text}; renew the credentials, or give the job a role that does")
        if is_denied(error):
            return StoreError(f"{what}: access denied ({text}); allow this role s3:GetObject")
        return Outage(f"{what}: {text}; tried for {RETRY_S:.0f} s: check the endpoint and the network, and run again")


class _Short(Exception):
    """An answer with too few bytes."""


class _Changed(DataError):
    """Told by the answer itself, where the store does not honour If-Match."""

    def __init__(self, error: DataError) -> None:
        super().__init__(str(error))


async def _awaited(task: asyncio.Future[Any]) -> Any:
    try:
        return await task
    except asyncio.CancelledError:
        task.cancel()
        raise


async def _waited(tasks: set[Any], timeout_s: float | None) -> tuple[set[Any], set[Any]]:
    """As asyncio.wait for the first; whoever gives up waiting gives up the tasks as well."""
    try:
        return await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    except asyncio.CancelledError:
        for task in tasks:
            task.cancel()
        raise
