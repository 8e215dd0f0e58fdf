"""Pack text into the bytes of shards. Worker processes import this, so it needs neither torch nor transformers."""

from __future__ import annotations

import json
import signal
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property

import numpy as np
import xxhash

from aura.data import documents
from aura.data.documents import Chunk, TextFormat, documents_in, read_chunks
from aura.data.encoder import Encoder, batched
from aura.data.sources import Source
from estiba.errors import EstibaError
from estiba.processes import WorkerDied, WorkerPool

VERSION = 1
"""Version of the format and of every rule that determines ids; part of the shard directory's name."""
BATCH_BYTES = 2**20
"""Amount of text passed to the tokenizer at once."""


@dataclass(frozen=True, kw_only=True)
class PackingConfig:
    """Everything except the text that determines token ids."""

    backend_json: str
    tokenizer_identity: str
    eos_id: int
    eos_text: str
    specials: tuple[tuple[int, str], ...] = ()
    """Ids and texts of special tokens, which no text may become."""
    vocab_size: int
    validation_split: float

    @property
    def dtype(self) -> np.dtype:
        return np.dtype("<u2" if self.vocab_size <= 2**16 else "<u4")

    @property
    def identity(self) -> str:
        values = [VERSION, self.tokenizer_identity, self.eos_id, str(self.dtype), self.validation_split]
        values += [self.specials] if self.specials else []
        return xxhash.xxh3_64_hexdigest(json.dumps(values).encode())


@dataclass(kw_only=True)
class TextStats:
    """Statistics of one shard's text, or of several."""

    train_tokens: int = 0
    """Including end-of-document tokens."""
    validation_tokens: int = 0
    documents: int = 0
    """Blocks, for running text."""
    validation_documents: int = 0
    empty_documents: int = 0
    words: int = 0
    text_bytes: int = 0

    def add(self, other: TextStats) -> None:
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


@dataclass(frozen=True)
class ShardText:
    """The text of one shard."""

    chunks: tuple[Chunk, ...]

    @cached_property
    def key(self) -> str:
        """xxh3-128 of the text and its layout. File names are not part of it."""
        digest = xxhash.xxh3_128()
        for chunk in self.chunks:
            digest.update(f"{chunk.layout} {len(chunk.data)}\n".encode())
            digest.update(chunk.data)
        return digest.hexdigest()

    @property
    def raw_bytes(self) -> int:
        return sum(chunk.raw_bytes for chunk in self.chunks)


def split_into_shards(sources: Sequence[Source], text_format: TextFormat) -> Iterator[ShardText]:
    """Yield the text of each shard in order: one chunk of a large file, or several small files."""
    pending: list[Chunk] = []
    size = 0
    for source in sources:
        for chunk in read_chunks(source, text_format):
            if pending and size + len(chunk.data) > documents.CHUNK_BYTES:
                yield ShardText(tuple(pending))
                pending, size = [], 0
            pending.append(chunk)
            size += len(chunk.data)
    if pending:
        yield ShardText(tuple(pending))


class Packer:
    """Packs text into the bytes of shards, a pure function of the text and the configuration."""

    def __init__(self, config: PackingConfig) -> None:
        self._config = config
        self._encoder = Encoder(
            backend_json=config.backend_json,
            specials=(*config.specials, (config.eos_id, config.eos_text)),
            dtype=config.dtype,
        )
        self._eos = np.array([config.eos_id], dtype=config.dtype).tobytes()

    def pack(self, text: ShardText, should_stop: Callable[[], bool] = lambda: False) -> bytes | None:
        """Return a shard's bytes, or None after a stop. Raises DataError with file and line."""
        stats = TextStats()
        train: list[bytes] = []
        held_out: list[bytes] = []
        unfinished: list[bytes] | None = None
        documents_of_shard = (document for chunk in text.chunks for document in documents_in(chunk))
        for batch in batched(documents_of_shard, lambda document: document.size_bytes, BATCH_BYTES):
            if should_stop():
                return None
            ids = iter(self._encoder.encode([part for document in batch for part in document.parts]))
            for document in batch:
                is_held_out = document.hash_fraction < self._config.validation_split
                side = held_out if is_held_out else train
                if unfinished is not None and unfinished is not side:  # its continuation is on the other side
                    unfinished.append(self._eos)
                    unfinished = None
                stats.text_bytes += document.size_bytes
                stats.words += sum(len(part.split()) for part in document.parts)
                if document.parts:
                    stats.documents += 1
                    stats.validation_documents += is_held_out
                    side.extend(next(ids) for _ in document.parts)
                else:
                    stats.empty_documents += 1
                if document.parts or unfinished is not None:
                    if document.continues:
                        unfinished = side
                    else:
                        side.append(self._eos)
                        unfinished = None
        stats.train_tokens = sum(map(len, train)) // self._config.dtype.itemsize
        stats.validation_tokens = sum(map(len, held_out)) // self._config.dtype.itemsize
        footer = json.dumps(asdict(stats)).encode()
        return b"".join([*train, *held_out, footer, struct.pack("<I", len(footer))])


def pack_here(
    texts: Iterable[ShardText], config: PackingConfig, should_stop: Callable[[], bool]
) -> Iterator[tuple[ShardText, bytes]]:
    """Pack in this process, using all cores that the tokenizer uses. Ends early after a stop."""
    packer = Packer(config)
    for text in texts:
        data = packer.pack(text, should_stop)
        if data is None:
            return
        yield text, data


def pack_in_workers(
    texts: Iterable[ShardText], config: PackingConfig, workers: int, should_stop: Callable[[], bool]
) -> Iterator[tuple[ShardText, bytes]]:
    """Pack in several processes, yielding as they finish. Re-raises a worker's error; EstibaError if one died."""
    one_thread = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}  # one process per core
    target = f"{__name__}:make_worker"
    try:
        with WorkerPool(target, config, size=workers, name="aura-packer", environ=one_thread) as pool:
            yield from pool.map_unordered(texts, should_stop)
    except WorkerDied as error:
        fewer = ", or use fewer --num_workers" if error.returncode == -signal.SIGKILL else ""
        raise EstibaError(f"{error}{fewer}") from None


def make_worker(config: PackingConfig) -> Callable[[ShardText], bytes | None]:
    return Packer(config).pack
