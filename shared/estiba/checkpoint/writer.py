"""The process that writes checkpoints from the staging buffer, so that no step waits for a disk or for S3.

`WriterProcess` starts it. It reads commands as JSON lines from standard input and replies on standard output. It
imports no torch, ignores the signals that are meant for the trainer, and dies with the trainer: a half-written folder
has a hidden name and is deleted at the next start.
"""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from estiba.checkpoint import disk
from estiba.checkpoint import format as ckpt_format
from estiba.checkpoint.chunks import digest_of
from estiba.checkpoint.format import Manifest
from estiba.checkpoint.remote import Remote
from estiba.checkpoint.retention import MIN_VERIFIED, Retention
from estiba.errors import CheckpointError, EstibaError, StoreError
from estiba.processes import die_with_parent, ignore_stop_signals

MARGIN_BYTES = 16 << 20
POLL_S = 0.05
Reply = dict[str, Any]


class Writer:
    """Writes checkpoints, reads them back, deletes surplus ones and copies the newest to S3."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.folder = Path(settings["folder"])
        self.rank, self.ranks = int(settings["rank"]), int(settings["ranks"])
        self.token = str(settings["token"])
        self.descriptor = int(settings["descriptor"])
        self.retention = Retention.model_validate(settings["retention"])
        self.remote = Remote(settings["upload"]) if settings["upload"] and self.rank == 0 else None
        self.verified: set[str] = set()
        self._map: mmap.mmap | None = None
        self._lock = threading.Lock()  # no checkpoint is deleted while it is published, chosen or copied
        self._sending: str | None = None
        self._newest: str | None = None
        self._wake = threading.Condition()
        self._unread: list[str] = []
        self._is_reading = False
        self._unsent: str | None = None
        self._closing = False
        self._threads: list[threading.Thread] = []
        if self.rank == 0:
            self._threads.append(threading.Thread(target=self._verify_and_prune, daemon=True))
            if self.remote:
                self._threads.append(threading.Thread(target=self._send, daemon=True))
        for thread in self._threads:
            thread.start()

    def run(self) -> None:
        for line in sys.stdin:
            command = json.loads(line)
            if command["do"] == "close":
                break
            if command["do"] == "verified":  # the trainer verified what it restored
                self.verified.add(command["name"])
                continue
            started = time.monotonic()
            try:
                name = self.save(command)
                reply({"saved": name, "step": command["step"], "seconds": time.monotonic() - started})
            except OSError as error:
                reply({"failed": self._explain(error), "step": command["step"]})
            except EstibaError as error:
                reply({"failed": str(error), "step": command["step"]})
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        for thread in self._threads:
            thread.join()

    def save(self, command: Mapping[str, Any]) -> str | None:
        """Write this rank's part; the main rank publishes the checkpoint and returns its name, the others None."""
        step = int(command["step"])
        files = command["files"]  # [{"name", "start", "size"}]
        texts = {name: text.encode() for name, text in command["texts"].items()}
        # Each attempt has its own folder, and other ranks may be writing to it already.
        hidden = f"{ckpt_format.TEMPORARY_PREFIX}{ckpt_format.checkpoint_name(step)}-{self.token}-{command['number']}"
        temporary = self.folder / hidden
        if self.rank == 0:
            ckpt_format.remove_unfinished(self.folder, keep=hidden)
            self._make_room(int(command["needed"]))
        temporary.mkdir(parents=True, exist_ok=True)
        try:
            written: dict[str, Mapping[str, Any]] = {}
            memory = memoryview(self._mapped(command["buffer_bytes"]))
            for file in files:
                digest = disk.write(temporary / file["name"], memory, file["start"], file["size"])
                written[file["name"]] = {"size": file["size"], "xxh3_128": digest}
            memory.release()
            for name, data in texts.items():
                ckpt_format.write_file(temporary / name, data)
                written[name] = {"size": len(data), "xxh3_128": digest_of(data)}
            if self.rank != 0:
                _write_part(temporary, self.rank, written)
                return None
            for rank in range(1, self.ranks):
                written |= _read_part(temporary, rank, deadline=time.monotonic() + float(command["rank_timeout_s"]))
            manifest = Manifest(
                step=step,
                kind=command["kind"],
                ranks=self.ranks,
                metrics=command["metrics"],
                files=written,
                written=datetime.now(UTC).isoformat(timespec="seconds"),
            )
            with self._lock:
                name = ckpt_format.publish(self.folder, temporary, manifest)
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
        """Delete old checkpoints, never the last two, if space is short. Raises CheckpointError if it remains short."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._free_bytes() >= size_bytes + MARGIN_BYTES:
            return
        with self._lock:
            for name in ckpt_format.quarantined_names(self.folder):
                shutil.rmtree(self.folder / name, ignore_errors=True)
            if self._free_bytes() < size_bytes + MARGIN_BYTES:
                self._delete(self._surplus(Retention(keep_last=MIN_VERIFIED)))
        if (free := self._free_bytes()) < size_bytes + MARGIN_BYTES:
            raise CheckpointError(
                f"{self.folder}: {(size_bytes + MARGIN_BYTES) / 1e6:.1f} MB needed ({size_bytes / 1e6:.1f} and a "
                f"margin of {MARGIN_BYTES / 1e6:.1f}), {free / 1e6:.1f} MB free; free some or give the job a "
                "larger volume"
            )

    def _free_bytes(self) -> int:
        return shutil.disk_usage(self.folder).free

    def _explain(self, error: OSError) -> str:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            with contextlib.suppress(OSError):
                return (
                    f"{self.folder}: no space left ({self._free_bytes() / 1e6:.1f} MB free); free some or give "
                    "the job a larger volume"
                )
        return f"{self.folder}: {error.strerror or error}; check the disk and the mount"

    # --- after publishing

    def _verify_and_prune(self) -> None:
        """Read back the published checkpoint, then delete surplus checkpoints."""
        while True:
            with self._wake:
                self._is_reading = False
                self._wake.wait_for(lambda: self._unread or self._closing)
                if not self._unread:
                    return
                name = self._unread[-1]  # the newest is enough; it is read back before older ones are deleted
                self._unread.clear()
                self._is_reading = True
            try:
                ckpt_format.verify(self.folder / name)
                self.verified.add(name)
            except CheckpointError as error:
                if not (self.folder / name).exists():  # deleted by hand
                    continue
                with self._lock:
                    new_name = ckpt_format.quarantine(self.folder, name)
                text = f"{error}; it was written just now, so do not trust this disk (quarantined as {new_name})"
                reply({"warning": text})
            except StoreError as error:
                reply({"warning": f"{error}"})
                continue
            with self._lock, contextlib.suppress(OSError):  # the next save reports a folder that cannot be read
                self._delete(self._surplus(self.retention))
                for old in ckpt_format.quarantined_names(self.folder)[2:]:
                    shutil.rmtree(self.folder / old, ignore_errors=True)

    def _surplus(self, retention: Retention) -> list[str]:
        checkpoints = []
        for name in ckpt_format.checkpoint_names(self.folder):
            with contextlib.suppress(CheckpointError, StoreError):  # the next restore quarantines what cannot be read
                checkpoints.append((name, ckpt_format.read_manifest(self.folder / name)))
        return [
            name for name in retention.surplus(checkpoints, self.verified) if name not in (self._sending, self._newest)
        ]

    def _delete(self, names: list[str]) -> None:
        for name in names:
            hidden = self.folder / f"{ckpt_format.TEMPORARY_PREFIX}deleting-{name}-{self.token}"
            with contextlib.suppress(OSError):
                os.rename(self.folder / name, hidden)  # so that no partial checkpoint has this name
            shutil.rmtree(hidden, ignore_errors=True)
            self.verified.discard(name)

    def _send(self) -> None:
        """Copy each newest checkpoint to S3. One that is superseded before its turn is skipped."""
        assert self.remote is not None
        with contextlib.suppress(EstibaError):
            self.remote.store.abort_uploads()  # unfinished uploads cost money and are not listed
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
                reply({"sent": name, "size": size, "seconds": time.monotonic() - started})
                self.remote.prune(self.retention)
            except (EstibaError, OSError) as error:
                reply({"warning": f"{self.remote.url}/{name}: not uploaded: {error}", "unsent": name})
            finally:
                with self._lock:
                    self._sending = None


def _write_part(temporary: Path, rank: int, written: Mapping[str, Any]) -> None:
    part = temporary / f".rank-{rank}"
    ckpt_format.write_file(part.with_suffix(".part"), json.dumps(written).encode())
    os.rename(part.with_suffix(".part"), part)


def _read_part(temporary: Path, rank: int, deadline: float) -> dict[str, Any]:
    """Wait for another rank's list of files in the same folder. Raises CheckpointError on a timeout."""
    part = temporary / f".rank-{rank}"
    while True:
        try:
            files: dict[str, Any] = json.loads(part.read_bytes())
        except FileNotFoundError:
            if time.monotonic() > deadline:
                raise CheckpointError(f"{temporary.name}: rank {rank} did not write its part in time") from None
            time.sleep(POLL_S)
            continue
        part.unlink()
        return files


_output = threading.Lock()


def reply(message: Reply) -> None:
    """Send one line to the trainer. If the trainer is gone, the current file is finished anyway."""
    with _output, contextlib.suppress(OSError):
        sys.stdout.write(json.dumps(message) + "\n")
        sys.stdout.flush()


def main(make: Callable[[Mapping[str, Any]], Any]) -> None:
    """Run the writer that `make` returns for its settings, at a lower priority than the trainer, and die with it."""
    ignore_stop_signals()
    die_with_parent(int(sys.argv[1]))
    with contextlib.suppress(OSError):
        os.nice(5)
    make(json.loads(sys.stdin.readline())).run()


if __name__ == "__main__":
    main(Writer)
