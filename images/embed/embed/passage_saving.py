"""Saving with `--chunk`: a window holds passages of one row range, and a range of very long texts has several windows.

The finished passages of a window are saved as one partial chunk, again and again. A range is saved when its last window
is computed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from embed import saving
from embed.config import EmbedConfig
from embed.data.chunks import (
    Encoded,
    Status,
    computed_by,
    encoded_from,
    file_key,
    from_bytes,
    key_of,
    partial_to_bytes,
)
from embed.data.parts import finish_range
from embed.data.passages import Passages, partial_part_key_of, with_passages
from embed.events import ChunkSaved, Event, PartialSaved, PartialsReplaced, RowsComputed
from embed.model import BatchDone, Encoder, Stopped
from embed.saving import Engines, Saver, WorkWindow
from embed.stages import COMPUTE, SAVE, StageTimes
from estiba.checkpoint import ChunkStore


class PassageSaver(Saver):
    """Saves one window while the next one is computed."""

    def __init__(
        self, chunks: ChunkStore, config: EmbedConfig, emit: Callable[[Event], None], times: StageTimes
    ) -> None:
        super().__init__(chunks, config.embedding_dtype, emit, times)
        self._config = config
        self._computed = self._resumed = 0  # rows of the range
        self._was_whole = False

    def compute(self, encoder: Encoder, item: WorkWindow, should_stop: Callable[[], bool]) -> bool:
        """Compute a window and save it. Returns False, with its finished batches saved, if the job should stop."""
        (part,) = item.parts
        is_whole = part.row_range.rows == item.largest_row_group
        if is_whole or self._was_whole:  # else the range being saved and this one could be two row groups
            self.wait()
        self._was_whole = is_whole
        passages = _passages_of(item)
        prior, engines = self._partial_of(item)
        engines += [engine for engine in [encoder.computed_by] if engine not in engines]
        prior_rows = 0 if prior is None else prior.rows_done
        watch = _Watch(item=item, saver=self, emit=self._emit, engines=engines, resumed=prior_rows)
        try:
            with self._times.measure(COMPUTE):
                encoded = encoder.encode(item.window, should_stop, watch.on_batch, prior)
        except Stopped:
            if watch.last is not None:
                self.wait()
                self.save_snapshot(item, watch.snapshot(), engines)
            return False
        self._computed += watch.rows
        self._resumed += passages.rows_done(prior_rows)
        if passages.is_last:
            self.wait()
            self._saving = self._thread.submit(self._save_range, item, encoded, engines, self._computed, self._resumed)
            self._computed = self._resumed = 0
        else:
            self.wait()
            self.save_snapshot(item, encoded, engines)
        return True

    def save_snapshot(self, item: WorkWindow, partial: Encoded, engines: Engines) -> None:
        """Save a window's finished batches, unless a save is in progress; the next batch tries again."""
        if self._saving is None or self._saving.done():
            self.wait()
            self._saving = self._thread.submit(self._save_snapshot, item, partial, engines)

    def _partial_of(self, item: WorkWindow) -> tuple[Encoded | None, Engines]:
        """What an earlier attempt saved of a window, and the engines that computed it."""
        key = _partial_key(item)
        data = self._chunks.load(key) if key in self._chunks else None
        if data is None:
            return None, []
        prior = encoded_from(data)
        # The same rows of the same text and model; a tokenizer of another version may still read them otherwise.
        if len(prior.status) != len(item.window.status):
            return None, []
        is_computed = prior.status != Status.NOT_FINITE  # whose number of tokens is not kept
        if (prior.n_tokens != item.window.n_tokens)[is_computed].any():
            return None, []
        return prior, computed_by(from_bytes(data))

    def _save_snapshot(self, item: WorkWindow, partial: Encoded, engines: Engines) -> None:
        key, passages = _partial_key(item), _passages_of(item)
        rows = passages.rows_done(partial.rows_done)
        with self._times.measure(SAVE):
            name = self._chunks.commit(key, with_passages(partial_to_bytes(partial, engines), passages, rows))
        self._emit(PartialSaved(key=key, name=name, rows=rows))

    def _save_range(self, item: WorkWindow, encoded: Encoded, engines: Engines, computed: int, resumed: int) -> None:
        (part,) = item.parts
        file, row_range = file_key(part.table), part.row_range
        with self._times.measure(SAVE):
            data, parts, partials = finish_range(
                self._chunks, self._config, file, row_range, encoded, _passages_of(item), engines
            )
            name = self._chunks.commit(key_of(file, row_range), data)
            self._chunks.drop(partials)
        self._emit(
            ChunkSaved(
                path=part.table.path,
                row_range=row_range,
                name=name,
                size_bytes=len(data),
                resumed=resumed,
                rest=row_range.rows - computed - resumed,
                parts=parts,
            )
        )
        self._emit(PartialsReplaced(keys=partials))


def _passages_of(item: WorkWindow) -> Passages:
    assert item.passages is not None
    return item.passages


def _partial_key(item: WorkWindow) -> str:
    (part,) = item.parts
    return partial_part_key_of(file_key(part.table), part.row_range, _passages_of(item).part)


@dataclass(kw_only=True)
class _Watch:
    """Follows the batches of a window: progress after each, and a partial chunk every few seconds."""

    item: WorkWindow
    saver: PassageSaver
    emit: Callable[[Event], None]
    engines: list[dict[str, Any]]
    resumed: int
    """Passages of the window that an earlier attempt computed."""
    computed: int = 0
    """Passages of the window."""
    rows: int = 0
    """Rows of the range that these stand for."""
    last: BatchDone | None = None
    saved_at: float = field(default_factory=time.monotonic)

    def on_batch(self, batch: BatchDone) -> None:
        self.last = batch
        self.computed += batch.rows
        rows_done = _passages_of(self.item).rows_done
        rows = rows_done(self.resumed + self.computed) - rows_done(self.resumed)
        more, self.rows = rows - self.rows, rows
        self.emit(RowsComputed(path=self.item.path, rows=more, tokens=batch.tokens, padded_tokens=batch.padded_tokens))
        now = time.monotonic()
        if now - self.saved_at >= saving.PARTIAL_S:
            self.saver.save_snapshot(self.item, self.snapshot(), self.engines)
            self.saved_at = now

    def snapshot(self) -> Encoded:
        assert self.last is not None
        return self.last.snapshot(np.arange(len(self.item.window.status)))
