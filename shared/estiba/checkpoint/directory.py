"""One checkpoint: a directory that is published whole, and of which every byte is verified before it is used.

    step-00000120/
        model.safetensors            weights alone, by their own names; plain safetensors reads them
        state.safetensors            every other tensor (state-00001.safetensors: rank 1's own)
        state.json                   everything that is no tensor, and which tensor goes where
        manifest.json                step, sizes and xxh3-128 of the files above, and a digest of itself

Written beside under a hidden name, every file fsynced, the manifest last, then renamed, then the parent fsynced.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from estiba.checkpoint import disk
from estiba.errors import CheckpointError, StoreError
from estiba.store import sync_directory

FORMAT = "estiba-checkpoint/1"
MANIFEST = "manifest.json"
TEMPORARY_PREFIX = ".saving-"
BAD_PREFIX = "bad-"
NOT_ITS_FAULT = (errno.EACCES, errno.EPERM, errno.ENOMEM, errno.EMFILE, errno.ENFILE)
"""Errors of this process, not of the bytes: nothing is set aside for them."""
_NAME = re.compile(r"step-(\d{8,})(?:-(\d+))?")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def name_of(step: int, copy: int = 0) -> str:
    """`step-00000120`; a second checkpoint of the same step is `step-00000120-1`."""
    return f"step-{step:08d}" + (f"-{copy}" if copy else "")


def order_of(name: str) -> tuple[int, int] | None:
    """Step and copy by which checkpoints are sorted; None where the name is not a checkpoint's."""
    match = _NAME.fullmatch(name)
    return (int(match[1]), int(match[2] or 0)) if match else None


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint holds."""

    step: int
    kind: str = "step"
    """step, interrupt or final."""
    ranks: int = 1
    metrics: Mapping[str, float] = field(default_factory=dict)
    files: Mapping[str, Mapping[str, Any]]
    """name -> {"size": bytes, "xxh3_128": 32 hexadecimal digits}"""
    written: str = ""
    """UTC time."""

    @property
    def size_bytes(self) -> int:
        return sum(int(entry["size"]) for entry in self.files.values())

    def to_bytes(self) -> bytes:
        body = {
            "format": FORMAT,
            "step": self.step,
            "kind": self.kind,
            "ranks": self.ranks,
            "written": self.written,
            "metrics": dict(self.metrics),
            "files": {name: dict(self.files[name]) for name in sorted(self.files)},
        }
        return (json.dumps({**body, "xxh3_128": _digest_of_body(body)}, indent=1) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Manifest:
        """Raises CheckpointError for anything that this version did not write, or that changed since."""
        try:
            body = json.loads(data)
            digest = body.pop("xxh3_128")
            if body["format"] != FORMAT:
                raise CheckpointError(f"{where}: format {body['format']!r}, this version reads {FORMAT!r}")
            if digest != _digest_of_body(body):
                raise ValueError("its bytes do not match its digest")
            files = body["files"]
            if bad := [name for name in files if not _FILE.fullmatch(name) or name == MANIFEST]:
                raise ValueError(f"file names {bad}")
            found = cls(
                step=int(body["step"]),
                kind=str(body["kind"]),
                ranks=int(body["ranks"]),
                written=str(body["written"]),
                metrics=body["metrics"],
                files=files,
            )
            if found.to_bytes() != data:  # 1e-05 and 1E-05 are one number, and one bit apart
                raise ValueError("its bytes are not those that were written")
            return found
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{where}: not a whole manifest ({error})") from None


def _digest_of_body(body: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())


# --- finding -------------------------------------------------------------------------------------------------------


def names_in(folder: Path) -> list[str]:
    """Published checkpoints, newest first. Those without a manifest were not ours to publish and are left out."""
    try:
        names = [entry.name for entry in os.scandir(folder) if entry.is_dir()]
    except FileNotFoundError:
        return []
    found = [name for name in names if order_of(name) and (folder / name / MANIFEST).exists()]
    return sorted(found, key=lambda name: order_of(name) or (0, 0), reverse=True)


def clean(folder: Path, keep: str | None = None) -> list[str]:
    """Delete what killed writers left: hidden folders, and folders that a copy from S3 left without a manifest.

    `keep` is the hidden folder of a writer that is at work. Returns what was incomplete though it bore a
    checkpoint's name.
    """
    incomplete = []
    with contextlib.suppress(FileNotFoundError):
        for entry in list(os.scandir(folder)):
            if not entry.is_dir(follow_symlinks=False) or entry.name == keep:
                continue
            is_half = order_of(entry.name) is not None and not (folder / entry.name / MANIFEST).exists()
            if is_half:
                incomplete.append(entry.name)
            if is_half or entry.name.startswith(TEMPORARY_PREFIX):
                shutil.rmtree(entry.path, ignore_errors=True)
    return incomplete


def set_aside(folder: Path, name: str) -> str | None:
    """Rename a checkpoint that does not verify, so that nothing takes it for one. Returns its new name."""
    for attempt in range(1000):
        new_name = f"{BAD_PREFIX}{name}" + (f"-{attempt}" if attempt else "")
        if (folder / new_name).exists():
            continue
        with contextlib.suppress(OSError):
            os.rename(folder / name, folder / new_name)
            return new_name
        return None
    return None


def bad_in(folder: Path) -> list[str]:
    """What was set aside, newest first."""
    with contextlib.suppress(FileNotFoundError):
        found = [entry for entry in os.scandir(folder) if entry.is_dir() and entry.name.startswith(BAD_PREFIX)]
        return [entry.name for entry in sorted(found, key=lambda entry: entry.stat().st_mtime, reverse=True)]
    return []


# --- publishing ----------------------------------------------------------------------------------------------------


def write_file(path: Path, data: bytes) -> None:
    """A small file, on the disk when this returns."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def publish(folder: Path, temporary: Path, manifest: Manifest) -> str:
    """Write the manifest, make the folder durable and give it its name. Returns the name."""
    write_file(temporary / MANIFEST, manifest.to_bytes())
    sync_directory(temporary)
    copy = 0
    while True:
        name = name_of(manifest.step, copy)
        if not (folder / name).exists():  # rename would replace an empty folder
            try:
                os.rename(temporary, folder / name)
                break
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                    raise
        copy += 1
    sync_directory(folder)
    return name


# --- loading -------------------------------------------------------------------------------------------------------


def read_manifest(path: Path) -> Manifest:
    """Raises CheckpointError; StoreError where this process cannot read what may be good."""
    with _explained(path / MANIFEST):
        data = (path / MANIFEST).read_bytes()
    return Manifest.from_bytes(data, str(path / MANIFEST))


def read_verified(path: Path, manifest: Manifest, name: str) -> memoryview:
    """One file's bytes, read once: the bytes that were checked are the bytes that are used.

    Raises CheckpointError where its size or digest differs from the manifest's.
    """
    entry = manifest.files.get(name)
    if entry is None:
        raise CheckpointError(f"{path}: its manifest names no {name}")
    with _explained(path / name):
        data = disk.read(path / name, int(entry["size"]))
    if xxhash.xxh3_128_hexdigest(data) != entry["xxh3_128"]:
        raise CheckpointError(f"{path / name}: its bytes do not match their digest")
    return data


def verify(path: Path) -> Manifest:
    """Compare every byte on the disk with the manifest. Raises CheckpointError."""
    manifest = read_manifest(path)
    for name, entry in manifest.files.items():
        with _explained(path / name):
            digest = disk.digest_of(path / name, int(entry["size"]))
        if digest != entry["xxh3_128"]:
            raise CheckpointError(f"{path / name}: its bytes do not match their digest")
    return manifest


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in NOT_ITS_FAULT:
            raise StoreError(
                f"{path}: cannot be read ({error.strerror}) by user {os.getuid()}; this says nothing about the "
                "checkpoint, which is left as it is: mend that and run again"
            ) from None
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
    except EOFError as error:
        raise CheckpointError(f"{path}: {error}") from None
