"""The host side of Estiba: job files, plans, prices and the machines that run them. Never imports torch or `estiba`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import Channel, Job, launch_training_job

__all__ = ["Channel", "Job", "launch_training_job"]


def __getattr__(name: str) -> Any:
    """The Python API, loaded when it is asked for: the command starts faster without."""
    if name in __all__:
        from . import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
