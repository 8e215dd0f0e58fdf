"""How the cells of a delimited file are separated and quoted, detected by parsing its beginning each way."""

from __future__ import annotations

import csv
import io
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from finetune.data.rows import MAX_LINE_CHARS

SAMPLE_CHARS = 2**18
_SAMPLE_RECORDS = 2000
_USUAL = (",", "\t", ";", "|")
_UNUSUAL = ("\x01", "\x1f", "\x1e", "^", "~", "¦", "§")
_OPEN_TSV_QUOTE = re.compile(r'(?:^|\t)"', re.MULTILINE)
_TSV_QUOTES = re.compile(r'(?:^|\t)"(?:[^"]|"")*"(?=[\t\r\n]|\Z)', re.MULTILINE)
_SINGLE_QUOTED_LINE = re.compile(r"'.+'")
_DECIMAL_COMMA = re.compile(r"\s*[-+]?\d[\d.]*,\d+\s*%?\s*")
_MOST = 0.8
_ALMOST = 0.05
"""Delimiters that score within this share of the best are ranked by their quotes and their order."""


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """The syntax of a delimited file."""

    delimiter: str
    quote: str | None = '"'
    escapes: bool = False
    """Whether \\" and \\\\ stand for " and \\ within quotes. Elsewhere a backslash is text."""
    skips_blank: bool = False
    """Whether a blank after the delimiter belongs to it, so that a quote may follow."""

    def __str__(self) -> str:
        shown = {"\t": "tab", ",": "comma", ";": "semicolon", "|": "bar"}.get(self.delimiter, repr(self.delimiter))
        quotes = {'"': "double quotes", "'": "single quotes", None: "no quotes"}.get(self.quote, repr(self.quote))
        return f"{shown}, {quotes}" + (", backslash escapes" if self.escapes else "")

    def reader(self, lines: Iterable[str]) -> Any:
        csv.field_size_limit(MAX_LINE_CHARS)
        return csv.reader(
            (line for line, _ in _scan(lines, self)) if self.escapes else lines,
            delimiter=self.delimiter,
            quotechar=self.quote,
            quoting=csv.QUOTE_MINIMAL if self.quote else csv.QUOTE_NONE,
            skipinitialspace=self.skips_blank,
        )

    def broken_quotes(self, lines: Iterable[str]) -> int:
        """Return the number of quoted cells with text after their closing quote."""
        return sum(broken for _, broken in _scan(lines, self)) if self.quote else 0


@dataclass(frozen=True, kw_only=True)
class Guess:
    """A dialect and how well the beginning of the file agrees with it."""

    dialect: Dialect
    columns: int
    agreement: float
    """Share of the rows that have this number of cells."""
    header_agrees: bool
    first_agrees: bool
    """Whether the first row has this number of cells; decimal commas are in the rows below it alone."""
    stray_quotes: float
    """Share of the cells that hold a quote where none should be."""
    single_quoted: float
    """Share of the filled cells that have a single quote at both ends."""
    blank_starts: float
    """Share of the cells that begin with a blank, as the words after a comma do."""
    records: int


def _scan(lines: Iterable[str], dialect: Dialect) -> Iterator[tuple[str, int]]:
    """Yield each line with its escaped quotes doubled instead, and the number of broken quotes."""
    assert dialect.quote is not None
    quote = re.escape(dialect.quote)
    start_of_cell = re.compile(f"{' *' if dialect.skips_blank else ''}{quote}?")
    within = rf"(?:[^{quote}\\]+|\\.?|{quote}{quote})*" if dialect.escapes else f"(?:[^{quote}]+|{quote}{quote})*"
    quoted_text = re.compile(within, re.DOTALL)
    escaped = re.compile(rf"\\({quote}|\\)")
    is_open = False
    for line in lines:
        if not is_open and dialect.quote not in line:
            yield line, 0
            continue
        parts: list[str] = []
        broken = at = 0
        while at < len(line):
            start = at
            if not is_open and (opening := start_of_cell.match(line, at)):
                at = opening.end()
                is_open = opening[0].endswith(dialect.quote)
            if is_open and (text := quoted_text.match(line, at)):
                undone = text[0]
                if dialect.escapes:
                    undone = escaped.sub(lambda mark: mark[1] * (2 if mark[1] == dialect.quote else 1), undone)
                parts.append(line[start:at] + undone)
                start = at = text.end()
                if at == len(line):
                    break
                is_open = False
                at += 1
                broken += line[at : at + 1] not in (dialect.delimiter, "\r", "\n", "")
            end = line.find(dialect.delimiter, at)
            at = len(line) if end < 0 else end + 1
            parts.append(line[start:at])
        yield "".join(parts), broken


def split_lines(text: str) -> list[str]:
    """Return the lines with their ends: LF, CR LF or CR."""
    return io.StringIO(text, newline="").readlines()


def guess_dialect(lines: list[str], *, delimiter: str | None = None, quote: str | None = None) -> Guess | None:
    """Return the dialect that the beginning of a file agrees with best, or None if nothing separates cells.

    `quote` is a character, or "no".
    """
    sample = list(_beginning(lines))
    for delimiters in ([delimiter],) if delimiter else (_USUAL, _UNUSUAL):
        guesses = [guess for mark in delimiters if (guess := _guess(sample, mark, quote)) is not None]
        if not guesses:
            continue
        best = max(
            guesses, key=lambda guess: (guess.agreement + guess.header_agrees, guess.first_agrees, -guess.stray_quotes)
        )
        close = [
            guess
            for guess in guesses
            if (guess.header_agrees, guess.first_agrees) == (best.header_agrees, best.first_agrees)
            and guess.agreement >= best.agreement - _ALMOST
            and guess.stray_quotes <= best.stray_quotes
        ]
        best = close[0] if close else best
        if best.dialect.delimiter == ",":
            best = next((guess for guess in close if _has_decimal_commas(sample, guess.dialect)), best)
        return best
    return None


def _has_decimal_commas(sample: list[str], dialect: Dialect) -> bool:
    """Whether the commas in the rows below the first are those of decimal numbers, and most rows have some."""
    rows = list(itertools.islice(dialect.reader(sample), 1, _SAMPLE_RECORDS))
    decimals = [[cell for cell in cells if "," in cell] for cells in rows if cells]
    is_decimal = all(_DECIMAL_COMMA.fullmatch(cell) for cells in decimals for cell in cells)
    return is_decimal and sum(map(bool, decimals)) > _MOST * len(decimals)


def _guess(sample: list[str], delimiter: str, quote: str | None) -> Guess | None:
    if quote is not None:
        return _variants(sample, Dialect(delimiter=delimiter, quote=None if quote == "no" else quote))
    text = "".join(sample)
    if delimiter == "\t" and _OPEN_TSV_QUOTE.search(text) and not _TSV_QUOTES.search(text):
        # many tools write tabs without quoting; then a quote is part of the text
        return _variants(sample, Dialect(delimiter=delimiter, quote=None))
    double = _variants(sample, Dialect(delimiter=delimiter))
    if double is None and '"' in text:
        return None  # the delimiter stands inside quotes alone
    if double is not None and 2 * text.count("'") < double.records:
        return double
    single = _variants(sample, Dialect(delimiter=delimiter, quote="'"))
    if double is None or single is None:
        return double or single
    fits_better = single.agreement + single.header_agrees > double.agreement + double.header_agrees
    fits_as_well = single.agreement + single.header_agrees >= double.agreement + double.header_agrees
    whole = sum(_SINGLE_QUOTED_LINE.fullmatch(line.strip()) is not None for line in sample)
    is_quoted = double.single_quoted > _MOST or (fits_as_well and whole > _MOST * double.records)
    return single if fits_better or is_quoted else double


def _variants(sample: list[str], dialect: Dialect) -> Guess | None:
    """The best guess with this delimiter and quote, with or without escapes and blanks after the delimiter."""
    guess = _with_or_without_escapes(sample, dialect)
    if dialect.quote is not None and f"{dialect.delimiter} {dialect.quote}" in "".join(sample):
        guess = _better(guess, _with_or_without_escapes(sample, replace(dialect, skips_blank=True)))
    return guess


def _with_or_without_escapes(sample: list[str], dialect: Dialect) -> Guess | None:
    """Escapes are undone only if more rows agree, or more quotes close where a cell ends, than without them."""
    plain = _judge(sample, dialect)
    if dialect.quote is None or f"\\{dialect.quote}" not in "".join(sample):
        return plain
    with_escapes = replace(dialect, escapes=True)
    escaped = _judge(sample, with_escapes)
    if escaped is None:
        return plain
    broken, broken_escaped = dialect.broken_quotes(sample), with_escapes.broken_quotes(sample)
    agreement = escaped.agreement if plain is None else plain.agreement  # one column is no guess, and may be right
    is_better = (escaped.agreement, -broken_escaped) > (agreement, -broken)
    return escaped if is_better and broken_escaped <= broken else plain


def _better(old: Guess | None, new: Guess | None) -> Guess | None:
    if old is None or new is None:
        return old or new
    if new.agreement < old.agreement:
        return old
    return new if (new.agreement, -new.stray_quotes) > (old.agreement, -old.stray_quotes) else old


def _judge(sample: list[str], dialect: Dialect) -> Guess | None:
    try:
        parsed = list(itertools.islice(dialect.reader(sample), _SAMPLE_RECORDS))
    except csv.Error:
        return None
    records = [cells for cells in parsed if len(cells) > 1 or (cells and cells[0].strip())]
    if not records:
        return None
    counts = Counter(map(len, records))
    columns = max(counts, key=lambda count: (counts[count], count))
    if columns < 2:
        return None
    fitting = [cells for cells in records if len(cells) == columns]
    cells = [cell for record in fitting for cell in record]
    filled = [cell for cell in cells if cell]
    in_single = sum(len(cell) > 1 and cell[0] == cell[-1] == "'" for cell in filled)
    later = [cell for record in fitting for cell in record[1:] if cell]
    quote = dialect.quote or '"'
    stray = sum(cell.startswith(quote) or cell.endswith(quote) for cell in cells)
    return Guess(
        dialect=dialect,
        columns=columns,
        agreement=len(fitting) / len(records),
        header_agrees=any(len(cells) == columns for cells in records[:2]),
        first_agrees=len(records[0]) == columns,
        stray_quotes=stray / len(cells),
        single_quoted=in_single / max(1, len(filled)),
        blank_starts=sum(cell[0] == " " for cell in later) / max(1, len(later)),
        records=len(records),
    )


def _beginning(lines: list[str]) -> Iterator[str]:
    size = 0
    for line in lines:
        size += len(line)
        if size > SAMPLE_CHARS and len(line) > SAMPLE_CHARS:
            return
        yield line
        if size > SAMPLE_CHARS:
            return
