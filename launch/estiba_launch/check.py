"""One thing `estiba doctor` looked at."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

STATUSES = ("ok", "unknown", "warn", "fail")
"""In order of gravity."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """What was seen, and what to do about it."""

    name: str
    status: str
    """`ok`; `unknown` (could not be asked); `warn` (some targets will not work); `fail` (the job will not run)."""
    seen: str
    remedy: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def worst(checks: list[Check]) -> str:
    """The gravest status of all."""
    return max((check.status for check in checks), key=STATUSES.index, default="ok")
