"""How long each stage of a pipeline worked, and how long it waited for another one."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

T = TypeVar("T")

READ, TOKENISE, READ_WAITS = "read.busy_s", "tokenise.busy_s", "read.waiting_s"
"""Reading and tokenising take turns in one thread, which waits while enough windows are ready."""
COMPUTE, COMPUTE_WAITS = "compute.busy_s", "compute.waiting_s"
"""The device waits while no window is ready, or while the chunk before is not saved."""
SAVE, JOIN = "save.busy_s", "join.busy_s"


class StageTimes:
    """Seconds by stage. Each thread of a pipeline adds its own."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self.add({stage: time.monotonic() - began})

    def each(self, items: Iterable[T], stage: str) -> Iterator[T]:
        """`items`, counting the time that each one takes to come."""
        iterator = iter(items)
        while True:
            with self.measure(stage):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def add(self, seconds: Mapping[str, float]) -> None:
        with self._lock:
            for stage, more in seconds.items():
                self._seconds[stage] += more

    def take(self) -> dict[str, float]:
        """The seconds since the last call."""
        with self._lock:
            taken = dict(self._seconds)
            self._seconds.clear()
        return taken

    def as_json(self) -> dict[str, dict[str, Any]]:
        with self._lock:
            found = {stage: round(seconds, 3) for stage, seconds in self._seconds.items()}
        table: dict[str, dict[str, Any]] = {}
        for stage in (READ, READ_WAITS, TOKENISE, COMPUTE, COMPUTE_WAITS, SAVE, JOIN):
            name, _, unit = stage.partition(".")
            table.setdefault(name, {})[unit] = found.get(stage, 0.0)
        return table
