"""SAGEMAKER_SUBMIT_DIRECTORY: where the user's code is, on S3 or at a path in the container.

A folder or prefix, one file such as train.py, or a tar.gz. AWS's toolkit takes a tar.gz only, and names no address when
there is nothing.
"""

from __future__ import annotations

import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from estiba.errors import ConfigError

NAME = "SAGEMAKER_SUBMIT_DIRECTORY"
ARCHIVES = (".tar.gz", ".tgz", ".tar")


def fetch(location: str, into: Path, program: str | None) -> None:
    """Put the code into an empty folder. Raises ConfigError, which names the location and what is there."""
    with tempfile.TemporaryDirectory() as scratch:
        source = _download(location, Path(scratch)) if location.startswith("s3://") else _local(location)
        if source.is_dir():
            archives = [path for path in source.iterdir() if path.name.endswith(ARCHIVES)]
            if program and not (source / program).exists() and len(archives) == 1:
                source = archives[0]
        try:
            _copy(source, into)
        except (tarfile.TarError, EOFError, OSError) as error:
            raise ConfigError(f"{NAME}={location}: cannot be unpacked ({error}); pack it with tar -czf") from None
    if program and not (into / program).exists():
        there = ", ".join(sorted(path.name for path in into.iterdir())[:8]) or "no files"
        raise ConfigError(
            f"SAGEMAKER_PROGRAM={program}: not in {NAME}={location}, which holds {there}; name one of them"
        )


def _local(location: str) -> Path:
    path = Path(location.removeprefix("file://"))
    if not path.exists():
        raise ConfigError(f"{NAME}={location}: no such file or folder in the container; mount it, or put it on S3")
    return path


def _copy(source: Path, into: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, into, dirs_exist_ok=True)
    elif source.name.endswith(ARCHIVES):
        with tarfile.open(source) as archive:
            _extract(archive, into)
    else:
        shutil.copy(source, into)


def _extract(archive: tarfile.TarFile, into: Path) -> None:
    # Python before 3.11.4, as in Debian 12, has no filter.
    if hasattr(tarfile, "data_filter"):
        archive.extractall(into, filter="data")
        return
    for member in archive.getmembers():
        names = [member.name, *([member.linkname] if member.issym() or member.islnk() else [])]
        if member.isdev() or any(name.startswith("/") or ".." in name.split("/") for name in names):
            raise tarfile.TarError(f"{member.name!r} leads out of the folder")
    archive.extractall(into)


def _download(location: str, into: Path) -> Path:
    """The objects below an address, or the one that it names, in a folder or as a file of this host."""
    import boto3
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, _, key = location.removeprefix("s3://").partition("/")
    key = key.strip("/")
    try:
        client = boto3.client("s3")
        keys = list(_keys(client, bucket, f"{key}/" if key else ""))
        if not keys and key in _keys(client, bucket, key):
            path = into / PurePosixPath(key).name
            client.download_file(bucket, key, str(path))
            return path
        for one in keys:
            relative = one[len(key) + 1 :] if key else one
            if any(part in ("", ".", "..") for part in relative.split("/")):
                raise ConfigError(f"s3://{bucket}/{one}: leads out of {location}; rename or remove the object")
            path = into / relative
            path.parent.mkdir(parents=True, exist_ok=True)
            client.download_file(bucket, one, str(path))
    except (BotoCoreError, ClientError, Boto3Error, OSError) as error:
        raise ConfigError(
            f"{NAME}={location}: {error}; check the address, the job's role and AWS_ENDPOINT_URL"
        ) from None
    if not keys:
        raise ConfigError(f"{NAME}={location}: no such object, and none below it; correct the address")
    return into


def _keys(client: Any, bucket: str, prefix: str) -> Iterator[str]:
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        yield from (one["Key"] for one in page.get("Contents", []) if not one["Key"].endswith("/"))
