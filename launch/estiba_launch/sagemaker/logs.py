"""A job's log from CloudWatch: every stream there is and every one that comes, in one file that is never lost.

A restart after an interruption writes to new streams (`JOB/algo-1-<time>`), so streams are looked for to the end.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .. import state
from ..localhost.logs import LOG, JobLog, Metrics
from .client import code_of

GROUP = "/aws/sagemaker/TrainingJobs"
PLACES = "streams.json"
STREAM = re.compile(r".*/(?P<host>algo-\d+)-(?P<time>\d+)(?:/.*)?")


class Follower:
    """Copies what is new since the last time into the job's log. One process at a time (control.hold)."""

    def __init__(self, directory: Path, job: str, many: bool, logs: Any, metrics: Metrics) -> None:
        self.directory, self.job, self.client, self.metrics = directory, job, logs, metrics
        self.many = many
        self.log = JobLog(directory, many)
        self.places: dict[str, Any] = state.read_json(
            directory / PLACES, {"bytes": 0, "streams": {}, "attempts": {}, "marked": []}
        )
        # What was written after the places were last noted is read again, so it goes first.
        path = directory / LOG
        if path.exists() and path.stat().st_size > self.places["bytes"]:
            with path.open("r+b") as file:
                file.truncate(self.places["bytes"])

    def save(self) -> None:
        path = self.directory / LOG
        self.places["bytes"] = path.stat().st_size if path.exists() else 0
        state.write_json(self.directory / PLACES, self.places)

    def mark(self, key: str, text: str) -> None:
        """A line of Estiba's own, once for each `key`."""
        if key not in self.places["marked"]:
            self.places["marked"].append(key)
            self.log.mark(text)
            self.save()

    def transitions(self, value: dict[str, Any]) -> None:
        """Mark the secondary statuses of a described job that are new."""
        for one in value.get("SecondaryStatusTransitions", []):
            message = one.get("StatusMessage", "")
            key = f"{one['Status']} {one['StartTime']} {message}"
            self.mark(key, f"{one['Status']}{': ' + message if message else ''}")

    def pull(self) -> int:
        """Copy all that is new; returns the number of lines. Raises botocore's ClientError, but not for "not yet"."""
        events: list[tuple[int, int, str, str]] = []
        for order, stream in enumerate(self._streams()):
            found = STREAM.fullmatch(stream)
            host = found["host"] if found else stream
            if stream not in self.places["streams"]:
                self._new_stream(stream, host)
            token = self.places["streams"][stream]
            while True:
                more = {"nextToken": token} if token else {}
                try:
                    page = self.client.get_log_events(
                        logGroupName=GROUP, logStreamName=stream, startFromHead=True, **more
                    )
                except Exception as error:
                    if code_of(error) == "ResourceNotFoundException":
                        break
                    raise
                events += [(e["timestamp"], order, host, e["message"]) for e in page["events"]]
                # The same token again means: nothing more for now.
                if page["nextForwardToken"] == token:
                    break
                token = page["nextForwardToken"]
            self.places["streams"][stream] = token
        events.sort(key=lambda event: event[:2])
        for _, _, host, text in events:
            for line in text.rstrip("\n").replace("\r\n", "\n").split("\n"):
                self.log.line(host, line.rpartition("\r")[2])
            self.metrics.look(text)
        self.save()
        return len(events)

    def _new_stream(self, stream: str, host: str) -> None:
        self.places["streams"][stream] = None
        number = self.places["attempts"][host] = self.places["attempts"].get(host, 0) + 1
        where = f" on {host}" if self.many else ""
        self.log.mark(f"attempt {number}{where} ({stream.rpartition('/')[2]})")

    def _streams(self) -> list[str]:
        """Every stream of the job, oldest first."""
        names: list[str] = []
        more: dict[str, str] = {}
        while True:
            try:
                page = self.client.describe_log_streams(logGroupName=GROUP, logStreamNamePrefix=f"{self.job}/", **more)
            except Exception as error:
                # The group comes with the account's first job, the streams minutes after the job.
                if code_of(error) == "ResourceNotFoundException":
                    return []
                raise
            names += [one["logStreamName"] for one in page["logStreams"]]
            if not page.get("nextToken"):
                break
            more = {"nextToken": page["nextToken"]}

        def age(name: str) -> tuple[int, str]:
            found = STREAM.fullmatch(name)
            return (int(found["time"]) if found else 0, name)

        return sorted(names, key=age)
