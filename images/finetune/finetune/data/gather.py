"""Rows of all files to records, each by what its columns mean."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from estiba.errors import DataError
from finetune.data.conversion import convert_row, digest
from finetune.data.recognise import Shape, column_named, normalized, refuse_numbers, shape_of, text_shape
from finetune.data.records import Record
from finetune.data.report import TableReport
from finetune.data.rows import BadRow, ParsedFile, Row, as_text
from finetune.data.settings import DataSettings
from finetune.data.tables import TableRow, convert_table

_DOCUMENT_COLUMNS = frozenset(
    """doc_id docid document_id document_name doc source_id parent_id article_id page_id book_id context_id
    conversation_id thread_id dialog_id dialogue_id url source_url filename file_name file title""".split()
)
_SERIALS = ("id", "idx", "index", "")
_TABLE = Shape(records="table")


@dataclass(kw_only=True)
class Gathered:
    """Records and faults of all files."""

    settings: DataSettings
    records: list[Record] = field(default_factory=list)
    bad: list[tuple[str, BadRow]] = field(default_factory=list)
    """File and row."""
    tables: list[TableReport] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    """How rows were recognised -> how many."""
    _unused: Counter[str] = field(default_factory=Counter)
    """What the conversations of the current file have and is not trained -> how many rows."""
    _tables: dict[tuple[str, ...], list[TableRow]] = field(default_factory=dict)

    def add_file(self, name: str, parsed: ParsedFile) -> str:
        """Add a file's rows. Return how they were recognised."""
        self.bad += [(name, row) for row in parsed.bad]
        if parsed.document_of is not None:
            self.counts["text"] += len(parsed.rows)
            self._add_document(name, parsed)
            return "text"
        described = []
        for shape, columns, rows in self._by_shape(name, parsed):
            self.counts[shape.records] += len(rows)
            described.append(shape.describe())
            if shape.records == "table":
                group = self._tables.setdefault(tuple(columns), [])
                group += [TableRow(file=name, row=row) for row in rows]
            else:
                self._add_rows(name, shape, columns, rows)
        return ", ".join(described)

    def add_tables(self) -> None:
        """Convert the tables, when all files with the same columns are known. Raises ConfigError, DataError."""
        for columns, rows in self._tables.items():
            files = list(dict.fromkeys(item.file for item in rows))
            name = files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
            table = convert_table(name, columns, rows, self.settings)
            group_by = self.settings.group_by
            column = None if group_by is None else column_named(group_by, columns, "--group-by")
            for record, origin in zip(table.records, table.origins, strict=True):
                self.records.append(_grouped(record, origin.row, column))
            self.bad += table.bad
            self.warnings += table.warnings
            if table.report is not None:
                self.tables.append(table.report)

    def _add_document(self, name: str, parsed: ParsedFile) -> None:
        """Join paragraphs up to the length of a record. None of a document is held out without the rest."""
        limit = self.settings.text_chunk_chars
        shape = text_shape("text", parsed.columns)
        lines = [Row(row.line, {"text": line}) for row in parsed.rows for line in row.cells["text"].splitlines()]
        refuse_numbers(name, "text", lines)
        chunks: list[tuple[int, list[str]]] = []
        size = 0
        for row in parsed.rows:
            text = row.cells["text"]
            size += len(text) + 2
            if not chunks or size > limit:
                text = text.lstrip("\n")
                chunks.append((row.line, []))
                size = len(text)
            chunks[-1][1].append(text)
        for line, paragraphs in chunks:
            self._convert(name, Row(line, {"text": "\n\n".join(paragraphs)}), shape, digest("document", name))

    def _add_rows(self, name: str, shape: Shape, columns: Sequence[str], rows: Sequence[Row]) -> None:
        ignored = [column for column in shape.ignored if normalized(column) not in _SERIALS]
        if ignored:
            self.notes.append(f"{name}: unused columns: {', '.join(ignored)[:120]}")
        column = self._group_column(name, columns, rows)
        for row in rows:
            value = as_text(row.cells.get(column)).strip() if column is not None else ""
            self._convert(name, row, shape, digest("group", value) if value else None)
        self.notes += [
            f"{name}: {what} is not trained ({count:,} row{'s' * (count > 1)})" for what, count in self._unused.items()
        ]
        self._unused.clear()

    def _convert(self, name: str, row: Row, shape: Shape, group: str | None) -> None:
        result = convert_row(f"{name}:{row.line}", row, shape, self.settings.text_chunk_chars, self._unused)
        if isinstance(result, BadRow):
            self.bad.append((name, result))
        else:
            self.records += result if group is None else [replace(record, group=group) for record in result]

    def _group_column(self, name: str, columns: Sequence[str], rows: Sequence[Row]) -> str | None:
        """The column that says which rows belong together: the user's, or one that names documents."""
        if self.settings.group_by is not None:
            return column_named(self.settings.group_by, columns, "--group-by")
        for column in columns:
            if normalized(column) not in _DOCUMENT_COLUMNS:
                continue
            sizes = Counter(as_text(row.cells.get(column)).strip() for row in rows)
            del sizes[""]
            if sizes and 1 < max(sizes.values()) <= len(rows) / 2:
                self.notes.append(f"{name}: rows with the same {column!r} stay on one side of the validation split")
                return column
        return None

    # --- shapes ---

    def _by_shape(self, name: str, parsed: ParsedFile) -> Iterator[tuple[Shape, list[str], list[Row]]]:
        """Yield the rows with the same meaning together."""
        if self.settings.text_column is not None:
            column = column_named(self.settings.text_column, parsed.columns, "--text-column")
            refuse_numbers(name, column, parsed.rows)
            yield text_shape(column, parsed.columns), parsed.columns, parsed.rows
            return
        shaped = [(_TABLE, list(parsed.columns), parsed.rows)] if self._is_asked_as_table() else _shapes(name, parsed)
        recognised = sum(len(rows) for shape, _, rows in shaped if shape.records != "table")
        if recognised * 2 < len(parsed.rows):
            rows = [row for _, _, rows in shaped for row in rows]
            columns = list(dict.fromkeys(column for _, columns, _ in shaped for column in columns))
            shaped = [(_TABLE, columns, sorted(rows, key=lambda row: row.line))] if rows else []
        for shape, columns, rows in shaped:
            if shape.records == "table":
                rows = self._without_strangers(name, rows, recognised > 0)
                columns = [column for column in columns if any(column in row.cells for row in rows)]
            if shape.records == "text":
                refuse_numbers(name, shape.fields["text"], rows)
            if rows:
                yield shape, columns, rows

    def _is_asked_as_table(self) -> bool:
        settings = self.settings
        return bool(settings.template or settings.target_columns or settings.key_columns)

    def _without_strangers(self, name: str, rows: list[Row], is_minority: bool) -> list[Row]:
        """Return a table's rows; those with other fields than most are bad."""
        fields = Counter(tuple(row.cells) for row in rows)
        if not is_minority and len(fields) < 2:
            return rows
        usual = set(fields.most_common(1)[0][0])
        kept = []
        for row in rows:
            if not is_minority and 2 * len(usual.intersection(row.cells)) >= len(usual):
                kept.append(row)
            else:
                most = "a conversation, a prompt with an answer, or text" if is_minority else ", ".join(usual)[:80]
                found = (
                    f"its fields ({', '.join(row.cells)[:80]}) differ from those of most rows ({most}); split the file"
                )
                self.bad.append((name, BadRow(row.line, "unexpected fields", found)))
        return kept


def _shapes(name: str, parsed: ParsedFile) -> list[tuple[Shape, list[str], list[Row]]]:
    """The rows by shape. Lines of JSON may differ in their fields; other files have one set of columns."""
    if parsed.format not in ("json", "jsonl"):
        return [(shape_of(name, parsed.columns, parsed.rows), list(parsed.columns), parsed.rows)]
    by_fields: dict[tuple[str, ...], list[Row]] = {}
    for row in parsed.rows:
        by_fields.setdefault(tuple(row.cells), []).append(row)
    shaped: dict[tuple[str, ...], tuple[Shape, list[str], list[Row]]] = {}
    for fields, rows in by_fields.items():
        shape = shape_of(name, fields, rows)
        key = (shape.records, *(part for item in shape.fields.items() for part in item))
        _, columns, gathered = shaped.setdefault(key, (shape, [], []))
        columns += [column for column in fields if column not in columns]
        gathered += rows
    for _, _, rows in shaped.values():
        rows.sort(key=lambda row: row.line)
    return list(shaped.values())


def _grouped(record: Record, row: Row, column: str | None) -> Record:
    value = as_text(row.cells.get(column)).strip() if column is not None else ""
    return replace(record, group=digest("group", value)) if value else record


def require_records(gathered: Gathered) -> None:
    """Raise DataError if nothing can be trained."""
    if gathered.records:
        return
    if gathered.bad:
        name, row = gathered.bad[0]
        raise DataError(f"{name}:{row.line}: {row.found}; no row of the data can be used")
    raise DataError("no row in the data; restore its content")
