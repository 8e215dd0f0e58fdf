"""What the columns of a file mean: conversations, prompts with answers, text, or a table to ask about."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from estiba.errors import ConfigError, DataError
from finetune.data.chats import parse_embedded
from finetune.data.rows import Number, Row, as_text, is_number

CHATS = ("messages", "conversations", "conversation", "chat", "dialog", "dialogue", "contents")
_PROMPTS: dict[str, tuple[str, ...]] = {
    "instruction": ("output", "response", "completion", "answer"),
    "prompt": ("completion", "response", "answer", "output"),
    "question": ("answer", "response", "output", "completion", "solution"),
    "query": ("response", "answer", "output", "completion"),
    "input": ("output", "response", "completion", "answer", "target"),
    "user": ("assistant",),
    "human": ("assistant", "gpt", "bot"),
    "problem": ("solution", "answer"),
    "request": ("response", "reply"),
    "pregunta": ("respuesta",),
}
"""The name of a prompt -> the names of its answer, the likeliest first."""
_CONTEXTS = {"instruction": ("input", "context"), "question": ("context", "passage"), "query": ("context",)}
_EXTRAS = {
    "system": ("system", "system_prompt", "system_message", "system_instruction", "systeminstruction"),
    "tools": ("tools", "functions"),
    "history": ("history",),
}
_TEXTS = ("text", "content", "texto", "document", "body")
LABELS = frozenset(
    """label labels target class category sentiment summary translation intent topic score rating stars emotion
    output answer""".split()
)
_PREFERENCES = (
    ("chosen", "rejected"),
    ("preferred", "dispreferred"),
    ("accepted", "rejected"),
    ("response_j", "response_k"),
)
_ANSWER = "(response|answer|output|completion|text|reply|messages?|conversation|summary|sample)"
"""What the names of a preference pair may have in front or behind."""
_METADATA = frozenset("id idx index uuid source url date timestamp lang language split meta metadata".split())
_SAMPLE_ROWS = 1000
_NUMBERS_SHARE = 0.9
_PROSE_WORDS = 4


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How rows with the same columns become records."""

    records: str
    """messages, conversations, prompt-completion, instruction, text or table."""
    fields: dict[str, str] = field(default_factory=dict)
    """messages, prompt, answer, context, system, history, tools or text -> the column."""
    ignored: tuple[str, ...] = ()
    """Columns that are not trained."""

    def describe(self) -> str:
        usual = {"prompt", "completion", "instruction", "output", "text", self.records}
        used = ", ".join(
            f"{column!r} as {use}" for use, column in self.fields.items() if not {use, normalized(column)} & usual
        )
        return self.records + (f" ({used})" if used else "")


def is_known_name(column: str) -> bool:
    """Whether a column has a name that `shape_of` knows, which makes its row a header."""
    name = normalized(column)
    answers = {answer for names in _PROMPTS.values() for answer in names}
    return name in _PROMPTS or name in answers or name in CHATS or name in _TEXTS or name in ("chosen", "rejected")


def normalized(column: str) -> str:
    return re.sub(r"[\s\-_]+", "_", column.strip().lower())


def column_named(name: str, columns: Sequence[str], setting: str) -> str:
    """Return the column that a setting names, whatever its case and blanks. Raises ConfigError."""
    if name in columns:
        return name
    found = [column for column in columns if normalized(column) == normalized(name)]
    if len(found) == 1:
        return found[0]
    shown = ", ".join(columns[:12]) + (", ..." if len(columns) > 12 else "")
    raise ConfigError(f"{setting} {name!r}: no column has this name; the columns are {shown}")


def shape_of(where: str, columns: Sequence[str], rows: Sequence[Row]) -> Shape:
    """Return the shape of rows that have these columns. Raises DataError for data of another method."""
    by_name = {normalized(column): column for column in reversed(columns)}
    _refuse_preferences(where, by_name, rows)
    sample = rows[:_SAMPLE_ROWS]
    for name in CHATS:
        if name in by_name and _has_conversations(name, by_name[name], sample):
            return _chat(by_name[name], columns, by_name, sample)
    if {"role", "content"} <= by_name.keys():
        raise DataError(
            f"{where}:{sample[0].line if sample else 1}: each row is one message (role and content); "
            'write a conversation per row: {"messages": [{"role": ..., "content": ...}, ...]}'
        )
    pair = _pair(columns, by_name, sample)
    if pair is not None:
        return pair
    text = next((by_name[name] for name in _TEXTS if name in by_name), None)
    if text is not None:
        others = [name for name in by_name if by_name[name] != text and name not in _METADATA]
        if not LABELS.intersection(others) and (
            not others or normalized(text) in _TEXTS[:1] or _is_prose(text, sample)
        ):
            return text_shape(text, columns)
    prose = _prose_column(by_name, sample)
    return text_shape(prose, columns) if prose is not None else Shape(records="table")


def text_shape(column: str, columns: Iterable[str]) -> Shape:
    ignored = tuple(other for other in columns if other != column)
    return Shape(records="text", fields={"text": column}, ignored=ignored)


def _is_prose(column: str, rows: Sequence[Row]) -> bool:
    """Whether most cells have several words. The body of a planet or the number of a document is no text."""
    cells = [cell for row in rows if (cell := as_text(row.cells.get(column)).strip())]
    # words of Chinese, Japanese or Thai are not set apart
    prose = sum(len(cell.split()) >= _PROSE_WORDS or (len(cell) >= 8 and not cell.isascii()) for cell in cells)
    return 2 * prose >= len(cells)


def _prose_column(by_name: dict[str, str], rows: Sequence[Row]) -> str | None:
    """The only column that is no metadata, if its cells are sentences: there is nothing else to ask for or from."""
    named = [by_name[name] for name in by_name if name not in _METADATA]
    filled = [column for column in named if any(as_text(row.cells.get(column)).strip() for row in rows)]
    if len(filled) != 1:
        return None
    cells = [cell for row in rows if (cell := as_text(row.cells.get(filled[0])).strip())]
    words = sum(len(cell.split()) for cell in cells) / len(cells)
    return filled[0] if words >= _PROSE_WORDS and not _are_numbers(filled[0], rows) else None


def refuse_numbers(where: str, column: str, rows: Sequence[Row]) -> None:
    """Raise DataError if the column to train as text holds numbers."""
    cells = [(row.line, as_text(row.cells.get(column))) for row in rows[:_SAMPLE_ROWS]]
    filled = [(line, cell) for line, cell in cells if cell.strip()]
    numbers = [(line, cell) for line, cell in filled if is_number(cell)]
    if numbers and len(numbers) > _NUMBERS_SHARE * len(filled):
        line, cell = numbers[0]
        raise DataError(
            f"{where}:{line}: the column {column!r} holds numbers ({cell.strip()[:30]!r}) where text is expected; "
            "name the column of text with --text-column, or rename this one"
        )


def _refuse_preferences(where: str, by_name: dict[str, str], rows: Sequence[Row]) -> None:
    line = rows[0].line if rows else 1
    for better, worse in _PREFERENCES:
        patterns = [re.compile(rf"({_ANSWER}_)?{part}(_{_ANSWER})?") for part in (better, worse)]
        pair = [next((by_name[name] for name in by_name if known.fullmatch(name)), None) for known in patterns]
        if all(column is not None and not _are_numbers(column, rows[:_SAMPLE_ROWS]) for column in pair):
            raise DataError(
                f"{where}:{line}: holds preference pairs ({pair[0]!r} and {pair[1]!r}), and this "
                "trains supervised: rename the better answer to `completion` and remove the other"
            )
    if {"prompt", "completion", "label"} <= by_name.keys():
        labels = {as_text(row.cells.get(by_name["label"])).strip().lower() for row in rows[:_SAMPLE_ROWS]}
        if labels <= {"true", "false", "0", "1", ""} and labels & {"true", "false", "0"}:
            raise DataError(
                f"{where}:{line}: holds rated answers (`label` is true or false), and this trains supervised: "
                "keep the good answers only and remove `label`"
            )


def _has_conversations(name: str, column: str, rows: Sequence[Row]) -> bool:
    """Whether the cells are lists, or are wrong under a name that promises lists. A number counts messages."""
    cells = [parse_embedded(row.cells.get(column)) for row in rows]
    if any(isinstance(cell, list) for cell in cells):
        return True
    filled = [cell for cell in cells if cell not in (None, "")]
    return name in CHATS[:2] and bool(filled) and not all(is_number(as_text(cell)) for cell in filled)


def _chat(column: str, columns: Sequence[str], by_name: dict[str, str], rows: Sequence[Row]) -> Shape:
    first: list[Any] = next(
        (value for row in rows if (value := parse_embedded(row.cells.get(column))) and _is_dicts(value)), []
    )
    style = "conversations" if first and "from" in first[0] else "messages"
    fields = {"messages": column}
    fields |= _extras(by_name)
    return Shape(records=style, fields=fields, ignored=_ignored(fields, columns))


def _is_dicts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _pair(columns: Sequence[str], by_name: dict[str, str], rows: Sequence[Row]) -> Shape | None:
    for prompt, answers in _PROMPTS.items():
        answer = next((name for name in answers if name in by_name), None)
        if prompt not in by_name or answer is None or _are_numbers(by_name[prompt], rows):
            continue
        fields = {"prompt": by_name[prompt], "answer": by_name[answer]}
        context = next((name for name in _CONTEXTS.get(prompt, ()) if name in by_name and name != answer), None)
        if context is not None:
            fields["context"] = by_name[context]
        fields |= _extras(by_name)
        records = "instruction" if prompt == "instruction" else "prompt-completion"
        return Shape(records=records, fields=fields, ignored=_ignored(fields, columns))
    return None


def _extras(by_name: dict[str, str]) -> dict[str, str]:
    """The columns that go with a conversation or a pair, by their use."""
    found = {use: next((by_name[name] for name in names if name in by_name), None) for use, names in _EXTRAS.items()}
    return {use: column for use, column in found.items() if column is not None}


def _are_numbers(column: str, rows: Sequence[Row]) -> bool:
    cells = [row.cells.get(column) for row in rows]
    filled = [cell for cell in cells if cell is not None and as_text(cell).strip()]
    numbers = sum(isinstance(cell, Number) or is_number(as_text(cell)) for cell in filled)
    return bool(filled) and numbers > _NUMBERS_SHARE * len(filled)


def _ignored(fields: dict[str, str], columns: Sequence[str]) -> tuple[str, ...]:
    return tuple(column for column in columns if column not in fields.values())
