"""The process that writes checkpoints from the arena, so that no step waits for a disk or for S3.

It is started by `saver.Checkpoints`, gets commands as JSON lines on its standard input and answers on its standard
output. It imports no torch, ignores the signals that are meant for the trainer, and dies with it: a half-written
folder is a hidden one, deleted at the next start.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import mmap
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from estiba.checkpoint import directory, disk
from estiba.checkpoint.directory import Manifest
from estiba.checkpoint.pieces import digest_of
from estiba.checkpoint.remote import Remote
from estiba.checkpoint.retention import LEAST, Retention
from estiba.errors import CheckpointError, EstibaError, StoreError

PR_SET_PDEATHSIG = 1
MARGIN_BYTES = 16 << 20
POLL_S = 0.05
Reply = dict[str, Any]


class Writer:
    """Writes, then looks after what is there: reads it back, deletes what is surplus, copies it to S3."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.folder = Path(settings["folder"])
        self.rank, self.ranks = int(settings["rank"]), int(settings["ranks"])
        self.token = str(settings["token"])
        self.descriptor = int(settings["descriptor"])
        self.retention = Retention.model_validate(settings["retention"])
        self.remote = Remote(settings["upload"]) if settings["upload"] and self.rank == 0 else None
        self.verified: set[str] = set()
        self._map: mmap.mmap | None = None
        self._lock = threading.Lock()  # of the folder's names: nothing is deleted while it is chosen or copied
        self._sending: str | None = None
        self._newest: str | None = None
        self._wake = threading.Condition()
        self._unread: list[str] = []
        self._is_reading = False
        self._unsent: str | None = None
        self._closing = False
        self._threads: list[threading.Thread] = []
        if self.rank == 0:
            self._threads.append(threading.Thread(target=self._look_after, daemon=True))
            if self.remote:
                self._threads.append(threading.Thread(target=self._send, daemon=True))
        for thread in self._threads:
            thread.start()

    def run(self) -> None:
        for line in sys.stdin:
            command = json.loads(line)
            if command["do"] == "close":
                break
            if command["do"] == "known":  # what the trainer restored from was read and verified by it
                self.verified.add(command["name"])
                continue
            started = time.monotonic()
            try:
                name = self.save(command)
                answer({"saved": name, "step": command["step"], "seconds": time.monotonic() - started})
            except OSError as error:
                answer({"failed": self._explain(error), "step": command["step"]})
            except EstibaError as error:
                answer({"failed": str(error), "step": command["step"]})
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        for thread in self._threads:
            thread.join()

    def save(self, command: Mapping[str, Any]) -> str | None:
        """Publish one checkpoint; None on ranks other than the first, whose part it is not."""
        step = int(command["step"])
        files = command["files"]  # [{"name", "start", "size"}]
        texts = {name: text.encode() for name, text in command["texts"].items()}
        # Each attempt has a folder of its own, in which other ranks may be writing already.
        hidden = f"{directory.TEMPORARY_PREFIX}{directory.name_of(step)}-{self.token}-{command['number']}"
        temporary = self.folder / hidden
        if self.rank == 0:
            directory.clean(self.folder, keep=hidden)  # what a writer before this one left, killed in the middle
            self._make_room(int(command["needed"]))
        temporary.mkdir(parents=True, exist_ok=True)
        try:
            written: dict[str, Mapping[str, Any]] = {}
            memory = memoryview(self._mapped(command["arena"]))
            for file in files:
                digest = disk.write(temporary / file["name"], memory, file["start"], file["size"])
                written[file["name"]] = {"size": file["size"], "xxh3_128": digest}
            memory.release()
            for name, data in texts.items():
                directory.write_file(temporary / name, data)
                written[name] = {"size": len(data), "xxh3_128": digest_of(data)}
            if self.rank != 0:
                _write_share(temporary, self.rank, written)
                return None
            for rank in range(1, self.ranks):
                written |= _read_share(temporary, rank, deadline=time.monotonic() + float(command["patience_s"]))
            manifest = Manifest(
                step=step,
                kind=command["kind"],
                ranks=self.ranks,
                metrics=command["metrics"],
                files=written,
                written=datetime.now(UTC).isoformat(timespec="seconds"),
            )
            with self._lock:
                name = directory.publish(self.folder, temporary, manifest)
        except BaseException:
            if self.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        with self._wake:
            self._newest = self._unsent = name
            self._unread.append(name)
            self._wake.notify_all()
        return name

    def _mapped(self, size_bytes: int) -> mmap.mmap:
        if self._map is None or len(self._map) < size_bytes:
            self._map = mmap.mmap(self.descriptor, size_bytes, prot=mmap.PROT_READ)
        return self._map

    def _make_room(self, size_bytes: int) -> None:
        """Raises CheckpointError where the disk cannot take it; gives up old checkpoints first, never the last two."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._free() >= size_bytes + MARGIN_BYTES:
            return
        with self._lock:
            for name in directory.bad_in(self.folder):
                shutil.rmtree(self.folder / name, ignore_errors=True)
            if self._free() < size_bytes + MARGIN_BYTES:
                self._delete(self._surplus(Retention(keep_last=LEAST)))
        if (free := self._free()) < size_bytes + MARGIN_BYTES:
            raise CheckpointError(
                f"{self.folder}: {size_bytes / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free; "
                "free some or give the job a larger volume"
            )

    def _free(self) -> int:
        return shutil.disk_usage(self.folder).free

    def _explain(self, error: OSError) -> str:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            with contextlib.suppress(OSError):
                return (
                    f"{self.folder}: no space left ({self._free() / 1e6:.1f} MB free); free some or give the job a "
                    "larger volume"
                )
        return f"{self.folder}: {error.strerror or error}; check the disk and the mount"

    # --- afterwards

    def _look_after(self) -> None:
        """Read back what was published, then delete what is surplus."""
        while True:
            with self._wake:
                self._is_reading = False
                self._wake.wait_for(lambda: self._unread or self._closing)
                if not self._unread:
                    return
                name = self._unread[-1]  # only the newest: what came between is older than two that follow
                self._unread.clear()
                self._is_reading = True
            try:
                directory.verify(self.folder / name)
                self.verified.add(name)
            except CheckpointError as error:
                if not (self.folder / name).exists():  # deleted by hand
                    continue
                with self._lock:
                    new_name = directory.set_aside(self.folder, name)
                answer({"warning": f"{error}; it was written just now, so do not trust this disk (now {new_name})"})
            except StoreError as error:
                answer({"warning": f"{error}"})
                continue
            with self._lock, contextlib.suppress(OSError):  # a folder that cannot be read is for the next save to say
                self._delete(self._surplus(self.retention))
                for old in directory.bad_in(self.folder)[2:]:
                    shutil.rmtree(self.folder / old, ignore_errors=True)

    def _surplus(self, retention: Retention) -> list[str]:
        found = []
        for name in directory.names_in(self.folder):
            with contextlib.suppress(
                CheckpointError, StoreError
            ):  # what cannot be read is for the next restore to set aside
                found.append((name, directory.read_manifest(self.folder / name)))
        return [name for name in retention.surplus(found, self.verified) if name not in (self._sending, self._newest)]

    def _delete(self, names: list[str]) -> None:
        for name in names:
            hidden = self.folder / f"{directory.TEMPORARY_PREFIX}deleting-{name}-{self.token}"
            with contextlib.suppress(OSError):
                os.rename(self.folder / name, hidden)  # so that none is ever half there under its name
            shutil.rmtree(hidden, ignore_errors=True)
            self.verified.discard(name)

    def _send(self) -> None:
        """Copy the newest to S3, again and again; one that came while another was on its way is skipped for a newer."""
        assert self.remote is not None
        with contextlib.suppress(EstibaError):
            self.remote.store.abort_uploads()  # they cost money and show nowhere
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._unsent or self._closing)
                if self._unsent is None:
                    return
                name, self._unsent = self._unsent, None
            with self._lock:
                self._sending = name
            started = time.monotonic()
            try:
                size = self.remote.send(self.folder / name)
                answer({"sent": name, "size": size, "seconds": time.monotonic() - started})
                self.remote.prune(self.retention)
            except (EstibaError, OSError) as error:
                answer({"warning": f"{self.remote.url}/{name}: not uploaded: {error}", "unsent": name})
            finally:
                with self._lock:
                    self._sending = None


def _write_share(temporary: Path, rank: int, written: Mapping[str, Any]) -> None:
    share = temporary / f".rank-{rank}"
    directory.write_file(share.with_suffix(".part"), json.dumps(written).encode())
    os.rename(share.with_suffix(".part"), share)


def _read_share(temporary: Path, rank: int, deadline: float) -> dict[str, Any]:
    """What another rank wrote into the same folder. Raises CheckpointError where it does not come."""
    share = temporary / f".rank-{rank}"
    while True:
        try:
            found: dict[str, Any] = json.loads(share.read_bytes())
        except FileNotFoundError:
            if time.monotonic() > deadline:
                raise CheckpointError(f"{temporary.name}: rank {rank} did not write its part in time") from None
            time.sleep(POLL_S)
            continue
        share.unlink()
        return found


_output = threading.Lock()


def answer(reply: Reply) -> None:
    """One line to the trainer; one that is gone is no reason to stop in the middle of a file."""
    with _output, contextlib.suppress(OSError):
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()


def main() -> None:
    parent = int(sys.argv[1])
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os._exit(0)
    with contextlib.suppress(OSError):
        os.nice(5)
    Writer(json.loads(sys.stdin.readline())).run()


if __name__ == "__main__":
    main()
