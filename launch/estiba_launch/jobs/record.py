"""The record of a job: DescribeTrainingJob's document in one JSON file that is always whole.

A local job's record is written by its supervisor alone. Records of other targets hold their last poll; any process that
polls may write one, under a lock, and never replaces a newer record with an older one.
"""

from __future__ import annotations

import datetime
import errno
import os
import shutil
import threading
from pathlib import Path
from typing import Any

from estiba_launch.errors import LaunchError
from estiba_launch.jobs.directory import job_dir, read_json, write_json
from estiba_launch.jobs.lock import locked
from estiba_launch.jobs.status import TERMINAL, JobStatus
from estiba_launch.request.contract import job_arn

RECORD = "describe.json"
RECORD_LOCK = "describe.lock"
RESERVE = "reserve"
RESERVE_BYTES = 256 << 10
"""Held back on the job's disk, so that a job that fills the disk can still be recorded."""
FULL_BYTES = 1 << 20
FAILURE_CHARS = 1024

# SecondaryStatus -> TrainingJobStatus; every other one is InProgress.
MAIN_STATUS = {
    "Stopping": "Stopping",
    "Completed": "Completed",
    "Failed": "Failed",
    "Stopped": "Stopped",
    "MaxRuntimeExceeded": "Stopped",
    "MaxWaitTimeExceeded": "Stopped",
}
VOLATILE = ("Supervised", "Directory", "Unreachable")
"""Members of `Estiba` that hold only at the moment of a poll, so are not recorded."""


def now_text() -> str:
    """The current time, UTC: 2026-09-27T12:30:05.123Z."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def disk_is_full(path: Path) -> bool:
    try:
        return shutil.disk_usage(path).free < FULL_BYTES
    except OSError:
        return False


def seconds_between(start: str, end: str) -> float:
    first, last = (datetime.datetime.fromisoformat(text) for text in (start, end))
    return max((last - first).total_seconds(), 0.0)


def enter(document: dict[str, Any], secondary: str, message: str) -> None:
    """Move a document to a secondary status and end the previous one. For Failed, `message` is the reason."""
    if secondary == "Failed":
        # Cut where the API cuts it.
        document["FailureReason"], message = message[:FAILURE_CHARS], "Training job failed"
    now = now_text()
    main = MAIN_STATUS.get(secondary, "InProgress")
    transitions = document["SecondaryStatusTransitions"]
    if transitions:
        transitions[-1].setdefault("EndTime", now)
    ended = {"EndTime": now} if main in TERMINAL else {}
    transitions.append({"Status": secondary, "StartTime": now, "StatusMessage": message, **ended})
    document.update(SecondaryStatus=secondary, TrainingJobStatus=main, LastModifiedTime=now)


def new_document(request: dict[str, Any], arn: str | None = None) -> dict[str, Any]:
    """The document of a job that was accepted just now."""
    now = now_text()
    name = request["TrainingJobName"]
    return {
        "TrainingJobName": name,
        "TrainingJobArn": arn or job_arn(name),
        "TrainingJobStatus": "InProgress",
        "SecondaryStatus": "Starting",
        **{field: part for field, part in request.items() if field != "TrainingJobName"},
        "CreationTime": now,
        "LastModifiedTime": now,
        "SecondaryStatusTransitions": [{"Status": "Starting", "StartTime": now, "StatusMessage": "Starting"}],
        "FinalMetricDataList": [],
        "Estiba": {"Attempts": []},
    }


def recorded_document(directory: Path, **extra: Any) -> dict[str, Any]:
    """The document on record, with `extra` under `Estiba`. Raises LaunchError when there is none."""
    document: dict[str, Any] = read_json(directory / RECORD, {})
    whole = isinstance(document, dict) and {"TrainingJobName", "TrainingJobStatus"} <= document.keys()
    if not whole or not isinstance(document.get("Estiba", {}), dict):
        raise LaunchError(f"{directory / RECORD}: not a job's record; remove the job's directory {directory}")
    document["Estiba"] = {"Attempts": [], **document.get("Estiba", {}), **extra, "Directory": str(directory)}
    return document


def keep_status(status: JobStatus) -> None:
    """Record what was polled, unless the record is newer."""
    directory = job_dir(status.name)
    document = status.to_json()
    extra = {name: value for name, value in document["Estiba"].items() if name not in VOLATILE}
    document["Estiba"] = extra
    with locked(directory / RECORD_LOCK):
        stored = read_json(directory / RECORD, {})
        if _age(stored) <= _age(document) and stored != document:
            write_json(directory / RECORD, document)


def _age(document: dict[str, Any]) -> tuple[bool, int]:
    """Orders documents of one job by time."""
    return document.get("TrainingJobStatus") in TERMINAL, len(document.get("SecondaryStatusTransitions", []))


class Record:
    """The record of a local job, in its supervisor. Every change is on disk when the method returns."""

    def __init__(self, job_dir: Path, value: dict[str, Any]) -> None:
        self.path = job_dir / RECORD
        self.value = value
        self._lock = threading.RLock()

    @classmethod
    def create(cls, job_dir: Path, request: dict[str, Any]) -> Record:
        record = cls(job_dir, new_document(request))
        record.save()
        (job_dir / RESERVE).write_bytes(os.urandom(RESERVE_BYTES))
        return record

    @classmethod
    def load(cls, job_dir: Path) -> Record:
        return cls(job_dir, read_json(job_dir / RECORD, {}))

    @property
    def status(self) -> str:
        return str(self.value.get("TrainingJobStatus", "InProgress"))

    @property
    def attempts(self) -> list[dict[str, Any]]:
        attempts: list[dict[str, Any]] = self.value["Estiba"]["Attempts"]
        return attempts

    def save(self) -> None:
        with self._lock:
            try:
                write_json(self.path, self.value)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                # The reserve is for this one write.
                (self.path.parent / RESERVE).unlink(missing_ok=True)
                write_json(self.path, self.value)

    def to(self, secondary: str, message: str) -> None:
        """Enter a secondary status. For Failed, `message` is the reason."""
        with self._lock:
            enter(self.value, secondary, message)
            self.save()

    def begin_attempt(self, hosts: list[str]) -> dict[str, Any]:
        with self._lock:
            attempt: dict[str, Any] = {"Number": len(self.attempts) + 1, "StartTime": now_text(), "Hosts": hosts}
            self.attempts.append(attempt)
            self.value.setdefault("TrainingStartTime", attempt["StartTime"])
            self.save()
            return attempt

    def end_attempt(self, outcome: str, exit_codes: dict[str, int | None], reason: str = "") -> None:
        with self._lock:
            now = now_text()
            self.attempts[-1].update(EndTime=now, Outcome=str(outcome), Reason=reason, ExitCodes=exit_codes)
            seconds = round(self.running_s())
            self.value.update(TrainingEndTime=now, TrainingTimeInSeconds=seconds, BillableTimeInSeconds=seconds)
            self.save()

    def running_s(self) -> float:
        """Seconds that hosts were held, over all attempts. Waiting for capacity does not count."""
        now = now_text()
        return sum(seconds_between(attempt["StartTime"], attempt.get("EndTime", now)) for attempt in self.attempts)

    def age_s(self) -> float:
        """Seconds since the job was submitted."""
        return seconds_between(self.value["CreationTime"], now_text())

    def metrics(self, values: list[dict[str, Any]]) -> None:
        """Set the last value of each metric, as a FinalMetricDataList."""
        with self._lock:
            self.value["FinalMetricDataList"] = values
            self.save()
