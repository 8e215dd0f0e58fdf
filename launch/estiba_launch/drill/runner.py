"""Run a drill's job and apply the planned faults."""

from __future__ import annotations

import copy
import datetime
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from estiba_launch.drill.loss_report import seconds_of
from estiba_launch.drill.reference import Reference
from estiba_launch.drill.scenario import PlannedFault, Scenario
from estiba_launch.errors import LaunchError
from estiba_launch.jobs import directory
from estiba_launch.jobs.checkpoint_watch import WriteCounter
from estiba_launch.jobs.options import SubmitOptions
from estiba_launch.jobs.progress import Progress, ProgressReader
from estiba_launch.jobs.status import JobStatus
from estiba_launch.request import contract
from estiba_launch.request.jobfile import JobFile
from estiba_launch.targets import operations
from estiba_launch.targets.base import Report

POLL_S = 0.1
ORPHAN_GRACE_S = 30.0
"""A supervisor may take this long to start."""
UNSYNCED_SHARE = 0.05
"""kill-before-sync holds the sync back for this share of the work, ..."""
UNSYNCED_S = 10.0
"""... or for this many seconds, whichever ends first."""
ASSUMED_WORKING_S = 10.0
"""Seconds of work, if no reference tells the duration."""
TICK_S = 15.0
"""Seconds between progress reports."""
MAX_NAME_CHARS = 63


@contextmanager
def isolated(
    job: JobFile,
    suffix: str,
    root: Path,
    image: str,
    *,
    keep: bool = False,
    conditions: Mapping[str, Any] | None = None,
) -> Iterator[JobFile]:
    """A copy of the job with its own name, and with output and checkpoints below `root`, deleted afterwards.

    `image` names the image's content: if a tag moved during a drill, the next attempt would run other code.
    Hyperparameters, environment and channels are not changed. `conditions` are those of `request/contract.py`.
    """
    request = copy.deepcopy(job.request)
    tail = f"-{suffix}-{datetime.datetime.now(datetime.UTC):%H%M%S%f}"[:-4]
    name = job.name[: MAX_NAME_CHARS - len(tail)].rstrip("-") + tail
    request["TrainingJobName"] = name
    if conditions:
        request[contract.CONDITIONS] = dict(conditions)
    request["AlgorithmSpecification"]["TrainingImage"] = image
    request["OutputDataConfig"] = {**request["OutputDataConfig"], "S3OutputPath": f"file://{root / name}"}
    request["CheckpointConfig"]["S3Uri"] = f"file://{root / name / 'checkpoints'}"
    try:
        yield replace(job, request=request)
    finally:
        if not keep:
            shutil.rmtree(root / name, ignore_errors=True)


@contextmanager
def started(job: JobFile, options: SubmitOptions, report: Report) -> Iterator[None]:
    """Start the job, and stop it when the drill ends early."""
    operations.start(operations.prepare(job, options), report)
    try:
        yield
    except BaseException:
        if not operations.status(job.name).is_terminal:
            report(f"{job.name}: stopping, since the drill ends early")
            operations.stop(job.name, "the drill ended early")
        raise


def attempt_dir(name: str, number: int) -> Path:
    return directory.job_dir(name) / "attempts" / str(number)


def read_progress(status: JobStatus) -> dict[tuple[int, str], Progress]:
    """(attempt number, host) -> progress, from the logs of all hosts."""
    return {
        (attempt.number, host): ProgressReader(attempt_dir(status.name, attempt.number) / f"{host}.log").read()
        for attempt in status.attempts
        for host in attempt.hosts
    }


class Monitor:
    """Observes a running job through the logs and checkpoint directories of its current attempt."""

    def __init__(self, name: str, hosts: list[str], reference: Reference | None = None) -> None:
        self._name, self._hosts, self._reference = name, hosts, reference
        self._number = 0
        self._readers: dict[str, ProgressReader] = {}
        self._counter: WriteCounter | None = None
        self._earlier_writes = 0
        self.writes: int | None = None
        """Checkpoint files written in all attempts; None if the system cannot count them."""
        self.working_since: float | None = None
        """time.monotonic() of the attempt's first sign of work."""
        self.share: float | None = None
        """Share of the work done: by the slowest host's progress lines, or by checkpoint writes relative to the
        reference. None before the attempt's first sign of work, and if neither is known."""

    def update(self, number: int) -> None:
        root = attempt_dir(self._name, number)
        if number != self._number:
            self.close()
            self._number, self.working_since, self._earlier_writes = number, None, self.writes or 0
            self._readers = {host: ProgressReader(root / f"{host}.log") for host in self._hosts}
            self._counter = WriteCounter([root / host / "checkpoints" for host in self._hosts])
        assert self._counter is not None
        written = self._counter.read()
        self.writes = None if written is None else self._earlier_writes + written
        for reader in self._readers.values():
            reader.read()
        if self._shows_work(written):
            self.working_since = self.working_since or time.monotonic()
        self.share = self._share() if self.working_since else None

    def _shows_work(self, written: int | None) -> bool:
        if any(reader.progress.points for reader in self._readers.values()):
            return True
        if self._reference is None:
            return bool(written)
        if self._reference.total is not None:
            return False  # It will print progress lines.
        # A job that shows no sign of work counts as working once it runs.
        return bool(written) or not self._reference.writes

    def _share(self) -> float | None:
        known = self._reference
        counts = [(one.counter, one.total or (known and known.total)) for one in self.progress]
        shares = [counter / total for counter, total in counts if counter is not None and total]
        if shares:
            return min(shares)
        if known and known.total is None and known.writes and self.writes is not None:
            return self.writes / known.writes
        return None

    @property
    def progress(self) -> list[Progress]:
        return [reader.progress for reader in self._readers.values()]

    def close(self) -> None:
        if self._counter is not None:
            self._counter.close()

    def __str__(self) -> str:
        lines = [f"{one.unit}={one.counter:g}" for one in self.progress if one.counter is not None]
        if not lines and self.writes:
            lines = [f"{self.writes} checkpoint files written"]
        return ", ".join(lines) or "no progress line yet"


def watch(name: str, monitor: Monitor, report: Report) -> JobStatus:
    """Wait for a job to end, and observe it meanwhile."""
    for status in _poll(name, monitor, report):
        if status.attempts and status.attempts[-1].training_start_time:
            monitor.update(status.attempts[-1].number)
    status = operations.status(name)
    if status.attempts and status.attempts[-1].training_start_time:
        monitor.update(status.attempts[-1].number)
    return status


def run_with_faults(
    job: JobFile, options: SubmitOptions, planned: Sequence[PlannedFault], reference: Reference | None, report: Report
) -> JobStatus:
    working_s = (reference and reference.working_s) or ASSUMED_WORKING_S
    name = job.name
    monitor = Monitor(name, [host.name for host in contract.hosts(job.request)], reference)
    with started(job, options, report), closing(monitor):
        done = 0.0
        for count, one in enumerate(planned):
            if not _reached(name, monitor, count, one.share, max(one.share - done, 0.0) * working_s, report):
                break
            if one.scenario is Scenario.KILL_BEFORE_SYNC:
                operations.hold_sync(name, True)
                share = 1.0 if monitor.share is None else monitor.share + UNSYNCED_SHARE
                hold_s = min(UNSYNCED_S, max(working_s * UNSYNCED_SHARE, 1.0))
                if not _reached(name, monitor, count, share, hold_s, report, whichever_first=True):
                    break
            report(f"interruption {count + 1} of {len(planned)}: {one.scenario} at {monitor}")
            try:
                operations.interrupt(name, one.fault)
            except LaunchError:
                break  # The job has just ended.
            done = one.share
            if not any(count_interruptions(status) > count for status in _poll(name, monitor, report)):
                break
        # Otherwise a hold that no fault used would keep the last checkpoint from the store.
        operations.hold_sync(name, False)
        return watch(name, monitor, report)


def count_interruptions(status: JobStatus) -> int:
    return sum((attempt.interruption is not None) + len(attempt.faults) for attempt in status.attempts)


def progress_after_watch(
    status: JobStatus, progress: Mapping[tuple[int, str], Progress]
) -> dict[tuple[int, str], bool]:
    """(attempt number, host) -> whether it counted work in the second half of the time that it was watched."""
    found = {}
    for attempt in status.attempts:
        note = attempt.interruption or {}
        since = seconds_of(note.get("Time")) if "Hosts" in note else None
        if since is not None:
            half = since + note["WatchedSeconds"] / 2
            for host in attempt.hosts:
                points = progress[attempt.number, host].points
                found[attempt.number, host] = bool(points) and points[-1][0] > half
    return found


def _poll(name: str, monitor: Monitor, report: Report) -> Iterator[JobStatus]:
    """Yield the status until the job ends, and report progress every TICK_S."""
    last_report = started = time.monotonic()
    orphaned_since: float | None = None
    while not (status := operations.status(name)).is_terminal:
        now = time.monotonic()
        orphaned_since = (orphaned_since or now) if status.is_orphaned else None
        if orphaned_since and now - orphaned_since > ORPHAN_GRACE_S:
            raise LaunchError(f"{name}: its supervisor died; run `estiba resume {name}`, or the drill again")
        if now - last_report >= TICK_S:
            last_report = now
            attempt = f"attempt {len(status.attempts)}, " if len(status.attempts) > 1 else ""
            report(f"{name}: {attempt}{status.secondary_status}, {monitor} ({now - started:.0f} s)")
        yield status
        time.sleep(POLL_S)


def _reached(
    name: str,
    monitor: Monitor,
    interruptions: int,
    share: float,
    pause_s: float,
    report: Report,
    *,
    whichever_first: bool = False,
) -> bool:
    """Wait until the attempt after `interruptions` has done `share` of the work. Returns False if the job ends first.

    Every attempt must show a sign of work first. If the share is unknown, wait for `pause_s` after that sign; with
    `whichever_first`, for the share or the pause.
    """
    called = time.monotonic()
    for status in _poll(name, monitor, report):
        attempt = status.attempts[-1] if status.attempts else None
        if not attempt or not attempt.training_start_time or attempt.end_time:
            continue
        if count_interruptions(status) < interruptions:
            continue
        monitor.update(attempt.number)
        since = monitor.working_since
        paused = since is not None and time.monotonic() - max(since, called) >= pause_s
        if monitor.share is not None and monitor.share >= share:
            return True
        if paused and (monitor.share is None or whichever_first):
            return True
    return False
