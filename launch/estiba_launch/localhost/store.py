"""Objects by relative key below one address: `file://` directories and `s3://` prefixes (any endpoint)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from ..contract import file_path
from ..errors import HostError

PART = ".estiba-part"


class Store(Protocol):
    """One place for objects. Every method raises HostError when the place cannot be reached or written."""

    uri: str

    def list(self) -> dict[str, int]:
        """Key to size in bytes, of every object."""

    def get(self, key: str, path: Path) -> None:
        """Write one object to `path`, making its directory."""

    def put(self, path: Path, key: str) -> None:
        """Store a file whole: readers see the old object or the new."""

    def delete(self, key: str) -> None:
        """Remove an object; one that is not there is no error."""


def open_store(uri: str) -> Store:
    """The store at `uri`. Raises HostError for an address of another kind."""
    if uri.startswith("file://"):
        return FileStore(file_path(uri))
    if uri.startswith("s3://"):
        return S3Store(uri)
    raise HostError(f"{uri}: neither s3:// nor file://; correct the job file")


@contextmanager
def _named_errors(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise HostError(f"{what}: {error.strerror or error}; make room or put the permissions right") from error


class FileStore:
    """A directory of this machine."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.uri = f"file://{root}"

    def list(self) -> dict[str, int]:
        with _named_errors(self.uri):
            return {key: stat.st_size for key, stat in walk(self.root)}

    def get(self, key: str, path: Path) -> None:
        with _named_errors(f"{self.uri}/{key}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.root / key, path)

    def put(self, path: Path, key: str) -> None:
        with _named_errors(f"{self.uri}/{key}"):
            place = self.root / key
            place.parent.mkdir(parents=True, exist_ok=True)
            part = place.with_name(f".{place.name[:200]}{PART}")
            try:
                with path.open("rb") as source, part.open("wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
                    target.flush()
                    os.fsync(target.fileno())
                part.replace(place)
            except BaseException:
                part.unlink(missing_ok=True)
                raise

    def delete(self, key: str) -> None:
        with _named_errors(f"{self.uri}/{key}"):
            (self.root / key).unlink(missing_ok=True)
            # Object stores have no empty directories; leave none behind, but keep the root.
            for parent in (self.root / key).parents:
                if parent == self.root:
                    break
                try:
                    parent.rmdir()
                except OSError:
                    break


class S3Store:
    """A prefix in a bucket; the endpoint, region and credentials are boto3's own (AWS_ENDPOINT_URL works)."""

    def __init__(self, uri: str) -> None:
        parts = urlsplit(uri)
        self.uri = uri.rstrip("/")
        self.bucket = parts.netloc
        self.prefix = parts.path.strip("/")
        self._client: Any = None

    @property
    def client(self) -> Any:
        if self._client is None:
            import boto3
            from botocore.config import Config

            self._client = boto3.client("s3", config=Config(retries={"mode": "standard", "total_max_attempts": 8}))
        return self._client

    def key(self, relative: str) -> str:
        return f"{self.prefix}/{relative}" if self.prefix else relative

    def list(self) -> dict[str, int]:
        return self._named(lambda: dict(self._pages(self.key(""))), self.uri)

    def list_prefix(self) -> dict[str, int]:
        """Objects whose key starts with the prefix, S3's way: `s3://b/tr` finds `train/a` too. Keys from the last /."""
        cut = len(self.prefix) - len(self.prefix.rpartition("/")[2])
        found = self._named(lambda: dict(self._pages(self.prefix)), self.uri)
        return {(self.prefix + key)[cut:]: size for key, size in found.items()}

    def _pages(self, prefix: str) -> Iterator[tuple[str, int]]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
        for page in pages:
            for entry in page.get("Contents", []):
                if not entry["Key"].endswith("/"):
                    yield entry["Key"][len(prefix) :], entry["Size"]

    def get(self, key: str, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        full = self.key(key)
        self._named(lambda: self.client.download_file(self.bucket, full, str(path)), f"s3://{self.bucket}/{full}")

    def put(self, path: Path, key: str) -> None:
        full = self.key(key)
        self._named(lambda: self.client.upload_file(str(path), self.bucket, full), f"s3://{self.bucket}/{full}")

    def delete(self, key: str) -> None:
        full = self.key(key)
        self._named(lambda: self.client.delete_object(Bucket=self.bucket, Key=full), f"s3://{self.bucket}/{full}")

    def _named(self, call: Callable[[], Any], what: str) -> Any:
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            return call()
        except (BotoCoreError, ClientError, Boto3Error) as error:
            raise HostError(f"{what}: {error}; check the address, the login and AWS_ENDPOINT_URL") from error
        except OSError as error:
            raise HostError(f"{what}: {error.strerror or error}; make room or put the permissions right") from error


def walk(root: Path) -> Iterator[tuple[str, os.stat_result]]:
    """(key, stat) of every regular file below `root`, sorted; links and half-written store parts are left out."""
    pending = [root]
    found: list[tuple[str, os.stat_result]] = []
    while pending:
        directory = pending.pop()
        try:
            entries = list(os.scandir(directory))
        except FileNotFoundError:
            continue
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                pending.append(Path(entry.path))
            elif entry.is_file(follow_symlinks=False) and not entry.name.endswith(PART):
                try:
                    found.append((os.path.relpath(entry.path, root), entry.stat(follow_symlinks=False)))
                except FileNotFoundError:
                    continue
    yield from sorted(found, key=lambda pair: pair[0])
