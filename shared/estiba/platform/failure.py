"""`/opt/ml/output/failure`: why the job failed, cause first, since SageMaker shows the first 1,024 characters."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

SHOWN_CHARACTERS = 1024
SHOWN_ERRORS = 3
_INSTALL_FAILURE = re.compile(r"^Install(?:Requirements|Module)Error:", re.M)
_FINAL_LINE = re.compile(r"[A-Za-z_][\w.]*(?:: .*)?$")
_TRACEBACK = "Traceback (most recent call last):"
_LOG_PREFIX = r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+ sagemaker-training-toolkit"
_TOOLKIT_LOG = re.compile(_LOG_PREFIX)
_TOOLKIT_FAILURE = re.compile(
    rf"(?:^|{_LOG_PREFIX} ERROR +)(?:Framework Error|[A-Za-z]+(?:Error|Exception)):\s*\nExitCode (?P<code>-?\d+)", re.M
)
_SCRIPT_FAILURE_KEPT = "Failure file exists. Skipping creation"


def write_failure(path: Path, text: str) -> None:
    """Write the failure file if its directory is writable. A job must not fail because it is not."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        content = (text.rstrip() + "\n").encode("utf-8", errors="backslashreplace")
        temporary.write_bytes(content)
        try:
            os.replace(temporary, path)
        except OSError:  # the file itself is a mount
            temporary.unlink()
            path.write_bytes(content)


def read_failure(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def remove_failure(path: Path) -> None:
    """Remove an earlier attempt's failure file, which would be shown as this one's."""
    with contextlib.suppress(OSError):
        path.unlink()


def cause_of(log_tail: str) -> str | None:
    """Return the log line that explains a failure: the end of the last Python traceback, else the last line.

    Lines that the toolkit logs after the script's traceback are skipped.
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


def install_error(text: str, log_tail: str) -> str | None:
    """Return pip's own errors, if the toolkit's failure text says that the requirements were not installed."""
    if not _INSTALL_FAILURE.search(text):
        return None
    lines = [line.strip() for line in log_tail.replace("\r", "\n").split("\n")]
    errors = list(dict.fromkeys(line for line in lines if line.startswith("ERROR: ")))[:SHOWN_ERRORS]
    broken = [line for line in lines if "connection broken by" in line][-1:]
    return "\n".join([*errors, *broken, "(requirements.txt was not installed)"]) if errors else None


def toolkit_exit_code(text: str) -> int | None:
    """Return the script's exit code from the toolkit's failure text or log. The toolkit itself always ends with 1."""
    match = _TOOLKIT_FAILURE.search(text)
    return None if match is None else int(match["code"])


def script_wrote_failure(log_tail: str) -> bool:
    """Whether the toolkit's log says that it kept the failure file of the script."""
    return _SCRIPT_FAILURE_KEPT in log_tail
