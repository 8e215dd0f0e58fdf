"""Prepare a corpus: find the text, pack it into shards, cut it into windows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import xxhash

from aura.data.documents import TextFormat
from aura.data.packing import PackingConfig, TextStats
from aura.data.shards import pack
from aura.data.sources import find_sources
from aura.data.windows import Windows
from aura.tokenizer.loading import Tokenizer
from estiba.errors import ConfigError, DataError
from estiba.log import get_logger
from estiba.platform.stop import Stop

logger = get_logger(__name__)


@dataclass(frozen=True)
class Corpus:
    """Packed text, ready to train on."""

    train: Windows
    validation: Windows
    """Empty if no text, or too little, is held out."""
    identity: str
    """A digest of both, and thus of text, tokenizer, split, seed and sequence length."""
    stats: TextStats

    @property
    def tokens(self) -> int:
        """Training and validation tokens, including end-of-document tokens."""
        return self.stats.train_tokens + self.stats.validation_tokens

    @property
    def tokens_per_word(self) -> float:
        return self.tokens / max(1, self.stats.words)


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
    """Prepare the corpus at a path, packing shards that `folder` does not have yet.

    Raises ConfigError (path, split), DataError (file and line; too little text), Interrupted.
    """
    if not 0 <= validation_split < 1:
        raise ConfigError(f"validation_split is {validation_split}; it must be a fraction, 0 or more and less than 1")
    config = PackingConfig(
        backend_json=tokenizer.backend_json(),
        tokenizer_identity=tokenizer.identity,
        eos_id=tokenizer.eos_id,
        eos_text=tokenizer.eos_text,
        specials=tokenizer.specials,
        vocab_size=tokenizer.vocab_size,
        validation_split=validation_split,
    )
    shards = pack(
        find_sources(dataset_path), config=config, text_format=text_format, folder=folder, workers=workers, stop=stop
    )
    stats = TextStats()
    for shard in shards:
        stats.add(shard.stats)
    digests = [shard.digest for shard in shards]
    train, validation = (
        Windows(
            [getattr(shard, side) for shard in shards],
            seq_length=seq_length,
            seed=seed,
            stream_identity=json.dumps([side, *digests]),
        )
        for side in ("train", "validation")
    )
    if stats.empty_documents:
        total = stats.documents + stats.empty_documents
        logger.info("input: skipped %d empty documents of %d", stats.empty_documents, total)
    if not len(train) and stats.validation_documents and not stats.train_tokens:
        raise DataError(
            f"{dataset_path}: --validation-split {validation_split:g} holds out all {stats.validation_documents} "
            "documents; give more documents, or --validation-split 0"
        )
    share = stats.validation_tokens / max(1, stats.validation_tokens + stats.train_tokens)
    if share > 0.2 and share > 2 * validation_split:
        logger.warning(
            f"--validation-split {validation_split:g} holds out {share:.0%} of the tokens, since the text has only "
            f"{stats.documents} documents, which are held out whole; give more documents, or --validation-split 0"
        )
    if not len(train):
        raise DataError(
            f"{dataset_path}: {train.tokens} tokens to train on make no window of {seq_length} + 1; give more text, or "
            f"a --seq_length of at most {max(1, train.tokens - 1)}"
        )
    if validation_split and not len(validation):
        logger.warning(
            f"--validation_split {validation_split:g} holds out {stats.validation_documents} of {stats.documents} "
            f"documents, {validation.tokens} tokens, too few for a window of {seq_length} + 1, so there will be "
            "no validation loss; raise the split, or pass 0 to hold out nothing"
        )
    identity = xxhash.xxh3_64_hexdigest(f"{train.identity} {validation.identity}".encode())
    return Corpus(train=train, validation=validation, identity=identity, stats=stats)
