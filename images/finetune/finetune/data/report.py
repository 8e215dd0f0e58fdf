"""How the records came about: what was found, kept and dropped."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from typing import Any

_CONTENT_TYPES = {
    "application/jsonlines": {"jsonl"},
    "application/x-jsonlines": {"jsonl"},
    "application/jsonl": {"jsonl"},
    "application/x-ndjson": {"jsonl"},
    "application/json": {"json", "jsonl"},
    "text/csv": {"csv", "tsv"},
    "text/tab-separated-values": {"tsv"},
    "text/plain": {"txt"},
    "application/x-parquet": {"parquet"},
    "application/vnd.apache.parquet": {"parquet"},
}
_PLACES_SHOWN = 3
_CELL_CHARS = 300


@dataclass(kw_only=True)
class FileReport:
    """One file."""

    name: str
    format: str
    encoding: str | None = None
    evidence: str = ""
    """Why this encoding."""
    dialect: str = ""
    columns: list[str] = field(default_factory=list)
    rows: int = 0
    records: str = ""
    """How its rows were recognised."""


@dataclass(kw_only=True)
class TableReport:
    """The template of one table and the part that each of its columns plays."""

    template: str
    key_columns: list[str] = field(default_factory=list)
    target_columns: list[str] = field(default_factory=list)
    memorisation_columns: list[str] = field(default_factory=list)
    """Targets that no other column predicts: only their form will be learnt."""
    constant_columns: list[str] = field(default_factory=list)
    ignored_columns: list[str] = field(default_factory=list)
    decided_by: dict[str, str] = field(default_factory=dict)
    """Target column -> the column that decides it."""
    predictability: dict[str, float] = field(default_factory=dict)
    """Target column -> share of the rows whose answer the best key gives, judged by the other rows."""


@dataclass(kw_only=True)
class DataReport:
    """The whole input."""

    files: list[FileReport] = field(default_factory=list)
    rows: int = 0
    kept: int = 0
    """Records, both to train and to hold out."""
    train: int = 0
    validation: int = 0
    questions: int = 0
    """Questions about rows of tables; those of a row count as one record."""
    duplicates: int = 0
    dropped: dict[str, list[str]] = field(default_factory=dict)
    """Reason -> file:line of every row that is not trained."""
    records: list[str] = field(default_factory=list)
    """How rows were recognised, the most frequent first."""
    tables: list[TableReport] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def drop(self, reason: str, place: str) -> None:
        self.dropped.setdefault(reason, []).append(place)

    def as_json(self) -> dict[str, Any]:
        """Return the report. What all files have in common is a value, and otherwise a list."""
        columns = list(dict.fromkeys(column for file in self.files for column in file.columns))
        summary = {
            "format": _common([file.format for file in self.files]),
            "encoding": _common([file.encoding for file in self.files if file.encoding]),
            "columns": columns,
            "records": _common(self.records),
        }
        for name in ("template", "key_columns", "target_columns", "memorisation_columns"):
            if len(self.tables) == 1:
                summary[name] = getattr(self.tables[0], name)
        return summary | {key: value for key, value in asdict(self).items() if key != "records"}

    def as_text(self) -> str:
        """Return the report for a person."""
        lines = [line for file in self.files for line in _file_lines(file)]
        lines.append(f"records: {', '.join(self.records)}")
        asked = f" with {self.questions:,} questions" if self.questions else ""
        lines.append(
            f"rows: {self.rows:,}, kept: {self.kept:,}{asked}, to train: {self.train:,}, held out: {self.validation:,}"
        )
        for reason, places in self.dropped.items():
            more = ", ..." if len(places) > _PLACES_SHOWN else ""
            lines.append(f"dropped: {len(places):,}, {reason} ({', '.join(places[:_PLACES_SHOWN])}{more})")
        for table in self.tables:
            lines += _table_lines(table)
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"warning: {warning}" for warning in self.warnings]
        for number, sample in enumerate(self.samples, start=1):
            lines += ["", f"sample {number}", *_sample_lines(sample)]
        return "\n".join(lines)


def content_type_warning(content_type: str | None, formats: Collection[str]) -> str | None:
    """Return a warning if a channel's content type contradicts the content."""
    if content_type is None:
        return None
    expected = _CONTENT_TYPES.get(content_type.partition(";")[0].strip().lower())
    if expected is None or expected.issuperset(formats):
        return None
    found = ", ".join(sorted(formats))
    return f"the content type says {content_type!r}, the content is {found}; read as {found}"


def _common(values: list[Any]) -> Any:
    distinct = list(dict.fromkeys(values))
    return distinct[0] if len(distinct) == 1 else distinct or None


def _file_lines(file: FileReport) -> list[str]:
    kind = ", ".join(part for part in (file.format, file.dialect, file.encoding) if part)
    lines = [f"{file.name}: {kind}; {file.rows:,} rows; {file.records or 'nothing to train'}"]
    if file.encoding not in (None, "utf-8"):
        lines.append(f"  encoding: {file.evidence}")
    lines.append(f"  columns: {', '.join(file.columns)[:_CELL_CHARS]}")
    return lines


def _table_lines(table: TableReport) -> list[str]:
    lines = []
    for column in table.target_columns:
        share = f"{table.predictability[column]:.0%}" if column in table.predictability else "unknown"
        if column in table.memorisation_columns:
            lines.append(
                f"asked: {column}: memorisation: nothing predicts it ({share}), so its values will not be "
                "learnt, only their form"
            )
        elif column in table.decided_by:
            lines.append(f"asked: {column}: decided by {table.decided_by[column]} ({share} of the rows)")
        else:
            lines.append(f"asked: {column}: {share} of the rows follow from one key")
    for name, columns in (
        ("keys", table.key_columns),
        ("constant, left out", table.constant_columns),
        ("not used", table.ignored_columns),
    ):
        if columns:
            lines.append(f"{name}: {', '.join(columns)}")
    return [*lines, "template:", *("  " + line for line in table.template.rstrip().splitlines())]


def _sample_lines(sample: dict[str, Any]) -> list[str]:
    messages = sample.get("messages")
    parts = (
        [(m["role"], m["content"] or str(m.get("tool_calls", ""))) for m in messages] if messages else sample.items()
    )
    lines = []
    for name, text in parts:
        first, *rest = text[:_CELL_CHARS].splitlines() or [""]
        lines += [f"  {name}: {first}", *("    " + line for line in rest)]
    return lines
