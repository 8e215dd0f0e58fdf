"""A worker's side of taking turns: it computes only while it has been told to, and counts what that took.

The other side writes one number a line, the tokens of the next turn; the worker answers with one line of JSON when it
has computed them or a file is finished, and then waits.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from typing import Any


class Gate:
    """Batches pass one by one. Tokens are those of the texts, special ones included, padding not."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what a library prints is no answer
        self._is_open = False
        self._limit = self._tokens = 0
        self._began = self._cpu = 0.0

    def ready(self, about: dict[str, Any]) -> None:
        """Say that the model is loaded and warm, and wait for the first turn."""
        self._answer(about)
        self._wait()

    def passed(self, tokens: int, *, may_stop: bool = True) -> None:
        """Count a finished batch, and wait for the next turn if this one is over.

        `may_stop` is false where other batches are still being computed.
        """
        if not self._is_open:  # a warm-up
            return
        self._tokens += tokens
        if may_stop and self._tokens >= self._limit:
            self._end(is_file_done=False)

    def file_done(self) -> None:
        self._end(is_file_done=True)

    def _end(self, *, is_file_done: bool) -> None:
        seconds, cpu = time.monotonic() - self._began, _cpu_s() - self._cpu
        self._answer({"wall_s": seconds, "cpu_s": cpu, "tokens": self._tokens, "is_file_done": is_file_done})
        self._wait()

    def _answer(self, answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=self._answers, flush=True)

    def _wait(self) -> None:
        self._is_open = False
        line = sys.stdin.readline()
        if not line:
            os._exit(0)  # the benchmark ended, or needs no more of this worker
        self._is_open, self._limit, self._tokens = True, int(line), 0
        self._cpu, self._began = _cpu_s(), time.monotonic()


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
