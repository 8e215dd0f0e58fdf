"""How a job is run, beyond what its request says; kept in the job's directory."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from estiba_launch.errors import LaunchError
from estiba_launch.jobs.directory import read_json, write_json
from estiba_launch.request.options import HostOptions

OPTIONS = "options.json"


@dataclass(frozen=True, kw_only=True)
class SubmitOptions:
    """Options of all targets. Each target reads those that it supports."""

    host: HostOptions = field(default_factory=HostOptions)
    region: str | None = None
    """AWS region; None for the one that AWS's own configuration names."""
    usd_per_h: float | None = None
    """Price of a remote host; None when unknown."""
    copy_inputs: bool = False
    """Give each host its own writable copy of File channels, as SageMaker does, instead of a read-only mount."""
    sync_every_s: float = 5.0
    """Seconds between checkpoint syncs."""
    stop_grace_s: int = 120
    """Seconds from TERM to KILL."""
    capacity_wait_s: float = 0.0
    """Seconds until the first host is available."""
    keep_hosts: bool = False
    """Keep the directories of finished hosts."""
    environment: dict[str, str] = field(default_factory=dict)
    """Extra environment of containers; the request's own wins. A drill sets variables here without changing the job."""

    def __post_init__(self) -> None:
        """Raise LaunchError for a number out of range."""
        for name, least in (("usd_per_h", 0.0), ("sync_every_s", 0.05), ("stop_grace_s", 0), ("capacity_wait_s", 0.0)):
            value = getattr(self, name)
            if value is not None and not least <= value < math.inf:
                raise LaunchError(f"{name} {value}: must be {least:g} or more, and finite")

    def write(self, job_dir: Path) -> None:
        write_json(job_dir / OPTIONS, asdict(self))

    @classmethod
    def read(cls, job_dir: Path) -> SubmitOptions:
        values: dict[str, Any] = read_json(job_dir / OPTIONS, {})
        return cls(**{**values, "host": HostOptions(**values.get("host", {}))})
