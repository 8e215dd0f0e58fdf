"""Reading a sharded checkpoint on any number of ranks: each reads the pieces that hold its rows, and verifies them."""

from __future__ import annotations

import contextlib
import json
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import xxhash

from estiba.checkpoint import tree_spec
from estiba.checkpoint.layout import DTYPES
from estiba.checkpoint.sharded import format as sharded
from estiba.checkpoint.sharded.format import Part, ShardedManifest, shard_rows
from estiba.errors import CheckpointError, StoreError
from estiba.storage import Store

READS_IN_FLIGHT = 8
_DTYPE_OF = {name: dtype for dtype, name in DTYPES.items()}


@dataclass(frozen=True)
class LocalShard:
    """This rank's rows of a sharded tensor."""

    rows: torch.Tensor
    shape: tuple[int, ...]
    """Of the whole tensor."""


@dataclass(frozen=True)
class _Stored:
    """A tensor in a part's file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class _Copy:
    """Bytes of a part's file that are wanted."""

    start: int
    target: memoryview


class MissingPart(CheckpointError):
    """A part that no store of this host has. It may be whole on another host's disk."""


@dataclass
class Trouble:
    """Why a rank could not load a checkpoint."""

    denied: str = ""
    """It may be intact, and this rank cannot read it."""
    problem: str = ""
    missing: str = ""
    """A part is not on this host."""

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        try:
            yield
        except MissingPart as error:
            self.missing = str(error)
        except CheckpointError as error:
            self.problem = str(error)
        except StoreError as error:
            self.denied = str(error)


class PartReader:
    """One part's file, in the first of several stores whose bytes match the digests."""

    def __init__(self, stores: Sequence[Store], name: str, part: Part) -> None:
        self._stores, self._part = stores, part
        self._path = f"{name}/{part.folder}/{sharded.PART_DATA}"
        self._tensors: dict[str, _Stored] | None = None

    def piece(self, index: int) -> bytes:
        """Return one piece. Raises CheckpointError if no store has it as it was written; StoreError."""
        start = index * self._part.piece_bytes
        size = min(self._part.piece_bytes, self._part.size - start)
        problem = ""
        for store in self._stores:
            entry = store.head(self._path)
            if entry is None:
                continue
            if entry.size_bytes != self._part.size:
                problem = f"{store.url_of(self._path)}: {entry.size_bytes} bytes where {self._part.size} were written"
                continue
            data = store.read(self._path, start, size)
            if xxhash.xxh3_128_hexdigest(data) == self._part.pieces[index]:
                return data
            problem = f"{store.url_of(self._path)}: bytes {start} to {start + size} do not match their digest"
        if problem:
            raise CheckpointError(problem)
        raise MissingPart(f"{' and '.join(store.url for store in self._stores)}: {self._path} is missing")

    def tensors(self) -> Mapping[str, _Stored]:
        """Return where each tensor is."""
        if self._tensors is None:
            data = self.piece(0)
            length = int.from_bytes(data[:8], "little")
            index = 1
            while len(data) < 8 + length and index < len(self._part.pieces):
                data += self.piece(index)
                index += 1
            header = json.loads(data[8 : 8 + length])
            header.pop("__metadata__", None)
            self._tensors = {
                name: _Stored(_DTYPE_OF[one["dtype"]], tuple(one["shape"]), 8 + length + one["data_offsets"][0])
                for name, one in header.items()
            }
        return self._tensors

    def fill(self, copies: Sequence[_Copy]) -> None:
        """Read each piece that the copies touch once, several at a time. Raises CheckpointError, StoreError."""
        ordered = sorted(copies, key=lambda copy: copy.start)
        size = self._part.piece_bytes
        touched = sorted(
            {
                index
                for copy in ordered
                for index in range(copy.start // size, -(-(copy.start + len(copy.target)) // size))
            }
        )
        waiting = deque(ordered)
        open_copies: list[_Copy] = []
        for index, data in self._read_ahead(touched):
            first, last = index * size, index * size + len(data)
            while waiting and waiting[0].start < last:
                open_copies.append(waiting.popleft())
            for copy in open_copies:
                start, stop = max(copy.start, first), min(copy.start + len(copy.target), last)
                copy.target[start - copy.start : stop - copy.start] = data[start - first : stop - first]
            open_copies = [copy for copy in open_copies if copy.start + len(copy.target) > last]

    def _read_ahead(self, indices: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        upcoming = iter(indices)
        with ThreadPoolExecutor(READS_IN_FLIGHT) as pool:
            flying: deque[tuple[int, Future[bytes]]] = deque()
            for index in upcoming:
                flying.append((index, pool.submit(self.piece, index)))
                if len(flying) >= READS_IN_FLIGHT:
                    done, future = flying.popleft()
                    yield done, future.result()
            while flying:
                done, future = flying.popleft()
                yield done, future.result()


Packed = Mapping[str, tuple[str, Sequence[int], bytes]]
"""Tensors as plain values that ranks send each other: name -> (dtype, shape, bytes)."""


def load_common(stores: Sequence[Store], name: str, manifest: ShardedManifest) -> Packed:
    """Return what the main rank saved besides its shard, by name. Raises CheckpointError, StoreError.

    The main rank reads it for all, as its part may be on the disk of its host alone.
    """
    main = manifest.parts[0]
    names = [path for path in _names_in(main.tree) if path not in main.sharded]
    tensors = _read_whole(PartReader(stores, name, main), names)
    return {
        name: (DTYPES[tensor.dtype], list(tensor.shape), bytes(_bytes_of(tensor))) for name, tensor in tensors.items()
    }


def load_state(
    stores: Sequence[Store],
    name: str,
    manifest: ShardedManifest,
    common: Packed,
    *,
    rank: int,
    ranks: int,
    shard: int,
    shards: int,
) -> dict[str, Any]:
    """Return the state of a rank, with a LocalShard for each sharded tensor. Raises CheckpointError, StoreError."""
    readers = [PartReader(stores, name, part) for part in manifest.parts]
    main = manifest.parts[0]
    loaded: dict[str, Any] = {
        path: torch.frombuffer(bytearray(data), dtype=_DTYPE_OF[dtype]).reshape(list(shape))
        if data
        else torch.empty(list(shape), dtype=_DTYPE_OF[dtype])
        for path, (dtype, shape, data) in common.items()
    }
    wanted: dict[int, list[_Copy]] = {}
    try:
        for path, one in main.sharded.items():
            shape = tuple(one["shape"])
            start, stop = shard_rows(shape[0], shards, shard)
            tensor = torch.empty((stop - start, *shape[1:]), dtype=_DTYPE_OF[one["dtype"]])
            _want_rows(path, tensor, start, readers, manifest, wanted)
            loaded[path] = LocalShard(tensor, shape)
        for index, copies in wanted.items():
            readers[index].fill(copies)
        state: dict[str, Any] = tree_spec.unflatten(main.tree, loaded.__getitem__)
        if rank > 0 and manifest.ranks == ranks:
            own = manifest.parts[rank].tree
            state |= tree_spec.unflatten(own, _read_whole(readers[rank], _names_in(own)).__getitem__)
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise CheckpointError(f"{stores[0].url_of(name)}: its parts do not belong together ({error!r})") from None
    return state


def _read_whole(reader: PartReader, names: Sequence[str]) -> dict[str, torch.Tensor]:
    tensors, copies = {}, []
    for name in names:
        stored = reader.tensors()[name]
        tensors[name] = torch.empty(stored.shape, dtype=stored.dtype)
        if tensors[name].numel():
            copies.append(_Copy(stored.start, _bytes_of(tensors[name])))
    reader.fill(copies)
    return tensors


def _names_in(tree: Any) -> list[str]:
    found: list[str] = []
    tree_spec.unflatten(tree, lambda name: found.append(name))  # type: ignore[arg-type,func-returns-value]
    return found


def _want_rows(
    path: str,
    tensor: torch.Tensor,
    start: int,
    readers: Sequence[PartReader],
    manifest: ShardedManifest,
    wanted: dict[int, list[_Copy]],
) -> None:
    """Note where the rows from `start` on are stored, which may be in several parts."""
    if tensor.numel() == 0:
        return
    rows = manifest.parts[0].sharded[path]["shape"][0]
    row_bytes = math.prod(tensor.shape[1:]) * tensor.element_size()
    target = _bytes_of(tensor)
    for index, part in enumerate(manifest.parts):
        if part.shard is None:
            continue
        first, last = shard_rows(rows, part.shards, part.shard)
        begin, end = max(first, start), min(last, start + len(tensor))
        if begin >= end:
            continue
        stored = readers[index].tensors()[path]
        if stored.shape != (last - first, *tensor.shape[1:]) or stored.dtype != tensor.dtype:
            raise ValueError(f"{path}: {stored.dtype} {list(stored.shape)} in the part of rank {index}")
        piece = target[(begin - start) * row_bytes : (end - start) * row_bytes]
        wanted.setdefault(index, []).append(_Copy(stored.start + (begin - first) * row_bytes, piece))


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
