"""The errors of the launcher. A message names the problem, the value and the remedy; each class has an exit code."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

EXIT_DONE = 0
EXIT_JOB_FAILED = 1
EXIT_INVALID = 2
EXIT_OVER_BUDGET = 3
EXIT_INTERRUPTED = 4


class LaunchError(Exception):
    """An error that the user can fix; printed without a traceback."""

    exit_code = EXIT_INVALID
    transient = False
    """Trying again may help: a network outage, throttling."""


class BudgetError(LaunchError):
    """The job may cost more than --max-cost."""

    exit_code = EXIT_OVER_BUDGET


class JobFailed(LaunchError):
    """The job ended in Failed."""

    exit_code = EXIT_JOB_FAILED


class HostError(LaunchError):
    """The machine or a service failed, not the job: engine gone, disk full, store unreachable."""

    exit_code = EXIT_JOB_FAILED


class AwsUnavailable(HostError):
    """AWS is unreachable, rejects the credentials, or refuses the call. The job file may be valid."""


_DISK_REMEDIES = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EACCES: "correct the permissions",
    errno.EPERM: "correct the permissions",
    errno.EROFS: "mount it for writing",
    errno.ENAMETOOLONG: "a file's name may have 255 bytes there",
    errno.EEXIST: "move away what is there already",
    errno.EISDIR: "move away the directory of that name",
    errno.ENOTDIR: "move away the file that is in the place of a directory",
}


def disk_error(error: OSError) -> str:
    """Return what the disk refused, and the remedy."""
    remedy = _DISK_REMEDIES.get(error.errno or 0, "make room or correct the permissions")
    return f"{error.strerror or error}; {remedy}"


VALUE_SHOWN_CHARS = 100


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One error in a job file."""

    field: str
    """Path in the request, e.g. `InputDataConfig[0].ChannelName`."""
    rule: str
    """What the API or Estiba requires."""
    remedy: str
    """What to change."""
    value: object = None
    """The value in the file; None if there is none, or if it must not be shown."""
    secret: bool = False
    """True hides the value."""
    written: str | None = None
    """The text in the file before its `${VARIABLES}` were filled in, when that differs."""

    def __str__(self) -> str:
        shown = ""
        if self.secret:
            shown = " (value hidden)"
        elif self.value is not None:
            text = repr(self.value)
            if len(text) > VALUE_SHOWN_CHARS:
                text = f"{text[:VALUE_SHOWN_CHARS]}… ({len(text)} characters)"
            shown = f" = {text}"
            if self.written:
                shown += f", from {self.written}"
        return f"{self.field}{shown}: {self.rule}; {self.remedy}"


class InvalidJob(LaunchError):
    """An invalid job file, with all its problems."""

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        self.source = source
        self.problems = tuple(problems)
        count = f"{len(self.problems)} problem{'s' if len(self.problems) != 1 else ''}"
        super().__init__("\n".join([f"{source}: {count}", *(f"  {problem}" for problem in self.problems)]))


def did_you_mean(name: str, known: Iterable[str], otherwise: str) -> str:
    """The remedy for an unknown name: the nearest known one, else `otherwise`."""
    nearest = difflib.get_close_matches(name, list(known), 1)
    return f"did you mean {nearest[0]}?" if nearest else otherwise
