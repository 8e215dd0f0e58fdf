"""Operations on jobs, the same for every target: guards, waiting and record keeping around `Target`."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from estiba_launch.errors import AwsUnavailable, HostError, LaunchError
from estiba_launch.jobs import artifacts, directory
from estiba_launch.jobs.control import Fault
from estiba_launch.jobs.options import SubmitOptions
from estiba_launch.jobs.record import keep_status
from estiba_launch.jobs.status import JobStatus
from estiba_launch.jobs.uploads import send
from estiba_launch.request.address import TargetAddress
from estiba_launch.request.jobfile import JobFile
from estiba_launch.request.prices import Prices
from estiba_launch.targets import script_mode
from estiba_launch.targets.base import Artifacts, ListFilters, Report, Submission, Target
from estiba_launch.targets.cost import Cost
from estiba_launch.targets.registry import by_target, parse, target_of, target_of_job, without_effect

T = TypeVar("T")
ORPHAN_GRACE_S = 15.0
"""Seconds that a new supervisor may take to start. A job without one for longer is orphaned."""
PARALLEL_TARGETS = 16
DAMAGED = (OSError, KeyError, TypeError, ValueError, AttributeError)
"""What reading a record raises whose file is closed, or whose JSON was changed by hand."""


def prepare(job: JobFile, options: SubmitOptions | None = None) -> Submission:
    """Make what `start` sends and `estiba plan` prints. Starts nothing."""
    job = replace(job, notes=(*job.notes, *without_effect(job), *script_mode.notes(job.request)))
    return target_of(job.target).prepare(job, options or SubmitOptions())


def start(submission: Submission, report: Report = lambda _: None) -> None:
    """Start a job. Raises LaunchError when it cannot be started, or its name is taken."""
    target = target_of(submission.target)
    directory.refuse_known(submission.name)
    artifacts.refuse_unwritable(submission.request, runs_here=submission.target.runs_here)
    for upload in submission.job.uploads:
        send(upload, report)
    target.submit(submission, report=report)


def with_fallback(start: Callable[[TargetAddress], T], target: str, fallback: str | None, report: Report) -> T:
    """Call `start` with `target`. When AWS is unavailable, warn loudly and call it with `fallback`.

    Raises AwsUnavailable without a fallback, LaunchError for one that is not `local`.
    """
    if fallback not in (None, "local"):
        raise LaunchError(f"fallback {fallback!r}: only `local` is supported")
    address = parse(target)
    try:
        return start(address)
    except AwsUnavailable as error:
        if fallback is None or not address.on_aws:
            raise
        stars = "*" * 72
        report(
            f"estiba: {error}\n{stars}\n** NOT ON AWS: fallback local runs this job on this machine instead **\n{stars}"
        )
    return start(parse(fallback))


def status(name: str) -> JobStatus:
    """The status of a job; the last known one, with `unreachable` set, when its target does not answer."""
    target = target_of_job(name)
    try:
        return _poll(target, name)
    except HostError as error:
        return target.recorded(name, unreachable=str(error))


def _poll(target: Target, name: str) -> JobStatus:
    """Poll and record. A terminal status is recorded after the log and the metrics that belong to it."""
    found = target.poll(name)
    if found.is_orphaned and target.resumes_on_poll:
        target.resume(name)
    if not target.records_polls:
        return found
    if found.is_terminal and not target.recorded(name).is_terminal:
        found = target.finalize(found)
    keep_status(found)
    return found


def wait(name: str, timeout_s: float | None = None) -> JobStatus:
    """Wait for the end of a job, however many days that takes.

    Raises LaunchError after `timeout_s`, and for a job that lost its supervisor. A network outage is tolerated for ten
    minutes, a refused login is not.
    """
    target = target_of_job(name)
    started = time.monotonic()
    outage_since: float | None = None
    orphaned_since: float | None = None
    while True:
        now = time.monotonic()
        try:
            found = _poll(target, name)
        except HostError as error:
            outage_since = outage_since or now
            if not error.transient:
                raise
            if now - outage_since > target.outage_patience_s:
                raise type(error)(
                    f"{name}: {error}; the job may be running, `estiba status {name}` asks again"
                ) from error
            state = "unreachable"
        else:
            outage_since, state = None, found.secondary_status
            if found.is_terminal:
                return found
            orphaned_since = (orphaned_since or now) if found.is_orphaned else None
            if orphaned_since and now - orphaned_since > ORPHAN_GRACE_S:
                raise LaunchError(f"{name}: its supervisor died; run `estiba resume {name}`")
        if timeout_s is not None and now - started > timeout_s:
            raise LaunchError(f"{name}: still {state} after {timeout_s:g} s; see `estiba logs {name}`")
        _pause(target)


def log_lines(name: str, *, follow: bool) -> Iterator[str]:
    """The whole log, attempts marked; with `follow` until the job ends, through network outages.

    Without `follow`, raises HostError after the known lines when the target does not answer.
    """
    target = target_of_job(name)
    cursor = 0
    outage = False
    orphaned_since: float | None = None
    while True:
        done, ended, failure = not follow, False, None
        try:
            # Poll first, so that the log of a job that has ended is read to its end.
            found = _poll(target, name)
            orphaned_since = (orphaned_since or time.monotonic()) if found.is_orphaned else None
            lost = orphaned_since is not None and time.monotonic() - orphaned_since > ORPHAN_GRACE_S
            ended = found.is_terminal
            done = done or ended or lost
            outage = False
        except HostError as error:
            failure = error
        try:
            for line in target.logs(name, cursor, to_the_end=ended):
                cursor = line.cursor
                yield line.text
        except HostError as error:
            failure = failure or error
        if failure and (done or not failure.transient):
            raise failure
        if failure and not outage:
            outage = True
            yield f"--- {failure}; trying again ---"
        elif done and not failure:
            return
        _pause(target)


def _pause(target: Target) -> None:
    # Jitter: followers of one account must not poll in step.
    time.sleep(target.poll_interval_s * random.uniform(0.7, 1.3))


def stop(name: str, reason: str = "requested by the user") -> None:
    """TERM, then KILL after the grace period. Returns at once. Raises LaunchError when the job has ended."""
    target, found = _running(name, "stop")
    if found.status != "Stopping" or found.is_orphaned:
        target.stop(name, reason)


def interrupt(name: str, fault: Fault) -> None:
    """Inject a spot interruption. Raises LaunchError when the job has ended."""
    target, _ = _running(name, "interrupt")
    target.interrupt(name, fault)


def _running(name: str, verb: str) -> tuple[Target, JobStatus]:
    target = target_of_job(name)
    found = _poll(target, name)
    if found.is_terminal:
        raise LaunchError(f"{name}: has already ended ({found.status}), so there is no job to {verb}")
    return target, found


def hold_sync(name: str, held: bool) -> None:
    """Suspend the checkpoint syncs of a job until the next interruption, or let them continue."""
    target_of_job(name).hold_sync(name, held)


def resume(name: str) -> bool:
    """Give an orphaned job a new supervisor. Returns False when it needs none."""
    return target_of_job(name).resume(name)


def download(name: str, into: Path) -> Artifacts:
    """Download a finished job's model and output, unpacked, to `into`. Raises LaunchError when there is nothing yet."""
    found = status(name)
    if not found.is_terminal:
        raise LaunchError(
            f"{name}: still {found.secondary_status}; wait for it (`estiba logs -f {name}`) or stop it first"
        )
    fetched = target_of_job(name).download(name, into)
    if not fetched:
        raise LaunchError(f"{name}: left nothing ({found.reason or found.status})")
    return fetched


def cost(name: str, prices: Prices, region: str | None = None) -> Cost:
    """What a job has cost so far."""
    return target_of_job(name).cost(status(name), prices, region)


def list_jobs(report: Report = lambda _: None) -> list[JobStatus]:
    """Every job that was started from this machine, oldest first. Each account and host is asked once.

    A record that cannot be read is reported, and hides no other job.
    """
    names = list(_readable(directory.job_names(), report))
    groups = list(by_target(names))
    found: dict[str, JobStatus] = {}
    with ThreadPoolExecutor(PARALLEL_TARGETS) as pool:
        for statuses in pool.map(lambda group: _listed(group[0], group[1], report), groups):
            found.update((one.name, one) for one in statuses)
    return [found[name] for name in names if name in found]


def _readable(names: list[str], report: Report) -> Iterator[str]:
    for name in names:
        try:
            recorded = target_of_job(name).recorded(name).name
            if recorded != name:
                raise LaunchError(f"its record is that of {recorded}; remove the copy {directory.job_dir(name)}")
        except LaunchError as error:
            report(f"warning: {name}: {error}")
        except DAMAGED as error:
            report(_damaged(name, error))
        else:
            yield name


def _listed(target: Target, filters: ListFilters, report: Report) -> list[JobStatus]:
    """The status of jobs of one target. Halves what it asks for until it has found the record that is damaged."""
    try:
        return list(target.list(filters))
    except LaunchError as error:
        # This machine cannot ask: it has no ssh client.
        return [target.recorded(name, unreachable=str(error)) for name in filters.names]
    except DAMAGED as error:
        names = filters.names
        if len(names) == 1:
            report(_damaged(names[0], error))
            return []
        middle = len(names) // 2
        halves = (replace(filters, names=half) for half in (names[:middle], names[middle:]))
        return [one for half in halves for one in _listed(target, half, report)]


def _damaged(name: str, error: Exception) -> str:
    if isinstance(error, OSError):
        return f"warning: {name}: its record cannot be read ({error}); correct its permissions"
    what = f"{type(error).__name__}: {error}"
    return f"warning: {name}: its record is damaged ({what}); remove the job's directory {directory.jobs_root() / name}"


def list_account(address: str, region: str | None = None) -> list[JobStatus]:
    """The latest jobs of an account, newest first, no matter where they were started."""
    return list(target_of(address).list(ListFilters(account=True, region=region)))


def find(name: str, address: str, region: str | None = None) -> None:
    """Record a job of an account that was started elsewhere, so that every command knows it."""
    target_of(address).find(name, region)
