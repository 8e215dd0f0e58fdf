"""The launcher: job files, estimates, and the targets that run jobs. Never imports torch or `estiba`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from estiba_launch.sdk import Channel, Estimator, HostOptions, Job, SubmitOptions, launch_training_job

__all__ = ["Channel", "Estimator", "HostOptions", "Job", "SubmitOptions", "launch_training_job"]


def __getattr__(name: str) -> Any:
    """Load the Python API when it is first used, so that the command starts faster."""
    if name in __all__:
        from estiba_launch import sdk

        return getattr(sdk, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
