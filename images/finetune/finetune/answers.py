"""Questions from the held-out records, and what a model answers to them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from estiba.errors import DataError
from finetune.data.records import Record, turns
from finetune.tokens.encode import Encoder

MAX_NEW_TOKENS = 64
ANSWERS_PER_BATCH = 16
_NO_THOUGHTS = re.compile(r"^\s*<think>\s*</think>")
"""What templates such as Qwen3's put before an answer without thoughts; it is trained, and no part of the answer."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One question, what the data says and what the model said."""

    source: str
    column: str
    """Empty where the record is no table row."""
    prompt: str
    """As the model sees it."""
    expected: str
    given: str = ""

    @property
    def is_exact(self) -> bool:
        return _said(self.given) == _said(self.expected)


def _said(text: str) -> str:
    return _NO_THOUGHTS.sub("", text).strip()


def held_out_questions(records: Sequence[Record], encoder: Encoder, count: int) -> list[Answer]:
    """Choose about `count` questions from the held-out records, evenly over the columns, in the records' order.

    Records whose prompt the template rejects, or that is longer than the longest sequence, are not asked.
    """
    by_column: dict[str, list[Answer]] = defaultdict(list)
    for record in records[: 20 * count]:
        try:
            asked = list(_questions(record, encoder))
        except DataError:
            continue  # it was not trained on either, and is counted there
        for question in asked:
            if len(encoder.prompt(question.prompt)) < encoder.max_length:
                by_column[question.column].append(question)
    share = max(1, -(-count // max(1, len(by_column))))
    return [question for questions in by_column.values() for question in questions[:share]][:count] if count else []


def _questions(record: Record, encoder: Encoder) -> Iterator[Answer]:
    """Yield what a record asks. Raises DataError if the template rejects it."""
    renderer = encoder.renderer
    if record.kind == "row":
        for question in record.questions:
            asked = encoder.guarded_all(turns(record.system, record.user_message(question)))
            yield Answer(
                source=record.source, column=question.column, prompt=renderer.prompt(asked), expected=question.answer
            )
    elif record.kind == "completion":
        prompt = renderer.completion_prompt(encoder.guarded(record.prompt))
        yield Answer(source=record.source, column="", prompt=prompt, expected=record.completion)
    elif record.kind == "chat" and record.messages[-1]["role"] == "assistant":
        asked = encoder.guarded_all(record.messages[:-1])
        for turn in asked:
            turn.pop("weight", None)
        if asked:
            prompt = renderer.prompt(asked, encoder.guarded_all(record.tools))
            yield Answer(source=record.source, column="", prompt=prompt, expected=record.messages[-1]["content"])


def answer(model: torch.nn.Module, encoder: Encoder, questions: Sequence[Answer]) -> list[Answer]:
    """Return the questions with the model's greedy answers."""
    tokenizer, was_training, device = encoder.tokenizer, model.training, next(model.parameters()).device
    model.eval()
    by_length = sorted(range(len(questions)), key=lambda index: len(questions[index].prompt))
    given: dict[int, str] = {}
    with torch.no_grad():
        for start in range(0, len(by_length), ANSWERS_PER_BATCH):
            chosen = by_length[start : start + ANSWERS_PER_BATCH]
            rows = [encoder.prompt(questions[index].prompt) for index in chosen]
            longest = max(len(row) for row in rows)
            expected = max(len(tokenizer(questions[index].expected)["input_ids"]) for index in chosen)
            ids = torch.full((len(rows), longest), int(tokenizer.eos_token_id or 0))
            mask = torch.zeros_like(ids)
            for number, row in enumerate(rows):  # on the left, so that every row continues at its end
                ids[number, longest - len(row) :] = torch.tensor(row)
                mask[number, longest - len(row) :] = 1
            budget = min(MAX_NEW_TOKENS, expected + 8)
            texts = continuations(model, encoder, ids.to(device), mask.to(device), max_new_tokens=budget)
            given.update(zip(chosen, texts, strict=True))
    model.train(was_training)
    return [replace(question, given=given[index]) for index, question in enumerate(questions)]


def continuations(
    model: torch.nn.Module, encoder: Encoder, ids: torch.Tensor, mask: torch.Tensor, *, max_new_tokens: int
) -> list[str]:
    """Continue prompts greedily. ids and mask are int64[B, T], padded on the left. Returns B texts."""
    tokenizer = encoder.tokenizer
    output = model.generate(  # type: ignore[operator]
        input_ids=ids, attention_mask=mask, do_sample=False, temperature=None, top_p=None, top_k=None,
        max_new_tokens=max_new_tokens, pad_token_id=int(tokenizer.eos_token_id or 0),
    )  # fmt: skip
    return [str(tokenizer.decode(row, skip_special_tokens=True)) for row in output[:, ids.shape[1] :]]


def exact_match(answers: Sequence[Answer]) -> dict[str, float]:
    """Return the share of exact answers by column."""
    columns: dict[str, list[bool]] = defaultdict(list)
    for one in answers:
        columns[one.column].append(one.is_exact)
    return {column: sum(exact) / len(exact) for column, exact in columns.items()}
