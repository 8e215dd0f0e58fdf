"""Results of a job: model and output of all hosts as two archives, or as plain files with CompressionType NONE."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from estiba_launch.errors import HostError, LaunchError, disk_error
from estiba_launch.jobs.archive import unpack
from estiba_launch.jobs.keys import paths_below
from estiba_launch.jobs.links import Found, InContainer, follow
from estiba_launch.jobs.s3 import disk_errors
from estiba_launch.jobs.store import open_store
from estiba_launch.request.contract import file_path

GZIP_LEVEL = 3
"""Vectors and weights hardly compress. A higher level only takes longer."""
FOLDERS = {"model": "/opt/ml/model", "output": "/opt/ml/output/data"}
"""Where a container leaves them."""
Mounts = Mapping[str, Path]
"""Folders of a container, and where they are on this machine."""


def merged(what: str, hosts: Sequence[Mounts], report: Callable[[str], None], *, keep_links: bool) -> Iterator[Found]:
    """The files that all hosts left, links followed. Where names collide, the first host's is kept.

    With `keep_links`, a link to something in the same folder stays one. What cannot be stored is reported.
    """
    files: set[str] = set()
    folders: set[str] = set()
    for mounts in hosts:
        root = mounts[FOLDERS[what]]
        if not root.is_dir():
            continue
        with disk_errors(str(root)):
            for one in follow(root, report, report, resolve=InContainer(mounts), keep_inside=keep_links):
                above = {str(folder) for folder in PurePosixPath(one.key).parents} - {"."}
                if one.key in folders or above & files:
                    report(f"{one.key} is a file on one host and a folder on another")
                elif one.key not in files:
                    files.add(one.key)
                    folders |= above
                    yield one


def location(request: Mapping[str, Any], what: str) -> str:
    """Address of `what` (model or output) of a job: S3OutputPath/JOB/output/..., as on SageMaker."""
    config = request["OutputDataConfig"]
    base = f"{config['S3OutputPath'].rstrip('/')}/{request['TrainingJobName']}/output"
    if config.get("CompressionType") == "NONE":
        return f"{base}/{'model' if what == 'model' else 'data'}"
    return f"{base}/{what}.tar.gz"


def refuse_unwritable(request: Mapping[str, Any], *, runs_here: bool) -> None:
    """Raise LaunchError when a folder of this machine cannot take the results or checkpoints of a job.

    A job on another machine leaves its results there until they are fetched, to a folder that `fetch` is given.
    """
    addresses = {
        "OutputDataConfig.S3OutputPath": request["OutputDataConfig"]["S3OutputPath"] if runs_here else "",
        "CheckpointConfig.S3Uri": request.get("CheckpointConfig", {}).get("S3Uri", ""),
    }
    for field, uri in addresses.items():
        if not uri.startswith("file://"):
            continue
        path = file_path(uri)
        with disk_errors(f"{field}: {uri}"):
            there = next(one for one in (path, *path.parents) if one.exists())
        if not there.is_dir():
            raise LaunchError(f"{field}: {uri}: {there} is a file; give a folder")
        if not os.access(there, os.W_OK | os.X_OK):
            raise LaunchError(
                f"{field}: {uri}: {there} cannot be written; correct its permissions or give another folder"
            )


def upload(
    request: Mapping[str, Any],
    what: str,
    hosts: Sequence[Mounts],
    scratch: Path,
    report: Callable[[str], None] = lambda _: None,
) -> str:
    """Store what the hosts left, merged, and return its address. `report` receives what cannot be stored.

    Raises HostError; calling again is safe.
    """
    address = location(request, what)
    if not address.endswith(".tar.gz"):
        store = open_store(address)
        for one in merged(what, hosts, report, keep_links=False):
            store.put(one.path, one.key)
        return address
    archive = scratch / f"{what}.tar.gz"
    scratch.mkdir(parents=True, exist_ok=True)
    try:
        with tarfile.open(archive, "w:gz", compresslevel=GZIP_LEVEL) as tar:
            for one in merged(what, hosts, report, keep_links=True):
                member = tar.gettarinfo(one.path, one.key)
                if one.link is not None:
                    member.linkname = one.link
                if member.isreg():
                    with one.path.open("rb") as file:
                        tar.addfile(member, file)
                else:
                    tar.addfile(member)
        parent, _, name = address.rpartition("/")
        open_store(parent).put(archive, name)
    except (OSError, tarfile.TarError) as error:
        left = hosts[0][FOLDERS[what]]
        reason = disk_error(error) if isinstance(error, OSError) else error
        raise HostError(f"{archive}: {reason}; the files are still in {left}") from error
    finally:
        archive.unlink(missing_ok=True)
    return address


def download(address: str, into: Path) -> int | None:
    """Download an archive and unpack it, or a prefix of plain files, into a folder.

    Returns the number of files, None when there is nothing at the address. Raises HostError, also for a name that leads
    out of the folder.
    """
    if not address.endswith(".tar.gz"):
        store = open_store(address)
        paths = paths_below(into, store.list(), address)
        for key, path in paths.items():
            store.get(key, path)
        return len(paths) or None
    parent, _, name = address.rpartition("/")
    store = open_store(parent)
    if name not in store.list():
        return None
    with disk_errors(str(into)):
        into.mkdir(parents=True, exist_ok=True)
    archive = into / f".{name}"
    try:
        store.get(name, archive)
        return unpack(archive, into)
    finally:
        archive.unlink(missing_ok=True)
