"""What every format is read into: rows with named cells, and the lines that are none."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

MAX_LINE_CHARS = 10_000_000
"""A longer line is no row: a closing quote or the line feeds are missing."""
MAX_NESTING = 64
_NUMBER_CHARS = 64
_NUMBER = re.compile(r"[-+(]?[$€£]?[\d,. ]*\d[\d,. ]*(e[-+]?\d+)?%?\)?", re.IGNORECASE)


class Number(str):
    """A number of a JSON file, with the digits that stand there."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Row:
    line: int
    """Line, element or row of the file, from 1."""
    cells: dict[str, Any]


@dataclass(frozen=True, slots=True)
class BadRow:
    line: int
    reason: str
    """The kind of fault, the same for all rows that have it."""
    found: str = ""
    """What is wrong with this row, and what to do."""


@dataclass(kw_only=True)
class ParsedFile:
    """A file's rows."""

    format: str
    columns: list[str]
    rows: list[Row] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)
    passed_over: list[BadRow] = field(default_factory=list)
    """Lines that are no rows and no faults: comments, titles above the header, rows without any content."""
    row_count: int = 0
    """Rows of the file, good and bad."""
    dialect: str = ""
    warnings: list[str] = field(default_factory=list)
    unit: str = "line"
    document_of: str | None = None
    """Name of the document that all rows belong to."""


def is_number(text: str) -> bool:
    """Whether a cell holds a number, also one with separators, a currency sign or a percent sign."""
    text = text.strip()
    return 0 < len(text) <= _NUMBER_CHARS and _NUMBER.fullmatch(text) is not None


def as_text(value: Any) -> str:
    """Return a cell as text: JSON for lists and objects, the file's own digits for numbers, "" for null."""
    if value is None:
        return ""
    if isinstance(value, str):
        return str(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    return to_json(value)


def to_json(value: Any) -> str:
    """Return JSON text in which numbers keep their digits."""
    if isinstance(value, Number):
        return str(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_quoted(str(key))}: {to_json(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(to_json, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def to_python(value: Any) -> Any:
    """Return JSON data with Python numbers, for a chat template and for json.dumps."""
    if isinstance(value, Number):
        try:
            return int(value)
        except ValueError:
            number = float(value)
            return number if abs(number) != float("inf") else str(value)
    if isinstance(value, dict):
        return {key: to_python(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_python(item) for item in value]
    return value


def nesting(value: Any) -> int:
    """Return the depth of lists and objects."""
    depth = 0
    level = [value]
    while level := [item for outer in level for item in _items(outer)]:
        depth += 1
        if depth > MAX_NESTING:
            break
    return depth


def unique_names(names: Sequence[str]) -> list[str]:
    """Return the names with a number after each one that stood before."""
    seen: set[str] = set()
    result = []
    for name in names:
        candidate, number = name, 2
        while candidate in seen:
            candidate, number = f"{name} ({number})", number + 1
        seen.add(candidate)
        result.append(candidate)
    return result


def _items(value: Any) -> Sequence[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else ()


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
