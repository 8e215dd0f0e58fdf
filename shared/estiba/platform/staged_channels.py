"""Channels that the job stages itself: Environment `ESTIBA_STAGE_<CHANNEL>=s3://BUCKET/PREFIX` of the request.

They are in /opt/ml/input/data/<channel> before the script or the workload starts. Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from estiba.errors import ConfigError
from estiba.platform.contract import Job, root_of

PREFIX = "ESTIBA_STAGE_"


def staged_channels(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the URL of each staged channel. A name in capitals means the channel in small letters."""
    found: dict[str, str] = {}
    for variable, url in sorted(environ.items()):
        if not variable.startswith(PREFIX) or not url.strip():
            continue
        name = variable.removeprefix(PREFIX)
        name = name.lower() if name == name.upper() else name
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
            raise ConfigError(
                f"environment variable {variable}: {name!r} is no channel name; write {PREFIX}MODEL=s3://…"
            )
        if name in found:
            raise ConfigError(f"environment variable {variable}: the channel {name!r} is staged twice; give it once")
        found[name] = url.strip()
    return found


def targets(environ: Mapping[str, str], job: Job, configured: Mapping[str, object]) -> dict[str, tuple[str, Path]]:
    """Return URL and directory of each staged channel. `configured` are the channels of InputDataConfig.

    Raises ConfigError if the platform has filled one of them already.
    """
    channels = staged_channels(environ)
    for name in channels:
        if name in configured:
            raise ConfigError(
                f"environment variable {PREFIX}{name.upper()}: InputDataConfig has a channel {name!r} too; "
                "remove it there, or give the staged channel another name"
            )
    return {name: (url, job.input_dir / name) for name, url in channels.items()}


def channel_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return SM_CHANNEL_<CHANNEL> of each staged channel, as scripts read it."""
    folder = root_of(environ) / "input/data"
    return {f"SM_CHANNEL_{name.upper()}": str(folder / name) for name in staged_channels(environ)}
