"""Short records, and an encoder with the tiny model's tokenizer."""

from __future__ import annotations

from typing import Any

import tiny_model

from finetune.data.records import Question, Record
from finetune.tokens.chat import ChatRenderer
from finetune.tokens.encode import Encoder

END = "<|im_end|>"


def encoder(template: str | None = tiny_model.CHATML, **options: Any) -> Encoder:
    tokenizer = tiny_model.make_tokenizer(template=template)
    return Encoder(
        tokenizer, ChatRenderer(tokenizer, None), **{"max_length": 512, "columns": ["Units", "Value"], **options}
    )


def chat(*messages: tuple[str, str], **weights: int) -> Record:
    turns = [{"role": role, "content": content} for role, content in messages]
    for index, weight in weights.items():
        turns[int(index[1:])]["weight"] = weight  # type: ignore[assignment]
    return Record(source="a.jsonl:1", group="1", kind="chat", messages=tuple(turns))


def row(known: str = "Year: 2019\nCode: H01", **answers: str) -> Record:
    questions = tuple(Question(text=f"{column}:", answer=answer, column=column) for column, answer in answers.items())
    return Record(source="s.csv:2", group="1", kind="row", system="Answer.", known=known, questions=questions)
