"""The format of a sharded checkpoint: a part from each rank, and a manifest that commits them.

    step-00000120/
        rank-00001-5eed.../part.safetensors    that rank's rows of every sharded tensor, and its own tensors
        rank-00001-5eed.../part.json           size and digest of each piece of the file above; written when it is whole
        manifest.json                          all part.json in one; written last, and only if there is none

Each rank writes below its own prefix, which also names the attempt, so two hosts never write one name, and parts of two
attempts are never mixed. What has no manifest is no checkpoint. One whose parts are all there can be committed by
anybody, at any time, with the same bytes. A piece is verified before its bytes are used, so a rank that needs a few
rows reads a few pieces. Sharded tensors are split along their first dimension as `torch.chunk` splits them.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import xxhash

from estiba.checkpoint.format import MANIFEST, sort_key, step_and_copy
from estiba.errors import CheckpointError, StoreError
from estiba.storage import Entry, Store

FORMAT = "estiba-sharded-checkpoint/1"
PART_DATA, PART_RECORD = "part.safetensors", "part.json"
PIECE_BYTES = 8 << 20
_PART = re.compile(r"rank-(\d{5})-([0-9a-f]+)")


def part_name(rank: int, token: str) -> str:
    """Return the prefix of a rank's files in an attempt's checkpoints."""
    return f"rank-{rank:05d}-{token}"


def shard_rows(rows: int, shards: int, index: int) -> tuple[int, int]:
    """Return the rows [start, stop) of a tensor's first dimension that a shard holds, as `torch.chunk` splits them."""
    size = -(-rows // shards)
    start = min(index * size, rows)
    return start, min(start + size, rows)


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one rank wrote."""

    token: str
    """The attempt."""
    step: int
    kind: str
    rank: int
    ranks: int
    shard: int | None
    """Which shard of the sharded tensors it holds; None for a rank of another replica."""
    shards: int
    metrics: Mapping[str, float]
    tree: Any
    """The tree spec (`tree_spec`): rank 0's of the whole state, the others' of what is theirs alone."""
    sharded: Mapping[str, Mapping[str, Any]]
    """Sharded tensor -> {"dtype", "shape"} of the whole, in rank 0's part."""
    size: int
    piece_bytes: int
    pieces: Sequence[str]
    """xxh3-128 of each piece of the file."""
    written: str

    @property
    def folder(self) -> str:
        return part_name(self.rank, self.token)

    def to_bytes(self) -> bytes:
        return _signed({"format": FORMAT, **asdict(self)})

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Part:
        """Raises CheckpointError."""
        body = _body(data, where)
        try:
            part = cls(**{name: value for name, value in body.items() if name != "format"})
            if part.size < 0 or len(part.pieces) != -(-part.size // part.piece_bytes):
                raise ValueError(f"{len(part.pieces)} pieces for {part.size} bytes")
            return part
        except (TypeError, ValueError, ZeroDivisionError) as error:
            raise CheckpointError(f"{where}: not a valid part ({error})") from None


@dataclass(frozen=True, kw_only=True)
class ShardedManifest:
    """The parts of a committed checkpoint, by rank."""

    parts: Sequence[Part] = field(default_factory=tuple)

    @property
    def step(self) -> int:
        return self.parts[0].step

    @property
    def token(self) -> str:
        return self.parts[0].token

    @property
    def ranks(self) -> int:
        return len(self.parts)

    @property
    def size_bytes(self) -> int:
        return sum(part.size for part in self.parts)

    def to_bytes(self) -> bytes:
        return _signed({"format": FORMAT, "parts": [asdict(part) for part in self.parts]})

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> ShardedManifest:
        """Raises CheckpointError for another format, or bytes that have changed."""
        body = _body(data, where)
        try:
            manifest = cls(parts=tuple(Part(**part) for part in body["parts"]))
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{where}: not a valid manifest ({error})") from None
        if not manifest.is_whole:
            raise CheckpointError(f"{where}: its parts are not those of all ranks of one save")
        return manifest

    @property
    def is_whole(self) -> bool:
        """Whether these are the parts of every rank of one save."""
        first = self.parts[0] if self.parts else None
        return (
            first is not None
            and first.ranks == len(self.parts)
            and all(
                (part.rank, part.token, part.step, part.ranks, part.shards)
                == (rank, first.token, first.step, first.ranks, first.shards)
                for rank, part in enumerate(self.parts)
            )
        )


def _signed(body: Mapping[str, Any]) -> bytes:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return (
        json.dumps({"body": body, "xxh3_128": xxhash.xxh3_128_hexdigest(text.encode())}, sort_keys=True) + "\n"
    ).encode()


def _body(data: bytes, where: str) -> dict[str, Any]:
    try:
        content = json.loads(data)
        body: dict[str, Any] = content["body"]
        if body["format"] != FORMAT:
            raise CheckpointError(f"{where}: format {body['format']!r}, this version reads {FORMAT!r}")
        if _signed(body) != data:
            raise ValueError("its bytes do not match its digest")
        return body
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{where}: not written by this version, or changed ({error})") from None


# --- a store of checkpoints ----------------------------------------------------------------------------------------


def committed(entries: Iterable[Entry]) -> list[str]:
    """Return the names of the committed checkpoints, newest first. Files of others, such as markers, do not matter."""
    names = [path[0] for path in (entry.path.split("/") for entry in entries) if path[1:] == [MANIFEST]]
    return sorted((name for name in names if step_and_copy(name)), key=sort_key, reverse=True)


def commit_if_whole(store: Store, name: str, token: str | None = None) -> ShardedManifest | None:
    """Commit a checkpoint whose parts are all in the store. Returns the manifest that is there now, or None.

    With `token`, only the parts of that attempt count. Two that commit at once write the same bytes, and the store
    keeps the first. Raises StoreError, CheckpointError.
    """
    entries = {entry.path for entry in store.list(name)}
    if f"{name}/{MANIFEST}" in entries:
        return read_manifest(store, name)
    found: dict[str, dict[int, str]] = {}
    for path in entries:
        folder, _, file = path.removeprefix(f"{name}/").partition("/")
        match = _PART.fullmatch(folder)
        if match and file == PART_RECORD and token in (None, match[2]):
            found.setdefault(match[2], {})[int(match[1])] = path
    for attempt in sorted(found):
        paths = found[attempt]
        if f"{name}/{_revoked(attempt)}" in entries or sorted(paths) != list(range(len(paths))):
            continue
        with contextlib.suppress(CheckpointError):  # a part that does not verify is not one
            first = Part.from_bytes(store.read(paths[0]), store.url_of(paths[0]))
            if first.ranks != len(paths):
                continue
            others = [
                Part.from_bytes(store.read(paths[rank]), store.url_of(paths[rank])) for rank in range(1, first.ranks)
            ]
            manifest = ShardedManifest(parts=(first, *others))
            if manifest.is_whole:
                store.write_new(f"{name}/{MANIFEST}", manifest.to_bytes())
                return read_manifest(store, name)
    return None


def read_manifest(store: Store, name: str) -> ShardedManifest:
    """Raises CheckpointError, StoreError."""
    path = f"{name}/{MANIFEST}"
    return ShardedManifest.from_bytes(store.read(path), store.url_of(path))


def uncommitted(entries: Iterable[Entry]) -> list[str]:
    """Return the steps that have parts and no manifest, newest first."""
    known = list(entries)
    names = {entry.path.partition("/")[0] for entry in known if entry.path.endswith(f"/{PART_RECORD}")}
    return sorted(
        (name for name in names if step_and_copy(name) and name not in committed(known)), key=sort_key, reverse=True
    )


def delete_all(store: Store, name: str, entries: Iterable[Entry]) -> None:
    """Delete a checkpoint, manifest first. Raises StoreError."""
    store.delete(f"{name}/{MANIFEST}")
    for entry in entries:
        if entry.path.startswith(f"{name}/"):
            store.delete(entry.path)


def revoke(store: Store, name: str, token: str) -> None:
    """Revoke the commit of an attempt, so that its checkpoint is neither used nor committed again."""
    with contextlib.suppress(StoreError):  # another host of a shared folder did it
        store.rename(f"{name}/{MANIFEST}", f"{name}/{_revoked(token)}")


def _revoked(token: str) -> str:
    return f"{MANIFEST}.{token}.bad"
