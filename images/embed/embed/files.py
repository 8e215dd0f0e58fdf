"""The state of every file of the job, and the thread that joins finished ones into outputs."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

import xxhash

from embed.config import EmbedConfig
from embed.data import Bad, Table
from embed.output import Abandoned, PieceLost, Written, read_provenance, write_output
from embed.vectors import Coverage, Span, file_key, key_of, span_of, vector_type
from embed.worker import Broken, Event, Saved, Task
from estiba.checkpoint import Ledger, Pieces
from estiba.errors import DataError, StoreError
from estiba.progress import Progress
from estiba.stop import Stop, say
from estiba.store import FileStore, Store


class State(Enum):
    TODO = "todo"
    ALREADY = "already"
    """Its output was there, whole, when the job started."""
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
    """What this process did, as opposed to what it found done."""

    rows_found: int = 0
    rows_computed: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    pieces_found: int = 0
    pieces_saved: int = 0
    pieces_lost: int = 0
    piece_bytes: int = 0


@dataclass(kw_only=True)
class Work:
    """All of the job's files. Events come from other threads; `lock` guards what they change."""

    config: EmbedConfig
    source: Store
    target: Store
    pieces: Pieces
    ledger: Ledger | None
    provenance: dict[str, Any]
    dimensions: int
    bad: list[Bad]
    files: dict[str, FileState] = field(default_factory=dict)
    attempt: Attempt = field(default_factory=Attempt)
    progress: Progress | None = None
    lost: list[Span] = field(default_factory=list)
    error: BaseException | None = None
    lock: threading.RLock = field(default_factory=threading.RLock)

    def __post_init__(self) -> None:
        self._vector_type = vector_type(self.dimensions, self.config.embedding_dtype)
        self._finisher = ThreadPoolExecutor(1, thread_name_prefix="embed-finisher")
        self._joins: list[Future[None]] = []
        self._abandoned = threading.Event()
        self._since_ledger = 0
        self._ledger_end, self._ledger_s = time.monotonic(), 0.0

    # --- what is done ------------------------------------------------------------------------------------------

    def open(self, tables: Iterable[Table], parallel: int) -> None:
        """Find each file's state: its output is whole, or so many of its rows are saved."""
        records = self._records()
        spans: dict[str, list[Span]] = {}
        for key in self.pieces.keys():  # noqa: SIM118
            span = span_of(key)
            if span is not None:
                spans.setdefault(key.split("/")[0], []).append(span)

        def look(table: Table) -> FileState:
            coverage = Coverage(table, spans.get(file_key(table), ()))
            written = self._existing(table, coverage, records.get(table.path))
            state = State.TODO if written is None else State.ALREADY
            return FileState(table=table, coverage=coverage, state=state, written=written)

        with ThreadPoolExecutor(parallel) as pool:
            for item in pool.map(look, tables):
                self.files[item.table.path] = item
        self.attempt.rows_found = self.rows_done
        self.attempt.pieces_found = sum(len(found) for found in spans.values())

    def _records(self) -> dict[str, dict[str, Any]]:
        records: dict[str, dict[str, Any]] = {}
        for data in self.ledger.newest() if self.ledger else ():
            for record in json.loads(data)["files"]:
                records[record["path"]] = record
        return records

    def _existing(self, table: Table, coverage: Coverage, record: dict[str, Any] | None) -> Written | None:
        """The output that is there already, if it is this file's, this configuration's, and undamaged."""
        if self.config.no_checkpoint:
            return None
        if record is not None and record["output_id"] == self.provenance["output_id"]:
            written = Written(**{name: record[name] for name in Written.__dataclass_fields__})
            if written.identity == table.identity and self._is_intact(written):
                return written
        if coverage.is_complete and table.rows:
            return None  # joined again in seconds, and then its digest is known
        found = read_provenance(self.target, table.path)
        if found is None:
            return None
        says, counts = found
        same = says.get("output_id") == self.provenance["output_id"] and says.get("source") == table.identity
        entry = self.target.head(table.path)
        if entry is None or not same or counts.get("rows") != table.rows:
            return None
        return Written(
            path=table.path,
            identity=table.identity,
            size_bytes=entry.size_bytes,
            digest="",
            etag=entry.etag,
            counts=counts,
        )

    def _is_intact(self, written: Written) -> bool:
        entry = self.target.head(written.path)
        if entry is None or entry.size_bytes != written.size_bytes:
            return False
        if not isinstance(self.target, FileStore) or not written.digest:
            return entry.etag == written.etag
        digest = xxhash.xxh3_128()
        try:
            with self.target.open(written.path) as file:
                while chunk := file.read(2**22):
                    digest.update(chunk)
        except (OSError, StoreError):
            return False
        return digest.hexdigest() == written.digest

    # --- what is to do -----------------------------------------------------------------------------------------

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

    def tasks(self) -> list[Task]:
        """The row groups with rows to do; files that only need joining are sent on their way."""
        found = []
        with self.lock:
            for item in self.files.values():
                if item.state is not State.TODO:
                    continue
                for row_group in range(len(item.table.row_group_rows)):
                    if gaps := item.coverage.gaps(row_group):
                        found.append(Task(table=item.table, row_group=row_group, gaps=tuple(gaps)))
                self._join_if_complete(item)
        return found

    def on_event(self, event: Event) -> None:
        """Called by the crew from its threads."""
        with self.lock:
            item = self.files[event.path]
            if isinstance(event, Broken):
                self._give_up(item, event.reason)
                return
            assert isinstance(event, Saved)
            self.pieces.adopt(key_of(file_key(item.table), event.span), event.name)
            item.coverage.add(event.span)
            self.attempt.rows_computed += event.span.rows
            self.attempt.tokens += event.tokens
            self.attempt.padded_tokens += event.padded_tokens
            self.attempt.pieces_saved += 1
            self.attempt.piece_bytes += event.size_bytes
            if self.progress is not None:
                elapsed = max(self.progress.elapsed_s, 1e-9)
                self.progress.advance(
                    event.span.rows,
                    tokens_per_s=round(self.attempt.tokens / elapsed),
                    padding=round(self.attempt.padded_tokens / max(1, self.attempt.tokens), 3),
                    file=event.path,
                )
            self._join_if_complete(item)

    def _give_up(self, item: FileState, reason: str) -> None:
        if item.state is State.BAD:
            return
        item.state = State.BAD
        self.bad.append(Bad(path=item.table.path, reason=reason.removeprefix(f"{item.table.path}: ")))
        say(f"bad file: {item.table.path}: {self.bad[-1].reason}")

    # --- joining -----------------------------------------------------------------------------------------------

    def _join_if_complete(self, item: FileState) -> None:
        if item.state is State.TODO and item.coverage.is_complete and not item.is_joining:
            item.is_joining = True
            self._joins.append(self._finisher.submit(self._join, item))

    def _join(self, item: FileState) -> None:
        if self._abandoned.is_set() or self.error is not None:
            return
        try:
            written = write_output(
                source=self.source,
                target=self.target,
                table=item.table,
                coverage=item.coverage,
                pieces=self.pieces,
                config=self.config,
                vector_type=self._vector_type,
                provenance=self.provenance,
                should_abandon=self._abandoned.is_set,
            )
        except PieceLost as lost:
            with self.lock:
                item.coverage.remove(lost.span)
                item.is_joining = False
                self.lost.append(lost.span)
                self.attempt.pieces_lost += 1
        except DataError as error:
            with self.lock:
                self._give_up(item, str(error))
        except Abandoned:
            pass
        except BaseException as error:  # the crew is told by `error`, the caller by `join`
            self.error = error
        else:
            with self.lock:
                item.written, item.state = written, State.DONE
                self._since_ledger += 1
                # With very many files the ledger is long: it may take a fiftieth of the time, not more.
                is_cheap = time.monotonic() - self._ledger_end >= 50 * self._ledger_s
                due = self._since_ledger >= self.config.checkpoint_every and is_cheap
            try:
                if due:
                    self.write_ledger()
                if self.target.is_durable or self.ledger is None:
                    key = file_key(item.table)
                    self.pieces.drop(self.pieces.keys(f"{key}/"))
            except BaseException as error:
                self.error = error

    def join(self, stop: Stop) -> None:
        """Wait for the joins under way. Raises what one of them raised."""
        while self._joins and not stop():
            future = self._joins[0]
            try:
                future.result(timeout=0.2)
            except TimeoutError:
                continue
            self._joins.pop(0)
        if self.error is not None:
            raise self.error

    def abandon(self) -> None:
        """Stop joining: an unfinished output is dropped, its pieces stay. What is finished goes into the ledger."""
        self._abandoned.set()
        self._finisher.shutdown(wait=True, cancel_futures=True)
        self.write_ledger()

    def finish(self) -> None:
        self._finisher.shutdown(wait=True)
        self.write_ledger()

    def write_ledger(self) -> None:
        if self.ledger is None:
            return
        with self.lock:
            self._since_ledger = 0
            records = [
                {"output_id": self.provenance["output_id"], **asdict(item.written)}
                for item in self.files.values()
                if item.written is not None
            ]
        began = time.monotonic()
        self.ledger.write(json.dumps({"files": records}).encode())
        self._ledger_end = time.monotonic()
        self._ledger_s = self._ledger_end - began

    # --- words -------------------------------------------------------------------------------------------------

    def summary(self, ignored: list[str], has_past: bool, model: str) -> str:
        already = sum(1 for item in self.files.values() if item.state is State.ALREADY)
        parts = [f"{len(self.files)} files, {self.rows_total} rows; {model}"]
        if ignored:
            parts.append(f"{len(ignored)} hidden files ignored")
        if already:
            parts.append(f"{already} files already complete")
        complete = sum(item.table.rows for item in self.files.values() if item.state is State.ALREADY)
        if has_past:  # said of nothing, too: whoever counts lost work must know that there was none
            parts.append(f"resuming: {self.rows_done - complete} rows of unfinished files are saved")
        return "; ".join(parts)

    def what_is_safe(self) -> str:
        if self.ledger is None:
            done = sum(1 for item in self.files.values() if item.written is not None)
            return f"{done} of {len(self.files)} files are complete; nothing else was kept (--no-checkpoint)"
        return f"{self.rows_done} of {self.rows_total} rows are saved in {self.pieces.store.url}"
