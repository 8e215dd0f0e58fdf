"""Runs work that cannot be interrupted, such as a download; a job that must end abandons it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from estiba_launch.targets.local.outcome import Result

T = TypeVar("T")
POLL_S = 0.25


class MustEnd(Exception):
    """The job was stopped, or a time limit has passed."""

    def __init__(self, result: Result) -> None:
        super().__init__(result.outcome)
        self.result = result


def run_unless(must_end: Callable[[], Result | None], action: Callable[[], T]) -> T:
    """Return what `action` returns. Raises MustEnd as soon as `must_end` returns a result.

    The action's thread then runs on until the process ends.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(action())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="interruptible", daemon=True).start()
    while True:
        try:
            return future.result(timeout=POLL_S)
        except TimeoutError:
            if future.done():  # The action raised it, or ended just after the wait.
                return future.result()
        if result := must_end():
            raise MustEnd(result)
