"""What a job leaves: model and output of all hosts as two archives, or as plain files with CompressionType NONE."""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import HostError
from .store import Store, open_store, walk

GZIP_LEVEL = 3
"""Vectors and weights hardly compress; a higher level only takes longer."""


def merged(folders: list[Path]) -> Iterator[tuple[str, Path]]:
    """(key, file) over all hosts' folders; where two hosts wrote the same name, the first host's is kept."""
    seen: set[str] = set()
    for folder in folders:
        for key, _ in walk(folder):
            if key not in seen:
                seen.add(key)
                yield key, folder / key


def location(request: Mapping[str, Any], what: str) -> str:
    """Where `what` (model or output) of a job ends up: S3OutputPath/JOB/output/..., as on SageMaker."""
    config = request["OutputDataConfig"]
    base = f"{config['S3OutputPath'].rstrip('/')}/{request['TrainingJobName']}/output"
    if config.get("CompressionType") == "NONE":
        return f"{base}/{'model' if what == 'model' else 'data'}"
    return f"{base}/{what}.tar.gz"


def upload(request: Mapping[str, Any], what: str, folders: list[Path], scratch: Path) -> str:
    """Store the merged folders and return their address. Raises HostError; calling again is safe."""
    address = location(request, what)
    if not address.endswith(".tar.gz"):
        store = open_store(address)
        for key, path in merged(folders):
            store.put(path, key)
        return address
    archive = scratch / f"{what}.tar.gz"
    scratch.mkdir(parents=True, exist_ok=True)
    try:
        with tarfile.open(archive, "w:gz", compresslevel=GZIP_LEVEL) as tar:
            for key, path in merged(folders):
                tar.add(path, key, recursive=False)
        parent, _, name = address.rpartition("/")
        store = open_store(parent)
        store.put(archive, name)
    except (OSError, tarfile.TarError) as error:
        raise HostError(f"{archive}: {error}; make room, the files are still below {folders[0].parent}") from error
    finally:
        archive.unlink(missing_ok=True)
    return address


def fetch(request: Mapping[str, Any], what: str, into: Path) -> int:
    """Bring `what` (model or output) of a finished job into a folder, unpacked; returns the number of files."""
    address = location(request, what)
    if not address.endswith(".tar.gz"):
        store: Store = open_store(address)
        keys = store.list()
        for key in keys:
            store.get(key, into / key)
        return len(keys)
    parent, _, name = address.rpartition("/")
    into.mkdir(parents=True, exist_ok=True)
    archive = into / f".{name}"
    try:
        open_store(parent).get(name, archive)
        with tarfile.open(archive, "r:gz") as tar:
            members = [member for member in tar.getmembers() if member.isfile()]
            # `data` refuses links, devices and names that lead out of the folder.
            tar.extractall(into, members, filter="data")
            return len(members)
    except (tarfile.TarError, EOFError) as error:
        raise HostError(f"{address}: broken archive ({error}); the job may still be uploading") from error
    finally:
        archive.unlink(missing_ok=True)


def remove_tree(path: Path) -> None:
    """Remove a folder as far as possible; what a container made as root may stay for a later clean-up."""
    shutil.rmtree(path, ignore_errors=True)
