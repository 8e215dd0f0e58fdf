"""Which processes of a script get a signal: those that have a rank, however many shells and starters stand between.

A shell, os.system, `tee` and torchrun get nothing: a launcher that hears TERM gives its ranks 30 s, and a `tee` that
dies takes its writer with it. Without ranks it is the user's program below the wrappers. Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Collection, Iterator
from pathlib import Path

from estiba.platform.process_tree import descendants, name_of, parents

RANK_NAMES = (b"RANK=", b"OMPI_COMM_WORLD_RANK=", b"PMI_RANK=")
_HELPERS = ("multiprocessing", "compile_worker", "resource_tracker")


def rank_processes(recorded: Collection[int]) -> list[int]:
    """Return the ranks below this process: the `recorded` ones, and Python programs that torchrun and the like started.

    What is below a rank, such as its data loaders, is left out. So is a rank that has recorded ranks below it: a
    launcher that inherited RANK from an exported variable.
    """
    tree = parents()
    below = descendants(os.getpid(), tree)
    known = set(recorded) & set(below)
    found = {pid for pid in known if not known & set(descendants(pid, tree))}
    for pid in below:
        is_first = _is_python(pid) and _has_rank(pid) and not _has_rank(tree.get(pid, 0))
        if is_first and not found & {*_ancestors(pid, tree), *descendants(pid, tree)}:
            found.add(pid)
    return sorted(found)


def program_processes(child: int, code: Path) -> list[int]:
    """Return the user's programs below `child` that get a signal when there is no rank.

    A program that handles TERM gets it, and nothing below it does. One that does not, but waits for another program of
    the source folder `code`, is a wrapper. Without such a program below, it gets the signal itself.
    """
    tree = parents()
    if child not in tree:
        return []
    if handles(child, signal.SIGTERM):
        return [child]
    found = []
    for pid in [pid for pid, parent in tree.items() if parent == child]:
        if any(_is_program(one, code) for one in (pid, *descendants(pid, tree))):
            found += program_processes(pid, code)
    return found or [child]


def handles(pid: int, signum: signal.Signals) -> bool:
    """Whether a process has a handler for a signal."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (signum - 1) & 1)
    return False


def _is_program(pid: int, code: Path) -> bool:
    """Whether a process runs Python on a file or module of the source folder, or one of torch's launchers."""
    words = _words(pid)
    if not _is_python(pid) or any(helper in word for helper in _HELPERS for word in words):
        return False
    for before, word in zip(["", *words], words, strict=False):
        if before == "-m" and (word.startswith("torch.") or (code / f"{word.replace('.', '/')}.py").exists()):
            return True
        if word.endswith(".py") and (code / word).is_relative_to(code) and (code / word).exists():
            return True
    return False


def _is_python(pid: int) -> bool:
    return name_of(pid).startswith("python")


def _has_rank(pid: int) -> bool:
    with contextlib.suppress(OSError):
        values = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        return any(value.startswith(RANK_NAMES) for value in values)
    return False


def _words(pid: int) -> list[str]:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    return []


def _ancestors(pid: int, tree: dict[int, int]) -> Iterator[int]:
    while (pid := tree.get(pid, 0)) > 1:
        yield pid
