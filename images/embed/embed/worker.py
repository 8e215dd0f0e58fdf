"""One worker: stretches of text in, durable pieces of vectors out, with reading, computing and saving overlapped.

    reader thread            this thread            saver thread
    read rows, tokenise  ->  forward on the device  ->  fsync the piece
    two windows ahead                                one piece behind

A kill can cost what is being computed and what is being saved. `Bounds.rows_in` keeps the two within one row group;
row groups too small to halve are saved before the next one starts.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from embed.config import EmbedConfig
from embed.data import Bounds, Stretch, Table, stretches
from embed.model import Encoded, Encoder, EncoderConfig, Stopped, Window
from embed.vectors import Span, file_key, key_of, to_bytes
from estiba.checkpoint import Pieces
from estiba.errors import DataError, StoreError
from estiba.store import Store

WINDOWS_AHEAD = 2
CHARACTERS_PER_TOKEN = 6
"""More than any script needs on average; text beyond max_length times this will not be seen."""
CPU_BOUNDS = (1024, 2**19)
GPU_BOUNDS = (8192, 2**22)
"""Rows and characters in a stretch: some 30 s of work on a CPU, a few on a GPU."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """The rows of one row group that are to do."""

    table: Table
    row_group: int
    gaps: tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class Saved:
    """Some rows became durable."""

    path: str
    span: Span
    name: str
    size_bytes: int
    tokens: int
    padded_tokens: int


@dataclass(frozen=True, kw_only=True)
class Broken:
    """A file turned out to be unreadable half-way."""

    path: str
    reason: str


Event = Saved | Broken


def encoder_config(config: EmbedConfig, model: str, device: str | None) -> EncoderConfig:
    return EncoderConfig(
        model=model,
        revision=config.revision,
        device=device,
        dtype=config.dtype,
        batch_size=config.batch_size,
        token_budget=config.token_budget,
        max_length=config.max_length,
        normalize=config.normalize,
        prompt=config.prompt,
        prompt_name=config.prompt_name,
        dimensions=config.dimensions,
        trust_remote_code=config.trust_remote_code,
    )


def bounds_of(encoder: Encoder) -> Bounds:
    rows, characters = CPU_BOUNDS if encoder.device.startswith("cpu") else GPU_BOUNDS
    return Bounds(rows=rows, characters=characters, row_characters=CHARACTERS_PER_TOKEN * encoder.max_length)


def work_through(
    tasks: Iterable[Task],
    *,
    encoder: Encoder,
    source: Store,
    pieces: Pieces,
    config: EmbedConfig,
    emit: Callable[[Event], None],
    should_stop: Callable[[], bool],
) -> None:
    """Compute and save every task's rows. Returns early when `should_stop` turns true; raises what a thread raised."""
    saver = _Saver(pieces, config.embedding_dtype, emit)
    reader = _Reader(tasks, encoder, source, config, emit, should_stop)
    try:
        path, was_whole = None, False
        for item in reader:
            if should_stop():
                break
            if path not in (None, item.table.path):
                encoder.trim()
            path = item.table.path
            if item.is_whole_row_group or was_whole:
                saver.wait()
            was_whole = item.is_whole_row_group
            try:
                encoded = encoder.encode(item.window, should_stop)
            except Stopped:
                break
            saver.save(item, encoded)
        saver.wait()
    finally:
        reader.close()
        saver.close()


@dataclass(frozen=True, kw_only=True)
class _Item:
    table: Table
    stretch: Stretch
    window: Window

    @property
    def is_whole_row_group(self) -> bool:
        return len(self.stretch.texts) == self.table.row_group_rows[self.stretch.row_group]


class _Reader:
    """Windows of tokens, read and tokenised in a thread, at most two ahead."""

    def __init__(
        self,
        tasks: Iterable[Task],
        encoder: Encoder,
        source: Store,
        config: EmbedConfig,
        emit: Callable[[Event], None],
        should_stop: Callable[[], bool],
    ) -> None:
        self._tasks, self._encoder, self._source, self._config, self._emit = tasks, encoder, source, config, emit
        self._should_stop = should_stop
        self._queue: queue.Queue[_Item | BaseException | None] = queue.Queue(maxsize=WINDOWS_AHEAD)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="embed-reader", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[_Item]:
        while not self._should_stop():
            try:
                item = self._queue.get(timeout=0.2)  # a stop must be seen while the disk is slow
            except queue.Empty:
                continue
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item

    def close(self) -> None:
        self._closed.set()

    def _run(self) -> None:
        try:
            bounds = bounds_of(self._encoder)
            for task in self._tasks:
                for item in self._read(task, bounds):
                    if not self._put(item):
                        return
            self._put(None)
        except BaseException as error:
            self._put(error)

    def _read(self, task: Task, bounds: Bounds) -> Iterator[_Item]:
        def next_gap(row: int) -> tuple[int, int] | None:
            return next(((start, end) for start, end in task.gaps if start >= row), None)

        try:
            for stretch in stretches(
                self._source, task.table, task.row_group, self._config.text_column, bounds, next_gap
            ):
                yield _Item(table=task.table, stretch=stretch, window=self._encoder.tokenize(stretch.texts))
        except DataError as error:
            self._emit(Broken(path=task.table.path, reason=str(error)))
        except StoreError as error:
            if self._source.is_durable:  # S3 was asked for minutes; the job cannot go on
                raise
            self._emit(Broken(path=task.table.path, reason=str(error)))

    def _put(self, item: _Item | BaseException | None) -> bool:
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False


class _Saver:
    """Makes one stretch durable while the next is computed."""

    def __init__(self, pieces: Pieces, dtype: str, emit: Callable[[Event], None]) -> None:
        self._pieces, self._dtype, self._emit = pieces, dtype, emit
        self._slot: queue.Queue[tuple[_Item, Encoded] | None] = queue.Queue(maxsize=1)
        self._idle = threading.Event()
        self._idle.set()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="embed-saver", daemon=True)
        self._thread.start()

    def save(self, item: _Item, encoded: Encoded) -> None:
        self.wait()
        self._idle.clear()
        self._slot.put((item, encoded))

    def wait(self) -> None:
        """Until nothing is being saved. Raises what the last save raised."""
        self._idle.wait()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        self._slot.put(None)

    def _run(self) -> None:
        while (work := self._slot.get()) is not None:
            try:
                self._save(*work)
            except BaseException as error:
                self._error = error
            finally:
                self._idle.set()

    def _save(self, item: _Item, encoded: Encoded) -> None:
        span = Span(row_group=item.stretch.row_group, start=item.stretch.start, rows=len(item.stretch.texts))
        data = to_bytes(encoded, self._dtype)
        name = self._pieces.commit(key_of(file_key(item.table), span), data)
        self._emit(
            Saved(
                path=item.table.path,
                span=span,
                name=name,
                size_bytes=len(data),
                tokens=int(encoded.n_tokens.sum()),
                padded_tokens=encoded.padded_tokens,
            )
        )
