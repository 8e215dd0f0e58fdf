"""What is known of a job, as DescribeTrainingJob would tell it, kept in one JSON file that is always whole."""

from __future__ import annotations

import datetime
import errno
import os
import shutil
import threading
from pathlib import Path
from typing import Any

from ..contract import job_arn
from ..state import read_json, write_json

RECORD = "describe.json"
RESERVE = "reserve"
RESERVE_BYTES = 256 << 10
"""Held back on the job's disk, so that a job that fills it can still be told of."""
FULL_BYTES = 1 << 20
TERMINAL = ("Completed", "Failed", "Stopped")
FAILURE_CHARS = 1024

# SecondaryStatus -> TrainingJobStatus
MAIN_STATUS = {
    "Starting": "InProgress",
    "Pending": "InProgress",
    "Downloading": "InProgress",
    "Training": "InProgress",
    "Uploading": "InProgress",
    "Interrupted": "InProgress",
    "Restarting": "InProgress",
    "Stopping": "Stopping",
    "Completed": "Completed",
    "Failed": "Failed",
    "Stopped": "Stopped",
    "MaxRuntimeExceeded": "Stopped",
    "MaxWaitTimeExceeded": "Stopped",
}


def now_text() -> str:
    """This moment, UTC: 2026-09-27T12:30:05.123Z."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def disk_is_full(path: Path) -> bool:
    try:
        return shutil.disk_usage(path).free < FULL_BYTES
    except OSError:
        return False


def seconds_between(start: str, end: str) -> float:
    first, last = (datetime.datetime.fromisoformat(text) for text in (start, end))
    return max((last - first).total_seconds(), 0.0)


class Record:
    """One job's record; every change is on disk when the method returns."""

    def __init__(self, job_dir: Path, value: dict[str, Any]) -> None:
        self.path = job_dir / RECORD
        self.value = value
        self._lock = threading.RLock()

    @classmethod
    def create(cls, job_dir: Path, request: dict[str, Any]) -> Record:
        """A job that was just asked for."""
        now = now_text()
        value = {
            "TrainingJobName": request["TrainingJobName"],
            "TrainingJobArn": job_arn(request["TrainingJobName"]),
            "TrainingJobStatus": "InProgress",
            "SecondaryStatus": "Starting",
            **{name: part for name, part in request.items() if name != "TrainingJobName"},
            "CreationTime": now,
            "LastModifiedTime": now,
            "SecondaryStatusTransitions": [{"Status": "Starting", "StartTime": now, "StatusMessage": "Starting"}],
            "FinalMetricDataList": [],
            "Estiba": {"Attempts": []},
        }
        record = cls(job_dir, value)
        record.save()
        record.reserve()
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

    def reserve(self) -> None:
        """Hold back a little room for later."""
        (self.path.parent / RESERVE).write_bytes(os.urandom(RESERVE_BYTES))

    def save(self) -> None:
        with self._lock:
            try:
                write_json(self.path, self.value)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                # Once: what was held back is for this.
                (self.path.parent / RESERVE).unlink(missing_ok=True)
                write_json(self.path, self.value)

    def to(self, secondary: str, message: str) -> None:
        """Enter a secondary status; the one before ends now."""
        with self._lock:
            now = now_text()
            transitions = self.value["SecondaryStatusTransitions"]
            if transitions and "EndTime" not in transitions[-1]:
                transitions[-1]["EndTime"] = now
            entry = {"Status": secondary, "StartTime": now, "StatusMessage": message}
            if MAIN_STATUS[secondary] in TERMINAL:
                entry["EndTime"] = now
            transitions.append(entry)
            self.value.update(SecondaryStatus=secondary, TrainingJobStatus=MAIN_STATUS[secondary], LastModifiedTime=now)
            self.save()

    def begin_attempt(self, hosts: list[str]) -> dict[str, Any]:
        """A new attempt, on new hosts."""
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
            self.value["TrainingEndTime"] = now
            seconds = round(self.running_s())
            self.value.update(TrainingTimeInSeconds=seconds, BillableTimeInSeconds=seconds)
            self.save()

    def running_s(self) -> float:
        """Seconds that hosts were held, over all attempts; waiting for capacity is not in it."""
        now = now_text()
        return sum(seconds_between(attempt["StartTime"], attempt.get("EndTime", now)) for attempt in self.attempts)

    def age_s(self) -> float:
        """Seconds since the job was asked for."""
        return seconds_between(self.value["CreationTime"], now_text())

    def metrics(self, latest: dict[str, tuple[float, float]]) -> None:
        """The last value of each metric: name -> (value, Unix time)."""
        with self._lock:
            self.value["FinalMetricDataList"] = [
                {"MetricName": name, "Value": value, "Timestamp": time} for name, (value, time) in latest.items()
            ]
            self.save()

    def fail(self, reason: str) -> None:
        """End in Failed; `reason` is cut where the API cuts it."""
        with self._lock:
            self.value["FailureReason"] = reason[:FAILURE_CHARS]
            self.to("Failed", "Training job failed")
