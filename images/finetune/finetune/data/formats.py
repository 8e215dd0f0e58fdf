"""A file's bytes to rows, in the format that its content shows."""

from __future__ import annotations

import re
from dataclasses import dataclass

from estiba.errors import DataError
from finetune.data import delimited
from finetune.data.dialects import Guess, split_lines
from finetune.data.encodings import decode
from finetune.data.json_files import (
    is_text_in_brackets,
    looks_like_json,
    looks_like_json_lines,
    looks_like_python,
    parse_json,
)
from finetune.data.parquet import parse_parquet
from finetune.data.plain_text import parse_text
from finetune.data.recognise import is_known_name
from finetune.data.refusals import PARQUET_MAGIC, is_binary, refuse_other_kinds
from finetune.data.rows import MAX_LINE_CHARS, ParsedFile
from finetune.data.settings import DataSettings

_COMPRESSED_SUFFIX = re.compile(r"(\.(gz|gzip|zst|zstd|xz|lzma|bz2))+$", re.IGNORECASE)
_DELIMITED = frozenset({"csv", "tsv", "tab", "psv"})
_JSON = frozenset({"json", "jsonl", "ndjson", "jsonlines"})
_TEXT = frozenset({"txt", "text", "md", "markdown", "rst", "log", ""})
_OTHERS = {
    "yaml": "YAML",
    "yml": "YAML",
    "toml": "TOML",
    "ini": "INI",
    "sql": "SQL",
    "arff": "ARFF",
    "html": "HTML",
    "htm": "HTML",
    "xml": "XML",
}
"""Formats that are text and are not read."""
_EXPECTED = {
    "csv": {"csv", "tsv"},
    "tsv": {"csv", "tsv"},
    **{name: {"json", "jsonl"} for name in _JSON},
    "parquet": {"parquet"},
}
"""Suffix -> the formats that it promises."""
_NAME = re.compile(r"\w[\w .%/-]*")
_PADDING = "\x00\x1a"
"""What some programs write after the end of a text: NUL, and the end-of-file mark of DOS."""
_AGREEMENT = 0.9
_HEADER_CHARS = 60


@dataclass(frozen=True, kw_only=True)
class ReadFile:
    parsed: ParsedFile
    encoding: str | None
    evidence: str


def parse(name: str, data: bytes, settings: DataSettings) -> ReadFile:
    """Return a file's rows. Raises DataError, ConfigError for what is no training data."""
    refuse_other_kinds(name, data)
    if data.startswith(PARQUET_MAGIC) and is_binary(data[:4096]):
        parsed = parse_parquet(name, data)
        _compare_suffix(name, parsed)
        return ReadFile(parsed=parsed, encoding=None, evidence="")
    decoded = decode(name, data, settings.encoding)
    text = decoded.text.replace("\n\ufeff", "\n")  # the byte order marks of files that were joined
    body = text.rstrip(_PADDING)
    if not body.strip():
        raise DataError(f"{name}: holds only blank space; remove it, or restore its content")
    parsed = _parse_text(name, body, settings)
    _compare_suffix(name, parsed)
    if len(body) < len(text):
        count = len(text) - len(body)
        parsed.warnings.append(f"{name}: ignores {count:,} NUL or end-of-file character{'s' * (count > 1)} at its end")
    if decoded.is_damaged:
        parsed.warnings.append(f"{name}: {decoded.evidence}")
    return ReadFile(parsed=parsed, encoding=decoded.encoding, evidence=decoded.evidence)


def _suffix(name: str) -> str:
    return _COMPRESSED_SUFFIX.sub("", name).rpartition("/")[2].rpartition(".")[2].lower() if "." in name else ""


def _compare_suffix(name: str, parsed: ParsedFile) -> None:
    suffix = _suffix(name)
    expected = {suffix} if suffix in _OTHERS else _EXPECTED.get(suffix)
    if expected is not None and parsed.format not in expected:
        parsed.warnings.append(
            f"{name}: the suffix says {suffix}, the content is {parsed.format}; read as {parsed.format}"
        )


def _parse_text(name: str, text: str, settings: DataSettings) -> ParsedFile:
    suffix = _suffix(name)
    is_json = looks_like_json(text) and not (suffix in _TEXT and is_text_in_brackets(text))
    lines = [] if is_json else split_lines(text)
    is_json = is_json or (suffix not in _DELIMITED and looks_like_json_lines(lines))
    guess = None if is_json else delimited.guess_for(lines, settings)
    if suffix in _OTHERS and not is_json and not _is_certain_table(lines, guess):
        raise DataError(
            f"{name}: is {_OTHERS[suffix]}, which is not read; convert it to CSV, JSON Lines or parquet, or name it "
            ".txt to train on it as plain text"
        )
    if looks_like_python(text):
        raise DataError(
            f"{name}:1: holds Python literals, not JSON ({text.strip()[:30]!r}: JSON has double quotes); "
            "write it with json.dump"
        )
    if is_json or (suffix in _JSON and text.lstrip().startswith(('"', "[", "{"))):
        return parse_json(name, text)
    if suffix in _DELIMITED or settings.csv_delimiter or delimited.separator_named_by(lines):
        return _delimited(name, lines, guess, settings)
    if guess is not None and _is_table(lines, guess, is_text=suffix in _TEXT):
        return _delimited(name, lines, guess, settings)
    if suffix in _JSON:
        first = next(number for number, line in enumerate(lines, start=1) if line.strip())
        found = lines[first - 1].strip()[:30]
        raise DataError(
            f"{name}:{first}: is not JSON (found {found!r}); repair it, or name it .txt if it is plain text"
        )
    parsed = parse_text(name, text, settings.text_format)
    if suffix not in _TEXT:
        parsed.warnings.append(f"{name}: unknown suffix .{suffix}; read as plain text")
    return parsed


def _delimited(name: str, lines: list[str], guess: Guess | None, settings: DataSettings) -> ParsedFile:
    if len(lines) == 1 and len(lines[0]) > MAX_LINE_CHARS:
        raise DataError(
            f"{name}:1: one line of {len(lines[0]):,} characters, and no row can be longer than "
            f"{MAX_LINE_CHARS // 10**6} million; its newlines are missing"
        )
    return delimited.parse_delimited(name, lines, guess, settings)


def _is_certain_table(lines: list[str], guess: Guess | None) -> bool:
    """Whether a file whose suffix says otherwise is a table all the same: each cell of its header is a plain name."""
    if guess is None or guess.columns < 2 or not _is_table(lines, guess, is_text=False):
        return False
    header = next(guess.dialect.reader([next(line for line in lines if line.strip())]))
    return all(_NAME.fullmatch(cell.strip()) for cell in header)


def _is_table(lines: list[str], guess: Guess, *, is_text: bool) -> bool:
    """Whether a file without a suffix that says so is a table, not text with commas."""
    if guess.records < 2 or guess.agreement < _AGREEMENT or not guess.header_agrees:
        return False
    header = next(guess.dialect.reader([next(line for line in lines if line.strip())]))
    if any(map(is_known_name, header)):
        return True
    if any(not cell.strip() or len(cell) > _HEADER_CHARS or cell[-1] in ".!?" for cell in header):
        return False
    if is_text and guess.blank_starts > 0.5:
        return False  # a comma and a blank separate words
    return not is_text or guess.columns > 2 or guess.records > 2
