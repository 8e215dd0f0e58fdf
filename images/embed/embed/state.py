"""The state of the job's files, and the thread that joins finished ones into outputs."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from typing import Any

from embed.artifacts.outputs import Abandoned, write_output
from embed.artifacts.written import Written, from_ledger, from_metadata
from embed.config import EmbedConfig
from embed.data.chunks import (
    REUSED,
    ChunkLost,
    Coverage,
    RowRange,
    computed_by,
    file_key,
    from_bytes,
    key_of,
    range_of,
)
from embed.data.identity import FileChangedError
from embed.data.precision import vector_fields
from embed.data.table import BadFile, Table
from embed.data.windows import Task, tasks_of, window_rows
from embed.events import ChunkSaved, Event, FileBroken, PartialSaved, PartialsReplaced, RowsComputed, TaskDone
from embed.saved_partials import SavedPartials
from embed.stages import JOIN, StageTimes
from estiba.checkpoint import ChunkStore, Ledger
from estiba.errors import DataError
from estiba.log import get_logger
from estiba.platform.stop import Stop
from estiba.progress import Progress
from estiba.storage import Store

logger = get_logger(__name__)

NOTHING_COMPUTED = "nothing was computed in this attempt, and what earlier ones saved is kept"
"""Reported when a stop comes before the first chunk."""
MAX_LEDGER_SHARE = 1 / 50
"""The ledger grows with the number of files; at most this share of the time is spent writing it."""


class State(Enum):
    TODO = "todo"
    ALREADY_DONE = "already done"
    """The output was complete when the job started."""
    DONE = "done"
    BAD = "bad"


@dataclass(kw_only=True)
class FileState:
    table: Table
    coverage: Coverage
    state: State = State.TODO
    written: Written | None = None
    is_joining: bool = False


@dataclass(kw_only=True)
class Attempt:
    """What this attempt computed, and what it resumed from."""

    rows_found: int = 0
    rows_computed: int = 0
    """Rows without text included."""
    rows_copied: int = 0
    rows_reused: int = 0
    reading_old_s: float = 0.0
    """Before anything is computed, with --reuse."""
    tokens: int = 0
    padded_tokens: int = 0
    chunks_found: int = 0
    chunks_saved: int = 0
    chunks_lost: int = 0
    chunk_bytes: int = 0


@dataclass(kw_only=True)
class JobState:
    """All files of the job. Events come from other threads; `lock` guards what they change."""

    config: EmbedConfig
    source: Store
    target: Store
    chunks: ChunkStore
    ledger: Ledger | None
    provenance: dict[str, Any]
    """Written into each output; its `output_id` decides whether an existing output can be used."""
    dimensions: int
    token_dimensions: int
    device: str
    bad: list[BadFile]
    files: dict[str, FileState] = field(default_factory=dict)
    old_outputs: frozenset[str] = frozenset()
    """Outputs that were there when the job started and are not known to be current."""
    attempt: Attempt = field(default_factory=Attempt)
    stages: StageTimes = field(default_factory=StageTimes)
    progress: Progress | None = None
    lost: list[RowRange] = field(default_factory=list)
    error: BaseException | None = None
    lock: threading.RLock = field(default_factory=threading.RLock)

    def __post_init__(self) -> None:
        self._vectors = vector_fields(self.config, self.dimensions, self.token_dimensions)
        self._partials = SavedPartials(self.chunks, has_passages=self.config.chunk is not None)
        self._saved: dict[tuple[str, RowRange], ChunkSaved] = {}
        self._joiner = ThreadPoolExecutor(1, thread_name_prefix="embed-joiner")
        self._joins: list[Future[None]] = []
        self._abandoned = threading.Event()
        self._done_since_ledger = 0
        self._ledger_ended, self._ledger_s = time.monotonic(), 0.0

    # --- finished work -----------------------------------------------------------------------------------------

    def open(self, tables: Iterable[Table], threads: int) -> None:
        """Find each file's state: its output is complete, or some of its rows are saved."""
        records = {
            record["path"]: record
            for data in (self.ledger.newest() if self.ledger else ())
            for record in json.loads(data)["files"]
        }
        ranges: dict[str, list[RowRange]] = {}
        for key in self.chunks.keys():  # noqa: SIM118 - not a mapping
            row_range = range_of(key)
            if row_range is not None:
                ranges.setdefault(key.split("/")[0], []).append(row_range)

        def state_of(table: Table) -> FileState:
            coverage = Coverage(table, ranges.get(file_key(table), ()))
            written = self._existing(table, coverage, records.get(table.path))
            state = State.TODO if written is None else State.ALREADY_DONE
            return FileState(table=table, coverage=coverage, state=state, written=written)

        with ThreadPoolExecutor(threads) as pool:
            self.files = {item.table.path: item for item in pool.map(state_of, tables)}
        self.attempt.rows_found = self.rows_done
        self._partials.open((file_key(item.table) for item in self.files.values()), self._missing())
        self.attempt.chunks_found = sum(map(len, ranges.values()))

    def _missing(self) -> dict[str, Coverage]:
        """What the unfinished files have, by file key."""
        return {file_key(item.table): item.coverage for item in self.files.values() if item.state is State.TODO}

    def _existing(self, table: Table, coverage: Coverage, record: dict[str, Any] | None) -> Written | None:
        """The complete output of an earlier attempt, if there is one."""
        if self.config.no_checkpoint:
            return None
        output_id = self.provenance["output_id"]
        if record is not None and (written := from_ledger(self.target, table, record, output_id)) is not None:
            return written
        if coverage.is_complete and table.rows:
            return None  # joining it again takes seconds and yields a digest
        return from_metadata(self.target, table, output_id)

    @property
    def files_total(self) -> int:
        return len(self.files) + sum(1 for item in self.bad if item.path not in self.files)

    @property
    def rows_total(self) -> int:
        return sum(item.table.rows for item in self.files.values())

    @property
    def rows_done(self) -> int:
        return sum(
            item.table.rows if item.written is not None else item.coverage.rows_done for item in self.files.values()
        )

    @property
    def rows_saved(self) -> int:
        """Rows that a resume does not compute again."""
        return self.rows_done + self._partials.rows(self._missing())

    def bad_rows(self) -> list[tuple[str, list[int]]]:
        """The rows that got no vector for a fault of the model, by file; at most ten of each."""
        found = ((path, item.written.counts.get("bad_rows")) for path, item in self.files.items() if item.written)
        return [(path, rows) for path, rows in found if rows]

    def computed_by(self) -> dict[str, Any] | None:
        """The engine of the job that saved rows of a file that is not finished; None if there are none."""
        files = [f"{file_key(item.table)}/" for item in self.files.values() if item.state is State.TODO]
        for key in (*self._partials.keys(), *(key for file in files for key in self.chunks.keys(file))):
            data = self.chunks.load(key)
            engines = computed_by(from_bytes(data)) if data is not None else []
            engines = [engine for engine in engines if engine["engine"] != REUSED]
            if engines:
                found: dict[str, Any] = engines[-1].get("instead_of", engines[-1])
                return found
        return None

    # --- remaining work ----------------------------------------------------------------------------------------

    def tasks(self) -> list[Task]:
        """The row groups with missing rows. Starts joining the files that are complete."""
        with self.lock:
            # With --chunk a long text has rows enough for a window.
            rows = window_rows(self.device, self.rows_total) if self.config.chunk is None else 0
            missing = {item.table.path: item.coverage for item in self.files.values() if item.state is State.TODO}
            tasks = tasks_of([item.table for item in self.files.values()], missing, rows)
            for item in self.files.values():
                if item.state is State.TODO:
                    self._join_if_complete(item)
            return [replace(task, partials=self._partials.names_for(task)) for task in tasks]

    def on_event(self, event: Event) -> None:
        """Record what a worker did. Called from any thread."""
        with self.lock:
            if isinstance(event, PartialSaved):
                self._partials.saved(event)
                return
            if isinstance(event, PartialsReplaced):
                self._partials.replaced(event)
                return
            if isinstance(event, RowsComputed):
                self._advance(event.path, event.rows, event.tokens, event.padded_tokens)
                return
            if isinstance(event, TaskDone):
                self.stages.add(event.seconds)
                return
            item = self.files[event.path]
            if isinstance(event, FileBroken):
                self._give_up(item, event.reason, event.may_be_good)
                return
            for key, name in (*event.parts, (key_of(file_key(item.table), event.row_range), event.name)):
                self.chunks.adopt(key, name)
            item.coverage.add(event.row_range)
            self._saved[event.path, event.row_range] = event
            self.attempt.rows_found += event.resumed
            self.attempt.rows_copied += event.copied
            self.attempt.rows_reused += event.reused
            self.attempt.rows_computed -= event.copied + event.reused
            self.attempt.chunks_saved += 1
            self.attempt.chunk_bytes += event.size_bytes
            self._advance(event.path, event.rest, 0, 0)
            self._join_if_complete(item)

    def _advance(self, path: str, rows: int, tokens: int, padded_tokens: int) -> None:
        attempt = self.attempt
        attempt.rows_computed += rows
        attempt.tokens += tokens
        attempt.padded_tokens += padded_tokens
        if self.progress is not None:
            elapsed_s = max(self.progress.elapsed_s, 1e-9)
            self.progress.advance(
                rows,
                tokens_per_s=round(attempt.tokens / elapsed_s),
                padding=round(attempt.padded_tokens / max(1, attempt.tokens), 3),
                file=path,
            )

    def _give_up(self, item: FileState, reason: str, may_be_good: bool) -> None:
        if item.state is State.BAD:
            return
        if item.state is State.DONE:  # its last rows were sound, and what follows them is not
            self.target.delete(item.table.path)
            item.written = None
        item.state = State.BAD
        path = item.table.path
        self.bad.append(BadFile(path=path, reason=reason.removeprefix(f"{path}: "), may_be_good=may_be_good))
        logger.info(f"bad file: {path}: {self.bad[-1].reason}")

    # --- joining -----------------------------------------------------------------------------------------------

    def _join_if_complete(self, item: FileState) -> None:
        if item.state is State.TODO and item.coverage.is_complete and not item.is_joining:
            item.is_joining = True
            self._joins.append(self._joiner.submit(self._join, item))

    def _join(self, item: FileState) -> None:
        """Write the output of a file whose rows are all saved. An error is kept in `error` and ends the job."""
        if self._abandoned.is_set() or self.error is not None:
            return
        try:
            with self.stages.measure(JOIN):
                written = write_output(
                    source=self.source,
                    target=self.target,
                    table=item.table,
                    coverage=item.coverage,
                    chunks=self.chunks,
                    config=self.config,
                    vectors=self._vectors,
                    provenance=self.provenance,
                    should_abandon=self._abandoned.is_set,
                )
            self._joined(item, written)
        except ChunkLost as lost:
            self._forget(item, [lost.row_range, *self._other_lost(item)])
        except Abandoned:
            pass
        except DataError as error:
            with self.lock:
                self._give_up(item, str(error), isinstance(error, FileChangedError))
        except BaseException as error:
            self.error = error

    def _other_lost(self, item: FileState) -> list[RowRange]:
        """The ranges of a file whose chunks are there and do not verify, so that all are computed again at once."""
        keys = {key_of(file_key(item.table), each): each for each in item.coverage.all_ranges}
        return [each for key, each in keys.items() if key in self.chunks and self.chunks.load(key) is None]

    def _forget(self, item: FileState, lost: Iterable[RowRange]) -> None:
        """Have rows computed once more; they count once."""
        with self.lock:
            item.is_joining = False
            for row_range in lost:
                item.coverage.remove(row_range)
                self.lost.append(row_range)
                self.attempt.chunks_lost += 1
                saved = self._saved.pop((item.table.path, row_range), None)
                if saved is None:
                    self.attempt.rows_found -= row_range.rows
                    continue
                self.attempt.rows_found -= saved.resumed
                self.attempt.rows_copied -= saved.copied
                self.attempt.rows_reused -= saved.reused
                self.attempt.rows_computed -= row_range.rows - saved.resumed - saved.copied - saved.reused

    def _joined(self, item: FileState, written: Written) -> None:
        with self.lock:
            if item.state is State.BAD:  # the reader found a fault behind the last row
                self.target.delete(item.table.path)
                return
            item.written, item.state = written, State.DONE
            self._done_since_ledger += 1
            is_affordable = self._ledger_s <= (time.monotonic() - self._ledger_ended) * MAX_LEDGER_SHARE
            is_due = self._done_since_ledger >= self.config.checkpoint_every and is_affordable
        if is_due:
            self.write_ledger()
        if self.target.is_durable or self.ledger is None:
            self.chunks.drop(self.chunks.keys(f"{file_key(item.table)}/"))

    def join(self, stop: Stop) -> None:
        """Wait for the joins in progress and re-raise an error of one."""
        while self._joins and not stop():
            try:
                self._joins[0].result(timeout=0.2)
            except TimeoutError:
                continue
            self._joins.pop(0)
        if self.error is not None:
            raise self.error

    def abandon(self) -> None:
        """Stop joining and write the ledger. An unfinished output is dropped, its chunks stay."""
        self._abandoned.set()
        self._joiner.shutdown(wait=True, cancel_futures=True)
        self.write_ledger()

    def finish(self) -> None:
        self._joiner.shutdown(wait=True)
        self.write_ledger()
        self._partials.drop_replaced(self._missing())

    def write_ledger(self) -> None:
        if self.ledger is None:
            return
        with self.lock:
            self._done_since_ledger = 0
            records = [
                {"output_id": self.provenance["output_id"], **asdict(item.written)}
                for item in self.files.values()
                if item.written is not None
            ]
        began = time.monotonic()
        self.ledger.write(json.dumps({"files": records}).encode())
        self._ledger_ended = time.monotonic()
        self._ledger_s = self._ledger_ended - began

    # --- messages ----------------------------------------------------------------------------------------------

    def summary(self, ignored: list[str], is_resumed: bool, model: str) -> str:
        """One line about the work ahead."""
        already = [item.table.rows for item in self.files.values() if item.state is State.ALREADY_DONE]
        parts = [f"{len(self.files)} files, {self.rows_total} rows; {model}"]
        if ignored:
            more = ", ..." if len(ignored) > 5 else ""
            parts.append(f"{len(ignored)} hidden files ignored ({', '.join(ignored[:5])}{more})")
        if already:
            parts.append(f"{len(already)} files already complete")
        if is_resumed:  # printed for 0 rows too, so that tools that count lost work see it
            parts.append(f"resuming: {self.rows_saved - sum(already)} rows of unfinished files are saved")
        return "; ".join(parts)

    def what_is_saved(self) -> str:
        if self.ledger is None:
            done = sum(1 for item in self.files.values() if item.written is not None)
            return f"{done} of {len(self.files)} files are complete; nothing else was kept (--no-checkpoint)"
        return f"{self.rows_saved} of {self.rows_total} rows are saved in {self.chunks.store.url}"
