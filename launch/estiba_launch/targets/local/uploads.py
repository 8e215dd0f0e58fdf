"""Checkpoint uploads of one attempt: every few seconds while it runs, and a last time after it ended."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TypeVar

from estiba_launch.errors import HostError
from estiba_launch.jobs import control
from estiba_launch.jobs.logs import JobLog
from estiba_launch.jobs.mirror import KeyRefused
from estiba_launch.jobs.sync import CheckpointSync, describe

T = TypeVar("T")
PATIENCE_S = 600.0
MAX_PAUSE_S = 30.0
REFUSED_PATIENCE_S = 3.0
"""For what a store refuses while it takes other objects."""


def retry(call: Callable[[], T], *, patience_s: float, failed: Callable[[HostError, float], None]) -> T:
    """Call until it succeeds, with growing pauses. Raises the last HostError after `patience_s`.

    `failed(error, pause_s)` is called before each pause. It may raise to give up.
    """
    started, pause_s = time.monotonic(), 1.0
    while True:
        try:
            return call()
        except HostError as error:
            if time.monotonic() - started >= (REFUSED_PATIENCE_S if isinstance(error, KeyRefused) else patience_s):
                raise
            failed(error, pause_s)
        time.sleep(pause_s)
        pause_s = min(pause_s * 2, MAX_PAUSE_S)


class CheckpointUploads:
    """Syncs the checkpoint directories of all hosts in a thread of its own."""

    def __init__(self, job_dir: Path, log: JobLog, every_s: float) -> None:
        self._job_dir, self._log, self._every_s = job_dir, log, every_s
        self.syncs: dict[str, CheckpointSync] = {}
        """Host name to its sync."""
        self._stopped = threading.Event()
        self._lost: set[str] = set()
        self._thread = threading.Thread(target=self._run, name="sync", daemon=True)

    def add(self, host: str, sync: CheckpointSync) -> None:
        for peer in self.syncs.values():
            peer.peers.append(sync)
            sync.peers.append(peer)
        self.syncs[host] = sync

    def start(self) -> None:
        self._thread.start()

    def lose(self, host: str) -> None:
        """Upload nothing more of one host, whose disk is gone with it."""
        self._lost.add(host)

    def stop(self) -> None:
        """Start no further upload; a host that was lost uploads nothing more."""
        self._stopped.set()

    def join(self) -> None:
        self.stop()
        self._thread.join()

    def _run(self) -> None:
        failing: set[str] = set()
        while not self._stopped.wait(self._every_s):
            for host, sync in self.syncs.items():
                if self._stopped.is_set() or host in self._lost or control.sync_held(self._job_dir):
                    continue
                try:
                    sync.push()
                    failing.discard(host)
                except Exception as error:
                    # The store may be away for a while. What is on disk is uploaded when it is back.
                    if host not in failing:
                        self._log.mark(f"checkpoints of {host} not synced, trying again: {error}")
                        if not isinstance(error, HostError):
                            traceback.print_exc()
                    failing.add(host)

    def finish(self) -> str:
        """Upload what is left, waiting for a store that is away. Returns what it refuses, and why.

        Raises HostError when the store stays away.
        """
        until = time.monotonic() + PATIENCE_S
        left = {}
        away = False
        for host, sync in self.syncs.items():
            if host in self._lost:
                continue

            def push(sync: CheckpointSync = sync) -> None:
                if problems := sync.push(last=True).problems:
                    raise KeyRefused(describe(problems))

            def failed(error: HostError, pause_s: float, host: str = host) -> None:
                self._log.mark(f"last sync of {host} failed, again in {pause_s:.0f} s: {error}")

            try:
                retry(push, patience_s=max(until - time.monotonic(), 0.0), failed=failed)
            except HostError as error:
                left[host] = f"{error}; kept in {sync.local}"
                away |= not isinstance(error, KeyRefused)
        text = "; ".join(f"{host}: {reason}" if len(self.syncs) > 1 else reason for host, reason in left.items())
        if away:
            raise HostError(text)
        return text

    def pending(self, hosts: Collection[str] = ()) -> Mapping[str, int]:
        """What is not in the store yet, of some hosts or of all."""
        counts = [sync.pending() for host, sync in self.syncs.items() if not hosts or host in hosts]
        return {"UnsyncedFiles": sum(files for files, _ in counts), "UnsyncedBytes": sum(size for _, size in counts)}
