"""The errors a person is meant to read: what, the value seen, and what to do about it."""

from __future__ import annotations

import signal


class EstibaError(Exception):
    """A failed job, explained in one message. `exit_code` is what the process ends with."""

    exit_code = 1


class ConfigError(EstibaError):
    """Something was asked for that cannot be: a flag, a hyperparameter, a path, a channel."""

    exit_code = 2


class DataError(EstibaError):
    """The input is not what the job needs: a missing column, a corrupt file, nothing to do."""


class StoreError(EstibaError):
    """Bytes could not be read or written: no such object, no permission, no space, no answer."""


class CheckpointError(EstibaError):
    """Saved work could not be used or saved."""


class Interrupted(EstibaError):
    """The job was asked to stop and did. What it committed is durable; running it again goes on from there.

    Ends with 128 + the signal, so that nothing takes an unfinished job for a finished one. A stop without a signal
    (the runtime limit, a spot notice) counts as SIGTERM.
    """

    def __init__(self, message: str, signum: int | None = None) -> None:
        super().__init__(message)
        self.signum = signum or signal.SIGTERM
        self.exit_code = 128 + self.signum
