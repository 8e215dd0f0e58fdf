"""Rows of a recognised shape to records; rows of tables are converted by `tables`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import xxhash

from finetune.data.chats import (
    BadMessageError,
    assistant_turn,
    check_conversation,
    is_speaker,
    parse_embedded,
    parse_messages,
    parse_tools,
    system_text,
    user_turn,
)
from finetune.data.plain_text import cut_text
from finetune.data.recognise import Shape
from finetune.data.records import Record
from finetune.data.rows import BadRow, Row, as_text, to_json


def convert_row(source: str, row: Row, shape: Shape, chunk_chars: int, unused: Counter[str]) -> list[Record] | BadRow:
    """Return a row's records, several if it is a long text, or why it cannot be used. Count what is not trained."""
    cells = {use: row.cells.get(column) for use, column in shape.fields.items()}
    try:
        if shape.records == "text":
            records = list(_texts(source, as_text(cells["text"]), chunk_chars))
        elif "messages" in cells:
            records = [_chat(source, parse_messages(cells["messages"], unused), cells, unused)]
        else:
            records = [_pair(source, cells, unused, is_completion=_is_completion(shape))]
    except BadMessageError as error:
        return BadRow(row.line, error.reason, error.found)
    if not all(map(_is_unicode, records)):
        return BadRow(row.line, "not UTF-8", "contains half of a surrogate pair; export the text again")
    return records


def digest(*parts: str) -> str:
    return xxhash.xxh3_128_hexdigest("\x1f".join(parts).encode("utf-8", "surrogatepass"))


def _is_completion(shape: Shape) -> bool:
    name = shape.fields["prompt"].strip().lower()
    return name == "prompt" and not {"system", "history", "tools", "context"} & shape.fields.keys()


def _texts(source: str, text: str, chunk_chars: int) -> Iterator[Record]:
    if not text.strip():
        raise BadMessageError("empty text", "the text is empty; remove the row")
    group = digest("text", text)
    for piece in cut_text(text, chunk_chars):
        if piece.strip():
            yield Record(source=source, group=group, kind="text", text=piece)


def _chat(source: str, messages: list[dict[str, Any]], cells: dict[str, Any], unused: Counter[str]) -> Record:
    system = system_text(cells.get("system")).strip()
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    elif system and messages[0]["content"].strip() != system:
        unused["a system column beside a system message"] += 1
    check_conversation(messages)
    first = next((message["content"] for message in messages if message["role"] == "user"), "")
    return Record(
        source=source,
        group=digest("prompt", first),
        kind="chat",
        messages=tuple(messages),
        tools=parse_tools(cells.get("tools")),
    )


def _pair(source: str, cells: dict[str, Any], unused: Counter[str], *, is_completion: bool) -> Record:
    prompt, answer = cells["prompt"], cells["answer"]
    if _are_messages(prompt) or _are_messages(answer):  # a string that holds JSON is text
        return _chat(source, _from_message_lists(prompt, answer), cells, unused)
    prompt_text, answer_text = as_text(prompt), as_text(answer)
    context = _trimmed(as_text(cells.get("context")))
    if not answer_text.strip():
        raise BadMessageError("empty answer", "the answer is empty; fill it in or remove the row")
    if not prompt_text.strip() and not context:
        raise BadMessageError("empty prompt", "the prompt is empty; fill it in or remove the row")
    if is_completion:
        group = digest("prompt", prompt_text)
        return Record(source=source, group=group, kind="completion", prompt=prompt_text, completion=answer_text)
    question = "\n\n".join(part for part in (_trimmed(prompt_text), context) if part)
    messages = [*_history(cells.get("history")), user_turn(question), assistant_turn(answer_text)]
    return _chat(source, messages, cells, unused)


def _trimmed(text: str) -> str:
    """A part of a question without outer blank lines. Indentation stays, as of code; a single blank does not."""
    text = text.rstrip().lstrip("\r\n")
    return text if "\n" in text or text.startswith(("  ", "\t")) else text.strip()


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value) and any(map(is_speaker, value))


def _from_message_lists(prompt: Any, answer: Any) -> list[dict[str, Any]]:
    """Messages of a prompt, whose own answers are not trained, and of its completion."""
    before = parse_messages(prompt) if _are_messages(prompt) else [user_turn(as_text(prompt))]
    after = parse_messages(answer) if _are_messages(answer) else [assistant_turn(as_text(answer))]
    return [message | ({"weight": 0} if message["role"] == "assistant" else {}) for message in before] + after


def _history(value: Any) -> list[dict[str, Any]]:
    """Earlier turns as pairs of a question and an answer."""
    pairs = parse_embedded(value)
    if pairs is None or pairs in ("", []):
        return []
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise BadMessageError("history cannot be read", "`history` is not a list of [question, answer]")
    return [
        turn for question, answer in pairs for turn in (user_turn(as_text(question)), assistant_turn(as_text(answer)))
    ]


def _is_unicode(record: Record) -> bool:
    texts = [record.prompt, record.completion, record.text, *(message["content"] for message in record.messages)]
    texts += [to_json(message) for message in record.messages if len(message) > 2]  # with tool calls or a name
    texts += map(to_json, record.tools)
    return all(text.isascii() or _encodes(text) for text in texts)


def _encodes(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
