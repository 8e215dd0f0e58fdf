"""Many objects surveyed at a time, by processes of their own: h5py lets one thread in at a time.

They are started afresh, `python -m brain_to_text.surveyors`, and not forked: obstore does not live through a fork. Nor
do they run the caller's main module again, as multiprocessing would, so a notebook or a bare script can call this.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from brain_to_text.survey import Survey, survey
from estiba.errors import EstibaError
from estiba.stop import Stop
from estiba.store import Entry, Store, open_store

_PR_SET_PDEATHSIG = 1
_POLL_S = 0.2
_KEPT = "the index is not complete; what was published is kept"


def survey_all(
    location: str, entries: Sequence[Entry], *, workers: int, stop: Stop, done: Callable[[Survey], None]
) -> None:
    """Survey many objects in up to `workers` processes; `done` is called in this thread, as they come.

    Raises what a survey raised; Interrupted; EstibaError where a process died.
    """
    if min(workers, len(entries)) <= 1:
        store = open_store(location)
        for entry in entries:
            if stop():
                raise stop.interrupted(_KEPT)
            done(survey(store, entry))
        return
    # Largest first, so that the last ones to end are small.
    waiting: queue.SimpleQueue[Entry] = queue.SimpleQueue()
    for entry in sorted(entries, key=lambda entry: -entry.size_bytes):
        waiting.put(entry)
    answers: queue.SimpleQueue[Survey | BaseException] = queue.SimpleQueue()
    crew = [_start() for _ in range(min(workers, len(entries)))]
    try:
        for process in crew:
            threading.Thread(
                target=_serve, args=(process, location, waiting, answers), name="brain-survey", daemon=True
            ).start()
        left = len(entries)
        while left:
            if stop():
                raise stop.interrupted(_KEPT)
            with contextlib.suppress(queue.Empty):
                answer = answers.get(timeout=_POLL_S)
                if isinstance(answer, BaseException):
                    raise stop.interrupted(_KEPT) if stop() else answer
                done(answer)
                left -= 1
    finally:
        for process in crew:
            process.kill()  # nothing of theirs is half done: this process writes the index
            process.wait()


def _start() -> subprocess.Popen[bytes]:
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    return subprocess.Popen(
        [sys.executable, "-m", "brain_to_text.surveyors", str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environ,
    )


def _serve(
    process: subprocess.Popen[bytes],
    location: str,
    waiting: queue.SimpleQueue[Entry],
    answers: queue.SimpleQueue[Survey | BaseException],
) -> None:
    """Hand one process objects until there are none."""
    assert process.stdin is not None and process.stdout is not None
    with process.stdin, process.stdout:
        while True:
            try:
                entry = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                pickle.dump((location, entry), process.stdin)
                process.stdin.flush()
                answers.put(pickle.load(process.stdout))
            except (OSError, EOFError, ValueError, pickle.UnpicklingError):
                status = process.wait()
                answers.put(
                    EstibaError(
                        f"a process that reads HDF5 tables died ({_obituary(status)}) over {entry.path}; run "
                        "again with fewer of them: --num-dataloader-workers 1"
                    )
                )
                return


def _obituary(status: int) -> str:
    if status == -signal.SIGKILL:
        return "SIGKILL: out of memory?"
    return signal.Signals(-status).name if status < 0 else f"exit status {status}"


def main() -> None:
    """The life of one process: the parent hears the signals, and it does not outlive the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(sys.argv[1]):
        return
    asking, answering = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # nothing else may come between the answers
    stores: dict[str, Store] = {}
    while True:
        try:
            location, entry = pickle.load(asking)
        except EOFError:
            return
        answer: Any
        try:
            if location not in stores:
                stores[location] = open_store(location)
            answer = survey(stores[location], entry)
        except EstibaError as error:
            answer = error
        except Exception as error:
            answer = EstibaError(f"{entry.path}: {type(error).__name__}: {error}")
        pickle.dump(answer, answering)
        answering.flush()


if __name__ == "__main__":
    main()
