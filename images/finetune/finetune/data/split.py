"""Remove duplicates, and hold out whole groups, so no validation record is a near copy of a trained one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import xxhash

from finetune.data.records import Question, Record

_WINDOW_BYTES = 64
"""Two records that share this much text may be pieces of one document."""
_SAMPLED_BITS = 4
"""One window in 16 is looked at: the same ones in every copy of a text."""
_MAX_TEXT_BYTES = 128 * 2**20
_BLOCK_BYTES = 8 * 2**20
_MIN_SHARED_WINDOWS = 3
_BOILERPLATE_RECORDS = 50
"""A passage in more records than this is a form of words, not a document."""


class Groups:
    """Records that must stay together, joined one pair at a time."""

    def __init__(self, names: Sequence[str]) -> None:
        self._parents = list(range(len(names)))
        first: dict[str, int] = {}
        for index, name in enumerate(names):
            self.join(first.setdefault(name, index), index)

    def join(self, first: int, second: int) -> None:
        self._parents[self.root(second)] = self.root(first)

    def root(self, index: int) -> int:
        while self._parents[index] != index:
            self._parents[index] = self._parents[self._parents[index]]
            index = self._parents[index]
        return index


def without_duplicates(records: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """Return the first of all equal records, and the others."""
    seen: set[bytes] = set()
    kept: list[Record] = []
    dropped: list[Record] = []
    for record in records:
        key = _content_digest(record)
        (dropped if key in seen else kept).append(record)
        seen.add(key)
    return kept, dropped


def sample_records(records: Sequence[Record], count: int, seed: int) -> list[Record]:
    """Return a random sample in the order of the records. A larger one contains a smaller one."""
    order = sorted(range(len(records)), key=lambda index: _rank(f"{records[index].source}/{index}", seed))
    return [records[index] for index in sorted(order[:count])]


def join_shared_text(records: Sequence[Record]) -> list[Record]:
    """Return the records with one group for those that share passages, such as overlapping pieces of a document."""
    groups = Groups([record.group for record in records])
    for first, second in _shared_passages(records):
        groups.join(first, second)
    roots = [records[groups.root(index)].group for index in range(len(records))]
    return [
        record if record.group == root else replace(record, group=root)
        for record, root in zip(records, roots, strict=True)
    ]


def split(records: Sequence[Record], share: float, seed: int) -> tuple[list[Record], list[Record]]:
    """Return the records to train and those to hold out, whole groups at a time.

    Which groups are held out depends on their content and the seed, not on their order. At least one is, if there are
    two.
    """
    if not share or not records:
        return list(records), []
    sizes = Counter(record.group for record in records)
    wanted = max(1, round(share * len(records)))
    held_out: set[str] = set()
    count = 0
    for group in sorted(sizes, key=lambda name: _rank(name, seed)):
        if count + sizes[group] <= wanted and len(held_out) + 1 < len(sizes):
            held_out.add(group)
            count += sizes[group]
        if count >= wanted:
            break
    if not held_out and len(sizes) > 1:
        held_out.add(min(sizes, key=lambda name: (sizes[name], _rank(name, seed))))
    train = [record for record in records if record.group not in held_out]
    return train, [record for record in records if record.group in held_out]


def without_trained_facts(train: Sequence[Record], validation: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """Return the validation records without what is also asked in training, and those that this leaves empty."""
    held_out = {_premise(record) for record in validation}
    trained = {fact for record in train if _premise(record) in held_out for fact in _facts(record)}
    kept: list[Record] = []
    dropped: list[Record] = []
    for record in validation:
        if record.kind != "row":
            (dropped if trained.intersection(_facts(record)) else kept).append(record)
            continue
        questions = tuple(item for item in record.questions if _fact(record, item) not in trained)
        if not questions:
            dropped.append(record)
        else:
            kept.append(record if len(questions) == len(record.questions) else replace(record, questions=questions))
    return kept, dropped


def _premise(record: Record) -> str:
    """What equal facts have in common and is at hand."""
    return record.known or record.prompt or record.text


def _facts(record: Record) -> list[bytes]:
    if record.kind == "row":
        return [_fact(record, question) for question in record.questions]
    return [_content_digest(record)]


def _fact(record: Record, question: Question) -> bytes:
    return _digest((record.known, question.text, question.answer))


def _content_digest(record: Record) -> bytes:
    if record.kind == "row":
        asked = [part for question in record.questions for part in (question.text, question.answer)]
        return _digest(("row", record.system or "", record.known, *asked))
    if record.kind == "chat":
        return _digest(("chat", repr(record.messages), repr(record.tools)))
    return _digest((record.kind, record.prompt, record.completion, record.text))


def _digest(parts: Iterable[str]) -> bytes:
    return xxhash.xxh3_128_digest("\x1f".join(parts).encode("utf-8", "surrogatepass"))


def _rank(name: str, seed: int) -> int:
    return xxhash.xxh3_64_intdigest(name.encode("utf-8", "surrogatepass"), seed=seed)


# --- shared passages -------------------------------------------------------------------------------------------------


def _shared_passages(records: Sequence[Record]) -> list[tuple[int, int]]:
    """Return pairs of records that have passages in common."""
    owners: list[np.ndarray] = []
    hashes: list[np.ndarray] = []
    for numbers, texts in _blocks(records):
        ends = np.cumsum([len(text) for text in texts])
        places, found = _window_hashes(b"".join(texts))
        first = np.searchsorted(ends, places, side="right")
        is_inside = first == np.searchsorted(ends, places + _WINDOW_BYTES - 1, side="right")
        owners.append(np.asarray(numbers)[first[is_inside]])
        hashes.append(found[is_inside])
    if not hashes:
        return []
    every = np.unique(np.stack([np.concatenate(hashes), np.concatenate(owners).astype(np.uint64)]), axis=1)
    _, inverse, counts = np.unique(every[0], return_inverse=True, return_counts=True)
    limit = min(max(_BOILERPLATE_RECORDS, len(records) // 100), max(2, len(records) // 2))
    is_shared = (counts[inverse] > 1) & (counts[inverse] <= limit)
    neighbours = is_shared[1:] & is_shared[:-1] & (every[0, 1:] == every[0, :-1])
    pairs = Counter(zip(every[1, :-1][neighbours].tolist(), every[1, 1:][neighbours].tolist(), strict=True))
    return [(int(one), int(other)) for (one, other), count in pairs.items() if count >= _MIN_SHARED_WINDOWS]


def _blocks(records: Sequence[Record]) -> Iterator[tuple[list[int], list[bytes]]]:
    """Yield the texts that are long enough to share a passage, some megabytes at a time, with their numbers."""
    numbers: list[int] = []
    texts: list[bytes] = []
    size = total = 0
    for index, record in enumerate(records):
        data = _source_text(record).encode()
        if len(data) < 2 * _WINDOW_BYTES:
            continue
        numbers.append(index)
        texts.append(data)
        size += len(data)
        total += len(data)
        if size > _BLOCK_BYTES:
            yield numbers, texts
            numbers, texts, size = [], [], 0
        if total > _MAX_TEXT_BYTES:
            break
    if texts:
        yield numbers, texts


def _source_text(record: Record) -> str:
    """The text that may come from a document: not the answers, and no system message."""
    if record.kind == "row":  # codes and numbers are alike in many rows; a long cell is text
        return "\n".join(line for line in record.known.splitlines() if len(line) > 2 * _WINDOW_BYTES)
    if record.kind == "chat":
        return "\n".join(item["content"] for item in record.messages if item["role"] in ("user", "tool"))
    return record.text or record.prompt


_BASE = 0x9E3779B97F4A7C15
_WORD = 2**64


def _window_hashes(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Return the places and hashes of the windows whose hash begins with zeros."""
    hashes = np.frombuffer(data, dtype=np.uint8).astype(np.uint64) + np.uint64(1)
    width = 1
    while width < _WINDOW_BYTES:  # a window's hash is that of its first half and of its second
        power = np.uint64(pow(_BASE, width, _WORD))
        hashes = hashes[:-width] + hashes[width:] * power
        width *= 2
    hashes ^= hashes >> np.uint64(29)
    hashes *= np.uint64(0xBF58476D1CE4E5B9)
    places = np.flatnonzero((hashes >> np.uint64(64 - _SAMPLED_BITS)) == 0)
    return places, hashes[places]
