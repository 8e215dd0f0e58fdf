"""Functions that the workers of test_processes.py run."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from estiba.errors import DataError


def make(offset: int = 0) -> Callable[[Any], Any]:
    """Return a function that adds, or does something else for a task that names it."""
    print("printed while it was made")

    def answer(task: Any) -> Any:
        if isinstance(task, int):
            return task + offset
        name, *rest = task
        if name == "print":
            print("printed by a task", flush=True)
            os.write(1, b"written by a C library\n")
        elif name == "data error":
            raise DataError("a.txt: is torn")
        elif name == "bug":
            raise ValueError("went wrong")
        elif name == "signal":
            os.kill(os.getpid(), rest[0])
        elif name == "exit":
            sys.stdout.flush()
            os._exit(rest[0])
        elif name == "sleep":
            time.sleep(rest[0])
        elif name == "environ":
            return os.environ.get(rest[0])
        elif name == "pid":
            return os.getpid(), os.getppid()
        elif name == "bytes":
            return bytes(rest[0])
        return name

    return answer


def refuse() -> Callable[[Any], Any]:
    raise DataError("the model: is not there")


if __name__ == "__main__":  # a parent that is killed: prints its worker's process id and waits
    from estiba.processes import Worker

    worker = Worker("answers:make")
    print(worker.ask(("pid",))[0], flush=True)
    print("signal", signal.Signals.SIGKILL.name, flush=True)
    time.sleep(60)
