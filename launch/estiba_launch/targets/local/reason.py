"""Why a host failed, in its own words or by what is known without them."""

from __future__ import annotations

from pathlib import Path

from estiba_launch.jobs.record import disk_is_full
from estiba_launch.targets.local.engine import End


def failure_reason(root: Path, host: str | None, end: End) -> str:
    """The text of the failure file below `root`. `host` is None for the only one."""
    try:
        text = (root / "output" / "failure").read_bytes().decode("utf-8", "replace").strip()
    except OSError:
        text = ""
    if text:
        return text
    where = f" on {host}" if host else ""
    if end.out_of_memory:
        return f"OutOfMemory: the container was killed at its memory limit{where}; give it more (--memory)"
    full = f" (the disk of {root} is full: make room there)" if disk_is_full(root) else ""
    return (
        f"AlgorithmError: exit code {end.exit_code}{where}{full}; /opt/ml/output/failure was not written, see the log"
    )
