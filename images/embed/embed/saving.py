"""Saving: what is computed becomes durable in other threads, often enough that a kill costs one row group at most.

At risk are the rows that are in flight, or finished and not durable. A batch waits for a save if it would put more rows
at risk than the largest row group of its window holds. Saving begins at half of that, so that it seldom waits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from embed.data.chunks import Encoded, Status, batch_bytes, file_key, key_of, partial_batch, to_batch
from embed.data.partials import Places, Prior, key_of_partial, partial_bytes, prior_of, read_partial
from embed.data.passages import Passages
from embed.data.windows import Part
from embed.events import ChunkSaved, Event, PartialSaved, PartialsReplaced, RowsComputed, TaskDone
from embed.model import BatchDone
from embed.model.tokens import Window
from embed.stages import COMPUTE_WAITS, SAVE, StageTimes
from estiba.checkpoint import ChunkStore

PARTIAL_S = 5.0
"""Finished batches are saved at least this often, so that a kill costs seconds on a machine of any speed."""
SAVES_AT_ONCE = 8
"""Chunks of one window. Each waits for a disk or for S3."""
Engines = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class WorkWindow:
    """A window of tokenised rows, and what is missing of it."""

    window: Window
    parts: tuple[Part, ...]
    largest_row_group: int
    partials: tuple[str, ...]
    """Keys of earlier attempts' partial chunks that may hold some of its rows."""
    passages: Passages | None = None
    """What the window's rows are, with --chunk: then it has one part."""

    @property
    def is_saved(self) -> np.ndarray:
        """bool[rows]: the row is in none of the parts."""
        is_saved = np.ones(len(self.window.status), bool)
        for part in self.parts:
            is_saved[part.rows] = False
        return is_saved

    @property
    def path(self) -> str:
        return self.parts[0].table.path


class Saver:
    """Saves one thing while the next one is computed."""

    def __init__(self, chunks: ChunkStore, dtype: str, emit: Callable[[Event], None], times: StageTimes) -> None:
        self._chunks, self._dtype, self._emit, self._times = chunks, dtype, emit, times
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="embed-saver")
        self._writers = ThreadPoolExecutor(SAVES_AT_ONCE, thread_name_prefix="embed-writer")
        self._saving: Future[None] | None = None
        self._finished = self._durable = 0
        self._partials: list[str] = []
        """Keys of this attempt's partial chunks of the window that is being computed."""
        self._places: dict[str, Places] = {}
        """The rows in those of earlier attempts, so that each is read for its own windows only."""

    def prior_of(self, item: WorkWindow) -> Prior:
        """What earlier attempts saved of a window."""
        partials = []
        for key in item.partials:
            places = self._places.get(key)
            is_elsewhere = places is not None and not places.are_in(item.parts)
            if is_elsewhere or key not in self._chunks or (data := self._chunks.load(key)) is None:
                continue
            partials.append(read_partial(key, data))
            self._places[key] = partials[-1].places
        return prior_of(partials, item.parts, item.window.n_tokens)

    @property
    def rows_at_risk(self) -> int:
        """Finished and not durable, of all windows."""
        return self._finished - self._durable

    def add_finished(self, rows: int) -> None:
        self._finished += rows

    def save(self, item: WorkWindow, encoded: Encoded, engines: Sequence[Engines], resumed: np.ndarray) -> None:
        """Save the chunks of a whole window, in place of its partial ones. `resumed` is a mask of its rows."""
        self.wait()
        partials, self._partials = self._partials, []
        self._saving = self._thread.submit(self._save, item, encoded, engines, resumed, partials, self._finished)

    def save_partial(self, item: WorkWindow, rows: np.ndarray, partial: Encoded, engines: Engines) -> bool:
        """Save rows of an unfinished window. Returns False, and saves nothing, if a save is in progress."""
        if self._saving is not None and not self._saving.done():
            return False
        self.wait()
        self._saving = self._thread.submit(self._save_partial, item, rows, partial, engines, self._finished)
        return True

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

    def _save_partial(
        self, item: WorkWindow, rows: np.ndarray, partial: Encoded, engines: Engines, finished: int
    ) -> None:
        with self._times.measure(SAVE):
            data = partial_bytes(partial_batch(partial), rows, item.parts, engines)
            key = key_of_partial(data)
            name = self._chunks.commit(key, data)
        self._partials.append(key)
        self._durable = finished
        self._emit(PartialSaved(key=key, name=name, rows=len(rows)))

    def _save(
        self,
        item: WorkWindow,
        encoded: Encoded,
        engines: Sequence[Engines],
        resumed: np.ndarray,
        partials: list[str],
        finished: int,
    ) -> None:
        batch = to_batch(encoded, self._dtype)

        def commit(part: Part, computed_by: Engines) -> tuple[str, int]:
            origins = encoded.origins_in(part.rows)
            data = batch_bytes(batch.slice(part.offset, part.row_range.rows), computed_by, origins)
            return self._chunks.commit(key_of(file_key(part.table), part.row_range), data), len(data)

        with self._times.measure(SAVE):
            saved = list(self._writers.map(commit, item.parts, engines))
            self._durable = finished
        for part, (name, size_bytes) in zip(item.parts, saved, strict=True):
            has_text = item.window.status[part.rows] == Status.OK
            # An attempt with other settings may have computed rows that are copied or reused now.
            taken = encoded.origins_in(part.rows, ~resumed[part.rows])
            self._emit(
                ChunkSaved(
                    path=part.table.path,
                    row_range=part.row_range,
                    name=name,
                    size_bytes=size_bytes,
                    resumed=int(resumed[part.rows].sum()),
                    rest=int((~has_text).sum()) + sum(taken.values()),
                    copied=taken.get("copied", 0),
                    reused=taken.get("reused", 0),
                )
            )
        if partials:
            with self._times.measure(SAVE):
                list(self._writers.map(lambda key: self._chunks.drop([key]), partials))
            self._emit(PartialsReplaced(keys=tuple(partials)))


@dataclass(kw_only=True)
class Watch:
    """Follows the batches of a window: tells progress after each, and saves them before too many are at risk."""

    item: WorkWindow
    saver: Saver
    emit: Callable[[Event], None]
    engines: Engines
    """What computes the window."""
    is_durable: np.ndarray
    """bool[rows]: the row needs no partial chunk, or is in one."""
    last: BatchDone | None = None
    rows_done: int = 0
    saved_at: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.rows_done = int(self.is_durable.sum())

    def on_batch(self, batch: BatchDone) -> None:
        self.last = batch
        before, self.rows_done = self.rows_done, int(batch.done.sum())
        self.saver.add_finished(self.rows_done - before)
        self.emit(
            RowsComputed(path=self.item.path, rows=batch.rows, tokens=batch.tokens, padded_tokens=batch.padded_tokens)
        )
        is_half = 2 * self.saver.rows_at_risk >= self.item.largest_row_group
        if is_half or time.monotonic() - self.saved_at >= PARTIAL_S:
            is_last = batch.done[self.item.window.status == Status.OK].all()  # the whole window is saved next
            if not is_last:
                self.save_partial()

    def has_room(self, in_flight: int) -> bool:
        """Whether so many rows may be in flight. Waits until those that are finished are durable, if that helps."""
        bound = self.item.largest_row_group
        if self.saver.rows_at_risk + in_flight > bound:
            self.saver.wait()
        if self.saver.rows_at_risk + in_flight > bound:
            self.save_partial()
            self.saver.wait()
        return self.saver.rows_at_risk + in_flight <= bound

    def save_partial(self) -> None:
        """Save what is finished and not durable, unless a save is in progress; the next batch tries again."""
        if self.last is None:
            return
        rows = np.flatnonzero(self.last.done & ~self.is_durable)
        if len(rows) and self.saver.save_partial(self.item, rows, self.last.snapshot(rows), self.engines):
            self.is_durable[rows] = True
            self.saved_at = time.monotonic()
