"""`estiba` as a process: signals, and output to streams that lack a character.

The first Ctrl-C or TERM lets a command clean up, a second one ends it at once. Both exit with 4.
"""

from __future__ import annotations

import atexit
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from estiba_launch.errors import EXIT_INTERRUPTED

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def start() -> None:
    """Set up this process. Call it before importing the commands, which takes a while."""
    handle_with(exit_at_once)
    # Registered first, so it runs last: the interpreter's own end restores the default action, which exits with -2.
    atexit.register(handle_with, signal.SIG_IGN)
    for stream in (sys.stdout, sys.stderr):
        # An ASCII-only terminal still shows every line.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def exit_at_once(_signum: int, _frame: FrameType | None) -> None:
    os._exit(EXIT_INTERRUPTED)


def interrupt(_signum: int, _frame: FrameType | None) -> None:
    handle_with(exit_at_once)
    raise KeyboardInterrupt


def handle_with(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    for signum in SIGNALS:
        # A background job of a shell script is started with Ctrl-C ignored.
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, handler)


@contextmanager
def graceful_interrupt() -> Iterator[None]:
    """Raise KeyboardInterrupt on the first signal inside the block, if `estiba` is the whole process."""
    if exit_at_once not in map(signal.getsignal, SIGNALS):
        yield
        return
    handle_with(interrupt)
    try:
        yield
    finally:
        handle_with(exit_at_once)
