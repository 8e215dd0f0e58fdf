"""A worker process takes tasks from a queue: it is never idle between two, and never waits for one after a failure."""

from __future__ import annotations

import queue
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embed import pool
from embed.config import EmbedConfig
from embed.data.chunks import Coverage, ModelInfo
from embed.data.files import inspect
from embed.data.table import InputFile, Table
from embed.data.windows import Task, tasks_of
from embed.events import ChunkSaved, TaskDone
from embed.model import Encoder
from estiba.checkpoint import ChunkStore
from estiba.errors import StoreError
from estiba.storage import FileStore

WAIT_S = 60.0
GROUPS = 3


class Events(list[Any]):
    def __init__(self, stop: threading.Event, kind: type, count: int) -> None:
        super().__init__()
        self._stop, self._kind, self._count = stop, kind, count

    def put(self, event: Any) -> None:
        self.append(event)
        if isinstance(event, Exception) or sum(isinstance(item, self._kind) for item in self) == self._count:
            self._stop.set()

    def close(self) -> None:
        pass

    def join_thread(self) -> None:
        pass


def three_tasks(folder: Path) -> list[Task]:
    """One task for each of three row groups of 100 rows."""
    texts = [f"barco {index}" for index in range(100 * GROUPS)]
    pq.write_table(pa.table({"texto": texts}), folder / "a.parquet", row_group_size=100)
    size = (folder / "a.parquet").stat().st_size
    table = inspect(FileStore(folder), InputFile(path="a.parquet", size_bytes=size, etag=None))
    assert isinstance(table, Table)
    return tasks_of([table], {table.path: Coverage(table)}, 100)


@pytest.fixture
def serve(root, inputs, tiny_model, monkeypatch):
    """Run a worker's main function in this process on the three tasks, until `count` events of `kind`."""
    for name in ("ignore_stop_signals", "die_with_parent", "limit_threads"):
        monkeypatch.setattr(pool, name, lambda *_: None)

    def run(tasks: queue.Queue[Any], kind: type, count: int) -> list[Any]:
        stop = threading.Event()
        events = Events(stop, kind, count)
        for task in three_tasks(inputs):
            tasks.put((((root / "ck").as_uri(), "pieces", None, None), task))
        watchdog = threading.Timer(WAIT_S, stop.set)
        watchdog.daemon = True
        watchdog.start()
        pool._serve(0, 1, EmbedConfig(model=str(tiny_model), device="cpu"), str(inputs), (), tasks, events, stop)
        assert watchdog.is_alive(), "the worker did not end by itself"
        watchdog.cancel()
        return events

    return run


def test_a_worker_reads_the_next_task_while_it_computes_one(serve, monkeypatch):
    tasks: queue.Queue[Any] = queue.Queue()
    left: list[int] = []
    original = Encoder.encode

    def encode(self, *arguments):
        deadline = time.monotonic() + WAIT_S / 2
        while not left and tasks.qsize() == GROUPS - 1 and time.monotonic() < deadline:
            threading.Event().wait(0.01)
        left.append(tasks.qsize())
        return original(self, *arguments)

    monkeypatch.setattr(Encoder, "encode", encode)
    events = serve(tasks, TaskDone, GROUPS)
    assert left[0] < GROUPS - 1
    done = [event for event in events if isinstance(event, TaskDone)]
    assert [event.row_group for event in done] == [0, 1, 2]
    for event in done:  # and only when its chunks are durable
        saved = [item.row_range for item in events[: events.index(event)] if isinstance(item, ChunkSaved)]
        assert any(item.row_group == event.row_group for item in saved)


def test_a_worker_that_cannot_save_says_so_while_it_waits_for_its_next_task(serve, monkeypatch):
    def commit(self, key: str, data: bytes) -> str:
        if "/000002-" in key:
            raise StoreError("the disk is full; make room and run the job again")
        return original(self, key, data)

    original = ChunkStore.commit
    monkeypatch.setattr(ChunkStore, "commit", commit)
    events = serve(queue.Queue(), TaskDone, GROUPS)
    assert isinstance(events[-1], StoreError)
    assert [event.row_group for event in events if isinstance(event, TaskDone)] == [0, 1]


def test_workers_that_chose_different_engines_all_compute_by_torch():
    """OpenVINO needs memory, which may be left to some of them only."""
    info = {"identity": {}, "dimensions": 8, "device": "cpu", "dtype": "float32", "token_budget": 9}
    fast, slow = (ModelInfo(engine=engine, **info) for engine in ("openvino 1, bfloat16", "torch 2, float32"))
    assert pool._common([fast, fast]) == (fast, None)
    model, engine = pool._common([fast, slow])
    assert engine is not None and engine["engine"].startswith("torch ") and engine["dtype"] == "float32"
    assert model.engine == f"{engine['engine']}, float32"
