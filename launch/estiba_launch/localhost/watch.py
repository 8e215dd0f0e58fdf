"""Seeing a checkpoint being written at the moment it is: Linux's inotify, so that a drill can kill in the middle.

The standard library has no inotify, and one system call with a handful of events needs no package. Where there is none
(macOS), the directory is looked at in a tight loop, which may be late; the answer says whether it was.
"""

from __future__ import annotations

import ctypes
import fnmatch
import os
import select
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .record import now_text

IN_MODIFY, IN_CLOSE_WRITE, IN_MOVED_FROM, IN_MOVED_TO, IN_CREATE = 0x2, 0x8, 0x40, 0x80, 0x100
IN_ISDIR = 0x40000000
EVENTS = IN_MODIFY | IN_CLOSE_WRITE | IN_MOVED_FROM | IN_MOVED_TO | IN_CREATE
HEAD = struct.Struct("iIII")
NOT_CHECKPOINTS = ("*metrics*", "*.jsonl", "*.log", "*.lock", "events.out.tfevents*")
"""Files that jobs keep beside their checkpoints and write all the time."""
LOOK_S = 0.5
LOOP_S = 0.002


@dataclass(frozen=True, kw_only=True)
class Hit:
    """A kill that followed a write."""

    name: str
    """The file that was being written, relative to the checkpoint directory."""
    time: str
    in_the_middle: bool | None
    """True when the write had not ended when the kill came; None where that cannot be seen."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """One thing that happened to a file."""

    mask: int
    path: Path


class Inotify:
    """Events of whole directory trees. Raises OSError where the system has no inotify or no watches are left."""

    def __init__(self, roots: list[Path]) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        if not hasattr(self._libc, "inotify_init1"):
            raise OSError("no inotify on this system")
        self._fd = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        self._folders: dict[int, Path] = {}
        for root in roots:
            for folder, _, _ in os.walk(root):
                self._watch(Path(folder))

    def _watch(self, folder: Path) -> None:
        number = self._libc.inotify_add_watch(self._fd, os.fsencode(folder), EVENTS)
        if number < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(folder))
        self._folders[number] = folder

    def read(self, timeout_s: float) -> Iterator[Event]:
        """What happened, waiting at most `timeout_s` for the first."""
        if not select.select([self._fd], [], [], timeout_s)[0]:
            return
        try:
            data = os.read(self._fd, 1 << 16)
        except BlockingIOError:
            return
        at = 0
        while at < len(data):
            number, mask, _, length = HEAD.unpack_from(data, at)
            name = data[at + HEAD.size : at + HEAD.size + length].rstrip(b"\0")
            at += HEAD.size + length
            folder = self._folders.get(number)
            if folder is None:
                continue
            path = folder / os.fsdecode(name)
            if mask & IN_ISDIR:
                if mask & (IN_CREATE | IN_MOVED_TO):
                    try:
                        self._watch(path)
                    except FileNotFoundError:
                        pass  # a temporary folder that is gone again
                continue
            yield Event(mask=mask, path=path)

    def close(self) -> None:
        os.close(self._fd)


def is_checkpoint(name: str) -> bool:
    return not any(fnmatch.fnmatch(name, pattern) for pattern in NOT_CHECKPOINTS)


def kill_at_write(roots: list[Path], *, kill: Callable[[], None], give_up: Callable[[], bool]) -> Hit | None:
    """Call `kill` as soon as a checkpoint file begins to be written; None when `give_up` said so first."""
    try:
        watcher = Inotify(roots)
    except OSError:
        return _kill_by_looking(roots, kill, give_up)
    try:
        while True:
            for event in watcher.read(LOOK_S):
                if event.mask & (IN_CREATE | IN_MODIFY) and is_checkpoint(event.path.name):
                    moment = now_text()
                    # Whether the write had ended before the kill is in the queue already, or never will be.
                    ended = any(
                        later.path == event.path and later.mask & (IN_CLOSE_WRITE | IN_MOVED_FROM)
                        for later in watcher.read(0)
                    )
                    kill()
                    return Hit(name=_relative(event.path, roots), time=moment, in_the_middle=not ended)
            if give_up():
                return None
    finally:
        watcher.close()


def _kill_by_looking(roots: list[Path], kill: Callable[[], None], give_up: Callable[[], bool]) -> Hit | None:
    before = _sizes(roots)
    looked = time.monotonic()
    while True:
        now = _sizes(roots)
        changed = [path for path, seen in now.items() if before.get(path) != seen]
        if changed:
            moment = now_text()
            kill()
            return Hit(name=_relative(changed[0], roots), time=moment, in_the_middle=None)
        if time.monotonic() - looked > LOOK_S:
            looked = time.monotonic()
            if give_up():
                return None
        time.sleep(LOOP_S)


def _sizes(roots: list[Path]) -> dict[Path, tuple[int, int]]:
    found = {}
    for root in roots:
        for folder, _, names in os.walk(root):
            for name in filter(is_checkpoint, names):
                path = Path(folder, name)
                try:
                    stat = path.stat()
                except FileNotFoundError:
                    continue
                found[path] = (stat.st_size, stat.st_mtime_ns)
    return found


def _relative(path: Path, roots: list[Path]) -> str:
    return next((str(path.relative_to(root)) for root in roots if path.is_relative_to(root)), str(path))
