"""A file for h5py whose pages are fetched many at a time, where h5py alone would ask for them one after another."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

PAGE_BYTES = 32 * 1024
"""One request's worth of a file's tables; more would fetch values that nobody asked for."""
AT_ONCE = 32
LEAST_AHEAD = 2


class PagedFile(io.RawIOBase):
    """A read-only, seekable file over `read(start, length)`, with the pages it has seen kept in memory."""

    def __init__(self, read: Callable[[int, int], bytes], size_bytes: int) -> None:
        self._read, self.size_bytes = read, size_bytes
        self._pages: dict[int, bytes] = {}
        self._position = 0

    def prefetch(self, offsets: Iterable[int]) -> None:
        """Fetch the pages at these offsets and the ones behind them, in parallel."""
        last = max(0, self.size_bytes - 1) // PAGE_BYTES
        wanted = {
            page
            for offset in offsets
            for page in range(offset // PAGE_BYTES, min(offset // PAGE_BYTES + LEAST_AHEAD, last + 1))
        }
        missing = sorted(wanted - self._pages.keys())
        if not missing:
            return
        with ThreadPoolExecutor(min(AT_ONCE, len(missing)), "brain-pages") as pool:
            for first, data in pool.map(self._fetch, _runs(missing)):
                for at in range(0, len(data), PAGE_BYTES):
                    self._pages[first + at // PAGE_BYTES] = data[at : at + PAGE_BYTES]

    def _fetch(self, run: tuple[int, int]) -> tuple[int, bytes]:
        start = run[0] * PAGE_BYTES
        return run[0], self._read(start, min(run[1] * PAGE_BYTES, self.size_bytes) - start)

    def _page(self, number: int) -> bytes:
        page = self._pages.get(number)
        if page is None:
            page = self._pages[number] = self._fetch((number, number + 1))[1]
        return page

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size_bytes}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        length = max(0, min(len(view), self.size_bytes - self._position))
        done = 0
        while done < length:
            number, within = divmod(self._position + done, PAGE_BYTES)
            piece = self._page(number)[within : within + length - done]
            view[done : done + len(piece)] = piece
            done += len(piece)
        self._position += length
        return length


def _runs(pages: list[int]) -> list[tuple[int, int]]:
    """Neighbouring pages as (first, behind the last)."""
    runs: list[tuple[int, int]] = []
    for page in pages:
        if runs and runs[-1][1] == page:
            runs[-1] = (runs[-1][0], page + 1)
        else:
            runs.append((page, page + 1))
    return runs
