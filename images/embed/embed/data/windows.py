"""Windows: rows that are sorted by length and packed into batches together.

The more rows share a window, the less padding. Consecutive small row groups share one, and so do those of small files
that follow each other. Which rows share a window depends on the input and on limits, and not on what is finished: a
resumed job packs the same batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from embed.data.chunks import Coverage, MissingRows, RowRange
from embed.data.rows import RangeLimits, TextRange, text_ranges
from embed.data.table import Table
from estiba.errors import DataError, StoreError
from estiba.storage import Store

CHARACTERS_PER_TOKEN = 6
"""More than any writing system needs on average. The model does not see text beyond max_length times this."""
CPU_LIMITS = (1024, 2**19)
GPU_LIMITS = (8192, 2**22)
"""Rows and characters in a text range, and in a window: about 30 s of work on a CPU, a few seconds on a GPU."""
CPU_TOKEN_VECTOR_BYTES, GPU_TOKEN_VECTOR_BYTES = 2**27, 2**29
"""The vectors of all tokens of a window, at one token in two characters; European languages have one in four."""
SMALL_JOB_WINDOWS = 64
"""A job of fewer windows cannot be shared evenly among GPUs."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Consecutive row groups of which some rows have no vectors yet: what a worker takes at once."""

    row_groups: tuple[MissingRows, ...]
    """A row group that has all its vectors is here too, if its rows share a window with others."""
    is_shared: bool
    """Its rows share windows. Otherwise it is one large row group, and each of its row ranges is a window."""
    partials: tuple[tuple[str, str], ...] = ()
    """Key and name of the partial chunks with rows of its files."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A row range without vectors, in a window."""

    table: Table
    row_range: RowRange
    offset: int
    """Its first row in the window."""

    @property
    def rows(self) -> slice:
        """Its rows in the window."""
        return slice(self.offset, self.offset + self.row_range.rows)


@dataclass(frozen=True, kw_only=True)
class TextWindow:
    """The text of a window, and what is missing of it."""

    texts: list[str | bytes | None]
    parts: tuple[Part, ...]
    """The other rows have their vectors; they are read because they share batches with these."""
    largest_row_group: int
    """Rows of the largest row group that has rows in the window."""


def limits_for(device: str, max_length: int, token_dimensions: int = 0) -> RangeLimits:
    """`token_dimensions` is the width of a token's vector, where the job saves these too."""
    is_cpu = device.startswith("cpu")
    rows, characters = CPU_LIMITS if is_cpu else GPU_LIMITS
    if token_dimensions:
        most_bytes = CPU_TOKEN_VECTOR_BYTES if is_cpu else GPU_TOKEN_VECTOR_BYTES
        characters = min(characters, 2 * most_bytes // (4 * token_dimensions))
    return RangeLimits(rows=rows, characters=characters, row_characters=CHARACTERS_PER_TOKEN * max_length)


def window_rows(device: str, rows: int) -> int:
    """Rows that may share a window, in a job of `rows` rows."""
    most, _ = CPU_LIMITS if device.startswith("cpu") else GPU_LIMITS
    return min(most, max(CPU_LIMITS[0], rows // SMALL_JOB_WINDOWS))


def tasks_of(tables: Iterable[Table], coverages: Mapping[str, Coverage], rows_of_window: int) -> list[Task]:
    """The tasks of a job. `coverages` holds the saved rows of the files that are not complete, by path."""
    tasks = []
    for group in _shared(tables, rows_of_window):
        row_groups = tuple(
            MissingRows(
                table=table,
                row_group=index,
                missing=coverages[table.path].gaps(index) if table.path in coverages else (),
            )
            for table, index in group
        )
        if any(item.missing for item in row_groups):
            is_shared = sum(table.row_group_rows[index] for table, index in group) <= rows_of_window
            tasks.append(Task(row_groups=row_groups, is_shared=is_shared))
    return tasks


def _shared(tables: Iterable[Table], rows_of_window: int) -> Iterator[list[tuple[Table, int]]]:
    """Consecutive row groups that fit into a window together, or one that does not."""
    held: list[tuple[Table, int]] = []
    held_rows = 0
    for table in tables:
        for index, rows in enumerate(table.row_group_rows):
            if held and held_rows + rows > rows_of_window:
                yield held
                held, held_rows = [], 0
            if rows:
                held.append((table, index))
                held_rows += rows
    if held:
        yield held


def text_windows(
    store: Store, task: Task, column: str, limits: RangeLimits, on_broken: Callable[[Table, Exception], None]
) -> Iterator[TextWindow]:
    """The windows of a task that have missing rows.

    A row group that cannot be read to its end is reported by `on_broken`; what follows its last sound row range is left
    out of the window, here and in a resumed job. Raises StoreError if S3 does not answer.
    """
    held: list[tuple[MissingRows, TextRange]] = []
    for item in task.row_groups:
        # The ends of the ranges follow from all rows of the row group, so they do not depend on what is missing.
        all_rows = ((0, item.table.row_group_rows[item.row_group]),)
        wanted = replace(item, missing=all_rows) if task.is_shared else item
        try:
            for text_range in text_ranges(store, wanted, column, limits):
                if held and not (task.is_shared and _fits(held, text_range, limits)):
                    yield from _window(held)
                    held = []
                held.append((item, text_range))
        except (DataError, StoreError) as error:
            if isinstance(error, StoreError) and store.is_durable:
                raise  # S3 was retried for minutes; the job cannot continue
            if item.missing:
                on_broken(item.table, error)
    if held:
        yield from _window(held)


def _fits(held: list[tuple[MissingRows, TextRange]], more: TextRange, limits: RangeLimits) -> bool:
    ranges = [*(text_range for _, text_range in held), more]
    return (
        sum(len(each.texts) for each in ranges) <= limits.rows
        and sum(each.characters for each in ranges) <= limits.characters
        and sum(each.raw_bytes for each in ranges) <= limits.raw_bytes
    )


def _window(held: list[tuple[MissingRows, TextRange]]) -> Iterator[TextWindow]:
    """The window of these ranges; none if all their rows have vectors."""
    texts: list[str | bytes | None] = []
    parts = []
    for item, text_range in held:
        for start, end in item.missing:
            first, last = max(start, text_range.start), min(end, text_range.start + len(text_range.texts))
            if first < last:
                row_range = RowRange(row_group=item.row_group, start=first, rows=last - first)
                parts.append(Part(table=item.table, row_range=row_range, offset=len(texts) + first - text_range.start))
        texts += text_range.texts
    if parts:
        largest = max(item.table.row_group_rows[item.row_group] for item, _ in held)
        yield TextWindow(texts=texts, parts=tuple(parts), largest_row_group=largest)
