"""File locks between processes. The kernel frees them however their holder dies."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

PROBE_S = 0.5
"""`is_locked` takes the lock for an instant, so `try_lock` tries for a moment before it reports a holder."""


def try_lock(path: Path) -> IO[str] | None:
    """Hold the lock for as long as the returned file is open. Returns None when another process holds it."""
    file = path.open("a+")
    until = time.monotonic() + PROBE_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError:
            if time.monotonic() > until:
                file.close()
                return None
            time.sleep(0.02)
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def is_locked(path: Path) -> bool:
    try:
        file = path.open()
    except FileNotFoundError:
        return False
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        return False


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait for the lock and hold it inside the `with` block."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
