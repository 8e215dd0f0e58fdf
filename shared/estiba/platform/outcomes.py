"""How the processes of a script job ended, from the records of `hooks/sitecustomize.py`, and which end is the reason.

Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from estiba.errors import RanksLost
from estiba.platform.failure import SHOWN_CHARACTERS
from estiba.platform.process_tree import start_time

STOPPING = "stopping"
"""A file in the run directory: from now on every Python program records its end."""
_CONSEQUENCE = re.compile(
    r"connection (?:closed|reset|refused|was closed)|broken pipe|gloo.*(?:transport|EnforceNotMet|IoException)"
    r"|DistBackendError|DistNetworkError|DistStoreError|RendezvousClosedError|RendezvousConnectionError"
    r"|NCCL (?:error|communicator)|socket (?:timeout|error)|failed to recv|recvvalue failed|timed out"
    r"|SignalException|ChildFailedError|ProcessExitedException|ProcessRaisedException|CalledProcessError",
    re.I,
)
"""Errors of a rank that lost another one, and of a launcher that lost a rank."""
_RUNS_A_SCRIPT = re.compile(r"(?:^|[\s;&|/])(?:bash|sh|python[\d.]*|torchrun|deepspeed|accelerate)\s|\.(?:sh|py)\b")
_HANDLES_FILES = re.compile(r"^\s*(?:sudo\s+)?(?:chmod|chown|cp|mv|rm|mkdir|ln|ls|cat|echo|touch|sed|kill|pkill)\b")


_EXCEPTION_LINE = re.compile(r"[A-Za-z_][\w.]*(?::|$)")
ERROR, LOST, STOPPED, KILLED, CONSEQUENCE = KINDS = ("error", "lost", "stopped", "killed", "consequence")
_WEIGHT = {ERROR: 0, LOST: 0, STOPPED: 0, KILLED: 1, CONSEQUENCE: 2}


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a job failed, as all of its hosts tell it."""

    text: str
    """One line: the exception, or what ended and how."""
    host: str
    at: float
    """Seconds since 1970 on the host that failed."""
    rank: int | None = None
    place: str | None = None
    """File and line of the exception."""
    code: int = 1
    kind: str = ERROR
    """ERROR; LOST, a silent host; STOPPED by a signal to PID 1; KILLED, by a launcher that lost another rank for
    instance; CONSEQUENCE, a lost connection and the like."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Failure:
        """Read another host's message. Raises TypeError or ValueError."""
        known = {field.name for field in fields(cls)}
        found = cls(**{name: value for name, value in values.items() if name in known})
        if not isinstance(found.text, str) or not isinstance(found.host, str) or not isinstance(found.code, int):
            raise TypeError("a failure's text and host are strings, its code a number")
        if found.kind not in KINDS or not isinstance(found.at, (int, float)):
            raise ValueError("a failure has a kind and a time")
        return found

    @property
    def who(self) -> str:
        return f"rank {self.rank} on {self.host}" if self.rank is not None else f"host {self.host}"


def first(failures: Iterable[Failure]) -> Failure | None:
    """Return the reason: the earliest of errors, losses and stops, else the earliest kill, else a consequence."""
    return min(failures, key=lambda failure: (_WEIGHT[failure.kind], failure.at), default=None)


def kind_of(text: str) -> str:
    return CONSEQUENCE if _CONSEQUENCE.search(text) else ERROR


class Outcomes:
    """The records in one run directory."""

    def __init__(self, folder: Path, host: str) -> None:
        self.folder = folder
        self.host = host

    def ranks(self) -> list[dict[str, Any]]:
        return self._read("rank")

    def living_ranks(self) -> list[int]:
        """Return the process ids of the recorded ranks that run."""
        return [record["pid"] for record in self.ranks() if start_time(record["pid"]) == record["start"]]

    def failed_ranks(self) -> list[Failure]:
        """Return the ranks that failed and were not started again."""
        newest: dict[int, dict[str, Any]] = {}
        for record in sorted(self.ranks(), key=lambda record: record["started"]):
            newest[record["rank"]] = record
        found = []
        for record in newest.values():
            if record.get("code") == 0 or start_time(record["pid"]) == record["start"]:
                continue
            found.append(self._failure(record))
        return found

    def hidden_failures(self) -> list[Failure]:
        """Return the failures that the script's own exit status hides, in the order of time.

        A rank that failed is one. Another Python program's failure is one if it is piped into `tee`, or if os.system or
        subprocess ran it and the caller dropped the result. Elsewhere a shell may have handled it (`x || y`).
        """
        found = self.failed_ranks()
        dropped = self._read("dropped")
        for record in self._read("end"):
            if not record.get("code"):
                continue
            is_dropped = any(
                call["pid"] in record.get("ancestors", ()) and call["started"] <= record["ended"] <= call["ended"] + 1
                for call in dropped
            )
            if record.get("piped_into_tee") or is_dropped:
                found.append(self._failure(record))
        if not found:
            found = [
                Failure(
                    text=f"{call['command']!r} ended with exit code {call['code']}, which the script did not look at",
                    host=self.host,
                    at=call["ended"],
                    code=call["code"],
                )
                for call in dropped
                if _RUNS_A_SCRIPT.search(call["command"]) and not _HANDLES_FILES.search(call["command"])
            ]
        return sorted(found, key=lambda failure: failure.at)

    def failures(self) -> list[Failure]:
        """Return the recorded failures, for a script that failed itself: its own programs' ends explain it.

        A program that said why it ends (`sys.exit("no GPU")`) is none: it may be a probe whose end the script handled,
        and else its words are the log's last line.
        """
        ends = [
            record
            for record in self._read("end")
            if record.get("code") and not (record.get("exception") or "SystemExit:").startswith("SystemExit:")
        ]
        return [*self.failed_ranks(), *map(self._failure, ends)]

    def ended_well(self, pid: int) -> bool:
        """Whether this process recorded that it ended with 0."""
        return any(
            record["pid"] == pid and record.get("code") == 0 for kind in ("rank", "end") for record in self._read(kind)
        )

    def note_stop(self) -> None:
        with contextlib.suppress(OSError):
            (self.folder / STOPPING).touch()

    def _failure(self, record: Mapping[str, Any]) -> Failure:
        code = record.get("code")
        kind = ERROR
        if exception := record.get("exception"):
            lines = exception.splitlines()
            text = next(filter(_EXCEPTION_LINE.match, lines), lines[0])
            kind = CONSEQUENCE if code == RanksLost.exit_code else kind_of(exception)
        elif code in (None, 128 + signal.SIGTERM, 128 + signal.SIGINT):
            text, kind = f"{record['program']} was killed", KILLED
        else:
            text = f"{record['program']} ended with exit code {code}"
            # A launcher's status says less than its ranks' ends, and a rank with this status lost other ranks.
            kind = ERROR if "rank" in record and code != RanksLost.exit_code else CONSEQUENCE
        return Failure(
            text=text[:SHOWN_CHARACTERS],
            host=self.host,
            at=record.get("ended") or self._first_end(),
            rank=record.get("rank"),
            place=record.get("place"),
            code=code or 128 + signal.SIGKILL,
            kind=kind,
        )

    def _first_end(self) -> float:
        """When a killed rank was lost at the latest: it leaves no time itself."""
        return min((record["ended"] for record in self.ranks() if record.get("code")), default=time.time())

    def _read(self, kind: str) -> list[dict[str, Any]]:
        found = []
        for path in sorted(self.folder.glob(f"{kind}-*.json")):
            with contextlib.suppress(OSError, ValueError):
                record = json.loads(path.read_text(encoding="utf-8"))
                if isinstance(record, dict):
                    found.append(record)
        return found
