"""One small error tree; every message says what, the value seen and what to do, and carries its exit code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

EXIT_DONE = 0
EXIT_JOB_FAILED = 1
EXIT_INVALID = 2
EXIT_OVER_BUDGET = 3
EXIT_INTERRUPTED = 4


class LaunchError(Exception):
    """Something a person can put right; printed without a traceback."""

    exit_code = EXIT_INVALID


class BudgetError(LaunchError):
    """The job may cost more than the person said it may."""

    exit_code = EXIT_OVER_BUDGET


class JobFailed(LaunchError):
    """The job ended in Failed."""

    exit_code = EXIT_JOB_FAILED


class HostError(LaunchError):
    """The machine under the job failed (engine gone, disk full, store unreachable), not the job itself."""

    exit_code = EXIT_JOB_FAILED


class AwsUnavailable(HostError):
    """AWS cannot be reached, does not know us, or refuses; the job file itself may be good."""


VALUE_SHOWN_CHARS = 100


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing wrong with a job file."""

    field: str
    """Path in the request, e.g. `InputDataConfig[0].ChannelName`."""
    rule: str
    """What the API (or Estiba) asks for."""
    remedy: str
    """What to change."""
    value: object = None
    """What was found; None where nothing was found or where it must not be shown."""
    secret: bool = False
    """True hides the value, whatever it is."""
    written: str | None = None
    """The text in the file before its `${VARIABLES}` were filled in, when that differs."""

    def __str__(self) -> str:
        seen = ""
        if self.secret:
            seen = " (value hidden)"
        elif self.value is not None:
            text = repr(self.value)
            shown = text if len(text) <= VALUE_SHOWN_CHARS else f"{text[:VALUE_SHOWN_CHARS]}… ({len(text)} characters)"
            seen = f" = {shown}"
            if self.written:
                seen += f", written {self.written}"
        return f"{self.field}{seen}: {self.rule}; {self.remedy}"


class InvalidJob(LaunchError):
    """A job file that must not be sent, with every problem at once."""

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        self.source = source
        self.problems = tuple(problems)
        count = f"{len(self.problems)} problem{'s' if len(self.problems) != 1 else ''}"
        super().__init__("\n".join([f"{source}: {count}", *(f"  {problem}" for problem in self.problems)]))
