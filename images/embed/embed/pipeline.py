"""One worker's pipeline: row ranges in, durable chunks of vectors out, with reading, computing and saving overlapped.

    reader thread            this thread            saver thread
    read rows, tokenise  ->  forward on the device  ->  fsync the chunk
    two windows ahead,                               one chunk behind
    over tasks and files

A kill costs the range being computed and the range being saved. `RangeLimits.rows_in` keeps both within one row group;
a row group too small to halve is saved before the next one starts.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from embed.config import EmbedConfig
from embed.data.chunks import (
    RowRange,
    Task,
    computed_by,
    encoded_from,
    file_key,
    from_bytes,
    key_of,
    partial_to_bytes,
    to_bytes,
)
from embed.data.parts import finish_range
from embed.data.passages import Passages, partial_part_key_of, with_passages
from embed.data.rows import RangeLimits, text_ranges
from embed.data.table import Table
from embed.events import ChunkSaved, Event, FileBroken, PartialSaved, RowsComputed, TaskDone
from embed.model import BatchDone, Encoded, Encoder, Stopped
from embed.model.tokens import Window
from embed.stages import COMPUTE, COMPUTE_WAITS, READ, READ_WAITS, SAVE, TOKENISE, StageTimes
from estiba.checkpoint import ChunkStore
from estiba.errors import DataError, StoreError
from estiba.log import get_logger
from estiba.storage import Store

logger = get_logger(__name__)

T = TypeVar("T")

PARTIAL_S = 5.0
"""The batches of a window are saved at least this often, so that a kill costs seconds on a machine of any speed."""
BAD_ROWS_LOGGED = 3
"""By row range."""
WINDOWS_AHEAD = 2
POLL_S = 0.2
CHARACTERS_PER_TOKEN = 6
"""More than any writing system needs on average. The model does not see text beyond max_length times this."""
CPU_LIMITS = (1024, 2**19)
GPU_LIMITS = (8192, 2**22)
"""Rows and characters in a text range: about 30 s of work on a CPU, a few seconds on a GPU."""
CPU_TOKEN_VECTOR_BYTES, GPU_TOKEN_VECTOR_BYTES = 2**27, 2**29
"""The vectors of all tokens of a range, at one token in two characters; European languages have one in four."""


@dataclass(frozen=True, kw_only=True)
class _Item:
    table: Table
    row_range: RowRange
    window: Window
    passages: Passages | None = None
    """What the window's rows are, with --chunk. A range with very long texts has several windows."""

    @property
    def is_whole_row_group(self) -> bool:
        return self.row_range.rows == self.table.row_group_rows[self.row_range.row_group]

    @property
    def is_last_of_range(self) -> bool:
        return self.passages is None or self.passages.is_last

    @property
    def partial_key(self) -> str:
        part = 0 if self.passages is None else self.passages.part
        return partial_part_key_of(file_key(self.table), self.row_range, part)

    def rows_done(self, window_rows: int) -> int:
        """Rows of the range that so many computed rows of the window stand for."""
        return window_rows if self.passages is None else self.passages.rows_done(window_rows)


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
    ) -> None:
        """Compute and save every task's rows. `emit` is called from other threads.

        `tasks` is read in a thread, a few windows ahead, so it may wait for its next task while others are computed.
        `earlier` is what computed the rows of an earlier attempt; it is used where it runs.
        Returns early when `should_stop` returns true. Re-raises an error of a thread.
        """
        if earlier is not None:
            self.encoder.continue_with(earlier)
        times = StageTimes()
        saver = _Saver(chunks, self.config, emit, times)

        def should_end() -> bool:
            return should_stop() or saver.has_failed

        try:
            with contextlib.closing(
                _read_ahead(self._windows(tasks, chunks, emit, times), WINDOWS_AHEAD, should_end, times)
            ) as windows:
                path, was_whole = None, False
                computed = resumed = 0  # rows of the range
                for item in times.each(windows, COMPUTE_WAITS):
                    if isinstance(item, TaskDone):
                        saver.tell(item)
                        continue
                    if path not in (None, item.table.path):
                        self.encoder.trim()
                    path = item.table.path
                    if item.is_whole_row_group or was_whole:
                        saver.wait()
                    was_whole = item.is_whole_row_group
                    self.encoder.choose_engine(item.window)
                    prior, computed_by = saver.partial_of(item)
                    computed_by += [engine for engine in [self.encoder.computed_by] if engine not in computed_by]
                    prior_rows = 0 if prior is None else prior.rows_done
                    watch = _Watch(item=item, saver=saver, emit=emit, computed_by=computed_by, resumed=prior_rows)
                    try:
                        with times.measure(COMPUTE):
                            encoded = self.encoder.encode(item.window, should_stop, watch.on_batch, prior)
                    except Stopped as stopped:
                        if watch.computed:
                            saver.wait()
                            saver.save_partial(item, stopped.partial, computed_by)
                        break
                    computed, resumed = computed + watch.rows, resumed + item.rows_done(prior_rows)
                    if item.is_last_of_range:
                        saver.save(item, encoded, computed_by, computed=computed, resumed=resumed)
                        computed = resumed = 0
                    else:
                        saver.wait()
                        saver.save_partial(item, encoded, computed_by)
                saver.wait()
        finally:
            saver.close()

    def _windows(
        self, tasks: Iterable[Task], chunks: ChunkStore, emit: Callable[[Event], None], times: StageTimes
    ) -> Iterator[_Item | TaskDone]:
        """Tokenised windows, and after the last one of each task that it is done.

        A file that cannot be read to its end is reported by `emit`.
        """
        is_cpu = self.encoder.device.startswith("cpu")
        rows, characters = CPU_LIMITS if is_cpu else GPU_LIMITS
        if width := self.encoder.info.token_dimensions:
            most_bytes = CPU_TOKEN_VECTOR_BYTES if is_cpu else GPU_TOKEN_VECTOR_BYTES
            characters = min(characters, 2 * most_bytes // (4 * width))
        # With --chunk the model reads all of a text.
        row_characters = CHARACTERS_PER_TOKEN * self.encoder.max_length if self.config.chunk is None else characters
        limits = RangeLimits(rows=rows, characters=characters, row_characters=row_characters)
        for task in tasks:
            for key, name in task.partials:
                chunks.adopt(key, name)
            try:
                for text_range in times.each(text_ranges(self.source, task, self.config.text_column, limits), READ):
                    for window, passages in times.each(self.encoder.windows(text_range.texts), TOKENISE):
                        item = _Item(table=task.table, row_range=text_range.row_range, window=window, passages=passages)
                        self._name_bad_rows(item)
                        yield item
            except (DataError, StoreError) as error:
                if isinstance(error, StoreError) and self.source.is_durable:
                    raise  # S3 was retried for minutes; the job cannot continue
                emit(FileBroken(path=task.table.path, reason=str(error)))
            yield TaskDone(path=task.table.path, row_group=task.row_group)

    def _name_bad_rows(self, item: _Item) -> None:
        table, row_range = item.table, item.row_range
        first = sum(table.row_group_rows[: row_range.row_group]) + row_range.start
        unknown = item.window.unknown
        if item.passages is not None:
            unknown = {int(item.passages.row[passage]): token_id for passage, token_id in unknown.items()}
        for row, token_id in list(unknown.items())[:BAD_ROWS_LOGGED]:
            token = self.encoder.token_of(token_id)
            logger.warning(
                f"{table.path}: row {first + row} holds the token {token!r} ({token_id}), which the model's embedding "
                "table lacks; it gets no vector"
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


class _Saver:
    """Saves one chunk while the next one is computed."""

    def __init__(
        self, chunks: ChunkStore, config: EmbedConfig, emit: Callable[[Event], None], times: StageTimes
    ) -> None:
        self._chunks, self._config, self._emit, self._times = chunks, config, emit, times
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="embed-saver")
        self._saving: Future[None] | None = None

    def partial_of(self, item: _Item) -> tuple[Encoded | None, list[dict[str, Any]]]:
        """What an earlier attempt saved of a window, and the engines that computed it."""
        key = item.partial_key
        data = self._chunks.load(key) if key in self._chunks else None
        if data is None:
            return None, []
        prior = encoded_from(data)
        # The same rows of the same text and model; a tokenizer of another version may still read them otherwise.
        if len(prior.status) != len(item.window.status) or not np.array_equal(prior.n_tokens, item.window.n_tokens):
            return None, []
        return prior, computed_by(from_bytes(data))

    def save(
        self, item: _Item, encoded: Encoded, computed_by: list[dict[str, Any]], *, computed: int, resumed: int
    ) -> None:
        """Save a whole range, of which `computed` rows are this attempt's and `resumed` ones were saved before."""
        self.wait()
        self._saving = self._thread.submit(self._save, item, encoded, computed_by, computed, resumed)

    def save_partial(self, item: _Item, partial: Encoded, computed_by: list[dict[str, Any]]) -> None:
        """Save a window's finished batches, unless a save is in progress; the next batch tries again."""
        if self._saving is None or self._saving.done():
            self.wait()
            self._saving = self._thread.submit(self._save_partial, item, partial, computed_by)

    def tell(self, done: TaskDone) -> None:
        """Emit that a task is done when its last chunk is saved, without waiting for it."""
        saving = self._saving

        def emit() -> None:
            if saving is None or saving.exception() is None:  # the only thread, so the save before is finished
                self._emit(replace(done, seconds=self._times.take()))

        self._thread.submit(emit)

    @property
    def has_failed(self) -> bool:
        return self._saving is not None and self._saving.done() and self._saving.exception() is not None

    def wait(self) -> None:
        """Wait for the save in progress and re-raise its error."""
        if self._saving is not None:
            with self._times.measure(COMPUTE_WAITS):
                self._saving.result()

    def close(self) -> None:
        self._thread.shutdown(wait=False)

    def _save_partial(self, item: _Item, partial: Encoded, computed_by: list[dict[str, Any]]) -> None:
        key, rows = item.partial_key, item.rows_done(partial.rows_done)
        with self._times.measure(SAVE):
            data = partial_to_bytes(partial, computed_by)
            if item.passages is not None:
                data = with_passages(data, item.passages, rows)
            name = self._chunks.commit(key, data)
        self._emit(PartialSaved(key=key, name=name, rows=rows))

    def _save(
        self, item: _Item, encoded: Encoded, computed_by: list[dict[str, Any]], computed: int, resumed: int
    ) -> None:
        file = file_key(item.table)
        partials: tuple[str, ...] = (item.partial_key,)
        parts: tuple[tuple[str, str], ...] = ()
        with self._times.measure(SAVE):
            if item.passages is None:
                data = to_bytes(encoded, self._config.embedding_dtype, computed_by)
            else:
                data, parts, partials = finish_range(
                    self._chunks, self._config, file, item.row_range, encoded, item.passages, computed_by
                )
            name = self._chunks.commit(key_of(file, item.row_range), data)
            self._chunks.drop(partials)
        self._emit(
            ChunkSaved(
                path=item.table.path,
                row_range=item.row_range,
                name=name,
                size_bytes=len(data),
                resumed=resumed,
                rest=item.row_range.rows - computed - resumed,
                partial_keys=partials,
                parts=parts,
            )
        )


@dataclass(kw_only=True)
class _Watch:
    """Follows the batches of a window: progress after each, and a partial chunk every few seconds."""

    item: _Item
    saver: _Saver
    emit: Callable[[Event], None]
    computed_by: list[dict[str, Any]]
    resumed: int
    """Rows of the window that an earlier attempt computed."""
    computed: int = 0
    """Rows of the window."""
    rows: int = 0
    """Rows of the range that these stand for."""
    saved_at: float = field(default_factory=time.monotonic)

    def on_batch(self, batch: BatchDone) -> None:
        self.computed += batch.rows
        rows = self.item.rows_done(self.resumed + self.computed) - self.item.rows_done(self.resumed)
        more, self.rows = rows - self.rows, rows
        self.emit(
            RowsComputed(path=self.item.table.path, rows=more, tokens=batch.tokens, padded_tokens=batch.padded_tokens)
        )
        now = time.monotonic()
        if now - self.saved_at >= PARTIAL_S:
            self.saver.save_partial(self.item, batch.snapshot(), self.computed_by)
            self.saved_at = now
