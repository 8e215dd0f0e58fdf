"""Errors for users. Each says what is wrong, the value seen, and the remedy."""

from __future__ import annotations

import signal


def first_line(error: BaseException) -> str:
    """Return the first line of another library's message, cut at 300 characters; its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


class EstibaError(Exception):
    """A failure that one message explains. The process ends with `exit_code`."""

    exit_code = 1


class ConfigError(EstibaError):
    """A flag, hyperparameter, path or channel that cannot be used."""

    exit_code = 2


class DataError(EstibaError):
    """Input that the job cannot use: a missing column, a corrupt file, no rows."""


class StoreError(EstibaError):
    """Storage that cannot be read or written: object missing, access denied, disk full, no response."""


class ObjectChangedError(StoreError):
    """An object that is no longer the version that was asked for: replaced, or deleted."""


class CheckpointError(EstibaError):
    """A checkpoint that cannot be read or written."""


class NewerFormatError(CheckpointError):
    """A checkpoint that a newer version wrote. It is intact, so it is neither quarantined nor passed over."""


class Interrupted(EstibaError):
    """The job stopped on request. Committed work is durable, and the next run resumes from it.

    The process ends with 128 + the signal, so that an unfinished job is never mistaken for a finished one. A stop
    without a signal (the runtime limit, a spot notice) counts as SIGTERM.
    """

    def __init__(self, message: str, signum: int | None = None) -> None:
        super().__init__(message)
        self.signum = signum or signal.SIGTERM
        self.exit_code = 128 + self.signum


class RanksLost(EstibaError):
    """Other ranks of the run were lost with their host. A new attempt resumes from the newest checkpoint."""

    exit_code = 75
    """EX_TEMPFAIL, as PID 1 ends with after a host was lost."""
