"""The process that writes one rank's parts of sharded checkpoints, and copies them to S3 while training continues.

`ShardedCheckpointManager` starts it. It reads commands as JSON lines from standard input and replies on standard
output, as `writer` does. A part is written, fsynced and read back before its record is written. On S3 any rank commits
a checkpoint once all parts are there, so the loss of one host, the main one too, does not lose what all had uploaded.
"""

from __future__ import annotations

import errno
import json
import mmap
import shutil
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import xxhash

from estiba.checkpoint import disk
from estiba.checkpoint.format import MANIFEST
from estiba.checkpoint.retention import Retention
from estiba.checkpoint.sharded import format as sharded
from estiba.checkpoint.sharded.retention import prune_folder, prune_store
from estiba.checkpoint.writer import MARGIN_BYTES, main, reply
from estiba.errors import CheckpointError, EstibaError
from estiba.storage import FileStore, Store, open_store, sync_directory

POLL_S = 0.5
"""Seconds between two looks at S3 for the other ranks' parts. The ranks other than the main one look less often."""
OTHERS_POLL_S = 5.0
COMMIT_TIMEOUT_S = 600.0
CLOSING_TIMEOUT_S = 30.0
"""How long a job that ends waits for parts of others, each time that one arrives."""


@dataclass(frozen=True)
class Owner:
    """Whose part a file is: a rank's of the job, or, after a loss, a rank's of the replica that lives on."""

    token: str
    rank: int
    ranks: int


class ShardedWriter:
    """Writes the parts of one rank."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.folder = Path(settings["folder"])
        self.store = FileStore(self.folder)
        self.owner = Owner(str(settings["token"]), int(settings["rank"]), int(settings["ranks"]))
        self.is_first_of_host = int(settings["local_rank"]) == 0
        self.descriptor = int(settings["descriptor"])
        self.retention = Retention.model_validate(settings["retention"])
        self.remote: Store | None = open_store(settings["upload"]) if settings["upload"] else None
        self._map: mmap.mmap | None = None
        self._wake = threading.Condition()
        self._unsent: list[tuple[str, Owner]] = []
        self._committed_remotely: set[Owner] = set()
        self._closing = threading.Event()
        self._sender = threading.Thread(target=self._send, daemon=True)
        if self.remote is not None:
            self._sender.start()

    def run(self) -> None:
        for line in sys.stdin:
            command = json.loads(line)
            if command["do"] == "close":
                break
            step = int(command["step"])
            try:
                if command["do"] == "save":
                    replica = command.get("replica")
                    owner = self.owner if replica is None else Owner(**replica)
                    part = self.save(command, owner)
                    if replica is None:
                        reply({"written": step, "part": part.to_bytes().decode()})
                    if command["is_uploaded"] and self.remote is not None:
                        with self._wake:
                            self._unsent.append((command["name"], owner))
                            self._wake.notify_all()
                    if replica is not None:
                        if owner.rank == 0:
                            self.commit_replica(command["name"], owner, float(command["timeout_s"]))
                        reply({"step": step})
                else:
                    self.commit(command)
                    reply({"step": step})
            except OSError as error:
                reply({"failed": self._explain(error), "step": step})
            except EstibaError as error:
                reply({"failed": str(error), "step": step})
        with self._wake:
            self._closing.set()
            self._wake.notify_all()
        if self._sender.is_alive():
            self._sender.join()

    # --- the folder

    def save(self, command: Mapping[str, Any], owner: Owner) -> sharded.Part:
        """Write this rank's part, read it back, and write its record. Raises CheckpointError, OSError."""
        name, size = str(command["name"]), int(command["size"])
        if self.is_first_of_host and command["kept"] is not None:
            prune_folder(self.folder, kept=command["kept"])
        self._check_room(int(command["needed"]))
        place = self.folder / name / sharded.part_name(owner.rank, owner.token)
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        path = place / sharded.PART_DATA
        try:
            memory = memoryview(self._mapped(command["buffer_bytes"]))
            pieces = [
                xxhash.xxh3_128_hexdigest(memory[start : min(start + sharded.PIECE_BYTES, size)])
                for start in range(0, size, sharded.PIECE_BYTES)
            ]
            digest = disk.write(path, memory, 0, size)
            memory.release()
            if disk.digest_of(path, size) != digest:
                raise CheckpointError(
                    f"{path}: was written just now and reads back differently; do not trust this disk"
                )
            part = sharded.Part(
                token=owner.token,
                rank=owner.rank,
                ranks=owner.ranks,
                size=size,
                piece_bytes=sharded.PIECE_BYTES,
                pieces=pieces,
                written=datetime.now(UTC).isoformat(timespec="seconds"),
                **command["part"],
            )
            self.store.write(f"{name}/{part.folder}/{sharded.PART_RECORD}", part.to_bytes())
        except BaseException:
            shutil.rmtree(place, ignore_errors=True)
            raise
        sync_directory(self.folder / name)
        sync_directory(self.folder)
        return part

    def commit(self, command: Mapping[str, Any]) -> None:
        """Commit in this host's folder, which may lack the other hosts' parts, and delete surplus checkpoints."""
        name = str(command["name"])
        parts = [sharded.Part.from_bytes(text.encode(), "a rank's part") for text in command["parts"]]
        manifest = sharded.ShardedManifest(parts=tuple(parts))
        if not manifest.is_whole:
            raise CheckpointError(f"{name}: the ranks saved different steps")
        path = f"{name}/{MANIFEST}"
        if not self.store.write_new(path, manifest.to_bytes()):
            other = sharded.read_manifest(self.store, name)
            if other.token != self.owner.token:
                raise CheckpointError(
                    f"{self.folder / path}: another attempt committed this step; its checkpoint is kept"
                )
        kept = prune_store(self.store, self.retention, keep=name)
        reply({"kept": kept})

    def commit_replica(self, name: str, owner: Owner, timeout_s: float) -> None:
        """Commit what the ranks of one replica wrote, once all did, here or on S3. Raises CheckpointError, StoreError.

        Nothing is deleted: another replica may be saving an earlier step.
        """
        end = time.monotonic() + timeout_s
        while owner not in self._committed_remotely:
            if sharded.commit_if_whole(self.store, name, owner.token) is not None:
                return
            if time.monotonic() > end:
                raise CheckpointError(f"not all {owner.ranks} ranks of this replica wrote their parts in time")
            time.sleep(POLL_S)

    def _check_room(self, size_bytes: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(self.folder).free) < size_bytes + MARGIN_BYTES:
            raise CheckpointError(
                f"{self.folder}: {size_bytes / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free; free some or give the job "
                "a larger volume"
            )

    def _mapped(self, size_bytes: int) -> mmap.mmap:
        if self._map is None or len(self._map) < size_bytes:
            self._map = mmap.mmap(self.descriptor, size_bytes, prot=mmap.PROT_READ)
        return self._map

    def _explain(self, error: OSError) -> str:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"{self.folder}: no space left; free some or give the job a larger volume"
        return f"{self.folder}: {error.strerror or error}; check the disk and the mount"

    # --- S3

    def _send(self) -> None:
        """Copy this rank's parts to S3 in order, and have each checkpoint committed."""
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._unsent or self._closing.is_set())
                if not self._unsent:
                    return
                name, owner = self._unsent.pop(0)
            started = time.monotonic()
            try:
                size = self.send(name, owner)
                reply({"sent": name, "size": size, "seconds": time.monotonic() - started})
                if owner.rank == 0 or self.is_first_of_host:
                    self.commit_remote(name, owner)
            except (EstibaError, OSError) as error:
                assert self.remote is not None
                reply(
                    {"warning": f"{self.remote.url_of(name)}: rank {owner.rank}: not uploaded: {error}", "unsent": name}
                )

    def send(self, name: str, owner: Owner) -> int:
        """Upload this rank's part, its record last. Returns its size. Raises StoreError, OSError."""
        assert self.remote is not None
        prefix = f"{name}/{sharded.part_name(owner.rank, owner.token)}"
        record = self.store.read(f"{prefix}/{sharded.PART_RECORD}")
        self.remote.put_file(f"{prefix}/{sharded.PART_DATA}", self.folder / prefix / sharded.PART_DATA)
        self.remote.write(f"{prefix}/{sharded.PART_RECORD}", record)
        return sharded.Part.from_bytes(record, self.remote.url_of(prefix)).size

    def commit_remote(self, name: str, owner: Owner) -> None:
        """Wait for the other ranks' parts and commit. Raises CheckpointError, StoreError."""
        assert self.remote is not None
        seen, changed_at = 0, time.monotonic()
        while True:
            manifest = sharded.commit_if_whole(self.remote, name, owner.token)
            if manifest is not None:
                if manifest.token != owner.token and owner == self.owner:  # for a replica, another's commit will do
                    raise CheckpointError("another attempt committed this step; its checkpoint is kept")
                break
            count = sum(entry.path.endswith(f"{owner.token}/{sharded.PART_RECORD}") for entry in self.remote.list(name))
            if count != seen:
                seen, changed_at = count, time.monotonic()
            limit_s = CLOSING_TIMEOUT_S if self._closing.is_set() else COMMIT_TIMEOUT_S
            if time.monotonic() - changed_at > limit_s:
                raise CheckpointError(f"{seen} of {owner.ranks} parts arrived; the checkpoint before it counts")
            with self._wake:
                if self._unsent and (owner.rank != 0 or self._unsent[0][1] != owner):
                    return  # the main rank waits for this one; or a replica is saved, as ranks were lost
            self._closing.wait(POLL_S if owner.rank == 0 or self._closing.is_set() else OTHERS_POLL_S)
            if self._closing.is_set():
                time.sleep(POLL_S)
        self._committed_remotely.add(owner)
        if owner == self.owner and owner.rank == 0:
            reply({"committed": name})
            prune_store(self.remote, self.retention, keep=name)


if __name__ == "__main__":
    main(ShardedWriter)
