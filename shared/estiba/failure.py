"""`/opt/ml/output/failure`: why the job failed, cause first, since SageMaker shows the first 1,024 characters."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

SHOWN_CHARACTERS = 1024
_FINAL_LINE = re.compile(r"[A-Za-z_][\w.]*(?:: .*)?$")
_TRACEBACK = "Traceback (most recent call last):"
_TOOLKIT_LOG = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+ sagemaker-training-toolkit")
_TOOLKIT_FAILURE = re.compile(r"^(?:Framework Error|[A-Za-z]+(?:Error|Exception)):\s*\nExitCode (?P<code>-?\d+)", re.M)


def write_failure(path: Path, text: str) -> None:
    """Write it if the place can be written: a job must not fail for lack of a place to say why it failed."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.tmp")
        content = (text.rstrip() + "\n").encode("utf-8", errors="backslashreplace")
        beside.write_bytes(content)
        try:
            os.replace(beside, path)
        except OSError:  # the file itself is a mount
            beside.unlink()
            path.write_bytes(content)


def read_failure(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def remove_failure(path: Path) -> None:
    """Forget the failure of an earlier attempt on the same host; it would be shown as this one's."""
    with contextlib.suppress(OSError):
        path.unlink()


def cause_of(log_tail: str) -> str | None:
    """The line of a log that says why: the end of the last Python traceback, else the last line of a program.

    The toolkit logs after the script's own traceback; its lines are not causes.
    """
    lines = [line.rstrip() for line in log_tail.replace("\r", "\n").split("\n")]
    cause = None
    inside = False
    for line in lines:
        if line.strip() == _TRACEBACK:
            inside = True
        elif inside and line and not line[0].isspace() and _FINAL_LINE.match(line):
            cause, inside = line, False
    if cause is not None and not cause.startswith("sagemaker_training.errors."):
        return cause
    for line in reversed(lines):
        if line.strip() and not _TOOLKIT_LOG.match(line):
            return line.strip()
    return None


def toolkit_exit_code(text: str) -> int | None:
    """The user script's own exit code out of the toolkit's failure text; the toolkit itself always ends with 1."""
    match = _TOOLKIT_FAILURE.search(text)
    return None if match is None else int(match["code"])
