"""A unit of text to the bytes of one shard: what a worker process does, without torch and transformers."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np
import xxhash

from aura import documents
from aura.documents import Document, Stretch, TextFormat, documents_in, stretches
from aura.encoder import Encoder
from aura.sources import Source

VERSION = 1
"""Of the format and of every rule that decides ids; part of the folder's name."""
BATCH_BYTES = 2**20
"""Text given to the tokenizer at once."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What decides ids, besides the text."""

    backend_json: str
    tokenizer_identity: str
    eos_id: int
    eos_text: str
    vocab_size: int
    validation_split: float

    @property
    def dtype(self) -> np.dtype:
        return np.dtype("<u2" if self.vocab_size <= 2**16 else "<u4")

    @property
    def identity(self) -> str:
        decides = [VERSION, self.tokenizer_identity, self.eos_id, str(self.dtype), self.validation_split]
        return xxhash.xxh3_64_hexdigest(json.dumps(decides).encode())


@dataclass(kw_only=True)
class Counts:
    """What a shard, or all of them, was made from."""

    train_tokens: int = 0
    """Ends of documents included."""
    validation_tokens: int = 0
    documents: int = 0
    """Blocks, where it is running text."""
    validation_documents: int = 0
    empty_documents: int = 0
    words: int = 0
    text_bytes: int = 0

    def add(self, other: Counts) -> None:
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


@dataclass(frozen=True)
class Unit:
    stretches: tuple[Stretch, ...]

    @property
    def name(self) -> str:
        """xxh3-128 of the text and how it is read; the files' names are no part of it."""
        digest = xxhash.xxh3_128()
        for stretch in self.stretches:
            digest.update(f"{stretch.form} {len(stretch.data)}\n".encode())
            digest.update(stretch.data)
        return digest.hexdigest()

    @property
    def raw_bytes(self) -> int:
        return sum(stretch.raw_bytes for stretch in self.stretches)


def units_of(sources: Sequence[Source], text_format: TextFormat) -> Iterator[Unit]:
    """The text in order, small files together, large ones in stretches."""
    waiting: list[Stretch] = []
    size = 0
    for source in sources:
        for stretch in stretches(source, text_format):
            if waiting and size + len(stretch.data) > documents.STRETCH_BYTES:
                yield Unit(tuple(waiting))
                waiting, size = [], 0
            waiting.append(stretch)
            size += len(stretch.data)
    if waiting:
        yield Unit(tuple(waiting))


class Packer:
    """Units to the bytes of shards: a pure function of the text and the recipe."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._encoder = Encoder(
            backend_json=recipe.backend_json, eos_id=recipe.eos_id, eos_text=recipe.eos_text, dtype=recipe.dtype
        )
        self._eos = np.array([recipe.eos_id], dtype=recipe.dtype).tobytes()

    def pack(self, unit: Unit, should_stop: Callable[[], bool] = lambda: False) -> bytes | None:
        """A shard's bytes, or None when it was to stop. Raises DataError with file and line."""
        counts = Counts()
        train: list[bytes] = []
        held_out: list[bytes] = []
        unended: list[bytes] | None = None
        for batch in _batches(unit):
            if should_stop():
                return None
            ids = iter(self._encoder.encode([piece for document in batch for piece in document.pieces]))
            for document in batch:
                is_held_out = document.share < self._recipe.validation_split
                side = held_out if is_held_out else train
                if unended is not None and unended is not side:  # what follows here is another part of the text
                    unended.append(self._eos)
                    unended = None
                counts.text_bytes += document.size_bytes
                counts.words += sum(len(piece.split()) for piece in document.pieces)
                if document.pieces:
                    counts.documents += 1
                    counts.validation_documents += is_held_out
                    side.extend(next(ids) for _ in document.pieces)
                else:
                    counts.empty_documents += 1
                if document.pieces or unended is not None:
                    if document.is_running:
                        unended = side
                    else:
                        side.append(self._eos)
                        unended = None
        counts.train_tokens = sum(map(len, train)) // self._recipe.dtype.itemsize
        counts.validation_tokens = sum(map(len, held_out)) // self._recipe.dtype.itemsize
        footer = json.dumps(asdict(counts)).encode()
        return b"".join([*train, *held_out, footer, struct.pack("<I", len(footer))])


def _batches(unit: Unit) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for stretch in unit.stretches:
        for document in documents_in(stretch):
            batch.append(document)
            size += document.size_bytes
            if size >= BATCH_BYTES:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch
