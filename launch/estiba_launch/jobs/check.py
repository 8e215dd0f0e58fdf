"""The checks of `estiba doctor`: what a target may need, and what a check found."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

STATUSES = ("ok", "unknown", "warn", "fail")
"""From best to worst."""


@dataclass(frozen=True, kw_only=True)
class Check:
    name: str
    status: str
    """`ok`; `unknown` (could not be determined); `warn` (some targets will not work); `fail` (the job will not run)."""
    seen: str
    remedy: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Requirements:
    """What a job needs; None and empty where no job was named."""

    image: str | None = None
    role: str | None = None
    instances: tuple[tuple[str, int], ...] = ()
    """(instance type, count)"""
    spot: bool = True
    max_run_s: int | None = None
    keep_alive_s: int | None = None
    """How long a warm pool waits for the next job."""
    addresses: tuple[tuple[str, str], ...] = ()
    """(field of the request, address) of all data."""
    region: str | None = None


def worst(checks: Iterable[Check]) -> str:
    return max((check.status for check in checks), key=STATUSES.index, default="ok")
