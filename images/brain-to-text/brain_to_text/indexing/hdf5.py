"""HDF5 without HDF5: where a dataset's bytes lie, and values out of those bytes.

`locate` asks h5py once, for the index. `decode` makes the values, bit for bit what h5py gives, out of bytes that were
fetched from anywhere; it needs no file, and runs in many threads where h5py runs in one.
"""

from __future__ import annotations

import math
import threading
import zlib
from collections.abc import Sequence
from typing import Any

import h5py
import numpy as np

from brain_to_text.indexing.schema import Placement
from estiba.errors import DataError

DEFLATE, SHUFFLE, FLETCHER32, SCALEOFFSET = 1, 2, 3, 6
ALL_LEFT_OUT = 2**32 - 1
"""The mask of a chunk that no filter was applied to."""
_NAMES = {4: "szip", 5: "nbit", 6: "scaleoffset", 32000: "lzf", 32001: "blosc", 32004: "lz4", 32008: "bitshuffle",
          32015: "zstd", 32026: "blosc2"}  # fmt: skip
NEIGHBOURS_BYTES = 16 * 1024
"""Chunks this near to each other are fetched as one piece: asking twice costs more than the bytes between."""

_h5py_lock = threading.Lock()


def refuse_elsewhere(dataset: h5py.Dataset) -> None:
    """Raises DataError where the values are in other files: of those there is no index, and h5py would look here."""
    created = dataset.id.get_create_plist()
    if created.get_external_count():
        raise DataError(f"{dataset.name}: its values are in another file; write it anew with h5repack")
    if created.get_layout() == h5py.h5d.VIRTUAL:
        raise DataError(
            f"{dataset.name}: a virtual dataset, whose values are in other files; write it anew with h5repack"
        )


def locate(dataset: h5py.Dataset) -> Placement:
    """Where the values lie. Raises DataError for storage that cannot be read by ranges."""
    created = dataset.id.get_create_plist()
    where = f"{dataset.name}"
    if dataset.shape is None:
        raise DataError(f"{where}: has no values, not even a shape; write it anew")
    refuse_elsewhere(dataset)
    dtype, shape = dataset.dtype, tuple(map(int, dataset.shape))
    if dtype.kind not in "fiu":
        raise DataError(f"{where}: holds {dtype}, not numbers; write it as float32")
    if not dataset.id.get_type().equal(h5py.h5t.py_create(dtype)):  # h5py would convert what is read
        raise DataError(f"{where}: its numbers are stored in bits that are no machine's {dtype}; write it as float32")
    common: dict[str, Any] = {"shape": shape, "dtype": dtype.str, "fill": _fill(created, dtype, where)}
    layout = created.get_layout()
    if layout == h5py.h5d.CHUNKED:
        filters = _filters(created, where)
        chunks = _chunks(dataset, filtered=bool(filters))
        return Placement(chunk_shape=tuple(created.get_chunk()), chunks=chunks, filters=filters, **common)
    if layout == h5py.h5d.CONTIGUOUS:
        # Asked before the offset, which behind a user block is a wrong one where there is none.
        offset = dataset.id.get_offset() if dataset.id.get_storage_size() else None
        if offset is not None or not dataset.size:
            return Placement(offset=offset, inline=None if dataset.size else b"", **common)
        if created.fill_value_defined() == h5py.h5d.FILL_VALUE_UNDEFINED:
            raise DataError(f"{where}: was never written, and names no value for that; write it anew")
        return Placement(**common)  # never written: all of it is the fill value
    if layout == h5py.h5d.COMPACT:
        return Placement(inline=dataset[()].tobytes(), **common)
    raise DataError(f"{where}: stored in a way that is not known here (layout {layout}); write it anew with h5repack")


def _fill(created: Any, dtype: np.dtype, where: str) -> bytes:
    """One value for what was never written; b"" where there is none, and h5py gives zeros."""
    is_defined = created.fill_value_defined() != h5py.h5d.FILL_VALUE_UNDEFINED
    if is_defined and created.get_fill_time() != h5py.h5d.FILL_TIME_NEVER:
        fill = np.zeros((), dtype)
        created.get_fill_value(fill)
        return fill.tobytes()
    if any(created.get_filter(number)[0] == SCALEOFFSET for number in range(created.get_nfilters())):
        raise DataError(f"{where}: compressed with scaleoffset, without a fill value; write it anew with gzip")
    return b""


def _chunks(dataset: h5py.Dataset, *, filtered: bool) -> tuple[tuple[tuple[int, ...], int, int, int], ...]:
    found: list[tuple[tuple[int, ...], int, int, int]] = []

    def note(info: Any) -> None:
        found.append((tuple(map(int, info.chunk_offset)), info.byte_offset, info.size, info.filter_mask))

    dataset.id.chunk_iter(note)
    whole = math.prod(dataset.chunks) * dataset.dtype.itemsize
    firsts = {first for first, *_ in found}
    for first, offset, size, _ in found:
        is_outside = any(at % n or at >= end for at, n, end in zip(first, dataset.chunks, dataset.shape, strict=True))
        # Older tables of chunks have no checksum; these are what h5py would stumble over, or read as values.
        if is_outside or offset <= 0 or size <= 0 or (size != whole and not filtered) or len(firsts) < len(found):
            raise DataError(
                f"{dataset.name}: its table of chunks is damaged ({list(first)}: {size:,} bytes at {offset:,}); copy "
                "the file again"
            )
    if filtered:
        found = [(first, at, size, ALL_LEFT_OUT if _is_plain(dataset, first, size) else mask)
                 for first, at, size, mask in found]  # fmt: skip
    return tuple(sorted(found, key=lambda chunk: chunk[1]))


def _is_plain(dataset: h5py.Dataset, first: tuple[int, ...], size_bytes: int) -> bool:
    """Whether a chunk that reaches beyond the dataset has no filters, which HDF5 can be told and no mask says."""
    ends = [min(at + n, end) for at, n, end in zip(first, dataset.chunks, dataset.shape, strict=True)]
    part = tuple(slice(0, end - at) for at, end in zip(first, ends, strict=True))
    is_whole = all(one.stop == n for one, n in zip(part, dataset.chunks, strict=True))
    if is_whole or size_bytes != math.prod(dataset.chunks) * dataset.dtype.itemsize:
        return False
    stored = np.frombuffer(dataset.id.read_direct_chunk(first)[1], dataset.dtype).reshape(dataset.chunks)
    expected = dataset[tuple(slice(at, end) for at, end in zip(first, ends, strict=True))]
    return bool(stored[part].tobytes() == expected.tobytes())


def _filters(created: Any, where: str) -> tuple[tuple[int, int, tuple[int, ...]], ...]:
    found = []
    for number in range(created.get_nfilters()):
        code, flags, values, name = created.get_filter(number)
        if not h5py.h5z.filter_avail(code):
            known = _NAMES.get(code) or (name or b"").decode(errors="replace") or "unknown"
            raise DataError(
                f"{where}: compressed with filter {code} ({known}), which is not installed; write the file anew: "
                "h5repack -f SHUF -f GZIP=4 OLD NEW"
            )
        found.append((int(code), int(flags), tuple(map(int, values))))
    return tuple(found)


def ranges_of(placement: Placement) -> list[tuple[int, int]]:
    """(start, length) of every piece to fetch; chunks that lie side by side are one."""
    if placement.inline is not None or not placement.size_bytes:
        return []
    if placement.offset is not None:
        return [(placement.offset, placement.size_bytes)]
    merged: list[tuple[int, int]] = []
    for _, offset, size, _ in placement.chunks:
        if merged and 0 <= offset - sum(merged[-1]) <= NEIGHBOURS_BYTES:
            merged[-1] = (merged[-1][0], offset + size - merged[-1][0])
        else:
            merged.append((offset, size))
    return merged


def decode(placement: Placement, pieces: Sequence[Any]) -> np.ndarray:
    """The values, from the pieces that `ranges_of` named. Raises ValueError where the bytes make no sense."""
    dtype = np.dtype(placement.dtype)
    if placement.inline is not None:
        return np.frombuffer(placement.inline, dtype).reshape(placement.shape)
    if placement.offset is not None:
        return np.frombuffer(pieces[0], dtype).reshape(placement.shape)
    fill = np.frombuffer(placement.fill, dtype)[0] if placement.fill else dtype.type(0)
    values = np.full(placement.shape, fill, dtype)
    if not placement.size_bytes:
        return values
    assert placement.chunk_shape is not None or not placement.chunks
    located = [(at, memoryview(piece)) for at, piece in zip(ranges_of(placement), pieces, strict=True)]
    at = 0
    for first, offset, size, mask in placement.chunks:
        while offset >= sum(located[at][0]):
            at += 1
        (start, _), piece = located[at]
        raw = piece.cast("B")[offset - start : offset - start + size]
        _place(values, first, _unfiltered(raw, mask, placement, dtype))
    return values


def _place(values: np.ndarray, first: tuple[int, ...], chunk: np.ndarray) -> None:
    """Chunks at the end reach beyond the dataset."""
    target = tuple(slice(at, min(at + n, end)) for at, n, end in zip(first, chunk.shape, values.shape, strict=True))
    values[target] = chunk[tuple(slice(0, part.stop - part.start) for part in target)]


def _unfiltered(raw: memoryview, mask: int, placement: Placement, dtype: np.dtype) -> np.ndarray:
    shape = placement.chunk_shape
    assert shape is not None
    # HDF5 leaves a filter out where it did not help, chunk by chunk.
    applied = [one for position, one in enumerate(placement.filters) if not mask >> position & 1]
    if any(code not in (DEFLATE, SHUFFLE, FLETCHER32) for code, _, _ in applied):
        return _through_h5py(raw, applied, shape, dtype, placement.fill)
    data: Any = raw
    for code, _, values in reversed(applied):
        if code == DEFLATE:
            try:
                data = zlib.decompress(data)
            except zlib.error as error:
                raise ValueError(f"a chunk does not decompress ({error})") from None
        elif code == FLETCHER32:
            data = _checked(data)
        else:
            data = _unshuffled(data, values[0] if values else dtype.itemsize)
    expected = int(np.prod(shape)) * dtype.itemsize
    if len(data) != expected:
        raise ValueError(f"a chunk has {len(data)} bytes, not {expected}")
    return np.frombuffer(data, dtype).reshape(shape)


def _unshuffled(data: Any, item_bytes: int) -> bytes | memoryview:
    """The first bytes of all values, then the second ones, … to values. A remainder was left as it is."""
    count = len(data) // item_bytes
    if item_bytes <= 1 or count <= 1:
        return data
    view = np.frombuffer(data, np.uint8)
    values = np.ascontiguousarray(view[: count * item_bytes].reshape(item_bytes, count).T).reshape(-1)
    return values.tobytes() + view[count * item_bytes :].tobytes()


def _checked(data: Any) -> memoryview:
    """Without the checksum behind them. Raises ValueError where it is another."""
    view = memoryview(data).cast("B")
    body, stored = view[:-4], int.from_bytes(view[-4:], "little")
    if fletcher32(body) != stored:
        raise ValueError("a chunk does not match its checksum")
    return body


def fletcher32(data: memoryview) -> int:
    """HDF5's checksum: sums of big-endian 16-bit words modulo 65,535, an odd last byte in the upper half."""
    words = np.frombuffer(data[: len(data) // 2 * 2], ">u2").astype(np.uint64)
    if len(data) % 2:
        words = np.append(words, np.uint64(data[-1] << 8))
    count = len(words)
    first = int(words.sum())
    second = int((words * (np.arange(count, 0, -1, dtype=np.uint64) % 65535)).sum())  # < 2**64 up to 2**32 words
    return (_folded(second) << 16) | _folded(first)


def _folded(total: int) -> int:
    """Modulo 65,535 the way that HDF5 gets there: only nothing at all gives 0."""
    return 0 if total == 0 else (total - 1) % 65535 + 1


def _through_h5py(
    raw: memoryview,
    filters: Sequence[tuple[int, int, tuple[int, ...]]],
    shape: tuple[int, ...],
    dtype: np.dtype,
    fill: bytes,
) -> np.ndarray:
    """Other filters are HDF5's own business: the chunk goes into a file in memory, as it is, and is read from there."""
    with _h5py_lock, h5py.File("chunk", "w", driver="core", backing_store=False) as file:
        created = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        created.set_chunk(shape)
        if fill:
            created.set_fill_value(np.frombuffer(fill, dtype).reshape(()))  # scaleoffset has a code of its own for it
        for code, flags, values in filters:
            created.set_filter(code, flags, values)
        made = h5py.h5d.create(file.id, b"chunk", h5py.h5t.py_create(dtype), h5py.h5s.create_simple(shape), created)
        made.write_direct_chunk((0,) * len(shape), bytes(raw))
        try:
            values = h5py.Dataset(made)[()]
        except OSError as error:
            raise ValueError(f"a chunk cannot be decoded ({error})") from None
    return np.asarray(values)
