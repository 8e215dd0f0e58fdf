"""JSON and JSON Lines to rows. Numbers keep the digits of the file."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from estiba.errors import DataError
from finetune.data.chats import is_conversation
from finetune.data.dialects import split_lines
from finetune.data.encodings import bad_bytes_in
from finetune.data.recognise import CHATS, is_known_name
from finetune.data.rows import MAX_LINE_CHARS, MAX_NESTING, BadRow, Number, ParsedFile, Row, nesting, to_json

_LOOKS_LIKE_JSON = re.compile(r'\s*(\{\s*("|\}|$)|\[\s*([\[{"\]]|-?\d|true\b|false\b|null\b|$))')
_LOOKS_LIKE_PYTHON = re.compile(r"\s*\[?\s*\{\s*'")
_LIST_OF_OBJECTS = re.compile(r"\[\s*(\{|$)")
_BLANK = re.compile(r"\s*")
_SEPARATOR = re.compile(r"[\s,]*")
_WRAPPERS = (
    "data",
    "rows",
    "records",
    "examples",
    "train",
    "items",
    "conversations",
    "instances",
    "results",
    "dataset",
)
_MESSAGE_KEYS = frozenset({"role", "from", "content"})
_ERROR_KEYS = frozenset({"message", "Message", "error", "errors", "code", "status", "detail", "requestId", "__type"})
_SAMPLE_LINES = 50
_SURROGATE = re.compile("[\ud800-\udfff]")
_LINES = ("jsonl", "ndjson")

_NOT_JSON = "not JSON"
_NOT_AN_OBJECT = "not an object"


class _Ambiguous(dict[str, Any]):
    """An object with a key twice, of which a dictionary keeps the last."""

    twice = ""


def looks_like_json(text: str) -> bool:
    return _LOOKS_LIKE_JSON.match(text) is not None


def looks_like_python(text: str) -> bool:
    """Whether the text is a Python dictionary as `print` shows it, with single quotes."""
    return _LOOKS_LIKE_PYTHON.match(text) is not None


def looks_like_json_lines(lines: list[str]) -> bool:
    """Whether most lines are complete objects, also if the first is none."""
    filled = _first_filled(lines)
    return len(filled) > 1 and 2 * sum(map(_is_complete_object, filled)) >= len(filled)


def is_text_in_brackets(text: str) -> bool:
    """Whether a text begins as a JSON list does and is none: `[1] Smith, A.`, `[2024-01-01 10:00] INFO`."""
    position = _end_of(_BLANK, text, 0)
    if _LIST_OF_OBJECTS.match(text, position):
        return False
    try:
        while position < len(text):
            _, position = _DECODER.raw_decode(text, position)
            position = _end_of(_SEPARATOR, text, position)
    except json.JSONDecodeError as error:
        return not _is_cut_off(text, error)
    except RecursionError:
        pass
    return False


def _first_filled(lines: list[str]) -> list[str]:
    return [line for line in lines[: _SAMPLE_LINES * 4] if line.strip()][:_SAMPLE_LINES]


def parse_json(name: str, text: str) -> ParsedFile:
    """Return the rows of a JSON or JSON Lines file. Raises DataError, with the place, if it is broken."""
    lines = split_lines(text)
    filled = _first_filled(lines)
    complete = sum(map(_is_complete_object, filled))
    if len(filled) > 1 and all(line.lstrip().startswith('"') for line in filled):
        return _json_lines(lines)
    # One bad line among good ones is a bad row, also if it is the first or one of two.
    if len(filled) > 1 and complete and (2 * complete >= len(filled) or _is_complete_object(filled[0])):
        return _json_lines(lines)
    objects = [_is_complete_object(line.rstrip().rstrip(",")) for line in filled]
    if len(filled) > 1 and objects[0] and 2 * sum(objects) >= len(filled):
        return _json_lines(lines)
    if not text.isascii() and (mark := bad_bytes_in(text)):
        line = next(number for number, line in enumerate(lines, start=1) if bad_bytes_in(line))
        raise DataError(f"{name}:{line}: byte {mark} is not valid UTF-8; save the file as UTF-8, or give --encoding")
    values = list(_values(name, text))
    if len(values) == 1:
        parsed = _one_value(name, values[0])
        if not parsed.row_count:
            raise DataError(f"{name}: holds an empty list, so no row; restore its content")
        if parsed.unit == "object" and len(filled) == 1 and name.lower().endswith(_LINES):
            parsed.format, parsed.unit = "jsonl", "line"
        return parsed
    return _from_list(values, "json", "object")


# --- one value, or several ------------------------------------------------------------------------------------------


def _values(name: str, text: str) -> Iterator[Any]:
    """Yield the values of a file: one, or concatenated ones."""
    position = _end_of(_BLANK, text, 0)
    while position < len(text):
        try:
            value, position = _DECODER.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise DataError(_broken(name, text, error)) from error
        except RecursionError as error:
            raise DataError(f"{name}: is nested more than {MAX_NESTING} deep; flatten it") from error
        yield value
        position = _end_of(_SEPARATOR, text, position)


def _end_of(pattern: re.Pattern[str], text: str, position: int) -> int:
    found = pattern.match(text, position)
    return found.end() if found else position


def _broken(name: str, text: str, error: json.JSONDecodeError) -> str:
    end = len(text.rstrip())
    last_line = text.count("\n", 0, end) + 1
    if _is_cut_off(text, error):
        return (
            f"{name}:{last_line}: the JSON is cut off here, at character {end:,}, in the middle of a value; "
            "copy or export the file again"
        )
    found = text[error.pos : error.pos + 20].splitlines()[0]
    return f"{name}:{error.lineno}: not JSON at column {error.colno} ({error.msg}; found {found!r}); repair the file"


def _is_cut_off(text: str, error: json.JSONDecodeError) -> bool:
    open_string = error.msg.startswith("Unterminated string") and text.count("\n", error.pos) <= 1
    return error.pos >= len(text.rstrip()) or open_string


def _one_value(name: str, value: Any) -> ParsedFile:
    if isinstance(value, list):
        return _from_list([value] if is_conversation(value) else value, "json", "element")
    if not isinstance(value, dict):
        raise DataError(f"{name}: is one JSON {_type_name(value)}; give an array of objects or JSON Lines")
    for item in (value, *value.values()):
        if isinstance(item, _Ambiguous):
            raise DataError(f"{name}: the key {item.twice!r} is duplicated in one object; remove one of them")
    lists = {key: item for key, item in value.items() if isinstance(item, list)}
    objects = {key: item for key, item in lists.items() if item and isinstance(item[0], dict)}
    if {"cells", "nbformat"} <= value.keys():
        raise DataError(f"{name}: is a Jupyter notebook; save its text as .txt, or its data as CSV")
    if value and value.keys() <= _ERROR_KEYS:
        raise DataError(f"{name}: is a server's error message ({to_json(value)[:80]}), not the data; download it again")
    is_record = _is_record(value)
    if len(value) == 1 and not is_record and _holds_list(inner := next(iter(value.values()))):
        return _one_value(name, inner)
    if objects and not is_record:
        keys = list(objects)
        if len(keys) > 1:
            raise DataError(
                f"{name}: holds several lists of objects ({', '.join(keys[:6])}); give a file that holds the one to use"
            )
        parsed = _from_list(objects[keys[0]], "json", "element")
        others = [key for key in value if key != keys[0]]
        if others:
            parsed.warnings.append(f"{name}: reads the list {keys[0]!r} and ignores {', '.join(others)[:80]}")
        return parsed
    if isinstance(value.get("columns"), list) and isinstance(value.get("data"), list):  # pandas' orient="split"
        return _from_list([value["columns"], *value["data"]], "json", "row")
    if len(lists) == 1 and (key := next(iter(lists))).lower() in _WRAPPERS and not is_record:
        return _from_list(lists[key], "json", "element")
    if lists and len(lists) == len(value) and not is_record:
        return _from_columns(name, lists)
    if value and not is_record and all(isinstance(item, dict) for item in value.values()):
        return _from_keyed(value)
    if not value:
        raise DataError(f"{name}: is an empty JSON object; restore its content")
    if not is_record and not name.lower().endswith(_LINES) and not any(map(is_known_name, value)):
        raise DataError(
            f"{name}: is one JSON object ({', '.join(value)[:80]}), not a list of rows; write [{{...}}, ...], or an "
            "object on each line of a .jsonl file"
        )
    return _from_list([value], "json", "object")


def _holds_list(value: Any) -> bool:
    """Whether an object is a further wrapping: {"data": {"items": [...]}}."""
    return isinstance(value, dict) and any(isinstance(item, list) and item for item in value.values())


def _is_record(value: dict[str, Any]) -> bool:
    """Whether an object is itself a record: its list is a conversation, not the rows."""
    names = {key.strip().lower() for key in value}
    for key in (*CHATS, "prompt", "completion", "chosen"):
        item = next((value[name] for name in value if name.strip().lower() == key), None)
        if key in CHATS and isinstance(item, dict) and _MESSAGE_KEYS & item.keys():
            return True
        if isinstance(item, list) and (not item or (isinstance(item[0], dict) and _MESSAGE_KEYS & item[0].keys())):
            return True
    cells = value.values()
    has_structure = any(isinstance(cell, list) for cell in cells) or all(isinstance(cell, dict) for cell in cells)
    return bool(names & {"text", "prompt", "instruction"}) and not has_structure


def _from_columns(name: str, columns: dict[str, list[Any]]) -> ParsedFile:
    lengths = {key: len(items) for key, items in columns.items()}
    if len(set(lengths.values())) > 1:
        shown = ", ".join(f"{key} {length}" for key, length in list(lengths.items())[:6])
        raise DataError(f"{name}: its columns differ in length ({shown}); export the table again")
    rows = [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
    return _from_list(rows, "json", "row")


def _from_keyed(value: dict[str, dict[str, Any]]) -> ParsedFile:
    """pandas' orientations: {row: {column: cell}}, or {column: {row: cell}} with numbers as rows."""
    inner = list(value.values())
    if all(key.isdecimal() for item in inner for key in item) and not all(key.isdecimal() for key in value):
        indices = list(dict.fromkeys(key for item in inner for key in item))
        return _from_list([{key: item.get(index) for key, item in value.items()} for index in indices], "json", "row")
    return _from_list(inner, "json", "row")


def _from_list(values: list[Any], format_name: str, unit: str) -> ParsedFile:
    parsed = ParsedFile(format=format_name, columns=[], unit=unit)
    if values and all(isinstance(value, list) for value in values):
        values = _with_header(values)
    _add_all(parsed, list(enumerate(values, start=1)), unit)
    return _finished(parsed)


def _with_header(values: list[list[Any]]) -> list[Any]:
    """Lists of cells whose first names the columns; other lists stay what they are, and are bad rows."""
    header = values[0]
    if not header or not all(isinstance(cell, str) and not isinstance(cell, Number) for cell in header):
        return values
    width = len(header)
    return [dict(zip(header, cells, strict=True)) if len(cells) == width else cells for cells in values[1:]]


# --- lines ------------------------------------------------------------------------------------------------------------


def _is_complete_object(line: str) -> bool:
    line = line.strip()
    if not line.startswith("{") or not line.endswith("}") or len(line) > MAX_LINE_CHARS:
        return False
    try:
        json.loads(line, parse_int=str)
    except (ValueError, RecursionError):
        return False
    return True


def _json_lines(lines: list[str]) -> ParsedFile:
    parsed = ParsedFile(format="jsonl", columns=[])
    found_values: list[tuple[int, Any]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if len(line) > MAX_LINE_CHARS:
            longest = f"{MAX_LINE_CHARS // 10**6} million"
            found = f"{len(line):,} characters, more than {longest}; a newline is missing, or split the record"
            parsed.bad.append(BadRow(number, "line too long", found))
            continue
        if not line.isascii() and (mark := bad_bytes_in(line)):
            parsed.bad.append(BadRow(number, "not UTF-8", f"byte {mark} is not valid UTF-8; repair the row"))
            continue
        try:
            values = _line_values(line)
        except RecursionError:
            parsed.bad.append(BadRow(number, "nested too deep", f"nested more than {MAX_NESTING} deep; flatten it"))
            continue
        except json.JSONDecodeError as error:
            found = line[error.pos : error.pos + 20].strip()
            shown = f"found {found!r}" if found else "the line is cut off"
            detail = f"not JSON at column {error.pos + 1} ({error.msg}; {shown}); write one object on each line"
            parsed.bad.append(BadRow(number, _NOT_JSON, detail))
            continue
        found_values += [(number, value) for value in values]
    _add_all(parsed, found_values, "line")
    parsed.bad.sort(key=lambda row: row.line)
    return _finished(parsed)


def _line_values(line: str) -> list[Any]:
    """The values of a line: one, or several that stand side by side."""
    values = []
    position = _end_of(_BLANK, line, 0)
    while position < len(line):
        value, position = _DECODER.raw_decode(line, position)
        values.append(value)
        position = _end_of(_SEPARATOR, line, position)
    return values


# --- rows -------------------------------------------------------------------------------------------------------------


def _add_all(parsed: ParsedFile, values: list[tuple[int, Any]], unit: str) -> None:
    """Add each value. Where all are strings, they are texts; a list of messages is a conversation."""
    are_texts = bool(values) and all(map(_is_text, (value for _, value in values)))
    for number, value in values:
        if are_texts:
            value = {"text": value}
        elif is_conversation(value):
            value = {"messages": value}
        _add(parsed, number, value, unit)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not isinstance(value, Number) and value.lstrip()[:1] not in ("{", "[")


def _add(parsed: ParsedFile, number: int, value: Any, unit: str) -> None:
    if not isinstance(value, dict):
        holds_json = isinstance(value, str) and value.lstrip().startswith("{")
        what = "string that holds JSON" if holds_json else _type_name(value)
        found = f"is a {what}, not an object with named fields; write {{...}}"
        parsed.bad.append(BadRow(number, _NOT_AN_OBJECT, found))
    elif nesting(value) > MAX_NESTING:
        parsed.bad.append(BadRow(number, "nested too deep", f"nested more than {MAX_NESTING} deep; flatten it"))
    elif fault := _fault(value):
        parsed.bad.append(BadRow(number, *fault))
    elif not value:
        parsed.bad.append(BadRow(number, "no field", f"an empty {unit if unit == 'object' else 'object'}; remove it"))
    else:
        cells = {key.strip(): item for key, item in value.items()}
        parsed.rows.append(Row(number, cells if len(cells) == len(value) else value))


def _fault(value: Any) -> tuple[str, str] | None:
    """Return what no record can have, here or in a value inside."""
    if isinstance(value, str):
        if len(value) > MAX_LINE_CHARS:
            longest = f"{MAX_LINE_CHARS // 10**6} million"
            return "line too long", f"a text of {len(value):,} characters, more than {longest}; split the record"
        if not value.isascii() and _SURROGATE.search(value):
            return "not UTF-8", "contains half of a surrogate pair; export the text again"
        return None
    if isinstance(value, _Ambiguous):
        return "duplicate key", f"the key {value.twice!r} is duplicated in one object; remove one of them"
    inner = (*value, *value.values()) if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((fault for item in inner if (fault := _fault(item))), None)


def _finished(parsed: ParsedFile) -> ParsedFile:
    names: dict[str, None] = {}
    for row in parsed.rows:
        names |= dict.fromkeys(row.cells)
    parsed.columns = list(names)
    parsed.row_count = len(parsed.rows) + len(parsed.bad)
    return parsed


def _type_name(value: Any) -> str:
    if isinstance(value, Number):
        return "number"
    names = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        value = _Ambiguous(value)
        value.twice = Counter(key for key, _ in pairs).most_common(1)[0][0][:60]
    return value


_DECODER = json.JSONDecoder(
    parse_int=Number,
    parse_float=Number,
    # none of them is JSON; pandas writes NaN for a missing cell
    parse_constant=lambda name: None if name == "NaN" else Number(name),
    object_pairs_hook=_pairs,
)
