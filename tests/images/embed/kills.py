"""Jobs that are killed or stopped at a batch, in this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from whole_job import run

from embed import saving
from embed.model import Encoder
from embed.saving import Saver
from estiba.checkpoint import ChunkStore
from estiba.errors import StoreError


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


def after_batches(monkeypatch: pytest.MonkeyPatch, count: int, action: Callable[[], None]) -> list[int]:
    """Call `action` when the model has run `count` batches; returns the number of rows of each batch."""
    sizes: list[int] = []
    original = Encoder._launch

    def launch(self, engine, window, batch):
        if len(sizes) == count:
            action()
        sizes.append(len(batch))
        return original(self, engine, window, batch)

    monkeypatch.setattr(Encoder, "_launch", launch)
    return sizes


def kill_at(
    monkeypatch: pytest.MonkeyPatch, batch: int, slow_s: float = 0.0, *, after_a_save: bool = False
) -> list[int]:
    """End the job before batch `batch`; from then on nothing becomes durable. Returns the rows of each batch.

    With `after_a_save` the kill waits for the first chunk, which a busy machine may not have saved by then.
    """
    sizes: list[int] = []
    launch, commit, drop = Encoder._launch, ChunkStore.commit, ChunkStore.drop
    dead: list[bool] = []
    is_saved = threading.Event()

    def launched(self, engine, window, rows):
        if len(sizes) == batch:
            if after_a_save:
                assert is_saved.wait(60)
            dead.append(True)
            raise Killed
        sizes.append(len(rows))
        return launch(self, engine, window, rows)

    def committed(self, key, data):
        time.sleep(slow_s)
        if dead:
            raise StoreError("killed")
        result = commit(self, key, data)
        is_saved.set()
        return result

    def dropped(self, keys):
        if not dead:
            drop(self, keys)

    monkeypatch.setattr(Encoder, "_launch", launched)
    monkeypatch.setattr(ChunkStore, "commit", committed)
    monkeypatch.setattr(ChunkStore, "drop", dropped)
    # No process dies, so the thread has to end before the job is run again.
    monkeypatch.setattr(Saver, "close", lambda saver: saver._thread.shutdown(wait=True))
    return sizes


def run_killed(monkeypatch: pytest.MonkeyPatch, model: Path, batches: int, **options: Any) -> None:
    """Run the job, which saves each batch, and kill it when the model has run `batches` of them."""

    def kill() -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(saving, "PARTIAL_S", 0.0)
        after_batches(patched, batches, kill)
        with pytest.raises(Killed):
            run(model, **options)
