"""The format of a checkpoint: a directory that is published atomically and verified byte for byte before use.

    step-00000120/
        model.safetensors            the model's tensors by their own names, as plain safetensors
        state.safetensors            every other tensor (state-00001.safetensors: rank 1's own)
        state.json                   everything else, with each tensor's position in it
        manifest.json                step, sizes and xxh3-128 of the files above, and its own digest

It is written under a hidden name, every file is fsynced, the manifest last; then it is renamed and the parent fsynced.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from estiba.checkpoint import disk
from estiba.errors import CheckpointError, NewerFormatError, StoreError
from estiba.storage import sync_directory

FORMAT = "estiba-checkpoint/1"
MANIFEST = "manifest.json"
TEMPORARY_PREFIX = ".saving-"
BAD_PREFIX = "bad-"
SUPERSEDED_PREFIX = "superseded-"
"""A checkpoint that a run left behind by restarting from an earlier one. Never used or deleted automatically."""
PROCESS_ERRORS = (errno.EACCES, errno.EPERM, errno.ENOMEM, errno.EMFILE, errno.ENFILE)
"""Errors of this process, not of the data; no checkpoint is quarantined for them."""
_NAME = re.compile(r"step-(\d{8,})(?:-(\d+))?")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def checkpoint_name(step: int, copy: int = 0) -> str:
    """Return `step-00000120`, and `step-00000120-1` for a second checkpoint of the same step."""
    return f"step-{step:08d}" + (f"-{copy}" if copy else "")


def step_and_copy(name: str) -> tuple[int, int] | None:
    """Return the step and the copy in a checkpoint's name; None for any other name."""
    match = _NAME.fullmatch(name)
    return (int(match[1]), int(match[2] or 0)) if match else None


def sort_key(name: str) -> tuple[int, int]:
    """Return a sort key for checkpoint names, oldest first."""
    return step_and_copy(name) or (0, 0)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of a checkpoint."""

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
        """Parse a manifest. Raises CheckpointError for another format, or bytes that have changed."""
        try:
            body = json.loads(data)
            digest = body.pop("xxh3_128")
            if body["format"] != FORMAT:
                if _is_newer(body["format"]):
                    raise NewerFormatError(
                        f"{where}: written by a newer version (format {body['format']!r}; this one reads {FORMAT!r}); "
                        "use that version, or give another directory for checkpoints"
                    )
                raise CheckpointError(f"{where}: format {body['format']!r}, this version reads {FORMAT!r}")
            if digest != _digest_of_body(body):
                raise ValueError("its bytes do not match its digest")
            files = body["files"]
            if bad := [name for name in files if not _FILE.fullmatch(name) or name == MANIFEST]:
                raise ValueError(f"file names {bad}")
            manifest = cls(
                step=int(body["step"]),
                kind=str(body["kind"]),
                ranks=int(body["ranks"]),
                written=str(body["written"]),
                metrics=body["metrics"],
                files=files,
            )
            if manifest.to_bytes() != data:  # 1e-05 and 1E-05 are the same number with one bit changed
                raise ValueError("its bytes have changed")
            return manifest
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{where}: not a valid manifest ({error})") from None


def _is_newer(name: object) -> bool:
    family, _, version = str(name).rpartition("/")
    own_family, _, own_version = FORMAT.rpartition("/")
    return family == own_family and version.isdecimal() and int(version) > int(own_version)


def _digest_of_body(body: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())


# --- listing -------------------------------------------------------------------------------------------------------


def checkpoint_names(folder: Path) -> list[str]:
    """Return the published checkpoints, newest first. A folder without a manifest is not published."""
    try:
        names = [entry.name for entry in os.scandir(folder) if entry.is_dir()]
    except FileNotFoundError:
        return []
    found = [name for name in names if step_and_copy(name) and (folder / name / MANIFEST).exists()]
    return sorted(found, key=sort_key, reverse=True)


def remove_unfinished(folder: Path, keep: str | None = None) -> None:
    """Delete the hidden folders that killed writers left. `keep` is the one of a running writer."""
    with contextlib.suppress(FileNotFoundError):
        for entry in list(os.scandir(folder)):
            is_hidden = entry.is_dir(follow_symlinks=False) and entry.name.startswith(TEMPORARY_PREFIX)
            if is_hidden and entry.name != keep:
                shutil.rmtree(entry.path, ignore_errors=True)


def quarantine_incomplete(folder: Path) -> dict[str, str | None]:
    """Rename checkpoints without a manifest, whose copy may be under way. Returns old names to new ones."""
    incomplete = []
    with contextlib.suppress(FileNotFoundError):
        for entry in os.scandir(folder):
            is_checkpoint = entry.is_dir(follow_symlinks=False) and step_and_copy(entry.name) is not None
            if is_checkpoint and not (folder / entry.name / MANIFEST).exists():
                incomplete.append(entry.name)
    return {name: quarantine(folder, name) for name in sorted(incomplete)}


def quarantine(folder: Path, name: str, prefix: str = BAD_PREFIX) -> str | None:
    """Rename a checkpoint so that it is not used. Returns its new name, or None."""
    for attempt in range(1000):
        new_name = f"{prefix}{name}" + (f"-{attempt}" if attempt else "")
        if (folder / new_name).exists():
            continue
        with contextlib.suppress(OSError):
            os.rename(folder / name, folder / new_name)
            return new_name
        return None
    return None


def quarantined_names(folder: Path) -> list[str]:
    """Return the quarantined checkpoints, newest first."""
    with contextlib.suppress(FileNotFoundError):
        found = [entry for entry in os.scandir(folder) if entry.is_dir() and entry.name.startswith(BAD_PREFIX)]
        return [entry.name for entry in sorted(found, key=lambda entry: entry.stat().st_mtime, reverse=True)]
    return []


# --- publishing ----------------------------------------------------------------------------------------------------


def write_file(path: Path, data: bytes) -> None:
    """Write a small file and make it durable."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def publish(folder: Path, temporary: Path, manifest: Manifest) -> str:
    """Write the manifest, make the folder durable and rename it. Returns its new name."""
    write_file(temporary / MANIFEST, manifest.to_bytes())
    sync_directory(temporary)
    copy = 0
    while True:
        name = checkpoint_name(manifest.step, copy)
        if not (folder / name).exists():  # a rename would replace an empty folder
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
    """Read a manifest. Raises CheckpointError, or StoreError if it may be intact but this process cannot read it."""
    with _explained(path / MANIFEST):
        if not stat.S_ISREG(os.stat(path / MANIFEST).st_mode):  # reading a FIFO would wait for ever
            raise CheckpointError(f"{path / MANIFEST}: is not a regular file")
        data = (path / MANIFEST).read_bytes()
    return Manifest.from_bytes(data, str(path / MANIFEST))


def read_verified(path: Path, manifest: Manifest, name: str) -> memoryview:
    """Read one file once, so that the bytes checked are the bytes used.

    Raises CheckpointError if its size or digest differs from the manifest's.
    """
    entry = manifest.files.get(name)
    if entry is None:
        raise CheckpointError(f"{path}: its manifest lacks {name}")
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
        if error.errno in PROCESS_ERRORS:
            raise StoreError(
                f"{path}: cannot be read ({error.strerror}) by user {os.getuid()}; the checkpoint "
                "itself may be intact and is kept: make it readable and run again"
            ) from None
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
    except EOFError as error:
        raise CheckpointError(f"{path}: {error}") from None
