"""The log: standard `logging`, set up once for the packages of the job layer and of an image.

    from estiba.log import get_logger

    logger = get_logger(__name__)
    logger.warning("%s is full", path)       # "warning: /opt/ml/model is full", on standard error

INFO messages have no prefix, so that a metric's regular expression matches `name=value` lines. Loggers of other
libraries are unchanged.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from tqdm import tqdm

_PREFIXES = {logging.WARNING: "warning: ", logging.ERROR: "error: ", logging.CRITICAL: "error: "}


class _StderrHandler(logging.Handler):
    """Writes to the current sys.stderr. A closed pipe (`| head`) is ignored."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):
            print(_PREFIXES.get(record.levelno, "") + self.format(record), file=sys.stderr, flush=True)


_handler = _StderrHandler()


def get_logger(name: str) -> logging.Logger:
    """Return a module's logger, and have its package log to standard error."""
    package = logging.getLogger(name.partition(".")[0])
    if _handler not in package.handlers:
        package.addHandler(_handler)
        package.setLevel(logging.INFO)
        package.propagate = False  # a user's script may have set up the root logger, which would print every line again
    return logging.getLogger(name)


def format_fields(fields: Mapping[str, Any]) -> str:
    """Format `name=value` pairs, leaving out values that are None."""
    return " ".join(f"{name}={format_value(value)}" for name, value in fields.items() if value is not None)


def format_value(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"


def json_value(value: Any) -> Any:
    """Return the value, or None for NaN and infinity, which strict JSON lacks."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def progress_bar(stream: TextIO, *, total: float, done: float, **options: Any) -> tqdm | None:
    """Return a progress bar on a terminal, and None on any other stream."""
    if not stream.isatty():
        return None
    from tqdm import tqdm

    has_size = _columns_of(stream) > 0  # `docker run -t` into a pipe is a terminal without a size
    size: dict[str, Any] = {} if has_size else {"ncols": 80, "nrows": 24}
    return tqdm(total=total, initial=done, file=stream, **size, **options)


def _columns_of(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        return 0
