"""Checkpoints on S3. Files are uploaded in parallel parts; the manifest is uploaded last and commits them."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from estiba.checkpoint import format as ckpt_format
from estiba.checkpoint.chunks import digest_of
from estiba.checkpoint.format import MANIFEST, Manifest
from estiba.checkpoint.retention import Retention
from estiba.errors import CheckpointError, StoreError
from estiba.storage import Store, open_store

DOWNLOADS = 16
DOWNLOAD_BYTES = 16 << 20


class Remote:
    """A folder of checkpoints at a URL."""

    def __init__(self, url: str) -> None:
        self.store: Store = open_store(url)
        self.url = self.store.url.rstrip("/")

    def names(self) -> list[str]:
        """Return the committed checkpoints, newest first."""
        names = []
        for entry in self.store.list():
            name, _, file = entry.path.partition("/")
            if file == MANIFEST and ckpt_format.step_and_copy(name):
                names.append(name)
        return sorted(names, key=ckpt_format.sort_key, reverse=True)

    def manifest(self, name: str) -> Manifest:
        """Read a checkpoint's manifest. Raises CheckpointError, StoreError."""
        path = f"{name}/{MANIFEST}"
        return Manifest.from_bytes(self.store.read(path), self.store.url_of(path))

    def read_verified(self, name: str, file: str) -> bytes:
        """Read one small file of a checkpoint. Raises CheckpointError, StoreError."""
        entry = self.manifest(name).files.get(file)
        data = self.store.read(f"{name}/{file}")
        if entry is None or digest_of(data) != entry["xxh3_128"]:
            raise CheckpointError(f"{self.store.url_of(name)}/{file}: its bytes do not match their digest")
        return data

    def send(self, path: Path) -> int:
        """Upload a published checkpoint. Returns its size in bytes. Raises StoreError, OSError."""
        manifest = ckpt_format.read_manifest(path)
        data = (path / MANIFEST).read_bytes()
        # S3 may have a checkpoint of this step whose local copy was quarantined or deleted: revoke it first.
        if self.store.head(f"{path.name}/{MANIFEST}") is not None:
            self.store.delete(f"{path.name}/{MANIFEST}")
        for name in sorted(manifest.files):
            self.store.put_file(f"{path.name}/{name}", path / name)
        self.store.write(f"{path.name}/{MANIFEST}", data)
        return manifest.size_bytes

    def fetch(self, name: str, folder: Path) -> str:
        """Download a checkpoint, verify it and publish it in `folder`. Returns its name there.

        Raises CheckpointError if it does not verify, and StoreError.
        """
        manifest = self.manifest(name)
        temporary = folder / f"{ckpt_format.TEMPORARY_PREFIX}{name}-from-remote-{os.getpid()}"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir(parents=True)
            for file, entry in manifest.files.items():
                self._get(f"{name}/{file}", temporary / file, int(entry["size"]))
            (temporary / MANIFEST).write_bytes(manifest.to_bytes())
            ckpt_format.verify(temporary)
            return ckpt_format.publish(folder, temporary, manifest)
        except OSError as error:  # an error of this disk; the checkpoint on S3 is kept
            raise StoreError(f"{folder}: {error.strerror or error}; check the disk and the mount") from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def quarantine(self, name: str) -> None:
        """Revoke the commit. The files stay for inspection until the prefix is pruned."""
        self.store.rename(f"{name}/{MANIFEST}", f"{name}/{MANIFEST}.bad")

    def supersede(self, name: str) -> None:
        """Rename a checkpoint so that it is not used, manifest first. Nothing is deleted."""
        new_name = f"{ckpt_format.SUPERSEDED_PREFIX}{name}"
        self.store.rename(f"{name}/{MANIFEST}", f"{new_name}/{MANIFEST}")
        for entry in self.store.list(name):
            self.store.rename(entry.path, f"{new_name}/{entry.path.removeprefix(name + '/')}")

    def prune(self, retention: Retention) -> None:
        """Delete surplus checkpoints, manifest first, and the files of unfinished uploads of older steps."""
        names = self.names()
        checkpoints = []
        for name in names:
            try:
                checkpoints.append((name, self.manifest(name)))
            except CheckpointError:
                continue
        surplus = set(retention.surplus(checkpoints, [name for name, _ in checkpoints]))
        for name in surplus:
            self.store.delete(f"{name}/{MANIFEST}")
        newest = ckpt_format.step_and_copy(names[0]) if names else None
        for entry in self.store.list():
            name = entry.path.partition("/")[0]
            position = ckpt_format.step_and_copy(name)
            if name in surplus or (position and newest and position < newest and name not in names):
                self.store.delete(entry.path)

    def _get(self, path: str, target: Path, size_bytes: int) -> None:
        entry = self.store.head(path)
        if entry is None or entry.size_bytes != size_bytes:
            problem = "is missing" if entry is None else f"has {entry.size_bytes} bytes"
            raise CheckpointError(f"{self.store.url_of(path)}: {problem} where {size_bytes} bytes were uploaded")
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)

        def part(start: int) -> None:
            data = self.store.read(path, start, min(DOWNLOAD_BYTES, size_bytes - start))
            while data:
                count = os.pwrite(descriptor, data, start)
                data, start = data[count:], start + count

        try:
            with ThreadPoolExecutor(DOWNLOADS) as pool:
                list(pool.map(part, range(0, size_bytes, DOWNLOAD_BYTES)))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
