"""The processes below PID 1, read from /proc, and the limits of their container. Standard library only."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
SHELLS = frozenset({"sh", "bash", "dash", "ash", "zsh", "ksh", "busybox"})


def receivers(child: int, is_toolkit: bool) -> list[int]:
    """Return the processes that get a signal: the program below any wrappers, and nothing below the program.

    A shell dies of TERM and leaves its child running, so both get the signal. The sagemaker-training toolkit also dies
    of it and loses the script's exit code; so does the `sh -c` that the toolkit runs a .sh script with. Of these, only
    the script gets the signal. A program forwards signals to its own helpers itself: a data loader's workers
    must keep running while their parent saves.
    """
    tree = parents()
    found: list[int] = []
    waiting = [child]
    while waiting:
        pid = waiting.pop()
        below = [other for other, parent in tree.items() if parent == pid]
        if is_toolkit and below and (pid == child or _is_shell_command(pid)):
            waiting += below
            continue
        found.append(pid)
        if name_of(pid) in SHELLS:
            waiting += below
    return found


def _is_shell_command(pid: int) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return False
    return name_of(pid) in SHELLS and words[1:2] == ["-c"]


def descendants(pid: int, tree: Mapping[int, int] | None = None) -> list[int]:
    """Return all processes below `pid`, parents before children. `tree` is an earlier answer of `parents`."""
    tree = parents() if tree is None else tree
    found = [pid]
    for item in found:
        found += [other for other, parent in tree.items() if parent == item]
    return found[1:]


def start_time(pid: int) -> int | None:
    """Return when a process started, in ticks since the boot; None if it has ended. Process ids are used again."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return None if fields[0] == "Z" else int(fields[19])
    except (OSError, IndexError, ValueError):
        return None


def parents() -> dict[int, int]:
    """Return the parent of every process that is not a zombie."""
    found = {}
    for folder in os.listdir("/proc"):
        if folder.isdigit():
            with contextlib.suppress(OSError):
                text = Path(f"/proc/{folder}/stat").read_text(errors="replace")
                state, parent = text.rpartition(")")[2].split()[:2]
                if state != "Z":
                    found[int(folder)] = int(parent)
    return found


def name_of(pid: int) -> str:
    try:
        return os.path.basename(os.readlink(f"/proc/{pid}/exe"))
    except OSError:
        return ""


def next_signal(signals: Collection[signal.Signals], timeout_s: float) -> signal.Signals | None:
    """Wait for one of the blocked `signals`. Returns None at the timeout, or after this process was stopped.

    CPython then returns an uninitialized number, if the time was up while it stood still (`docker pause`).
    """
    info = signal.sigtimedwait(signals, timeout_s)
    if info is None or info.si_signo not in signals:
        return None
    return signal.Signals(info.si_signo)


def reap() -> list[tuple[int, int]]:
    """Collect the children that have ended. Returns their process ids and wait statuses."""
    ended = []
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            ended.append((pid, status))
    return ended


def has_children() -> bool:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


@dataclass(frozen=True)
class LimitHits:
    """How often this container ran into its limits."""

    oom_kills: int
    """Processes that the kernel killed for lack of memory."""
    failed_forks: int
    """Processes and threads that could not be started."""

    @classmethod
    def read(cls) -> LimitHits:
        return cls(
            _count("oom_kill", "memory.events", "memory/memory.oom_control"),
            _count("max", "pids.events", "pids/pids.events"),
        )

    def since(self, before: LimitHits) -> str | None:
        """What was hit since then, and the remedy."""
        if self.oom_kills > before.oom_kills:
            limit = _read("memory.max", "memory/memory.limit_in_bytes").strip()
            shown = f"{int(limit) / 2**20:.0f} MiB" if limit.isdigit() else "this machine's memory"
            return f"out of memory: a process was killed at the container's limit of {shown}; give it more memory"
        if self.failed_forks > before.failed_forks:
            limit = _read("pids.max", "pids/pids.max").strip()
            return f"the container's limit of {limit} processes and threads was reached; raise it (--pids-limit)"
        return None


def _count(name: str, *files: str) -> int:
    for line in _read(*files).splitlines():
        if line.startswith(f"{name} "):
            return int(line.split()[1])
    return 0


def _read(*files: str) -> str:
    """The text of this container's file in cgroup version 2, else in version 1."""
    for file in files:
        with contextlib.suppress(OSError):
            return (CGROUP / file).read_text()
    return ""
