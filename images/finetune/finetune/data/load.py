"""Files to a data set: read, recognise, build records, remove duplicates, split."""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import xxhash

from estiba.errors import DataError
from finetune.data.files import FoundFiles, find_files, read_file
from finetune.data.formats import parse
from finetune.data.gather import Gathered, require_records
from finetune.data.records import Dataset, Record
from finetune.data.report import DataReport, FileReport, content_type_warning
from finetune.data.rows import BadRow
from finetune.data.settings import DataSettings
from finetune.data.split import (
    join_shared_text,
    sample_records,
    split,
    without_duplicates,
    without_trained_facts,
)
from finetune.data.template import read_template

BAD_SHARE = 0.01
_SHOWN = 3
_SAMPLES = 5
_TEST_FILE = re.compile(r"(^|[/_.-])(test|dev|valid|validation|val|eval)([/_.-]|$)", re.IGNORECASE)


def load(location: Path | Sequence[Path], settings: DataSettings, *, content_type: str | None = None) -> Dataset:
    """Return the training and validation records at a path. Raises DataError, ConfigError.

    A content type that the content contradicts is ignored with a warning.
    """
    with _paused_garbage_collection():
        return _load([location] if isinstance(location, Path) else location, settings, content_type)


@contextmanager
def _paused_garbage_collection() -> Iterator[None]:
    """Half of the time would go into looking for cycles among millions of records that have none."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _load(locations: Sequence[Path], settings: DataSettings, content_type: str | None) -> Dataset:
    found = find_files(locations)
    gathered = Gathered(settings=settings)
    report = DataReport()
    identity = xxhash.xxh3_128(_settings_bytes(settings))
    for file in found.files:
        data = read_file(file)
        identity.update(xxhash.xxh3_128_digest(data))
        read = parse(file.name, data, settings)
        parsed = read.parsed
        for row in parsed.passed_over:
            report.drop(row.reason, f"{file.name}:{row.line}")
        gathered.warnings += parsed.warnings
        report.files.append(
            FileReport(
                name=file.name,
                format=parsed.format,
                encoding=read.encoding,
                evidence=read.evidence,
                dialect=parsed.dialect,
                columns=parsed.columns,
                rows=parsed.row_count + len(parsed.passed_over),
                records=gathered.add_file(file.name, parsed),
            )
        )
    report.rows = sum(file.rows for file in report.files)
    _judge_bad_rows(gathered, report)
    gathered.add_tables()
    _judge_bad_rows(gathered, report)
    require_records(gathered)
    for name, row in gathered.bad:
        report.drop(row.reason, f"{name}:{row.line}")
    _describe(gathered, report, found, content_type)
    train, validation = _split(gathered.records, settings, report)
    return Dataset(train=train, validation=validation, report=report, identity=identity.hexdigest())


def _judge_bad_rows(gathered: Gathered, report: DataReport) -> None:
    """Sort the bad rows. Raise DataError if there are more than the settings allow."""
    order = {file.name: index for index, file in enumerate(report.files)}
    bad = gathered.bad = sorted(gathered.bad, key=lambda item: (order[item[0]], item[1].line))
    mode = gathered.settings.on_bad_row
    if not bad or mode == "skip":
        return
    if mode == "fail":
        raise DataError(f"{_place(*bad[0])}; --on-bad-row skip allows such rows")
    if len(bad) > BAD_SHARE * report.rows:
        rows = f"{len(bad):,} of {report.rows:,} rows cannot be used"
        more = f"; and {len(bad) - _SHOWN:,} more" if len(bad) > _SHOWN else ""
        first = "; ".join(_place(name, row) for name, row in bad[:_SHOWN])
        raise DataError(f"{first}{more} ({rows}, at most 1% may be skipped; --on-bad-row skip allows any number)")


def _place(name: str, row: BadRow) -> str:
    return f"{name}:{row.line}: {row.found or row.reason}"


def _split(records: list[Record], settings: DataSettings, report: DataReport) -> tuple[list[Record], list[Record]]:
    records, duplicates = without_duplicates(records)
    for record in duplicates:
        report.drop("exact duplicate", record.source)
    report.duplicates = len(duplicates)
    if settings.max_records is not None and settings.max_records < len(records):
        report.notes.append(f"a random sample of {settings.max_records:,} of {len(records):,} records")
        records = sample_records(records, settings.max_records, settings.seed)
    if settings.validation_split:
        records = join_shared_text(records)
    train, validation = split(records, settings.validation_split, settings.seed)
    validation, leaked = without_trained_facts(train, validation)
    for record in leaked:
        report.drop("also asked in training", record.source)
    if settings.validation_split and not validation:
        report.warnings.append(
            "no record is held out, because all belong to one group; there will be no validation loss"
        )
    report.train, report.validation, report.kept = len(train), len(validation), len(train) + len(validation)
    report.questions = sum(len(record.questions) for side in (train, validation) for record in side)
    every = train + validation
    count = min(_SAMPLES, len(every))
    for number in range(count):
        lines = every[number * len(every) // count].as_json()
        report.samples.append(lines[number % len(lines)])
    return train, validation


def _describe(gathered: Gathered, report: DataReport, found: FoundFiles, content_type: str | None) -> None:
    report.records = [name for name, _ in gathered.counts.most_common()]
    report.tables, report.warnings, report.notes = gathered.tables, gathered.warnings, gathered.notes
    if found.hidden:
        report.notes.append(f"skipped {len(found.hidden)} hidden file{'s' * (len(found.hidden) > 1)}")
    if found.companions:
        report.notes.append(f"skipped, not data: {', '.join(found.companions[:6])}")
    if warning := content_type_warning(content_type, {file.format for file in report.files}):
        report.warnings.append(warning)
    if held_back := [file.name for file in report.files if _TEST_FILE.search(file.name)]:
        names = ", ".join(held_back[:3])
        report.warnings.append(f"also trained on, though the name suggests a test set: {names}; remove it if it is one")
    if len(gathered.counts) > 1:
        kinds = ", ".join(f"{count:,} as {name}" for name, count in gathered.counts.most_common())
        report.warnings.append(f"the rows are of several kinds ({kinds}); all are used")


def _settings_bytes(settings: DataSettings) -> bytes:
    """The settings that change the records. Of a template, its text counts and not its path."""
    values = {name: getattr(settings, name) for name in DataSettings.model_fields if name != "on_bad_row"}
    if settings.template is not None:
        values["template"] = read_template(settings.template).source
    return json.dumps(values, sort_keys=True).encode()
