"""Batches that a thread prepares ahead of their step. A stop ends the wait for a batch."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

B = TypeVar("B")
POLL_S = 0.1


class Prefetcher(Generic[B]):
    """`make(first)`, `make(first + 1)`, … up to `end`, in order, with at most `depth` of them ready."""

    def __init__(self, make: Callable[[int], B], first: int, end: int, *, depth: int = 2) -> None:
        self._make, self._end = make, end
        self._ready: queue.Queue[tuple[int, B | BaseException]] = queue.Queue(depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(first,), name="estiba-batches", daemon=True)
        self._thread.start()

    def next(self, index: int, should_stop: Callable[[], bool]) -> B | None:
        """Return the batch of `index`, or None once `should_stop()` is true. Raises what `make` raised."""
        while not should_stop():
            try:
                position, batch = self._ready.get(timeout=POLL_S)
            except queue.Empty:
                continue
            if isinstance(batch, BaseException):
                raise batch
            assert position == index, "batches are taken in order"
            return batch
        return None

    def close(self) -> None:
        self._closed.set()
        with contextlib.suppress(queue.Empty):
            while True:
                self._ready.get_nowait()
        self._thread.join(timeout=1.0)

    def _run(self, first: int) -> None:
        for index in range(first, self._end):
            try:
                item: Any = self._make(index)
            except BaseException as error:
                item = error
            while not self._closed.is_set():
                with contextlib.suppress(queue.Full):
                    self._ready.put((index, item), timeout=POLL_S)
                    break
            if self._closed.is_set() or isinstance(item, BaseException):
                return


def to_device(batch: Any, device: torch.device) -> Any:
    """Move the tensors inside tuples, lists and dicts; to a GPU from pinned memory, without waiting."""
    if isinstance(batch, torch.Tensor):
        if device.type == "cuda" and not batch.is_cuda:
            return batch.pin_memory().to(device, non_blocking=True)
        return batch.to(device)
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch
