"""Where this user's settings and jobs are kept."""

from __future__ import annotations

import os
from pathlib import Path


def config_dir() -> Path:
    """`~/.config/estiba`, or `estiba` below $XDG_CONFIG_HOME."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "estiba"


def state_root() -> Path:
    """$ESTIBA_STATE, else `~/.local/state/estiba` or `estiba` below $XDG_STATE_HOME."""
    if root := os.environ.get("ESTIBA_STATE"):
        return Path(root).absolute()
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "estiba"
