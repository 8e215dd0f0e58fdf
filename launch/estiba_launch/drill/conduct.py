"""Carrying a drill out: start the job on the local host, and take its hosts away at the planned moments."""

from __future__ import annotations

import copy
import datetime
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .. import contract
from ..errors import LaunchError
from ..jobfile import JobFile
from ..localhost import control, jobs
from ..localhost.control import LocalOptions
from ..localhost.store import walk
from ..localhost.watch import is_checkpoint
from .account import seconds_of
from .compare import Reference
from .scenario import Scenario, Strike
from .timeline import Reader

LOOK_S = 0.1
LOG_INTERVAL_VARIABLE = "ESTIBA_LOG_INTERVAL_S"
UNSYNCED_SHARE = 0.05
UNSYNCED_S = 10.0
BLIND_S = 5.0
"""Seconds into the work of a job that says nothing of itself and has no reference."""
NAME_CHARS = 63


def refuse_unless_spot(job: JobFile) -> None:
    """Raise LaunchError for a job that an interruption ends."""
    if not job.request.get("EnableManagedSpotTraining") or "CheckpointConfig" not in job.request:
        raise LaunchError(
            f"{job.path}: not a spot job, so an interruption is its end; set EnableManagedSpotTraining: true with "
            "MaxWaitTimeInSeconds and CheckpointConfig"
        )


def own_places(job: JobFile, suffix: str, root: Path, image: str) -> JobFile:
    """The same job under another name, with output and checkpoints of its own below `root`.

    `image` is the content that its image's name stands for now: a name that is built anew in the middle of a drill
    must not bring other code to the next attempt. Hyperparameters, environment and channels stay as they are.
    """
    request = copy.deepcopy(job.request)
    stamp = datetime.datetime.now(datetime.UTC).strftime("%H%M%S%f")[:-4]
    tail = f"-{suffix}-{stamp}"
    name = job.name[: NAME_CHARS - len(tail)].rstrip("-") + tail
    request["TrainingJobName"] = name
    request["AlgorithmSpecification"]["TrainingImage"] = image
    request["OutputDataConfig"] = {**request["OutputDataConfig"], "S3OutputPath": f"file://{root / name}"}
    request["CheckpointConfig"]["S3Uri"] = f"file://{root / name / 'checkpoints'}"
    return JobFile(job.path, job.target, request, job.variables)


@contextmanager
def stopped_on_error(name: str) -> Iterator[None]:
    """A drill's job is of no use to anybody when the drill ends early."""
    try:
        yield
    except BaseException:
        if not jobs.is_over(jobs.describe(name)):
            jobs.stop(name, "the drill was ended")
        raise


def run_undisturbed(job: JobFile, options: LocalOptions, say: Callable[[str], None]) -> dict[str, Any]:
    """The job from start to end. Returns its record."""
    started = jobs.start(job, options, say)
    with stopped_on_error(started.name):
        return jobs.wait(started.name)


class Look:
    """What can be seen of the running attempt."""

    def __init__(self, job_dir: Path, hosts: list[str], *, counts: bool) -> None:
        """`counts` True: the job is known to print progress lines, so nothing else is a sign of its work."""
        self.job_dir, self.hosts, self.counts = job_dir, hosts, counts
        self.number = 0
        self._readers: dict[str, Reader] = {}
        self._files: dict[str, tuple[int, int]] | None = None
        self.began: float | None = None
        """time.monotonic() of the first sign of work."""

    def at(self, number: int) -> None:
        """Look at this attempt from now on."""
        if number != self.number:
            self.number, self.began, self._files = number, None, None
            self._readers = {host: Reader(self.root / f"{host}.log") for host in self.hosts}

    @property
    def root(self) -> Path:
        return self.job_dir / "attempts" / str(self.number)

    def share(self, total: float | None) -> float | None:
        """Share of the work that is done, over the hosts the least; None when the attempt has not counted yet."""
        shares = []
        for reader in self._readers.values():
            line = reader.read()
            whole = line.total or total
            if line.counted is None:
                continue
            self.began = self.began or time.monotonic()
            if whole:
                shares.append(line.counted / whole)
        return min(shares) if shares else None

    def text(self) -> str:
        """How far the hosts are, in words."""
        lines = [reader.timeline for reader in self._readers.values() if reader.timeline.points]
        return ", ".join(f"{line.unit}={line.counted:g}" for line in lines) or "no progress line yet"

    def look_at_files(self) -> None:
        """For jobs that count nothing: a checkpoint directory that changes is a job at work."""
        if self.counts:
            return
        files = {}
        for host in self.hosts:
            for key, stat in walk(self.root / host / "checkpoints"):
                if is_checkpoint(Path(key).name):
                    files[f"{host}/{key}"] = (stat.st_size, stat.st_mtime_ns)
        if self._files is not None and files != self._files:
            self.began = self.began or time.monotonic()
        self._files = files


def run_interrupted(
    job: JobFile,
    options: LocalOptions,
    strikes: list[Strike],
    *,
    grace_s: int,
    reference: Reference | None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """The job with its interruptions. `reference` tells how much work there is. Returns the final record."""
    working_s, total = (reference.working_s, reference.total) if reference else (None, None)
    started = jobs.start(job, options, say)
    look = Look(started.directory, [host.name for host in contract.hosts(job.request)], counts=bool(total))
    with stopped_on_error(started.name):
        done = 0.0
        for index, strike in enumerate(strikes, 1):
            pause_s = max(strike.share - done, 0.0) * working_s if working_s else BLIND_S
            if not _until(started.name, look, index, strike.share, total, pause_s):
                break
            if strike.kind is Scenario.KILL_BEFORE_SYNC:
                control.hold_sync(started.directory)
                share = look.share(total)
                more = None if share is None else share + UNSYNCED_SHARE
                held_s = UNSYNCED_S if working_s is None else min(UNSYNCED_S, max(working_s * UNSYNCED_SHARE, 1.0))
                if not _until(started.name, look, index, more or 1.0, total, held_s, either=True):
                    break
            say(f"interruption {index} of {len(strikes)}: {strike.kind} at {look.text()}")
            try:
                jobs.interrupt(started.name, strike.order(grace_s))
            except LaunchError:
                break  # the job ended in this moment
            done = strike.share
            if not _interrupted(started.name, index):
                break
        # A hold that was not used must not keep the last checkpoint from the store.
        control.release_sync(started.directory)
        return jobs.wait(started.name)


def _interruptions(record: Mapping[str, Any]) -> int:
    return sum("Interruption" in attempt for attempt in record["Estiba"]["Attempts"])


def _until(
    name: str, look: Look, index: int, share: float, total: float | None, pause_s: float, *, either: bool = False
) -> bool:
    """Until the running attempt has done `share` of the work; False when the job ended first.

    An attempt is only struck after a sign of work of its own. Where shares are not known, `pause_s` after that sign;
    `either` takes whichever comes first.
    """
    entered = time.monotonic()
    while True:
        record = jobs.describe(name)
        if jobs.is_over(record):
            return False
        if jobs.orphaned(record) and time.monotonic() - entered > 30:
            raise LaunchError(f"{name}: its supervisor died; run `estiba resume {name}`, or the drill again")
        attempts = record["Estiba"]["Attempts"]
        if _interruptions(record) == index - 1 and attempts and "EndTime" not in attempts[-1]:
            look.at(attempts[-1]["Number"])
            if attempts[-1].get("TrainingStartTime"):
                reached = look.share(total)
                look.look_at_files()
                waited = look.began is not None and time.monotonic() - max(look.began, entered) >= pause_s
                if (reached is not None and reached >= share) or (waited and (reached is None or either)):
                    return True
        time.sleep(LOOK_S)


def _interrupted(name: str, index: int) -> bool:
    """Until interruption `index` has taken place; False when the job ended by itself."""
    while True:
        record = jobs.describe(name)
        if _interruptions(record) >= index:
            return True
        if jobs.is_over(record):
            return False
        time.sleep(LOOK_S)


def working_seconds(record: Mapping[str, Any], first_line: float | None) -> float | None:
    """Seconds from the first progress line of an undisturbed run, or from its start, to its end."""
    end = seconds_of(record.get("TrainingEndTime"))
    start = first_line or seconds_of(record["Estiba"]["Attempts"][0].get("TrainingStartTime"))
    return max(end - start, 0.0) if start and end else None
