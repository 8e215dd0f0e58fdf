"""How an attempt of a local job ended."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Outcome(StrEnum):
    COMPLETED = "Completed"
    FAILED = "Failed"
    STOPPED = "Stopped"
    INTERRUPTED = "Interrupted"
    MAX_RUNTIME = "MaxRuntimeExceeded"
    MAX_WAIT = "MaxWaitTimeExceeded"
    HOST_LOST = "HostLost"


@dataclass(frozen=True, kw_only=True)
class Result:
    """The end of one attempt."""

    outcome: Outcome
    reason: str = ""
    """For users: the text of the failure file, or what happened to the host."""
    capacity_wait_s: float = 0.0
    """After an interruption: seconds until a new host is available."""
    store_is_away: bool = False
    """Nothing could be brought to the store, so no other attempt can go on from there."""
