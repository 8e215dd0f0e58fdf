"""Scan many objects in parallel worker processes, because h5py lets only one thread run at a time."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence

from brain_to_text.data.indexing.scan import COPY_AGAIN, ScanResult, scan_object
from estiba.errors import DataError, EstibaError
from estiba.platform.stop import Stop
from estiba.processes import WorkerDied, WorkerPool
from estiba.storage import Entry, open_store

MAX_SCAN_S = 120.0
"""CPU seconds per object. A few are usual, but HDF5 never finishes reading some damaged tables."""
_INTERRUPTED = "the index is not complete; what was published is kept"


def scan_all(
    location: str, entries: Sequence[Entry], *, workers: int, stop: Stop, on_result: Callable[[ScanResult], None]
) -> None:
    """Scan objects in up to `workers` processes. Calls `on_result` in this thread with each result as it arrives.

    0 workers scan in this thread, which notices a stop only between objects. Raises what a scan raises; Interrupted;
    EstibaError if a process dies.
    """
    if workers == 0:
        scan = make_scanner(location, None)
        for entry in entries:
            if stop():
                raise stop.interrupted(_INTERRUPTED)
            on_result(scan(entry))
        return
    largest_first = sorted(entries, key=lambda entry: -entry.size_bytes)  # so that no process ends with a large one
    target, count = "brain_to_text.data.indexing.scan_pool:make_scanner", 0
    with WorkerPool(target, location, MAX_SCAN_S, size=min(workers, len(entries)), name="HDF5 scan") as pool:
        try:
            for _, scanned in pool.map_unordered(largest_first, stop):
                on_result(scanned)
                count += 1
        except WorkerDied as error:
            raise _as_estiba_error(location, error) from None
    if count < len(entries):
        raise stop.interrupted(_INTERRUPTED)


def make_scanner(location: str, max_cpu_s: float | None) -> Callable[[Entry], ScanResult]:
    """Return the function that a worker process runs for each object. After `max_cpu_s` in a scan it is killed."""
    store = open_store(location)

    def scan(entry: Entry) -> ScanResult:
        if max_cpu_s is None:
            return scan_object(store, entry)
        signal.setitimer(signal.ITIMER_PROF, max_cpu_s)  # the default action of SIGPROF ends the process
        try:
            return scan_object(store, entry)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0.0)

    return scan


def _as_estiba_error(location: str, error: WorkerDied) -> EstibaError:
    url = f"{location.rstrip('/')}/{error.task.path}"
    if error.returncode == -signal.SIGPROF:
        return DataError(
            f"{url}: its tables could not be read within {MAX_SCAN_S:.0f} CPU seconds (parts are missing or point at "
            f"each other); {COPY_AGAIN}"
        )
    return EstibaError(
        f"{url}: {error} while it scanned this file; run again with fewer processes: --num-dataloader-workers 1"
    )
