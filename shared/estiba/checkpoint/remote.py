"""Checkpoints on S3: files in parallel parts, the manifest last, as the commit."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from estiba.checkpoint import directory
from estiba.checkpoint.directory import MANIFEST, Manifest
from estiba.checkpoint.retention import Retention
from estiba.errors import CheckpointError, StoreError
from estiba.store import Store, open_store

DOWNLOADS = 16
DOWNLOAD_BYTES = 16 << 20


class Remote:
    """The same folder of checkpoints, at a URL."""

    def __init__(self, url: str) -> None:
        self.store: Store = open_store(url)
        self.url = self.store.url.rstrip("/")

    def names(self) -> list[str]:
        """Committed checkpoints, newest first."""
        found = []
        for entry in self.store.list():
            name, _, file = entry.path.partition("/")
            if file == MANIFEST and directory.order_of(name):
                found.append(name)
        return sorted(found, key=lambda name: directory.order_of(name) or (0, 0), reverse=True)

    def manifest(self, name: str) -> Manifest:
        """Raises CheckpointError, StoreError."""
        path = f"{name}/{MANIFEST}"
        return Manifest.from_bytes(self.store.read(path), self.store.url_of(path))

    def send(self, path: Path) -> int:
        """Upload a published checkpoint. Returns its size in bytes. Raises StoreError, OSError."""
        manifest = directory.read_manifest(path)
        data = (path / MANIFEST).read_bytes()
        # A name that is in use: the one before had the same step, and was set aside or deleted here.
        if self.store.head(f"{path.name}/{MANIFEST}") is not None:
            self.store.delete(f"{path.name}/{MANIFEST}")
        for name in sorted(manifest.files):
            self.store.put_file(f"{path.name}/{name}", path / name)
        self.store.write(f"{path.name}/{MANIFEST}", data)
        return manifest.size_bytes

    def fetch(self, name: str, folder: Path) -> str:
        """Download, verify and publish here. Returns the local name. Raises CheckpointError, StoreError."""
        manifest = self.manifest(name)
        temporary = folder / f"{directory.TEMPORARY_PREFIX}{name}-from-remote-{os.getpid()}"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir(parents=True)
            for file, entry in manifest.files.items():
                self._get(f"{name}/{file}", temporary / file, int(entry["size"]))
            (temporary / MANIFEST).write_bytes(manifest.to_bytes())
            directory.verify(temporary)
            return directory.publish(folder, temporary, manifest)
        except OSError as error:  # this disk's fault: the copy over there is good and stays
            raise StoreError(f"{folder}: {error.strerror or error}; check the disk and the mount") from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def set_aside(self, name: str) -> None:
        """Take the commit back; the files stay for a look until the prefix is cleaned."""
        self.store.rename(f"{name}/{MANIFEST}", f"{name}/{MANIFEST}.bad")

    def prune(self, retention: Retention) -> None:
        """Delete what is surplus, manifest first, and what uploads that never ended left of older steps."""
        names = self.names()
        found = []
        for name in names:
            try:
                found.append((name, self.manifest(name)))
            except CheckpointError:
                continue
        surplus = set(retention.surplus(found, [name for name, _ in found]))
        for name in surplus:
            self.store.delete(f"{name}/{MANIFEST}")
        newest = directory.order_of(names[0]) if names else None
        for entry in self.store.list():
            name = entry.path.partition("/")[0]
            order = directory.order_of(name)
            if name in surplus or (order and newest and order < newest and name not in names):
                self.store.delete(entry.path)

    def _get(self, path: str, target: Path, size_bytes: int) -> None:
        there = self.store.head(path)
        if there is None or there.size_bytes != size_bytes:
            found = "is not there" if there is None else f"has {there.size_bytes} bytes"
            raise CheckpointError(f"{self.store.url_of(path)}: {found} where {size_bytes} bytes were uploaded")
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
