"""The index file format. An index file describes one HDF5 object.

estiba-h5-index 1 <xxh3-128 of the rest>\\n<zlib of JSON>
"""

from __future__ import annotations

import base64
import json
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from brain_to_text.data.indexing.scan import ScanResult
from brain_to_text.data.schema import DatasetLayout, ObjectVersion, Split, Trial, parse_path

MAGIC = b"estiba-h5-index 1 "


@dataclass(frozen=True)
class ObjectIndex:
    """The trials of one object."""

    path: str
    """Relative to the location of the data."""
    session: str
    split: Split
    version: ObjectVersion
    trials: list[Trial]
    problems: dict[str, str]
    digest: str
    """Digest of everything except the version, so it is the same for a copy of the object."""


def dumps(scanned: ScanResult, version: ObjectVersion) -> bytes:
    body = {"path": scanned.path, "trials": scanned.trials, "problems": scanned.problems}
    text = _json(body)
    document = {
        "pin": [version.kind, version.size_bytes, version.tag, version.place],
        "digest": xxhash.xxh3_128_hexdigest(text.encode()),
        "body": body,
    }
    packed = zlib.compress(_json(document).encode(), 6)
    return MAGIC + xxhash.xxh3_128_hexdigest(packed).encode() + b"\n" + packed


def loads(data: bytes) -> ObjectIndex:
    """Parse an index file. Raises ValueError if it is damaged or in another format."""
    head, _, packed = data.partition(b"\n")
    if not head.startswith(MAGIC):
        raise ValueError("not an index that this version reads")
    if head[len(MAGIC) :].decode(errors="replace") != xxhash.xxh3_128_hexdigest(packed):
        raise ValueError("its bytes do not match its digest")
    try:
        document = json.loads(zlib.decompress(packed))
        body = document["body"]
        key = parse_path(body["path"])
        if key is None:
            raise ValueError(f"it describes {body['path']!r}, which is not a file of a session")
        return ObjectIndex(
            path=body["path"],
            session=key[0],
            split=key[1],
            version=ObjectVersion(*document["pin"]),
            trials=[_trial(item) for item in body["trials"]],
            problems=body["problems"],
            digest=document["digest"],
        )
    except (KeyError, IndexError, TypeError, AttributeError, zlib.error) as error:
        raise ValueError(f"not an index that this version reads ({type(error).__name__}: {error})") from None


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, default=_to_list)


def _to_list(value: Any) -> list[Any]:
    """Turn a trial and its parts into lists."""
    if isinstance(value, np.ndarray):
        return list(value.tolist())
    if isinstance(value, Trial):
        return [getattr(value, name) for name in Trial.__slots__]
    assert isinstance(value, DatasetLayout)
    inline = None if value.inline is None else base64.b85encode(value.inline).decode()
    return [value.shape, value.dtype, value.offset, value.chunk_shape, value.chunks, value.filters, inline,
            value.fill.hex()]  # fmt: skip


def _trial(item: list[Any]) -> Trial:
    name, features, steps, labels, length, phonemes, *rest = item
    return Trial(
        name,
        None if features is None else _layout(features),
        steps,
        None if labels is None else np.asarray(labels, np.int64),
        length,
        None if phonemes is None else np.asarray(phonemes, np.int64),
        *rest,
    )


def _layout(item: list[Any]) -> DatasetLayout:
    shape, dtype, offset, chunk_shape, chunks, filters, inline, fill = item
    return DatasetLayout(
        shape=tuple(shape),
        dtype=dtype,
        offset=offset,
        chunk_shape=None if chunk_shape is None else tuple(chunk_shape),
        chunks=tuple((tuple(first), at, size, mask) for first, at, size, mask in chunks),
        filters=tuple((code, flags, tuple(values)) for code, flags, values in filters),
        inline=None if inline is None else base64.b85decode(inline),
        fill=bytes.fromhex(fill),
    )
