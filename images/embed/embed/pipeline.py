"""One worker's pipeline: rows in, durable chunks of vectors out, with reading, computing and saving overlapped.

    reader thread            this thread            saver threads
    read rows, tokenise  ->  forward on the device  ->  fsync the finished rows
    two windows ahead,
    over tasks and files

What a kill costs is bounded in `saving`.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from embed.config import EmbedConfig
from embed.data.chunks import Status
from embed.data.identity import FileChangedError
from embed.data.known_vectors import KnownVectors
from embed.data.passages import Passages
from embed.data.rows import half_of
from embed.data.table import Table
from embed.data.windows import Task, TextWindow, limits_for, text_windows
from embed.events import Event, FileBroken, TaskDone
from embed.model import BatchLimits, Encoder, Stopped
from embed.model.resolve import NO_LIMIT
from embed.model.tokens import Window
from embed.passage_saving import PassageSaver
from embed.saving import Saver, Watch, WorkWindow
from embed.stages import COMPUTE, COMPUTE_WAITS, READ, READ_WAITS, TOKENISE, StageTimes
from estiba.checkpoint import ChunkStore
from estiba.log import get_logger
from estiba.storage import Store

logger = get_logger(__name__)

T = TypeVar("T")

BAD_ROWS_LOGGED = 3
"""By window."""
WINDOWS_AHEAD = 2
POLL_S = 0.2


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """A loaded model and the input that it reads."""

    config: EmbedConfig
    encoder: Encoder
    source: Store

    def run(
        self,
        tasks: Iterable[Task],
        chunks: ChunkStore,
        emit: Callable[[Event], None],
        should_stop: Callable[[], bool],
        earlier: Mapping[str, Any] | None = None,
        known: KnownVectors | None = None,
    ) -> None:
        """Compute and save every task's rows. `emit` is called from other threads.

        `tasks` is read in a thread, a few windows ahead, so it may wait for its next task while others are computed.
        `earlier` is what computed the rows of an earlier attempt; it is used where it runs. Rows with a `known` vector
        get that one.
        Returns early when `should_stop` returns true. Re-raises an error of a thread.
        """
        if earlier is not None:
            self.encoder.continue_with(earlier)
        times = StageTimes()
        saver = (
            Saver(chunks, self.config.embedding_dtype, emit, times)
            if self.config.chunk is None
            else PassageSaver(chunks, self.config, emit, times)
        )

        def should_end() -> bool:
            return should_stop() or saver.has_failed

        try:
            with contextlib.closing(
                _read_ahead(self._windows(tasks, chunks, emit, times), WINDOWS_AHEAD, should_end, times)
            ) as windows:
                path = None
                for item in times.each(windows, COMPUTE_WAITS):
                    if isinstance(item, TaskDone):
                        saver.tell(item)
                        continue
                    if path not in (None, item.path):
                        self.encoder.trim()
                    path = item.path
                    if not self._compute(item, saver, emit, should_stop, times, known):
                        break
                saver.wait()
        finally:
            saver.close()

    def _compute(
        self,
        item: WorkWindow,
        saver: Saver,
        emit: Callable[[Event], None],
        should_stop: Callable[[], bool],
        times: StageTimes,
        known: KnownVectors | None,
    ) -> bool:
        """Compute a window and save it. Returns False, with its finished batches saved, if the job should stop."""
        self.encoder.choose_engine(item.window)
        if isinstance(saver, PassageSaver):
            return saver.compute(self.encoder, item, should_stop)
        prior, is_saved = saver.prior_of(item), item.is_saved
        resumed = np.zeros(len(is_saved), bool) if prior.encoded is None else prior.encoded.status == Status.OK
        engine = self.encoder.computed_by
        watch = Watch(item=item, saver=saver, emit=emit, engines=[engine], is_durable=is_saved | resumed)
        # A batch never holds more rows than a row group did when each was a window of its own.
        limits = BatchLimits(max_rows=half_of(item.largest_row_group), has_room=watch.has_room)
        try:
            with times.measure(COMPUTE):
                encoded = self.encoder.encode(
                    item.window, should_stop, watch.on_batch, prior.encoded, is_saved, limits, known
                )
        except Stopped:
            saver.wait()
            watch.save_partial()
            return False
        engines = [found + [engine] * (engine not in found) for found in prior.engines]
        if known is not None:
            for index, part in enumerate(item.parts):
                reused = encoded.origins_in(part.rows).get("reused", 0)
                are_all = reused == (item.window.status[part.rows] == Status.OK).sum()
                engines[index] = [known.computed_by] * bool(reused) + engines[index] * (not (reused and are_all))
        saver.save(item, encoded, engines, resumed)
        return True

    def _windows(
        self, tasks: Iterable[Task], chunks: ChunkStore, emit: Callable[[Event], None], times: StageTimes
    ) -> Iterator[WorkWindow | TaskDone]:
        """Tokenised windows, and after the last one of each task that it is done.

        A file that cannot be read to its end is reported by `emit`.
        """
        # With --chunk the model reads all of a text.
        max_length = self.encoder.max_length if self.config.chunk is None else NO_LIMIT
        limits = limits_for(self.encoder.device, max_length, self.encoder.info.token_dimensions)

        def report(table: Table, error: Exception) -> None:
            may_be_good = isinstance(error, FileChangedError)
            emit(FileBroken(path=table.path, reason=str(error), may_be_good=may_be_good))

        for task in tasks:
            for key, name in task.partials:
                chunks.adopt(key, name)
            partials = tuple(key for key, _ in task.partials)
            found = text_windows(self.source, task, self.config.text_column, limits, report)
            for text in times.each(found, READ):
                for window, passages in times.each(self.encoder.windows(text.texts), TOKENISE):
                    self._name_bad_rows(text, window, passages)
                    yield WorkWindow(
                        window=window,
                        parts=text.parts,
                        largest_row_group=text.largest_row_group,
                        partials=partials,
                        passages=passages,
                    )
            first = task.row_groups[0]
            yield TaskDone(path=first.table.path, row_group=first.row_group)

    def _name_bad_rows(self, text: TextWindow, window: Window, passages: Passages | None) -> None:
        unknown = window.unknown
        if passages is not None:
            unknown = {int(passages.row[passage]): token_id for passage, token_id in unknown.items()}
        bad = [(part, row) for row in unknown for part in text.parts if part.rows.start <= row < part.rows.stop]
        for part, row in bad[:BAD_ROWS_LOGGED]:
            table, row_range = part.table, part.row_range
            first = sum(table.row_group_rows[: row_range.row_group]) + row_range.start
            token_id = unknown[row]
            token = self.encoder.token_of(token_id)
            logger.warning(
                f"{table.path}: row {first + row - part.offset} holds the token {token!r} ({token_id}), which the "
                "model's embedding table lacks; it gets no vector"
            )


def _read_ahead(
    items: Iterator[T], depth: int, should_stop: Callable[[], bool], times: StageTimes
) -> Generator[T, None, None]:
    """Iterate over `items` in a thread, up to `depth` ahead. A stop ends the wait for a slow disk."""
    ready: queue.Queue[Any] = queue.Queue(depth)
    closed = threading.Event()
    end = object()

    def put(item: Any) -> bool:
        while not closed.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=POLL_S)
                return True
        return False

    def read() -> None:
        try:
            for item in items:
                with times.measure(READ_WAITS):
                    if not put(item):
                        return
            put(end)
        except BaseException as error:
            put(error)

    threading.Thread(target=read, name="embed-reader", daemon=True).start()
    try:
        while not should_stop():
            try:
                item = ready.get(timeout=POLL_S)
            except queue.Empty:
                continue
            if item is end:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        closed.set()
