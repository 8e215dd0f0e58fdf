"""All examples of a run, tokenized once. What is finished survives a kill."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import xxhash

from estiba.checkpoint.chunks import ChunkStore
from estiba.errors import DataError
from estiba.log import get_logger
from estiba.platform.stop import Stop
from finetune.data.records import Record
from finetune.tokens.encode import Encoder
from finetune.tokens.examples import Example

logger = get_logger(__name__)

RECORDS_PER_CHUNK = 2048


@dataclass
class TokenizedRecords:
    """The examples of one side of the split, in the order of its records."""

    examples: list[Example] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    """The record of each example, as file:line."""
    dropped: dict[str, list[str]] = field(default_factory=dict)
    """Why a record is not trained -> file:line."""
    truncated: int = 0
    """Sequences whose prompt was shortened."""

    @property
    def tokens(self) -> int:
        return sum(len(example.ids) for example in self.examples)

    @property
    def trained_tokens(self) -> int:
        return sum(example.trained_tokens for example in self.examples)

    @property
    def unshared_tokens(self) -> int:
        """How many tokens there would be if every sequence repeated its trunk."""
        return sum(len(one.ids) + (len(one.columns) - 1) * one.trunk_length for one in self.examples)

    def lengths(self) -> dict[str, int]:
        """Return the quartiles and the extremes of the sequences' lengths."""
        lengths = np.asarray([len(one.ids) for example in self.examples[:5000] for one in example.sequences()])
        names = ("min", "p25", "median", "p75", "max")
        return dict(zip(names, (int(value) for value in np.percentile(lengths, (0, 25, 50, 75, 100))), strict=True))


def tokenize(
    records: Sequence[Record], encoder: Encoder, *, key: str, chunks: ChunkStore | None, stop: Stop
) -> TokenizedRecords:
    """Tokenize records, or load what an earlier attempt finished. `key` must name everything that the tokens depend on.

    Raises DataError if no record is left; Interrupted after a stop, with what is finished saved.
    """
    found = TokenizedRecords()
    for number, start in enumerate(range(0, len(records), RECORDS_PER_CHUNK)):
        part = records[start : start + RECORDS_PER_CHUNK]
        name = f"{key}/{number:05d}"
        data = chunks.load(name) if chunks is not None and name in chunks else None
        if data is None:
            encoded = [_encode(record, encoder) for record in part]
            if chunks is not None:
                chunks.commit(name, _to_bytes(encoded))
            if stop():
                raise stop.interrupted(f"tokens of {start + len(part):,} of {len(records):,} records")
            if len(records) > 4 * RECORDS_PER_CHUNK and (number + 1) % 4 == 0:
                logger.info(f"tokenized {start + len(part):,} of {len(records):,} records")
        else:
            encoded = _from_bytes(data)
        for record, result in zip(part, encoded, strict=True):
            if isinstance(result, str):
                found.dropped.setdefault(result, []).append(record.source)
                continue
            found.examples += result
            found.sources += [record.source] * len(result)
            found.truncated += sum(example.truncated for example in result)
    if records and not found.examples:
        reason, sources = next(iter(found.dropped.items()))
        raise DataError(f"{sources[0]}: {reason}; none of {len(records)} records can be trained")
    return found


def corpus_key(*parts: object) -> str:
    """Return a name for everything that the tokens depend on."""
    return xxhash.xxh3_64_hexdigest(repr(parts).encode())


def summarize_drops(dropped: dict[str, list[str]]) -> str:
    counts = Counter({reason: len(sources) for reason, sources in dropped.items()})
    return "; ".join(
        f"{count} records: {reason} (first: {dropped[reason][0]})" for reason, count in counts.most_common(5)
    )


def _encode(record: Record, encoder: Encoder) -> list[Example] | str:
    try:
        examples = encoder.examples(record)
    except DataError as error:
        return str(error)
    return examples or "nothing in it is trained"


def _to_bytes(encoded: Sequence[list[Example] | str]) -> bytes:
    """Pack into four arrays, which numpy reads without pickle."""
    examples = [example for result in encoded if not isinstance(result, str) for example in result]
    counts = [-1 if isinstance(result, str) else len(result) for result in encoded]
    reasons = "\n".join(result for result in encoded if isinstance(result, str))
    buffer = io.BytesIO()
    np.savez(
        buffer,
        counts=np.asarray(counts, dtype=np.int64),
        reasons=np.frombuffer(reasons.encode(), dtype=np.uint8),
        ids=np.concatenate([one.ids for one in examples] or [np.zeros(0, np.int32)]),
        trained=np.packbits(np.concatenate([one.trained for one in examples] or [np.zeros(0, bool)])),
        branches=np.asarray([len(one.columns) for one in examples], dtype=np.int64),
        ends=np.asarray([end for one in examples for end in one.ends], dtype=np.int64),
        columns=np.asarray([column for one in examples for column in one.columns], dtype=np.int64),
        truncated=np.asarray([one.truncated for one in examples], dtype=np.int64),
    )
    return buffer.getvalue()


def _from_bytes(data: bytes) -> list[list[Example] | str]:
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        held = {name: arrays[name] for name in arrays.files}
    trained = np.unpackbits(held["trained"])[: len(held["ids"])].astype(bool)
    examples, at, end_at, column_at = [], 0, 0, 0
    for branches, truncated in zip(held["branches"].tolist(), held["truncated"].tolist(), strict=True):
        ends = tuple(held["ends"][end_at : end_at + branches + 1].tolist())
        length = ends[-1]
        examples.append(
            Example(
                ids=held["ids"][at : at + length],
                trained=trained[at : at + length],
                ends=ends,
                columns=tuple(held["columns"][column_at : column_at + branches].tolist()),
                truncated=truncated,
            )
        )
        at, end_at, column_at = at + length, end_at + branches + 1, column_at + branches
    reasons = iter(held["reasons"].tobytes().decode().split("\n"))
    remaining = iter(examples)
    return [
        next(reasons) if count < 0 else [next(remaining) for _ in range(count)] for count in held["counts"].tolist()
    ]
