"""Where a job runs, as a value for every layer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TargetAddress:
    """One parsed `--target`. The registry of targets parses it, and finds its class."""

    kind: str
    """Name in the registry: `local`, `sagemaker`, `ssh`, ..."""
    user: str | None = None
    host: str | None = None
    """A machine reached over the network; None for this one and for a service."""
    port: int = 22
    runs_here: bool = False
    """This machine runs the job: it is free, and its GPUs are the ones to look for."""
    on_aws: bool = False
    """AWS runs and bills the job, so it needs a role, an image in ECR and data on S3. Elsewhere file:// is allowed."""

    waits_count: bool = False
    """With managed spot, the only limit on a job's time is MaxWaitTimeInSeconds."""
    restarts_clock: bool = False
    """A job that is taken away and starts again has its whole time limit again."""

    def __str__(self) -> str:
        if self.host is None:
            return self.kind
        user = f"{self.user}@" if self.user else ""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.kind}://{user}{host}{f':{self.port}' if self.port != 22 else ''}"
