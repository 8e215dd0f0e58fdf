"""Processes of our own that answer tasks, one at a time: for h5py, which lets one thread in at a time.

They are started afresh, `python -m brain_to_text.indexing.crew MODULE`, and not forked: neither obstore nor an s3fs
that was used lives through a fork. Nor do they run the caller's main module again, as multiprocessing would, so a
notebook or a bare script can use them. MODULE has a function `answering()`; what that returns is called with each task.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import pickle
import signal
import subprocess
import sys
from typing import Any

from estiba.errors import EstibaError

_PR_SET_PDEATHSIG = 1
_LAST_WORDS_S = 5.0
_OURS = {signal.SIGINT, signal.SIGTERM}


class Died(Exception):
    """The process ended over a task. The text says how."""


class Worker:
    """One process. The thread that makes it has to outlive it: the process ends with that thread."""

    def __init__(self, module: str) -> None:
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        # It inherits what is blocked here, so that no Ctrl+C ends it before it can say that the parent hears signals.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _OURS)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "brain_to_text.indexing.crew", module, str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environ,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, task: Any) -> Any:
        """The answer, or the EstibaError that the task raised, as a value. Raises Died."""
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        try:
            pickle.dump(task, process.stdin, pickle.HIGHEST_PROTOCOL)
            process.stdin.flush()
            return pickle.load(process.stdout)
        except (OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
            raise Died(self._obituary()) from error

    def _obituary(self) -> str:
        try:
            status = self._process.wait(_LAST_WORDS_S)
        except subprocess.TimeoutExpired:
            self.kill()
            return "its answer made no sense"
        if status == -signal.SIGKILL:
            return "SIGKILL: out of memory?"
        return signal.Signals(-status).name if status < 0 else f"exit status {status}"

    def kill(self) -> None:
        """End it at once; from any thread. An `ask` that waits raises Died."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):  # what was not sent cannot be sent any more
                pipe.close()


def main() -> None:
    """The life of one process: the parent hears the signals, and it does not outlive the parent."""
    module, parent = sys.argv[1], int(sys.argv[2])
    for one in _OURS:
        signal.signal(one, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _OURS)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        return
    # Nothing else may come between the answers, not even what a C library prints.
    asking, answering = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    answer_to = importlib.import_module(module).answering()
    while True:
        try:
            task = pickle.load(asking)
        except EOFError:
            return
        answer: Any
        try:
            answer = answer_to(task)
        except EstibaError as error:
            answer = error
        except Exception as error:
            answer = EstibaError(f"{type(error).__name__}: {error}")
        pickle.dump(answer, answering, pickle.HIGHEST_PROTOCOL)
        answering.flush()


if __name__ == "__main__":
    main()
