"""The partial chunks of a job: which there are, how many rows they save, and which can be deleted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from embed.data.chunks import PARTIAL, Coverage, file_key, from_bytes, range_of
from embed.data.partials import Places, is_partial, read_partial
from embed.data.passages import rows_done_of
from embed.data.windows import Task
from embed.events import PartialSaved, PartialsReplaced
from estiba.checkpoint import ChunkStore


class SavedPartials:
    """Coverages are those of the unfinished files, by file key."""

    def __init__(self, chunks: ChunkStore, *, has_passages: bool) -> None:
        """`has_passages` as with --chunk, where a partial chunk belongs to one row range and counts its rows."""
        self._chunks, self._has_passages = chunks, has_passages
        self._rows: dict[str, int] = {}
        """Rows in the partial chunks of this attempt, and in all with passages, by key."""
        self._found: dict[str, Places] = {}
        """The rows in those of earlier attempts."""
        self._shared: set[str] = set()
        """Those with rows of files that are another host's, now that the files are shared among other hosts."""

    def open(self, files: Iterable[str], coverages: Mapping[str, Coverage]) -> None:
        """Read what earlier attempts left of files, which are named by key."""
        known = set(files)
        for key in list(filter(is_partial, self._chunks.keys())):
            if self._has_passages:
                coverage = coverages.get(key.split("/")[0])
                if coverage is None:
                    continue
                if _is_replaced(key, coverage):  # by an attempt that was killed right then
                    self._chunks.drop([key])
                    continue
            if (data := self._chunks.load(key, may_be_gone=True)) is None:  # another host's window may be complete
                continue
            if self._has_passages:
                self._rows[key] = rows_done_of(from_bytes(data))
            elif known.intersection((places := read_partial(key, data).places).files):  # or another host's
                self._found[key] = places
                if not places.files <= known:
                    self._shared.add(key)
        self.drop_replaced(coverages)

    def drop_replaced(self, coverages: Mapping[str, Coverage]) -> None:
        """Delete the partial chunks of earlier attempts whose rows all have chunks."""
        for key, places in list(self._found.items()):
            if key not in self._shared and not places.rows_in(coverages):
                self._chunks.drop([key])
                del self._found[key]

    def saved(self, event: PartialSaved) -> None:
        self._chunks.adopt(event.key, event.name)
        self._rows[event.key] = event.rows

    def replaced(self, event: PartialsReplaced) -> None:
        self._chunks.forget(event.keys)
        for key in event.keys:
            self._rows.pop(key, None)

    def rows(self, coverages: Mapping[str, Coverage]) -> int:
        """Rows without a chunk that a resume does not compute again."""
        return sum(self._rows.values()) + sum(places.rows_in(coverages) for places in self._found.values())

    def keys(self) -> list[str]:
        """Of partial chunks that are not in the folder of a file."""
        return list(self._found)

    def names_for(self, task: Task) -> tuple[tuple[str, str], ...]:
        """Key and name of those with rows of the task's row groups, or with passages, files."""
        row_groups = {(file_key(item.table), item.row_group) for item in task.row_groups}
        files = {file for file, _ in row_groups}
        keys = [key for key, places in self._found.items() if row_groups & places.rows.keys()]
        keys += [key for key in self._rows if key.split("/")[0] in files]
        return tuple((key, self._chunks.name_of(key)) for key in keys if key in self._chunks)


def _is_replaced(key: str, coverage: Coverage) -> bool:
    """Whether the rows of a partial chunk with passages all have chunks."""
    name = key.removesuffix(PARTIAL)
    rows = range_of(name) or range_of(name.rpartition("-")[0])  # of the first part, or of a later one
    return rows is not None and not any(
        start < rows.end and rows.start < end for start, end in coverage.gaps(rows.row_group)
    )
