"""The interface of every target: a place that runs jobs.

A new target is a folder with a subclass of `Target` and a line in `registry.py`. `prepare` is pure and makes the
submission that `estiba plan` prints; `submit` sends that submission and nothing else, so the two cannot differ. A
target without the SUBMIT capability has only `prepare`: its submission is printed, and another tool sends it.

Users of jobs call `operations.py`, where waiting, following a log, refusing a name that exists, guarding a download and
keeping records are written once for all targets.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar

from estiba_launch.errors import HostError, LaunchError
from estiba_launch.jobs import control
from estiba_launch.jobs.check import Check, Requirements
from estiba_launch.jobs.control import Fault
from estiba_launch.jobs.directory import job_dir
from estiba_launch.jobs.logs import LOG, read_lines
from estiba_launch.jobs.options import SubmitOptions
from estiba_launch.jobs.record import recorded_document
from estiba_launch.jobs.status import JobStatus
from estiba_launch.request.address import TargetAddress
from estiba_launch.request.jobfile import JobFile
from estiba_launch.request.prices import Prices, hosts_of
from estiba_launch.targets.cost import Cost

Report = Callable[[str], None]
"""Receives one line of progress for the user."""


class Capability(StrEnum):
    SUBMIT = "start jobs"
    POLL = "show the status of jobs"
    LIST = "list jobs"
    LIST_ACCOUNT = "list jobs that were started elsewhere"
    LOGS = "show logs"
    STOP = "stop jobs"
    INTERRUPT = "interrupt jobs"
    RESUME = "resume jobs"
    DOWNLOAD = "download results"
    COST = "report what a job cost"


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A job as one target would run it: what `estiba plan` prints and `submit` consumes."""

    job: JobFile
    options: SubmitOptions
    script: str | None = None
    """Shell script or batch file; None for a target that takes the request itself, or a manifest."""
    manifest: str | None = None
    """Documents of YAML for another tool."""

    @property
    def name(self) -> str:
        return self.job.name

    @property
    def target(self) -> TargetAddress:
        return self.job.target

    @property
    def request(self) -> dict[str, Any]:
        return self.job.request

    def render(self) -> str:
        """The artefact for people: the script, the manifest, or the request as JSON."""
        return self.script or self.manifest or json.dumps(self.request, indent=2, ensure_ascii=False) + "\n"

    def to_json(self) -> dict[str, Any]:
        made = {"script": self.script, "manifest": self.manifest}
        return {"request": self.request, **{kind: text for kind, text in made.items() if text}}


@dataclass(frozen=True, kw_only=True)
class ListFilters:
    """Which jobs `list` yields."""

    names: Sequence[str] = ()
    """Jobs recorded on this machine that run on this target."""
    account: bool = False
    """Every recent job of the account instead, no matter where it was started."""
    region: str | None = None
    limit: int = 50
    """Most jobs of the account to list."""


@dataclass(frozen=True, kw_only=True)
class LogLine:
    text: str
    cursor: int
    """Pass it to `logs` to read on after this line."""


Artifacts = Mapping[str, int]
"""`model` and `output`, each with the number of files that were downloaded."""


class Target(ABC):
    """One place that runs jobs. Every method raises LaunchError with a remedy."""

    kind: ClassVar[str]
    """Its name in the registry and the start of its address."""
    capabilities: ClassVar[frozenset[Capability]]
    poll_interval_s: ClassVar[float] = 2.0
    """Seconds between polls while a user waits."""
    outage_patience_s: ClassVar[float] = 600.0
    """Seconds without an answer after which waiting ends."""
    records_polls: ClassVar[bool] = True
    """What `poll` returns is recorded. False where a supervisor on this machine writes the record."""
    by_hand: ClassVar[Mapping[Capability, str]] = {}
    """Of a target that only prints: the command of another tool that does what the target cannot."""
    resumes_on_poll: ClassVar[bool] = False
    """Polling resumes an orphaned job, because its supervisor is on another machine."""

    def __init__(self, address: TargetAddress) -> None:
        self.address = address

    def __str__(self) -> str:
        return str(self.address)

    @abstractmethod
    def prepare(self, job: JobFile, options: SubmitOptions) -> Submission:
        """Make the submission of a checked job. Starts nothing and sends nothing."""

    def submit(self, submission: Submission, *, report: Report) -> None:  # noqa: ARG002
        """Start the job and record it in its directory.

        Raises LaunchError with nothing left behind, or one that names what is running.
        """
        raise self._lacks(Capability.SUBMIT)

    def poll(self, name: str) -> JobStatus:  # noqa: ARG002
        """Ask for the status of one job. Writes nothing.

        Raises HostError when the target does not answer, with `transient` True when asking again may help.
        """
        raise self._lacks(Capability.POLL)

    def list(self, filters: ListFilters) -> Iterator[JobStatus]:  # noqa: ARG002
        """Status of many jobs, with one request per account or host. Writes nothing.

        A target that does not answer yields what was last known, with `unreachable` set.
        """
        raise self._lacks(Capability.LIST)

    def recorded(self, name: str, unreachable: str | None = None) -> JobStatus:
        """The last record of a job; `unreachable` says why the target did not answer."""
        extra = {"Unreachable": unreachable} if unreachable else {}
        return JobStatus.from_json(recorded_document(job_dir(name), Target=str(self), **extra))

    def logs(self, name: str, cursor: int = 0, *, to_the_end: bool = False) -> Iterator[LogLine]:
        """The log lines after `cursor` that exist now, attempts marked. Does not wait for more.

        `to_the_end` is for a job that has ended: all its lines. Raises HostError after the known lines when the target
        does not answer.
        """
        self.require(Capability.LOGS)
        return self._logs(name, cursor, to_the_end)

    def _logs(self, name: str, cursor: int, to_the_end: bool) -> Iterator[LogLine]:
        folder = job_dir(name)
        failure = None
        lock = control.hold(folder) if self.records_polls else None
        # Another process is copying the log: wait until it is done, then read its copy.
        while lock is None and self.records_polls and to_the_end:
            lock = control.hold(folder)
        if lock is not None:
            with lock:
                try:
                    self.copy_log(name, folder)
                except HostError as error:
                    failure = error
        for text, after in read_lines(folder / LOG, cursor):
            yield LogLine(text=text, cursor=after)
        if failure:
            raise failure

    def copy_log(self, name: str, folder: Path) -> None:  # noqa: B027
        """Append new log lines to the file in the job's directory. One process at a time calls this."""

    def stop(self, name: str, reason: str) -> None:  # noqa: ARG002
        """Ask for TERM, then KILL after the grace period. Returns at once."""
        raise self._lacks(Capability.STOP)

    def interrupt(self, name: str, fault: Fault) -> None:  # noqa: ARG002
        """Inject a spot interruption."""
        raise self._lacks(Capability.INTERRUPT)

    def hold_sync(self, name: str, held: bool) -> None:  # noqa: ARG002
        """Suspend checkpoint syncs until the next interruption, or let them continue."""
        raise self._lacks(Capability.INTERRUPT)

    def resume(self, name: str) -> bool:  # noqa: ARG002
        """Give an orphaned job a new supervisor. Returns False when it needs none."""
        raise self._lacks(Capability.RESUME)

    def download(self, name: str, into: Path) -> Artifacts:  # noqa: ARG002
        """Download the model and output of a finished job and unpack them below `into`."""
        raise self._lacks(Capability.DOWNLOAD)

    def cost(self, status: JobStatus, prices: Prices, region: str | None = None) -> Cost:
        """What a job has cost so far."""
        hosts = [(prices.find(kind), count) for kind, count in hosts_of(status.document)]
        warnings = prices.warnings([instance.name for instance, _ in hosts], region)
        return Cost(status=status, target=self.address, hosts=hosts, warnings=warnings)

    def finalize(self, status: JobStatus) -> JobStatus:
        """Bring what watchers rely on (log, metrics) to this machine before a terminal status is recorded."""
        return status

    def find(self, name: str, region: str | None = None) -> None:  # noqa: ARG002
        """Record a job of the account that was started elsewhere, so that other commands know it."""
        raise self._lacks(Capability.LIST_ACCOUNT)

    def resolve_role(self, role: str, region: str | None = None) -> str:  # noqa: ARG002
        """The full name of an execution role. Targets without roles return it unchanged."""
        return role

    def default_role(self, region: str | None = None) -> str | None:  # noqa: ARG002
        """The execution role of the notebook that this runs in; None elsewhere."""
        return None

    def pin_image(self, image: str, report: Report) -> str:  # noqa: ARG002
        """An immutable reference to the content that `image` names now, for every attempt of a drill."""
        return image

    def checks(self, needs: Requirements, *, network: bool) -> Iterable[Check]:  # noqa: ARG002
        """Checks of `estiba doctor` for this target."""
        return ()

    def can(self, capability: Capability) -> bool:
        return capability in self.capabilities

    def require(self, capability: Capability) -> None:
        """Raise LaunchError when the target lacks the capability."""
        if not self.can(capability):
            raise self._lacks(capability)

    def _lacks(self, capability: Capability) -> LaunchError:
        remedy = "use another --target"
        if how := self.by_hand.get(capability):
            remedy = f"run {how}, or {remedy}"
        elif Capability.SUBMIT not in self.capabilities:
            remedy = f"`estiba plan JOB --target {self}` prints what to submit by hand; or {remedy}"
        return LaunchError(f"{self}: this target cannot {capability}; {remedy}")
