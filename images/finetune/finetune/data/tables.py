"""Rows of a table to records: choose the columns, render the template, ask the questions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from finetune.data.columns import ColumnRoles, choose_columns
from finetune.data.conversion import digest
from finetune.data.records import Question, Record
from finetune.data.report import TableReport
from finetune.data.rows import BadRow, Row, as_text
from finetune.data.settings import DataSettings
from finetune.data.template import ColumnTemplate, RowTemplate, read_template

_NO_ANSWER = "every target cell is empty"


@dataclass(kw_only=True)
class TableRow:
    """A row and its file."""

    file: str
    row: Row


@dataclass(kw_only=True)
class ConvertedTable:
    """The records of one table, which may stand in several files."""

    records: list[Record] = field(default_factory=list)
    origins: list[TableRow] = field(default_factory=list)
    """The row of each record."""
    bad: list[tuple[str, BadRow]] = field(default_factory=list)
    report: TableReport | None = None
    warnings: list[str] = field(default_factory=list)


def convert_table(name: str, columns: Sequence[str], rows: list[TableRow], settings: DataSettings) -> ConvertedTable:
    """Return the records of a table. Raises ConfigError, DataError if no question can be asked."""
    template = read_template(settings.template) if settings.template else None
    texts = {column: [as_text(item.row.cells.get(column)) for item in rows] for column in columns}
    if template is not None and template.is_text:
        return _as_text(template, texts, rows)
    roles = choose_columns(name, texts, settings)
    gaps = {column for column in roles.keys if not all(map(str.strip, texts[column]))}
    template = template or ColumnTemplate(roles.keys, gaps)
    result = ConvertedTable(report=_report(template, roles), warnings=list(roles.warnings))
    for item, cells in zip(rows, _cells(texts, len(rows)), strict=True):
        record = _record(item, cells, template, roles)
        if isinstance(record, BadRow):
            result.bad.append((item.file, record))
        else:
            result.records.append(record)
            result.origins.append(item)
    result.warnings += _contradictions(name, result.records, roles)
    return result


def _cells(texts: dict[str, list[str]], count: int) -> Iterator[dict[str, str]]:
    for index in range(count):
        yield {column: _trimmed(cells[index]) for column, cells in texts.items()}


def _trimmed(cell: str) -> str:
    """A cell without the blanks that pad a table; of several lines, such as code, the first keeps its indentation."""
    text = cell.strip()
    return cell.rstrip().lstrip("\r\n") if "\n" in text else text


def _record(item: TableRow, cells: dict[str, str], template: RowTemplate, roles: ColumnRoles) -> Record | BadRow:
    answers = [(column, template.answer(cells, column)) for column in roles.targets if cells[column]]
    questions = tuple(
        Question(text=template.question(cells, column), answer=answer, column=column)
        for column, answer in answers
        if answer
    )
    if not questions:
        shown = ", ".join(roles.targets)[:80]
        return BadRow(item.row.line, _NO_ANSWER, f"empty: {shown}; fill them in, or ask for others by --target-columns")
    known = template.known(cells)
    if not known:
        return BadRow(item.row.line, "every key cell is empty", f"empty: {', '.join(roles.keys)[:80]}; fill them in")
    return Record(
        source=f"{item.file}:{item.row.line}",
        group=digest("row", known),
        kind="row",
        system=template.system(cells),
        known=known,
        questions=questions,
    )


def _as_text(template: RowTemplate, texts: dict[str, list[str]], rows: list[TableRow]) -> ConvertedTable:
    result = ConvertedTable(
        report=TableReport(
            template=template.source,
        )
    )
    for item, cells in zip(rows, _cells(texts, len(rows)), strict=True):
        text = template.text(cells)
        if not text:
            result.bad.append(
                (item.file, BadRow(item.row.line, "empty text", "the template makes no text of this row"))
            )
            continue
        source = f"{item.file}:{item.row.line}"
        result.records.append(Record(source=source, group=digest("text", text), kind="text", text=text))
        result.origins.append(item)
    return result


def _contradictions(name: str, records: list[Record], roles: ColumnRoles) -> list[str]:
    """Warn of questions that have several answers, since the keys do not tell their rows apart."""
    answers: dict[tuple[str, str], str] = {}
    contradicted: dict[str, str] = {}
    for record in records:
        for question in record.questions:
            answer = answers.setdefault((record.known, question.text), question.answer)
            if answer != question.answer:
                contradicted.setdefault(record.known + question.text, record.source)
    if not contradicted:
        return []
    count, first = len(contradicted), next(iter(contradicted.values()))
    keys = ", ".join(roles.keys)
    warning = (
        f"{name}: {count:,} question{'s have' if count > 1 else ' has'} more than one answer (such as {first}), since "
        f"the key columns ({keys}) do not tell the rows apart; name more by --key-columns"
    )
    return [warning]


def _report(template: RowTemplate, roles: ColumnRoles) -> TableReport:
    return TableReport(
        template=template.source,
        key_columns=roles.keys,
        target_columns=roles.targets,
        memorisation_columns=roles.memorisation,
        constant_columns=roles.constant,
        ignored_columns=roles.ignored,
        decided_by=roles.decided_by,
        predictability=roles.predictability,
    )
