"""Many objects surveyed at a time, by processes of their own (crew.py)."""

from __future__ import annotations

import contextlib
import queue
import signal
import threading
from collections.abc import Callable, Sequence
from typing import Any

from brain_to_text.indexing.crew import Died, Worker
from brain_to_text.indexing.survey import Survey, survey
from estiba.errors import DataError, EstibaError
from estiba.stop import Stop
from estiba.store import Entry, Store, open_store

_POLL_S = 0.2
LONGEST_S = 120.0
"""Of a processor, for one object; some seconds are usual. HDF5 goes round in circles over some damaged tables."""
_KEPT = "the index is not complete; what was published is kept"


def survey_all(
    location: str, entries: Sequence[Entry], *, workers: int, stop: Stop, done: Callable[[Survey], None]
) -> None:
    """Survey many objects in up to `workers` processes; `done` is called in this thread, as they come.

    With 0 workers in this thread, which hears no stop while h5py reads one. Raises what a survey raised; Interrupted;
    EstibaError where a process died.
    """
    if workers == 0:
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
    crew: list[Worker] = []
    try:
        for _ in range(min(workers, len(entries))):
            crew.append(Worker(__name__))
            threading.Thread(
                target=_serve, args=(crew[-1], location, waiting, answers), name="brain-survey", daemon=True
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
        for worker in crew:
            worker.kill()  # nothing of theirs is half done: this process writes the index


def _serve(
    worker: Worker,
    location: str,
    waiting: queue.SimpleQueue[Entry],
    answers: queue.SimpleQueue[Survey | BaseException],
) -> None:
    """Hand one process objects until there are none."""
    while True:
        try:
            entry = waiting.get_nowait()
        except queue.Empty:
            return
        try:
            answers.put(worker.ask((location, entry, LONGEST_S)))
        except Died as error:
            answers.put(_explained(location, entry, str(error)))
            return


def _explained(location: str, entry: Entry, how: str) -> EstibaError:
    url = f"{location.rstrip('/')}/{entry.path}"
    if "SIGPROF" in how:
        return DataError(
            f"{url}: its tables cannot be read to their end ({LONGEST_S:.0f} s of work; parts of it are missing or "
            "point at each other); copy it again from where it came from"
        )
    return EstibaError(
        f"{url}: a process that reads HDF5 tables died over it ({how}); run again with fewer of them: "
        "--num-dataloader-workers 1"
    )


def answering() -> Callable[[tuple[str, Entry, float]], Any]:
    """What one of the processes does (crew.py)."""
    stores: dict[str, Store] = {}

    def answer(task: tuple[str, Entry, float]) -> Survey:
        location, entry, longest_s = task
        try:
            if location not in stores:
                stores[location] = open_store(location)
            signal.setitimer(signal.ITIMER_PROF, longest_s)  # whose end is that of the process
            return survey(stores[location], entry)
        except EstibaError:
            raise
        except Exception as error:
            raise EstibaError(f"{entry.path}: {type(error).__name__}: {error}") from error
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0.0)

    return answer
