"""A file object for h5py that fetches pages in parallel. h5py by itself would request them one after another."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

PAGE_BYTES = 32 * 1024
"""Enough for the tables of a group. Larger pages would fetch feature values that the index does not need."""
MAX_THREADS = 32
PAGES_PER_OFFSET = 2


class PagedFile(io.RawIOBase):
    """A read-only, seekable file on top of `read(start, length)`. Fetched pages stay in memory."""

    def __init__(self, read: Callable[[int, int], bytes], size_bytes: int) -> None:
        self._read, self.size_bytes = read, size_bytes
        self._pages: dict[int, bytes] = {}
        self._position = 0

    def prefetch(self, offsets: Iterable[int]) -> None:
        """Fetch the page at each offset and the page after it, in parallel."""
        last = max(0, self.size_bytes - 1) // PAGE_BYTES
        first = {offset // PAGE_BYTES for offset in offsets}
        needed = {page for start in first for page in range(start, min(start + PAGES_PER_OFFSET, last + 1))}
        if missing := sorted(needed - self._pages.keys()):
            with ThreadPoolExecutor(min(MAX_THREADS, len(missing)), "brain-pages") as pool:
                for first_page, data in pool.map(self._fetch, _runs(missing)):
                    for start in range(0, len(data), PAGE_BYTES):
                        self._pages[first_page + start // PAGE_BYTES] = data[start : start + PAGE_BYTES]

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
            part = self._page(number)[within : within + length - done]
            view[done : done + len(part)] = part
            done += len(part)
        self._position += length
        return length


def _runs(pages: list[int]) -> list[tuple[int, int]]:
    """Group page numbers into runs of consecutive pages, as (first, last + 1)."""
    runs: list[tuple[int, int]] = []
    for page in pages:
        if runs and runs[-1][1] == page:
            runs[-1] = (runs[-1][0], page + 1)
        else:
            runs.append((page, page + 1))
    return runs
