"""Local data for a job on AWS: an address that names its content, and the files to upload there."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from estiba_launch.errors import LaunchError
from estiba_launch.request.contract import file_path
from estiba_launch.request.jobfile import Upload

FOLDER = "inputs"


def with_uploads(body: dict[str, Any], prefix: str) -> tuple[dict[str, Any], tuple[Upload, ...]]:
    """(the request with its file:// channels moved below `prefix`, the files to upload there first)."""
    body = copy.deepcopy(body)
    uploads: tuple[Upload, ...] = ()
    for channel in body.get("InputDataConfig", []):
        source = channel.get("DataSource", {}).get("S3DataSource", {})
        if str(source.get("S3Uri")).startswith("file://"):
            source["S3Uri"], files = plan_upload(source["S3Uri"], prefix)
            uploads += files
    return body, uploads


def plan_upload(uri: str, prefix: str) -> tuple[str, tuple[Upload, ...]]:
    """(the address below `prefix` for a local file or directory, the uploads that fill it).

    The same names and bytes have the same address. Raises LaunchError if there is nothing to upload.
    """
    root = file_path(uri)
    digest = hashlib.sha256()
    stamped: list[tuple[str, Path, tuple[int, int]]] = []
    try:
        files = {path.name: path for path in [root] if path.is_file()} or dict(_files(root, (root.resolve(),)))
        for name, path in sorted(files.items()):
            stamp = stamp_of(path)
            with path.open("rb") as file:
                digest.update(f"{hashlib.file_digest(file, 'sha256').hexdigest()} {name}\n".encode())
            stamped.append((name, path, stamp))
    except UnicodeEncodeError:
        raise LaunchError(f"{uri}: {name!r} is not UTF-8, as names on S3 must be; rename it") from None
    except OSError as error:
        raise LaunchError(
            f"{uri}: {error.filename}: {error.strerror}; correct the address or its permissions"
        ) from None
    if not stamped:
        raise LaunchError(f"{uri}: an empty directory; put the data there or correct the address")
    address = f"{prefix.rstrip('/')}/{FOLDER}/{digest.hexdigest()[:32]}"
    return address, tuple(Upload(path, f"{address}/{name}".rpartition("/")[0], stamp) for name, path, stamp in stamped)


def stamp_of(path: Path) -> tuple[int, int]:
    """Size and modification time."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _files(folder: Path, ancestors: tuple[Path, ...]) -> Iterator[tuple[str, Path]]:
    for path in folder.iterdir():
        if path.is_dir():
            if path.resolve() in ancestors:
                raise LaunchError(f"{path}: a link to a directory that contains it; remove it")
            for name, file in _files(path, (*ancestors, path.resolve())):
                yield f"{path.name}/{name}", file
        elif path.is_file():
            yield path.name, path
        else:
            raise LaunchError(f"{path}: neither a file nor a directory, nor a link to one; remove it")
