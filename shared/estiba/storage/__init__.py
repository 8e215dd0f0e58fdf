"""Object storage by URL: `s3://bucket/prefix`, `file:///dir` or a plain path, behind one small interface."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import unquote

from estiba.errors import ConfigError
from estiba.storage.base import TEMPORARY_SUFFIX, Entry, Store, exact_reader, split_location
from estiba.storage.local import FileStore, copy_tree, sync_directory

__all__ = [
    "TEMPORARY_SUFFIX",
    "Entry",
    "FileStore",
    "Store",
    "exact_reader",
    "open_store",
    "split_location",
    "stage",
    "sync_directory",
]


def open_store(location: str | os.PathLike[str]) -> Store:
    """Return the store at a URL or path. Raises ConfigError for an unknown scheme."""
    text = os.fspath(location)
    scheme, separator, rest = text.partition("://")  # not urlsplit: a # or ? in a name is part of the name
    scheme = scheme.lower()
    if not separator:
        return FileStore(Path(text))
    if scheme == "file":
        host, _, path = rest.partition("/")
        if host not in ("", "localhost"):
            raise ConfigError(f"{text}: names the host {host!r}; a file URL has three slashes: file:///{rest}")
        return FileStore(Path("/" + unquote(path)))
    if scheme == "s3":
        from estiba.storage.s3 import S3ObjectStore  # takes a second to import

        return S3ObjectStore(text)
    raise ConfigError(f"{text}: storage scheme {scheme!r} is not supported; use s3://, file:// or a path")


def stage(location: str, folder: Path) -> Path:
    """Copy everything below a URL into `folder` unless it exists; it appears when complete. Returns it."""
    return copy_tree(open_store(location), folder)
