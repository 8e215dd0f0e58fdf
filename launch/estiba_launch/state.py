"""Where jobs are remembered on this machine: one directory per job, readable by any process at any time."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import LaunchError


def state_root(environ: Mapping[str, str] | None = None) -> Path:
    """$ESTIBA_STATE, or ~/.local/state/estiba (below $XDG_STATE_HOME)."""
    values = os.environ if environ is None else environ
    if values.get("ESTIBA_STATE"):
        return Path(values["ESTIBA_STATE"]).absolute()
    base = values.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "estiba"


def job_dir(name: str) -> Path:
    """The directory of one job. Raises LaunchError when there is none."""
    path = jobs_root() / name
    if "/" in name or name in ("", ".", "..") or not (path / "request.json").exists():
        known = ", ".join(job_names()[-5:]) or "none"
        raise LaunchError(f"{name}: no such job on this machine (latest: {known}); see `estiba list`")
    return path


def jobs_root() -> Path:
    return state_root() / "jobs"


def job_names() -> list[str]:
    """Every job, oldest first."""
    found = [path.parent for path in jobs_root().glob("*/request.json")]
    return [path.name for path in sorted(found, key=lambda path: (path / "request.json").stat().st_mtime_ns)]


def write_text(path: Path, text: str) -> None:
    """Replace a file whole: a reader sees the old text or the new, also after a crash."""
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(partial).replace(path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path, default: Any = None) -> Any:
    """The JSON in `path`, or `default` when there is no such file. Raises LaunchError when it is broken."""
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return default
    except ValueError as error:
        raise LaunchError(f"{path}: broken ({error}); remove the job's directory {path.parent}") from None
