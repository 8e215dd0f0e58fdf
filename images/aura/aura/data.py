"""A corpus as windows of tokens: which window is which sample is a pure function of (seed, sample index)."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from pathlib import Path

import numpy as np
import torch
import xxhash

from aura.documents import TextFormat
from aura.packing import Counts, Recipe
from aura.shards import pack
from aura.sources import find_sources
from aura.tokenizer import Tokenizer
from estiba.errors import ConfigError, DataError
from estiba.stop import Stop, say

VERSION = 1
"""Of the order of samples; part of `Windows.identity`."""
ORDER_BLOCK = 2**16
"""Sample indices whose windows are worked out at once and kept."""
_ROUNDS = 8


class Windows:
    """Windows of T + 1 tokens over a stream that lies in several arrays; neighbours share one token.

    Sample `i` is window `order(i % len)` of epoch `i // len`, and every epoch has a permutation of its own, computed,
    not stored: nothing but (seed, index) decides it.
    """

    identity: str
    """16 hexadecimal digits: of the stream, T, the seed, and the rules of the order."""
    seq_length: int
    tokens: int
    """In the stream."""

    def __init__(self, parts: Sequence[np.ndarray], *, seq_length: int, seed: int, stream_identity: str) -> None:
        """`parts` are one-dimensional arrays of ids, in the order of the stream; `stream_identity` stands for them."""
        self._parts = [part for part in parts if len(part)]
        self._ends = np.cumsum([len(part) for part in self._parts], dtype=np.int64).tolist()
        self.seq_length, self._seed = seq_length, seed
        self.tokens = self._ends[-1] if self._ends else 0
        self._count = max(0, (self.tokens - 1) // seq_length)
        self._cached: tuple[tuple[int, int], np.ndarray] | None = None
        decides = [VERSION, stream_identity, seq_length, seed]
        self.identity = xxhash.xxh3_64_hexdigest(json.dumps(decides).encode())

    def __len__(self) -> int:
        """Windows in an epoch."""
        return self._count

    def take(self, first: int, count: int) -> torch.Tensor:
        """Samples `first` to `first + count`, across epochs. Returns int64[count, T + 1]."""
        width = self.seq_length + 1
        out = torch.empty((count, width), dtype=torch.int64)
        rows = out.numpy()
        parts, ends = self._parts, self._ends
        for row, start in enumerate((self.order(first, count) * self.seq_length).tolist()):
            index = bisect_right(ends, start)
            part, end = parts[index], ends[index]
            at = start - (end - len(part))
            if start + width <= end:
                rows[row] = part[at : at + width]
            else:
                self._stitch(rows[row], index, at)
        return out

    def order(self, first: int, count: int) -> np.ndarray:
        """Which windows the samples are. Returns int64[count]; raises DataError where there is no window."""
        if not self._count:
            raise DataError(f"{self.tokens} tokens make no window of {self.seq_length} + 1; give more text")
        if first < 0 or count < 0:
            raise ValueError(f"samples {first} to {first + count}")
        pieces = []
        while count > 0:
            epoch, index = divmod(first, self._count)
            block, offset = divmod(index, ORDER_BLOCK)
            piece = self._block(epoch, block)[offset : offset + count]
            pieces.append(piece)
            first += len(piece)
            count -= len(piece)
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.empty(0, np.int64), *pieces])

    def _block(self, epoch: int, block: int) -> np.ndarray:
        cached = self._cached  # read once: another thread may replace it
        if cached is not None and cached[0] == (epoch, block):
            return cached[1]
        indices = np.arange(block * ORDER_BLOCK, min(self._count, (block + 1) * ORDER_BLOCK), dtype=np.uint64)
        value = permuted(indices, self._count, self._seed, epoch)
        self._cached = ((epoch, block), value)
        return value

    def _stitch(self, row: np.ndarray, index: int, at: int) -> None:
        """A window over the border of two parts or more."""
        filled = 0
        while filled < len(row):
            piece = self._parts[index][at : at + len(row) - filled]
            row[filled : filled + len(piece)] = piece
            filled += len(piece)
            index, at = index + 1, 0


def permuted(indices: np.ndarray, count: int, seed: int, epoch: int) -> np.ndarray:
    """Where a permutation of `count` things, one for each (seed, epoch), puts `indices`. Returns int64, same shape.

    A Feistel network over a grid just larger than `count`, walked on until inside. Source: Black and Rogaway, Ciphers
    with arbitrary finite domains, 2002. A small `count` is sorted by hash, since a network mixes few things badly.
    """
    keys = [
        np.uint64(xxhash.xxh3_64_intdigest(f"aura {VERSION} {seed} {epoch} {number}".encode()))
        for number in range(2 * _ROUNDS)
    ]
    if count <= ORDER_BLOCK:
        return np.argsort(_mixed(np.arange(count, dtype=np.uint64), keys[0]), kind="stable")[indices.astype(np.int64)]
    height = np.uint64(isqrt(count - 1) + 1)
    width = np.uint64(-(-count // int(height)))
    values = indices.astype(np.uint64)
    outside = np.arange(len(values))
    while len(outside):
        left, right = np.divmod(values[outside], width)
        for number in range(_ROUNDS):
            left = (left + _mixed(right, keys[2 * number])) % height
            right = (right + _mixed(left, keys[2 * number + 1])) % width
        values[outside] = left * width + right
        outside = outside[values[outside] >= count]
    return values.astype(np.int64)


def _mixed(values: np.ndarray, key: np.uint64) -> np.ndarray:
    """splitmix64's finish, of values plus a key; below 2**63, so that what is added to it does not run over."""
    mixed = values + key
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (mixed ^ (mixed >> np.uint64(31))) >> np.uint64(1)


@dataclass(frozen=True)
class Corpus:
    """Packed text, ready to train on."""

    train: Windows
    validation: Windows
    """Of length 0 where nothing, or too little, is held out."""
    identity: str
    """Of both, and so of text, tokenizer, split, seed and T."""
    counts: Counts
    files: int

    @property
    def documents(self) -> int:
        """Blocks of a few kilobytes, where it is running text. Empty ones are not counted."""
        return self.counts.documents

    @property
    def tokens(self) -> int:
        """Both sides, with the ends of documents."""
        return self.counts.train_tokens + self.counts.validation_tokens

    @property
    def bytes(self) -> int:
        return self.counts.text_bytes

    @property
    def tokens_per_word(self) -> float:
        return self.tokens / max(1, self.counts.words)


def prepare(
    dataset_path: str,
    *,
    tokenizer: Tokenizer,
    folder: Path,
    seq_length: int,
    validation_split: float,
    text_format: TextFormat,
    workers: int,
    stop: Stop,
    seed: int,
) -> Corpus:
    """The corpus at a path. What is packed in `folder` already, of the same text by the same rules, is used.

    Raises ConfigError (path, split), DataError (file and line; too little text), Interrupted.
    """
    if not 0 <= validation_split < 1:
        raise ConfigError(f"validation_split {validation_split}: a share of the documents, 0 or more and below 1")
    sources = find_sources(dataset_path)
    recipe = Recipe(
        backend_json=tokenizer.backend_json(),
        tokenizer_identity=tokenizer.identity,
        eos_id=tokenizer.eos_id,
        eos_text=tokenizer.eos_text,
        vocab_size=tokenizer.vocab_size,
        validation_split=validation_split,
    )
    shards = pack(sources, recipe=recipe, text_format=text_format, folder=folder, workers=workers, stop=stop)
    counts = Counts()
    for shard in shards:
        counts.add(shard.counts)
    digests = [shard.digest for shard in shards]
    sides = {
        name: Windows(
            [getattr(shard, name) for shard in shards],
            seq_length=seq_length,
            seed=seed,
            stream_identity=json.dumps([name, *digests]),
        )
        for name in ("train", "validation")
    }
    train, validation = sides["train"], sides["validation"]
    if counts.empty_documents:
        of = counts.documents + counts.empty_documents
        say(f"input: {counts.empty_documents} of {of} documents are empty; left out")
    if not len(train):
        raise DataError(
            f"{dataset_path}: {train.tokens} tokens to train on make no window of {seq_length} + 1; give more text, or "
            f"a --seq_length of at most {max(1, train.tokens - 1)}"
        )
    if validation_split and not len(validation):
        say(
            f"warning: --validation_split {validation_split:g} holds out {counts.validation_documents} of "
            f"{counts.documents} documents, {validation.tokens} tokens, too few for a window of {seq_length} + 1: no "
            "validation loss; raise the split, or give 0 to hold out nothing"
        )
    identity = xxhash.xxh3_64_hexdigest(f"{train.identity} {validation.identity}".encode())
    return Corpus(train=train, validation=validation, identity=identity, counts=counts, files=len(sources))
