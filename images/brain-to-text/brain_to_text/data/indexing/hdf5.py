"""Find where HDF5 stores the bytes of a dataset, and decode them without the HDF5 library.

`locate` uses h5py once, when the index is built. `decode` then turns fetched bytes into exactly the values that h5py
would return. It needs no file, and runs in parallel threads, which h5py would serialize.
"""

from __future__ import annotations

import functools
import math
import threading
import zlib
from collections.abc import Sequence
from typing import Any

import h5py
import numpy as np

from brain_to_text.data.schema import DatasetLayout
from estiba.errors import DataError

DEFLATE, SHUFFLE, FLETCHER32, SCALEOFFSET = 1, 2, 3, 6
NO_FILTERS = 2**32 - 1
"""The mask of a chunk that skipped every filter."""
_NAMES = {4: "szip", 5: "nbit", 6: "scaleoffset", 32000: "lzf", 32001: "blosc", 32004: "lz4", 32008: "bitshuffle",
          32015: "zstd", 32026: "blosc2"}  # fmt: skip
MERGE_GAP_BYTES = 16 * 1024
"""Chunks this close together are fetched in one request, which costs less than a second request."""

_h5py_lock = threading.Lock()


def refuse_external(dataset: h5py.Dataset) -> None:
    """Raises DataError if the values are in other files, which the index does not cover."""
    created = dataset.id.get_create_plist()
    if created.get_external_count():
        raise DataError(f"{dataset.name}: stores its values in another file; rewrite it with h5repack")
    if created.get_layout() == h5py.h5d.VIRTUAL:
        raise DataError(f"{dataset.name}: is a virtual dataset, with values in other files; rewrite it with h5repack")


def locate(dataset: h5py.Dataset) -> DatasetLayout:
    """Return where the values are stored. Raises DataError for storage that cannot be read by byte ranges."""
    created, name = dataset.id.get_create_plist(), f"{dataset.name}"
    if dataset.shape is None:
        raise DataError(f"{name}: has no values and no shape; rewrite it")
    refuse_external(dataset)
    dtype, shape = dataset.dtype, tuple(map(int, dataset.shape))
    if dtype.kind not in "fiu":
        raise DataError(f"{name}: holds {dtype}, not numbers; write it as float32")
    if not dataset.id.get_type().equal(h5py.h5t.py_create(dtype)):  # h5py would convert them on reading
        raise DataError(f"{name}: stores its numbers in a format that is not {dtype}; write it as float32")
    common: dict[str, Any] = {"shape": shape, "dtype": dtype.str, "fill": _fill_value(created, dtype, name)}
    storage = created.get_layout()
    if storage == h5py.h5d.CHUNKED:
        filters = _filters(created, name)
        chunks = _chunks(dataset, filtered=bool(filters))
        return DatasetLayout(chunk_shape=tuple(created.get_chunk()), chunks=chunks, filters=filters, **common)
    if storage == h5py.h5d.CONTIGUOUS:
        # First check for unallocated storage: after a user block its offset is a wrong number instead of None.
        offset = dataset.id.get_offset() if dataset.id.get_storage_size() else None
        if offset is not None or not dataset.size:
            return DatasetLayout(offset=offset, inline=None if dataset.size else b"", **common)
        if created.fill_value_defined() == h5py.h5d.FILL_VALUE_UNDEFINED:
            raise DataError(f"{name}: was never written and has no fill value; rewrite it")
        return DatasetLayout(**common)
    if storage == h5py.h5d.COMPACT:
        return DatasetLayout(inline=dataset[()].tobytes(), **common)
    raise DataError(f"{name}: has the unsupported storage layout {storage}; rewrite it with h5repack")


def _fill_value(created: Any, dtype: np.dtype, name: str) -> bytes:
    """Return the value of elements that were never written; b"" if it is undefined and h5py returns zeros."""
    is_defined = created.fill_value_defined() != h5py.h5d.FILL_VALUE_UNDEFINED
    if is_defined and created.get_fill_time() != h5py.h5d.FILL_TIME_NEVER:
        fill = np.zeros((), dtype)
        created.get_fill_value(fill)
        return fill.tobytes()
    if any(created.get_filter(number)[0] == SCALEOFFSET for number in range(created.get_nfilters())):
        raise DataError(f"{name}: is compressed with scaleoffset and has no fill value; rewrite it with gzip")
    return b""


def _chunks(dataset: h5py.Dataset, *, filtered: bool) -> tuple[tuple[tuple[int, ...], int, int, int], ...]:
    chunks: list[tuple[tuple[int, ...], int, int, int]] = []

    def add(info: Any) -> None:
        chunks.append((tuple(map(int, info.chunk_offset)), info.byte_offset, info.size, info.filter_mask))

    dataset.id.chunk_iter(add)
    full_bytes = math.prod(dataset.chunks) * dataset.dtype.itemsize
    has_duplicates = len({first for first, *_ in chunks}) < len(chunks)
    for first, offset, size, _ in chunks:
        is_outside = any(i % n or i >= end for i, n, end in zip(first, dataset.chunks, dataset.shape, strict=True))
        # Old chunk tables have no checksum. h5py would fail on such entries, or return wrong values.
        if is_outside or offset <= 0 or size <= 0 or (size != full_bytes and not filtered) or has_duplicates:
            raise DataError(
                f"{dataset.name}: its chunk table is damaged ({list(first)}: {size:,} bytes at {offset:,}); copy the "
                "file again"
            )
    if filtered:
        chunks = [(first, offset, size, NO_FILTERS if _is_unfiltered_edge(dataset, first, size) else mask)
                  for first, offset, size, mask in chunks]  # fmt: skip
    return tuple(sorted(chunks, key=lambda chunk: chunk[1]))


def _is_unfiltered_edge(dataset: h5py.Dataset, first: tuple[int, ...], size_bytes: int) -> bool:
    """Return whether a chunk at the edge skipped its filters, an HDF5 option that the filter mask does not show."""
    region, part = _region(first, dataset.chunks, dataset.shape)
    is_full = all(side.stop == n for side, n in zip(part, dataset.chunks, strict=True))
    if is_full or size_bytes != math.prod(dataset.chunks) * dataset.dtype.itemsize:
        return False
    stored = np.frombuffer(dataset.id.read_direct_chunk(first)[1], dataset.dtype).reshape(dataset.chunks)
    return bool(stored[part].tobytes() == dataset[region].tobytes())


def _region(
    first: tuple[int, ...], chunk_shape: tuple[int, ...], shape: tuple[int, ...]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Return which part of the dataset a chunk covers, and which part of the chunk that is: edge chunks stick out."""
    region = tuple(slice(i, min(i + n, end)) for i, n, end in zip(first, chunk_shape, shape, strict=True))
    return region, tuple(slice(0, side.stop - side.start) for side in region)


def _filters(created: Any, dataset_name: str) -> tuple[tuple[int, int, tuple[int, ...]], ...]:
    filters = []
    for number in range(created.get_nfilters()):
        code, flags, values, stored_name = created.get_filter(number)
        if not h5py.h5z.filter_avail(code):
            name = _NAMES.get(code) or (stored_name or b"").decode(errors="replace") or "unknown"
            raise DataError(
                f"{dataset_name}: is compressed with filter {code} ({name}), which is not installed; rewrite the file: "
                "h5repack -f SHUF -f GZIP=4 OLD NEW"
            )
        filters.append((int(code), int(flags), tuple(map(int, values))))
    return tuple(filters)


def byte_ranges(layout: DatasetLayout) -> list[tuple[int, int]]:
    """Return (start, length) of every range to fetch. Chunks that are close together share one."""
    if layout.inline is not None or not layout.size_bytes:
        return []
    if layout.offset is not None:
        return [(layout.offset, layout.size_bytes)]
    merged: list[tuple[int, int]] = []
    for _, offset, size, _ in layout.chunks:
        if merged and 0 <= offset - sum(merged[-1]) <= MERGE_GAP_BYTES:
            merged[-1] = (merged[-1][0], offset + size - merged[-1][0])
        else:
            merged.append((offset, size))
    return merged


def decode(layout: DatasetLayout, buffers: Sequence[Any]) -> np.ndarray:
    """Decode the values from one buffer per byte range. Raises ValueError for bytes that do not decode."""
    dtype = np.dtype(layout.dtype)
    if layout.inline is not None or layout.offset is not None:
        data = buffers[0] if layout.inline is None else layout.inline
        return np.frombuffer(data, dtype).reshape(layout.shape)
    fill = np.frombuffer(layout.fill, dtype)[0] if layout.fill else dtype.type(0)
    values = np.full(layout.shape, fill, dtype)
    if not layout.size_bytes:
        return values
    assert layout.chunk_shape is not None or not layout.chunks
    ranges = iter(zip(byte_ranges(layout), buffers, strict=True))
    start, end, fetched = 0, 0, memoryview(b"")
    for first, offset, size, mask in layout.chunks:
        while offset >= end:
            (start, length), buffer = next(ranges)
            end, fetched = start + length, memoryview(buffer).cast("B")
        chunk = _undo_filters(fetched[offset - start : offset - start + size], mask, layout, dtype)
        region, part = _region(first, chunk.shape, values.shape)
        values[region] = chunk[part]
    return values


def _undo_filters(raw: memoryview, mask: int, layout: DatasetLayout, dtype: np.dtype) -> np.ndarray:
    shape = layout.chunk_shape
    assert shape is not None
    # For each chunk, HDF5 skips a filter that does not help.
    applied = [entry for position, entry in enumerate(layout.filters) if not mask >> position & 1]
    if any(code not in (DEFLATE, SHUFFLE, FLETCHER32) for code, _, _ in applied):
        return _decode_with_h5py(raw, applied, shape, dtype, layout.fill)
    data: Any = raw
    for code, _, values in reversed(applied):
        if code == DEFLATE:
            try:
                data = zlib.decompress(data)
            except zlib.error as error:
                raise ValueError(f"a chunk does not decompress ({error})") from None
        elif code == FLETCHER32:
            data = _verify_checksum(data)
        else:
            data = _unshuffle(data, values[0] if values else dtype.itemsize)
    expected = math.prod(shape) * dtype.itemsize
    if len(data) != expected:
        raise ValueError(f"a chunk has {len(data)} bytes, not {expected}")
    return np.frombuffer(data, dtype).reshape(shape)


def _unshuffle(data: Any, item_bytes: int) -> bytes | memoryview:
    """Undo HDF5's byte shuffle, which stores all first bytes, then all second bytes, ..., then a remainder as it is."""
    count = len(data) // item_bytes
    if item_bytes <= 1 or count <= 1:
        return data
    view = np.frombuffer(data, np.uint8)
    values = np.ascontiguousarray(view[: count * item_bytes].reshape(item_bytes, count).T).reshape(-1)
    return values.tobytes() + view[count * item_bytes :].tobytes()


def _verify_checksum(data: Any) -> memoryview:
    """Return the data without the checksum at its end. Raises ValueError if it does not match."""
    view = memoryview(data).cast("B")
    body, stored = view[:-4], int.from_bytes(view[-4:], "little")
    if fletcher32(body) != stored:
        raise ValueError("a chunk does not match its checksum")
    return body


def fletcher32(data: memoryview) -> int:
    """Return HDF5's checksum: sums of big-endian 16-bit words modulo 65,535, the last one padded with a zero byte."""
    words = np.frombuffer(data[: len(data) // 2 * 2], ">u2").astype(np.uint64)
    if len(data) % 2:
        words = np.append(words, np.uint64(data[-1] << 8))
    count = len(words)
    first = int(words.sum())
    second = int((words * (np.arange(count, 0, -1, dtype=np.uint64) % 65535)).sum())  # < 2**64 up to 2**32 words
    return (_modulo_65535(second) << 16) | _modulo_65535(first)


def _modulo_65535(total: int) -> int:
    """Return the remainder as HDF5 computes it: 65,535 instead of 0, except for 0 itself."""
    return 0 if total == 0 else (total - 1) % 65535 + 1


def _decode_with_h5py(
    raw: memoryview,
    filters: Sequence[tuple[int, int, tuple[int, ...]]],
    shape: tuple[int, ...],
    dtype: np.dtype,
    fill: bytes,
) -> np.ndarray:
    """Decode the rarer filters with HDF5 itself: write the raw chunk to a file in memory, and read it back."""
    given = _given_values(tuple(filters), shape, dtype)
    with _h5py_lock, h5py.File("chunk", "w", driver="core", backing_store=False) as file:
        created = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        created.set_chunk(shape)
        if fill:
            created.set_fill_value(np.frombuffer(fill, dtype).reshape(()))  # scaleoffset encodes it specially
        for entry in given:
            created.set_filter(*entry)
        chunk = _create_chunk(file, shape, dtype, created)
        chunk.write_direct_chunk((0,) * len(shape), bytes(raw))
        try:
            return np.asarray(h5py.Dataset(chunk)[()])
        except OSError as error:
            raise ValueError(f"a chunk cannot be decoded ({error})") from None


def _create_chunk(file: h5py.File, shape: tuple[int, ...], dtype: np.dtype, created: Any) -> Any:
    space = h5py.h5s.create_simple(shape)
    return h5py.h5d.create(file.id, b"chunk", h5py.h5t.py_create(dtype), space, created)


@functools.lru_cache(maxsize=64)
def _given_values(
    filters: tuple[tuple[int, int, tuple[int, ...]], ...], shape: tuple[int, ...], dtype: np.dtype
) -> tuple[tuple[int, int, tuple[int, ...]], ...]:
    """Return the filters with the values that they were given, for which HDF5 then stores those of the file.

    When a dataset is created, a filter may put values of its own before the given ones: bitshuffle puts three. With the
    stored values as the given ones it would put them there twice.
    """
    found: list[tuple[int, int, tuple[int, ...]]] = []
    for code, flags, stored in filters:
        for n_own in (*range(len(stored) + 1), 0):
            created = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            created.set_chunk(shape)
            for entry in (*found, (code, flags, stored[n_own:])):
                created.set_filter(*entry)
            with _h5py_lock, h5py.File("chunk", "w", driver="core", backing_store=False) as file:
                try:
                    made = _create_chunk(file, shape, dtype, created).get_create_plist().get_filter(len(found))
                except (ValueError, OSError):  # values that the filter does not accept
                    continue
            if tuple(made[2]) == stored:
                break
        found.append((code, flags, stored[n_own:]))
    return tuple(found)
