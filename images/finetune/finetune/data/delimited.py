"""CSV and its relatives: lines to rows. Cells stay the text that they are."""

from __future__ import annotations

import csv
import itertools
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from estiba.errors import DataError
from finetune.data.dialects import Dialect, Guess, guess_dialect
from finetune.data.encodings import bad_bytes_in
from finetune.data.recognise import is_known_name
from finetune.data.rows import MAX_LINE_CHARS, BadRow, ParsedFile, Row, is_number, unique_names
from finetune.data.settings import DataSettings

MAX_COLUMNS = 4096
_END = "\x02end of file\x03\n"
"""A line after the last. A quote that is never closed swallows it."""
_CELL_LINES = 100
"""More lines are not taken for one cell of a row that is bad."""
_RESTARTS = 1000
_PREAMBLE_LINES = 30
_SEPARATOR_LINE = re.compile(r"\ufeff?sep=(.)\r?\n?", re.IGNORECASE)
_DATE = re.compile(r"\d{4}-\d\d-\d\d|\d{1,2}[./]\d{1,2}[./]\d{2,4}")
_COLUMN_RUN = 4
"""Columns numbered one after another show a header. Fewer may be the values of a row."""
_HEADER_CHARS = 80
_HEADER_ROWS = 500
_MOST = 0.8
_FEW = 0.1
_SENTENCE = re.compile(r".*\w[.?!]\s*$|.*[.?!]\s+\w", re.DOTALL)

_WRONG_COUNT = "wrong number of cells"
_OPEN_QUOTE = "quote is never closed"


@dataclass(frozen=True, slots=True)
class _RawRecord:
    line: int
    lines: int
    cells: list[str]


def separator_named_by(lines: list[str]) -> str | None:
    """Return the delimiter that Excel's first line `sep=;` names."""
    found = _SEPARATOR_LINE.fullmatch(lines[0]) if lines else None
    return found[1] if found else None


def guess_for(lines: list[str], settings: DataSettings) -> Guess | None:
    named = separator_named_by(lines)
    chosen = settings.csv_delimiter or named
    delimiter = {"tab": "\t", "\\t": "\t"}.get(chosen, chosen) if chosen else None
    return guess_dialect(lines[1:] if named else lines, delimiter=delimiter, quote=settings.csv_quote)


def parse_delimited(name: str, lines: list[str], guess: Guess | None, settings: DataSettings) -> ParsedFile:
    """Return a file's rows. Raises DataError if it has no header or no rows."""
    dialect = guess.dialect if guess else Dialect(delimiter=",")
    skip = 1 if separator_named_by(lines) else 0
    bad: list[BadRow] = []
    columns = guess.columns if guess else 1
    records = list(_records(name, lines, skip, dialect, columns, bad))
    if not records:
        raise DataError(f"{name}: has no row that can be read{_first(bad)}; check its quotes and delimiters")
    passed_over, records = _split_preamble(records, columns)
    has_header = _has_header(records, settings)
    names, records, warnings = _header(name, records, columns, has_header)
    parsed = ParsedFile(
        format="tsv" if dialect.delimiter == "\t" else "csv",
        columns=names,
        bad=bad,
        passed_over=passed_over,
        dialect=str(dialect),
        warnings=warnings,
    )
    _add_rows(parsed, records, names)
    if not parsed.rows and not parsed.bad:
        rows = "only empty rows" if passed_over or parsed.passed_over else "no rows"
        raise DataError(f"{name}: has a header ({', '.join(names)[:80]}) and {rows}; restore its content")
    parsed.bad.sort(key=lambda row: row.line)
    parsed.row_count = len(parsed.rows) + len(parsed.bad)
    return parsed


# --- records ---------------------------------------------------------------------------------------------------------


def _records(
    name: str, lines: list[str], start: int, dialect: Dialect, columns: int, bad: list[BadRow]
) -> Iterator[_RawRecord]:
    """Yield the records that are not blank. After a fault, parsing starts again at the next line.

    A quote opened by mistake swallows the lines up to the next quote. Only its own line is then bad, not all of them,
    unless the next quote is where a cell ends: then the lines are a cell of a row that has too few or too many.
    """
    too_long = {index for index, line in enumerate(lines) if len(line) > MAX_LINE_CHARS}
    budget = 20 * len(lines) + 1000
    restarts = 0
    while start < len(lines):
        reader = dialect.reader(_lines_from(lines, start, too_long))
        base = start
        while True:
            first = base + reader.line_num
            fault: BadRow | None = None
            is_whole = False
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                is_long = "field larger" in str(error)
                found = f"a cell of more than {MAX_LINE_CHARS // 10**6} million characters" if is_long else str(error)
                cells, fault = [], BadRow(first + 1, "not CSV", f"{found}; check the quotes")
            end = base + reader.line_num
            if first >= len(lines):
                return
            if fault is not None:
                pass
            elif end > len(lines):
                fault = BadRow(first + 1, _OPEN_QUOTE, "a quote is never closed; double it, or give --csv-quote no")
            elif too_long and (hit := too_long.intersection(range(first, end))):
                size = len(lines[min(hit)])
                longest = f"{MAX_LINE_CHARS // 10**6} million"
                fault = BadRow(
                    min(hit) + 1, "line too long", f"{size:,} characters, more than {longest}; a newline is missing"
                )
            elif end - first > 1 and columns > 1 and columns not in (len(cells), _width(cells)):
                found = f"a quote opened here closes in line {end}, and {len(cells)} cells result instead of {columns}"
                fault = BadRow(first + 1, _WRONG_COUNT, f"{found}; check the quotes")
                is_whole = end - first <= _CELL_LINES and not dialect.broken_quotes(lines[first:end])
            if fault is not None:
                bad.append(fault)
                restarts += 1
                budget -= end - first
                start = end if is_whole else max(first + 1, min(end, fault.line))
                if restarts > _RESTARTS or budget < 0:
                    raise DataError(f"{name}:{bad[0].line}: {bad[0].found} ({restarts} such lines); repair the quotes")
                break
            if len(cells) > 1 or (cells and cells[0].strip()):
                yield _RawRecord(first + 1, end - first, cells)


def _lines_from(lines: list[str], start: int, too_long: set[int]) -> Iterator[str]:
    rest: Iterator[str] = map(lines.__getitem__, range(start, len(lines)))
    if too_long:
        rest = ("\n" if index in too_long else lines[index] for index in range(start, len(lines)))
    return itertools.chain(rest, [_END])


def _first(bad: list[BadRow]) -> str:
    return f" (line {bad[0].line}: {bad[0].found})" if bad else ""


# --- header ----------------------------------------------------------------------------------------------------------


def _split_preamble(records: list[_RawRecord], columns: int) -> tuple[list[BadRow], list[_RawRecord]]:
    """Separate comments and titles above the header from the table."""
    count = 0
    for index, record in enumerate(records[:_PREAMBLE_LINES]):
        filled = sum(bool(cell.strip()) for cell in record.cells)
        is_comment = record.cells[0].startswith("#") and (
            len(record.cells) != columns or _is_above_header(record.cells, records[index + 1 :])
        )
        is_title = columns > 2 and filled < 2 and len(record.cells) in (1, columns)
        if not is_comment and not is_title:
            break
        count += 1
    if count == len(records):
        return [], records
    passed_over = [
        BadRow(record.line, "line above the header", record.cells[0].strip()[:60]) for record in records[:count]
    ]
    return passed_over, records[count:]


def _has_header(records: list[_RawRecord], settings: DataSettings) -> bool:
    if settings.csv_header != "auto":
        return settings.csv_header == "yes"
    first, body = records[0].cells, [record.cells for record in records[1:_HEADER_ROWS]]
    names = [cell.strip() for cell in first]
    if not body:
        return len(first) > 1
    values, score = _header_score(names, [cells for cells in body if cells != first])
    return (not values and _has_known_name(names, body)) or score - values >= 0


def _is_above_header(cells: list[str], following: list[_RawRecord]) -> bool:
    """Whether a line that begins with # and has the table's width is a comment: words, and a surer header below."""
    table = [record.cells for record in following[:_HEADER_ROWS] if not record.cells[0].startswith("#")]
    if len(cells[0].lstrip("# ").split()) < 2 or len(table) < 2:
        return False
    names = [cell.strip() for cell in table[0]]
    values, score = _header_score(names, table[1:])
    return not values and (score > 0 or _has_known_name(names, table[1:]))


def _has_known_name(names: list[str], body: list[list[str]]) -> bool:
    """Whether a name is one of those that trainers use, and its column is no list of such words."""
    for index, name in enumerate(names):
        column = {cells[index].strip() for cells in body if len(cells) > index} - set(names)
        if is_known_name(name) and not any(map(is_known_name, column)):
            return True
    return False


def _header_score(names: list[str], body: list[list[str]]) -> tuple[int, int]:
    """Return how many names are values of their columns, and how many other names speak for a header, less against."""
    values = score = 0
    numbered = _numbered(names)
    has_questions = sum(name.endswith("?") for name in names) > 1
    for index, name in enumerate(names):
        column = [cells[index].strip() for cells in body if len(cells) > index and cells[index].strip()]
        if not name or not column:
            continue
        numbers = sum(map(is_number, column)) / len(column)
        dates = sum(_DATE.match(cell) is not None for cell in column) / len(column)
        if _DATE.match(name) and numbers > _MOST and dates == 0:
            score += 1
        elif _is_value(name):
            is_year = re.fullmatch(r"(19|20)\d\d", name) is not None
            values += sum(map(_is_value, column)) > 0.5 * len(column) and not is_year and index not in numbered
        elif sum(map(_is_value, column)) > _MOST * len(column):
            score += 1
        elif has_questions and name.endswith("?") and sum(cell.endswith("?") for cell in column) < _FEW * len(column):
            continue  # a survey's question above its answers
        elif name in column or len(name) > _HEADER_CHARS or _SENTENCE.match(name):
            score -= 1
    return values, score


def _numbered(names: list[str]) -> set[int]:
    """Return the places of names such as 1, 2, 3, 4 beside names that are none."""
    run: list[int] = []
    for index, name in enumerate(names):
        is_short_number = name.isdecimal() and len(name) < 10
        if is_short_number and run and run[-1] == index - 1 and int(name) == int(names[index - 1]) + 1:
            run.append(index)
        elif is_short_number and len(run) < _COLUMN_RUN:
            run = [index]
    return set(run) if _COLUMN_RUN <= len(run) < len(names) else set()


def _is_value(cell: str) -> bool:
    return is_number(cell) or _DATE.match(cell) is not None


def _header(
    name: str, records: list[_RawRecord], columns: int, has_header: bool
) -> tuple[list[str], list[_RawRecord], list[str]]:
    """Return the columns' names, the rows below them, and warnings."""
    body = records[1:] if has_header else records
    if not has_header:
        names = [f"column_{number}" for number in range(1, columns + 1)]
        shown = ", ".join(cell.strip()[:20] for cell in records[0].cells[:4])
        return (
            names,
            body,
            [f"{name}: the first row ({shown}) looks like data, not names; set --csv-header yes if it is a header"],
        )
    names = [cell.strip() for cell in records[0].cells]
    if mark := bad_bytes_in("".join(names)):
        raise DataError(
            f"{name}:{records[0].line}: byte {mark} in the header is not valid UTF-8; repair it, or give --encoding"
        )
    while len(names) > 1 and not names[-1] and not any(_filled(record, len(names) - 1) for record in body):
        names.pop()
    if len(names) > MAX_COLUMNS:
        raise DataError(f"{name}:{records[0].line}: {len(names)} columns, more than {MAX_COLUMNS}; remove columns")
    widths = Counter(_width(record.cells) for record in body)
    if body and not widths[len(names)] and max(widths) > len(names):
        raise DataError(
            f"{name}:{records[0].line}: the header has {len(names)} cells, and no row has as many "
            f"({widths.most_common(1)[0][0]} in line {body[0].line}); repair the header, or give --csv-delimiter"
        )
    warnings = []
    named = [cell or f"column_{number}" for number, cell in enumerate(names, start=1)]
    unique = unique_names(named)
    twice = [cell for cell, count in Counter(named).items() if count > 1]
    if twice:
        warnings.append(f"{name}: duplicate column name {twice[0]!r}; the second is renamed {twice[0] + ' (2)'!r}")
    return unique, body, warnings


def _filled(record: _RawRecord, index: int) -> bool:
    return len(record.cells) > index and bool(record.cells[index].strip())


def _width(cells: list[str]) -> int:
    """The number of cells without empty ones at the end."""
    width = len(cells)
    while width > 1 and not cells[width - 1]:
        width -= 1
    return width


# --- rows ------------------------------------------------------------------------------------------------------------


def _add_rows(parsed: ParsedFile, records: list[_RawRecord], names: list[str]) -> None:
    expected = len(names)
    for record in records:
        cells = record.cells
        if len(cells) > expected and not any(cells[expected:]):
            cells = cells[:expected]  # a delimiter at the end of the line
        if len(cells) != expected:
            found = f"{len(cells)} cell{'s' * (len(cells) > 1)} where the header has {expected}"
            comment = "it begins with # and may be a comment; " if cells[0].startswith("#") else ""
            parsed.bad.append(BadRow(record.line, _WRONG_COUNT, f"{found}; {comment}quote cells that hold delimiters"))
            continue
        text = "".join(cells)
        if cells[0].strip() == names[0] and [cell.strip() for cell in cells] == names:
            parsed.passed_over.append(BadRow(record.line, "repeated header"))
        elif not text.strip():
            parsed.passed_over.append(BadRow(record.line, "every cell is empty"))
        elif not text.isascii() and (mark := bad_bytes_in(text)):
            parsed.bad.append(BadRow(record.line, "not UTF-8", f"byte {mark} is not valid UTF-8; repair the row"))
        elif "\x00" in text:
            parsed.bad.append(BadRow(record.line, "NUL byte", "holds a NUL byte; remove it or export the table again"))
        else:
            parsed.rows.append(Row(record.line, dict(zip(names, cells, strict=True))))
