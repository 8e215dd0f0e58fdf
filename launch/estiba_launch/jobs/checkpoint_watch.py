"""Kill a job in the middle of a checkpoint write, for drills.

Linux reports writes through inotify. Other systems have no equivalent that is fast enough, so the directories are
polled; the kill may then come late, and `Hit.in_the_middle` is None because nothing shows whether it did.
"""

from __future__ import annotations

import fnmatch
import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from inotify_simple import INotify, flags

from estiba_launch.jobs.keys import shown
from estiba_launch.jobs.record import now_text

WRITES = flags.CREATE | flags.MODIFY
ENDS = flags.CLOSE_WRITE | flags.MOVED_FROM
NOT_CHECKPOINTS = ("*metrics*", "*.jsonl", "*.log", "*.lock", "events.out.tfevents*", "*.sagemaker-upload*")
"""Files that jobs append to all the time beside their checkpoints."""
GIVE_UP_CHECK_S = 0.5
POLL_S = 0.002


@dataclass(frozen=True, kw_only=True)
class Hit:
    """A kill that was triggered by a write."""

    name: str
    """The file that was written, relative to the checkpoint directory."""
    time: str
    in_the_middle: bool | None
    """None where the system cannot tell."""


@dataclass(frozen=True)
class Event:
    mask: int
    path: Path


class TreeWatch:
    """Inotify events of whole directory trees. Raises OSError where there is no inotify or no watch left."""

    def __init__(self, roots: list[Path]) -> None:
        try:
            self._inotify = INotify()
        except AttributeError:
            raise OSError("no inotify on this system") from None
        self._folders: dict[int, Path] = {}
        for root in roots:
            for folder, _, _ in os.walk(root):
                self._add(Path(folder))

    def _add(self, folder: Path) -> None:
        number = self._inotify.add_watch(folder, WRITES | ENDS | flags.MOVED_TO)
        self._folders[number] = folder

    def read(self, timeout_s: float) -> list[Event]:
        """Events of files, waiting at most `timeout_s` for the first."""
        events = []
        for number, mask, _, name in self._inotify.read(timeout=int(timeout_s * 1000)):
            if number not in self._folders:
                continue
            path = self._folders[number] / name
            if not mask & flags.ISDIR:
                events.append(Event(mask, path))
            elif mask & (flags.CREATE | flags.MOVED_TO):
                try:
                    self._add(path)
                except (FileNotFoundError, NotADirectoryError, PermissionError):
                    pass  # A temporary folder that was removed again, or one that is closed to this user.
        return events

    def close(self) -> None:
        self._inotify.close()


def is_checkpoint(name: str) -> bool:
    return not any(fnmatch.fnmatch(name, pattern) for pattern in NOT_CHECKPOINTS)


class Freezable(Protocol):
    """The processes that write."""

    def freeze(self) -> bool:
        """Hold all of them until `thaw`. Returns False where that is not possible."""

    def thaw(self) -> None: ...

    def kill(self) -> None: ...


class WriteCounter:
    """Counts the checkpoint files that were written below directories since it was made.

    A measure of the progress of a job that prints none: equal work writes equally often, however fast the machine is.
    """

    def __init__(self, roots: list[Path]) -> None:
        try:
            self._watch: TreeWatch | None = TreeWatch(roots)
        except OSError:
            self._watch = None
        self._count = 0

    def read(self) -> int | None:
        """The number of writes so far; None where the system cannot tell."""
        if self._watch is None:
            return None
        self._count += sum(
            bool(event.mask & flags.CLOSE_WRITE) and is_checkpoint(event.path.name) for event in self._watch.read(0)
        )
        return self._count

    def close(self) -> None:
        if self._watch is not None:
            self._watch.close()


def kill_at_write(roots: list[Path], job: Freezable, *, give_up: Callable[[], bool]) -> Hit | None:
    """Kill the job while it writes a checkpoint file. Returns None when `give_up` returns True first.

    The job is frozen before it is killed. If the write has ended by then, the job is thawed and the next write tried.
    """
    try:
        watch = TreeWatch(roots)
    except OSError:
        return _kill_by_polling(roots, job.kill, give_up)
    pending: deque[Event] = deque()
    try:
        while True:
            pending.extend(watch.read(GIVE_UP_CHECK_S))
            while pending:
                event = pending.popleft()
                if not (event.mask & WRITES and is_checkpoint(event.path.name)):
                    continue
                pending.extend(watch.read(0))
                if not _is_open(event.path, pending):
                    continue
                frozen = job.freeze()
                moment = now_text()
                pending.extend(watch.read(0))
                if _is_open(event.path, pending):
                    job.kill()
                    return Hit(name=_relative(event.path, roots), time=moment, in_the_middle=frozen or None)
                job.thaw()
            if give_up():
                return None
    finally:
        watch.close()


def _is_open(path: Path, events: deque[Event]) -> bool:
    """Whether a file whose write has begun is still being written after these events."""
    masks = [event.mask for event in events if event.path == path and event.mask & (WRITES | ENDS)]
    return not masks or bool(masks[-1] & WRITES)


def _kill_by_polling(roots: list[Path], kill: Callable[[], None], give_up: Callable[[], bool]) -> Hit | None:
    before = _sizes(roots)
    checked = time.monotonic()
    while True:
        changed = [path for path, seen in _sizes(roots).items() if before.get(path) != seen]
        if changed:
            moment = now_text()
            kill()
            return Hit(name=_relative(changed[0], roots), time=moment, in_the_middle=None)
        if time.monotonic() - checked > GIVE_UP_CHECK_S:
            checked = time.monotonic()
            if give_up():
                return None
        time.sleep(POLL_S)


def _sizes(roots: list[Path]) -> dict[Path, tuple[int, int]]:
    found = {}
    for root in roots:
        for folder, _, names in os.walk(root):
            for name in filter(is_checkpoint, names):
                path = Path(folder, name)
                try:
                    stat = path.stat()
                except OSError:
                    continue
                found[path] = (stat.st_size, stat.st_mtime_ns)
    return found


def _relative(path: Path, roots: list[Path]) -> str:
    return shown(next((str(path.relative_to(root)) for root in roots if path.is_relative_to(root)), str(path)))
