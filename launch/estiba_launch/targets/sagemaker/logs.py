"""A job's log from CloudWatch, all streams in one file.

A restart after an interruption writes to new streams (`JOB/algo-1-<time>`), so every copy lists the streams again.
"""

from __future__ import annotations

import datetime
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from estiba_launch.jobs import directory as state
from estiba_launch.jobs.logs import LOG, JobLog, Metrics
from estiba_launch.jobs.status import TERMINAL
from estiba_launch.targets.sagemaker.client import code_of, explain

GROUP = "/aws/sagemaker/TrainingJobs"
POSITIONS = "streams.json"
"""How far each stream was copied."""
SETTLE_S = 15.0
"""CloudWatch delivers the last lines of a job some seconds after its end."""
SETTLE_POLL_S = 2.0
STREAM = re.compile(r".*/(?P<host>algo-\d+)-(?P<time>\d+)(?:/.*)?")


class Follower:
    """Appends what is new since the last copy to the job's log. One process at a time (control.hold)."""

    def __init__(self, directory: Path, job: str, many: bool, logs: Any, metrics: Metrics) -> None:
        self.directory, self.job, self.client, self.metrics = directory, job, logs, metrics
        self.many = many
        self.log = JobLog(directory, many)
        self.positions: dict[str, Any] = state.read_json(
            directory / POSITIONS, {"bytes": 0, "streams": {}, "attempts": {}, "marked": []}
        )
        # Lines after the last saved position are read again, so drop them from the file.
        path = directory / LOG
        if path.exists() and path.stat().st_size > self.positions["bytes"]:
            with path.open("r+b") as file:
                file.truncate(self.positions["bytes"])

    def save(self) -> None:
        path = self.directory / LOG
        self.positions["bytes"] = path.stat().st_size if path.exists() else 0
        state.write_json(self.directory / POSITIONS, self.positions)

    def mark(self, key: str, text: str) -> None:
        """Write a line of Estiba's own, once for each `key`."""
        if key not in self.positions["marked"]:
            self.positions["marked"].append(key)
            self.log.mark(text)
            self.save()

    def copy(self, document: Mapping[str, Any]) -> None:
        """Copy what is new, and mark the statuses of the job. Waits for the last lines of an ended job."""
        ended = document["TrainingJobStatus"] in TERMINAL
        # The end is marked after the last lines, which arrive late.
        if not ended:
            self.transitions(document)
        try:
            self.pull()
            if ended and not self.positions.get("settled"):
                self._settle(document)
        except Exception as error:
            self.mark("log refused", f"the log cannot be read: {explain('log', error, 'logs')}")
        if ended:
            self.transitions(document)

    def _settle(self, document: Mapping[str, Any]) -> None:
        """Copy until no line arrives for a while. Returns at once when the job ended long ago."""
        end = document.get("TrainingEndTime")
        quiet_since = time.monotonic()
        if end:
            quiet_since -= max(time.time() - datetime.datetime.fromisoformat(end).timestamp(), 0.0)
        while time.monotonic() - quiet_since < SETTLE_S:
            time.sleep(min(SETTLE_POLL_S, SETTLE_S))
            if self.pull():
                quiet_since = time.monotonic()
        self.positions["settled"] = True
        self.save()

    def transitions(self, document: Mapping[str, Any]) -> None:
        for one in document.get("SecondaryStatusTransitions", []):
            message = one.get("StatusMessage", "")
            key = f"{one['Status']} {one['StartTime']} {message}"
            self.mark(key, f"{one['Status']}{': ' + message if message else ''}")

    def pull(self) -> int:
        """Copy all new events. Returns their number. Raises botocore's errors, but not for missing streams."""
        events: list[tuple[int, int, str, str]] = []
        for order, stream in enumerate(self._streams()):
            found = STREAM.fullmatch(stream)
            host = found["host"] if found else stream
            if stream not in self.positions["streams"]:
                self._new_stream(stream, host)
            token = self.positions["streams"][stream]
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
                # The same token again: the end of the stream for now.
                if page["nextForwardToken"] == token:
                    break
                token = page["nextForwardToken"]
            self.positions["streams"][stream] = token
        events.sort(key=lambda event: event[:2])
        for _, _, host, text in events:
            for line in text.rstrip("\n").replace("\r\n", "\n").split("\n"):
                self.log.line(host, line.rpartition("\r")[2])
            self.metrics.parse(text)
        self.save()
        return len(events)

    def _new_stream(self, stream: str, host: str) -> None:
        self.positions["streams"][stream] = None
        number = self.positions["attempts"][host] = self.positions["attempts"].get(host, 0) + 1
        where = f" on {host}" if self.many else ""
        self.log.mark(f"attempt {number}{where} ({stream.rpartition('/')[2]})")

    def _streams(self) -> list[str]:
        """Every stream of the job, oldest first."""
        paginator = self.client.get_paginator("describe_log_streams")
        try:
            pages = list(paginator.paginate(logGroupName=GROUP, logStreamNamePrefix=f"{self.job}/"))
        except Exception as error:
            # The group appears with the account's first job, the streams minutes after the job.
            if code_of(error) == "ResourceNotFoundException":
                return []
            raise

        def age(name: str) -> tuple[int, str]:
            found = STREAM.fullmatch(name)
            return (int(found["time"]) if found else 0, name)

        return sorted((one["logStreamName"] for page in pages for one in page["logStreams"]), key=age)
