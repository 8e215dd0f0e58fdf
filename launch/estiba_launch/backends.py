"""Which module looks after a job: local, ssh and SageMaker jobs answer to the same functions.

describe(name), wait(name, timeout_s), stop(name), log_lines(name, follow=...), fetch(name, into), is_over(value).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from . import state
from .target import Target

TARGET = "target.json"
"""In a job's directory: where it runs. Local jobs have none."""


class Backend(Protocol):
    """What every kind of target can do with a job, given its name. All raise LaunchError."""

    def describe(self, name: str) -> dict[str, Any]:
        """The job as DescribeTrainingJob would tell it, with more under `Estiba`."""

    def is_over(self, value: dict[str, Any]) -> bool: ...

    def wait(self, name: str, timeout_s: float | None = None) -> dict[str, Any]: ...

    def stop(self, name: str, reason: str = "asked for") -> None: ...

    def log_lines(self, name: str, *, follow: bool) -> Iterator[str]: ...

    def fetch(self, name: str, into: Path) -> dict[str, int]: ...


def target(name: str) -> Target:
    """Where a job runs. Raises LaunchError when there is no such job."""
    return Target.parse(state.read_json(state.job_dir(name) / TARGET, {"target": "local"})["target"])


def of(name: str) -> Backend:
    """The module that looks after this job. Raises LaunchError when there is no such job."""
    kind = target(name).kind
    # Imported when needed: boto3 alone takes half a second.
    if kind == "ssh":
        from .ssh import jobs as ssh_jobs

        return ssh_jobs
    if kind == "sagemaker":
        from .sagemaker import jobs as sagemaker_jobs

        return sagemaker_jobs
    from .localhost import jobs as local_jobs

    return local_jobs
