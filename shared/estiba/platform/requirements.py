"""The packages that a script needs: requirements.txt beside it, installed once per host before the script starts.

AWS's toolkit does this for .py entry points only. Standard library only.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from estiba.errors import ConfigError
from estiba.log import get_logger

logger = get_logger("estiba.platform.requirements")
NAME, MISSPELT = "requirements.txt", "requirement.txt"
WHEELS = "wheels"
"""A folder beside the script, or a channel: packages come from there, and from the index only if that is not enough."""
SHOWN_ERRORS = 3


class InstallError(ConfigError):
    """Requirements that cannot be installed."""

    exit_code = 1


def requirements_of(code: Path, environ: Mapping[str, str]) -> Path | None:
    """Return the file to install, SAGEMAKER_REQUIREMENTS or requirements.txt; None if there is none.

    Raises ConfigError if the request names a file that is not there.
    """
    if named := environ.get("SAGEMAKER_REQUIREMENTS"):
        if (code / named).is_file():
            return code / named
        if named != NAME:
            raise ConfigError(f"SAGEMAKER_REQUIREMENTS={named}: not in {code}; name a file of the source folder")
    if (code / NAME).is_file():
        return code / NAME
    if (code / MISSPELT).is_file():
        logger.warning("%s has no s at its end; installing it as %s. Rename it: AWS's images ignore it", MISSPELT, NAME)
        return code / MISSPELT
    return None


def install(code: Path, channels: Path, environ: Mapping[str, str] = os.environ) -> None:
    """Install the requirements of the code, and the package that it may be. Raises InstallError, ConfigError."""
    file = requirements_of(code, environ)
    wanted = ["-r", str(file)] if file is not None else []
    if (code / "setup.py").is_file() and environ.get("SAGEMAKER_PROGRAM", "").endswith(".py"):
        wanted.append(".")  # as AWS's toolkit does
    if not wanted:
        return
    name = file.name if file is not None else "setup.py"
    logger.info("installing %s", name)
    folders = [folder for folder in (code / WHEELS, channels / WHEELS) if any(folder.glob("*.whl"))]
    links = [word for folder in folders for word in ("--find-links", str(folder))]
    if links and _pip([*wanted, "--no-index", *links], code, is_quiet=True)[0] == 0:
        return
    status, errors = _pip([*wanted, *links], code)
    if status:
        raise InstallError("\n".join([*errors, f"({name} was not installed)"]))


def _pip(arguments: Sequence[str], folder: Path, *, is_quiet: bool = False) -> tuple[int, list[str]]:
    """Run pip, with its errors on this process's standard error. Returns its status and the lines that explain it."""
    process = subprocess.Popen(
        [*_installer(), *arguments], cwd=folder, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line.strip())
        if not is_quiet:
            sys.stderr.write(line)
            sys.stderr.flush()
    errors = list(dict.fromkeys(line for line in lines if line.lower().startswith("error")))[:SHOWN_ERRORS]
    broken = [line for line in lines if "connection broken by" in line][-1:]
    return process.wait(), [*(errors or [line for line in lines if line][-1:]), *broken]


def _installer() -> list[str]:
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--root-user-action=ignore"]
    if uv := shutil.which("uv"):  # AWS's Amazon Linux images have no pip
        return [uv, "pip", "install", "--python", sys.executable]
    raise InstallError("neither pip nor uv is in this image, so requirements cannot be installed; add one of them")
