"""Everything that a run reads: the base model's place, the records, and their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from estiba.checkpoint.chunks import ChunkStore
from estiba.errors import ConfigError
from estiba.log import get_logger
from estiba.platform.contract import root_of
from estiba.storage import FileStore
from estiba.training.fit import NOTHING_TRAINED, Run
from finetune.config import FinetuneConfig
from finetune.data.load import load
from finetune.data.records import Dataset
from finetune.model.base import BaseModel, find_base
from finetune.tokens.chat import ChatRenderer, separate_padding
from finetune.tokens.corpus import TokenizedRecords, corpus_key, tokenize
from finetune.tokens.encode import Encoder
from finetune.tokens.examples import Example

logger = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a run reads, before any weights are loaded."""

    base: BaseModel
    dataset: Dataset
    encoder: Encoder
    columns: tuple[str, ...]
    """Target columns of tables; examples number them from 1."""
    training: TokenizedRecords
    validation: TokenizedRecords
    tokens_key: str

    @property
    def completions_only(self) -> bool:
        return _completions_only(self.dataset)

    def dropped(self) -> dict[str, list[str]]:
        """Return why rows and records of either side are not used -> file:line."""
        reasons: dict[str, list[str]] = {}
        for side in (self.dataset.report.dropped, self.training.dropped, self.validation.dropped):
            for reason, sources in side.items():
                reasons[reason] = reasons.get(reason, []) + sources
        return reasons

    def identity(self) -> dict[str, Any]:
        return {"data": self.dataset.identity, "base_model": self.base.identity, "tokens": self.tokens_key}


def read_inputs(run: Run[FinetuneConfig]) -> Inputs:
    """Find the base model, read the data and tokenize it. Raises EstibaError; Interrupted after a stop."""
    config, stop = run.config, run.stop
    location = config.data_location()
    channel = run.job.channel_of(location)
    with run.dist.main_first():  # which may download it, and the others then find it
        base = stop.unless_stopped(
            lambda: find_base(config.base_model, root_of() / "input/data/model"), NOTHING_TRAINED
        )
    dataset = stop.unless_stopped(
        lambda: load(location, config, content_type=channel.content_type if channel else None), NOTHING_TRAINED
    )
    tokenizer, text_config = base.tokenizer(), base.config.get_text_config()
    separate_padding(tokenizer)
    columns = tuple(sorted({question.column for record in dataset for question in record.questions}))
    encoder = Encoder(
        tokenizer,
        ChatRenderer(tokenizer, config.chat_template, completions_only=_completions_only(dataset)),
        max_length=_longest(config.max_sequence_length, getattr(text_config, "max_position_embeddings", None)),
        columns=columns,
        share_trunks=config.share_trunks,
    )
    settings = (encoder.max_length, config.share_trunks)
    key = corpus_key(dataset.identity, base.identity, tokenizer.chat_template, *settings)
    with run.dist.main_first():
        chunks = ChunkStore(FileStore(run.checkpoints.folder), "tokens")
        if run.dist.is_main:
            chunks.drop(name for name in chunks.keys() if not name.startswith(key))  # noqa: SIM118 - not a mapping
        training = tokenize(dataset.train, encoder, key=f"{key}/train", chunks=chunks, stop=stop)
        validation = tokenize(dataset.validation, encoder, key=f"{key}/validation", chunks=chunks, stop=stop)
    check_vocabulary(base.name, text_config.vocab_size, [*training.examples, *validation.examples])
    return Inputs(
        base=base, dataset=dataset, encoder=encoder, columns=columns, training=training, validation=validation,
        tokens_key=key,
    )  # fmt: skip


def _completions_only(dataset: Dataset) -> bool:
    return all(record.kind == "completion" for record in dataset)


def _longest(asked: int, positions: int | None) -> int:
    """Return the longest sequence: what was asked for, or what the base model has positions for."""
    if not positions or asked <= positions:
        return asked
    logger.warning(f"--max-sequence-length {asked}: the base model has {positions} positions, so that is the longest")
    return positions


def check_vocabulary(name: str, rows: int, examples: Sequence[Example]) -> None:
    """Raise ConfigError if the records have tokens that the model has no embedding for."""
    largest = max(int(example.ids.max()) for example in examples)
    if largest >= rows:
        raise ConfigError(
            f"{name}: its tokenizer gives token {largest}, and the model has embeddings for {rows}; the tokenizer is "
            "another model's, or tokens were added to it and the embeddings were not resized"
        )
