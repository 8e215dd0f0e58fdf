"""Find the files at a dataset path, local or on S3, and open them (plain, gzip or zstd) as byte streams."""

from __future__ import annotations

import fnmatch
import glob
import gzip
import os
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import BinaryIO, Literal, cast

from backports import zstd

from estiba.errors import ConfigError, DataError
from estiba.log import get_logger
from estiba.storage import Entry, FileStore, Store, open_store, split_location

logger = get_logger(__name__)

Kind = Literal["text", "jsonl"]

_KINDS: dict[str, Kind] = {".txt": "text", ".text": "text", ".jsonl": "jsonl", ".ndjson": "jsonl"}
_COMPRESSED_SUFFIXES = (".gz", ".zst")
_WILDCARD = re.compile(r"[*?\[]")
_NAMES_SHOWN = 4


@dataclass(frozen=True, kw_only=True)
class Source:
    """One input file."""

    store: Store
    path: str
    size_bytes: int
    """Size of the stored file, compressed or not."""
    version: str
    """Changes with the file: an object's ETag, or a local file's change time and inode."""
    kind: Kind

    @property
    def url(self) -> str:
        return self.store.url_of(self.path)


class Stream:
    """A source's bytes. Compression is detected from the content, not the file name."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._raw = source.store.open(source.path, source.size_bytes)
        self._file = _decompressed(self._raw)

    def read(self, size_bytes: int) -> bytes:
        """Return `size_bytes` bytes, fewer only at the end. Raises DataError if the file is damaged."""
        try:
            return self._file.read(size_bytes)
        except (EOFError, gzip.BadGzipFile, zlib.error, zstd.ZstdError) as error:
            raise DataError(f"{self._source.url}: damaged or cut short ({error}); copy or compress it again") from error

    def raw_position(self) -> int:
        """Return how many bytes of the stored file have been read."""
        return min(self._raw.tell(), self._source.size_bytes)

    def close(self) -> None:
        self._raw.close()


def find_sources(dataset_path: str) -> list[Source]:
    """Return the files at a path, sorted by name; a comma-separated list keeps its own order.

    Each item is a file, a directory (searched recursively), a glob (`**` matches directories) or an s3:// URL of any of
    these. Raises ConfigError if no text is found, DataError for an empty file.
    """
    found: dict[str, Source] = {}
    for location in _split_list(dataset_path):
        for source in _sources_at(location):
            found.setdefault(source.url, source)  # a file named twice is read once
    for source in found.values():
        if source.size_bytes == 0:
            raise DataError(f"{source.url}: is empty (0 bytes); remove it, or restore its text")
    return list(found.values())


def check_reachable(dataset_path: str) -> None:
    """Raise StoreError within seconds if a location on S3 does not answer."""
    for location in _split_list(dataset_path) if "s3://" in dataset_path else ():
        if location.startswith("s3://"):
            open_store("/".join(location.split("/")[:3])).answers()


def _split_list(dataset_path: str) -> list[str]:
    if not dataset_path.strip():
        raise ConfigError("dataset_path is empty; give a .txt or .jsonl file, a directory, a glob, or s3://")
    whole = dataset_path if os.path.exists(dataset_path) else dataset_path.strip()
    if "," not in whole or os.path.exists(whole):
        return [whole]
    return [part.strip() for part in whole.split(",") if part.strip()]


def _sources_at(location: str) -> list[Source]:
    scheme, separator, rest = location.partition("://")
    if separator and _WILDCARD.search(rest):
        return _matching_url(f"{scheme}://", rest)
    if not separator and not os.path.exists(location) and _WILDCARD.search(location):
        return _select(location, filter(None, map(_entry, sorted(glob.glob(location, recursive=True)))))
    names_bucket = separator and "/" not in rest.rstrip("/")
    if not names_bucket and not location.endswith("/") and (entry := _entry(location)) is not None:
        return [_source(*entry, kind_named(location))]
    if separator or os.path.isdir(location):
        store = open_store(location)
        return _select(location, [(store, entry) for entry in store.list()])
    if os.path.exists(location) and not os.path.isfile(
        location
    ):  # its size and content must be the same in every attempt
        raise ConfigError(
            f"dataset_path {location!r}: is a pipe or a device, which cannot be read again; write the text to a file"
        )
    raise ConfigError(
        f"dataset_path {location!r}: no such file or directory; give a .txt or .jsonl file, a directory, a glob or "
        "s3://bucket/prefix. In a container, mount it (-v DIR:/opt/ml/input/data/dataset) or name the channel `dataset`"
    )


def _entry(location: str) -> tuple[Store, Entry] | None:
    parent, name = split_location(location)
    store = open_store(parent)
    entry = store.head(name)
    return None if entry is None else (store, entry)


def _matching_url(scheme: str, pattern: str) -> list[Source]:
    """Match a glob in an object store by listing everything below the part before the first wildcard."""
    root = re.split(_WILDCARD, pattern, maxsplit=1)[0].rpartition("/")[0]
    if not root:
        raise ConfigError(f"dataset_path {scheme}{pattern}: the bucket name has a wildcard; give the exact bucket")
    segments = pattern[len(root) + 1 :].split("/")
    store = open_store(scheme + root)
    entries = [entry for entry in store.list() if _matches(entry.path.split("/"), segments)]
    return _select(scheme + pattern, [(store, entry) for entry in entries])


def _matches(path: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern:
        return not path
    if pattern[0] == "**":
        return any(_matches(path[start:], pattern[1:]) for start in range(len(path) + 1))
    return bool(path) and fnmatch.fnmatchcase(path[0], pattern[0]) and _matches(path[1:], pattern[1:])


def _select(location: str, files: Iterable[tuple[Store, Entry]]) -> list[Source]:
    """Return the text files, by suffix, and log the others. Raises ConfigError if there is no text file."""
    selected, others = [], []
    for store, entry in files:
        is_hidden = any(part.startswith(".") for part in entry.path.split("/"))
        kind = None if is_hidden else _kind(entry.path)
        if kind is None:
            others.append(entry.path)
        else:
            selected.append(_source(store, entry, kind))
    names = ", ".join(sorted(others)[:_NAMES_SHOWN]) + (", ..." if len(others) > _NAMES_SHOWN else "")
    if not selected:
        raise ConfigError(
            f"dataset_path {location!r}: no .txt or .jsonl file there (found {names or 'nothing'}); give text files, "
            "also as .txt.gz or .jsonl.zst, and pass their directory or a quoted glob"
        )
    if others:
        what = "file of another kind" if len(others) == 1 else "files of other kinds"
        logger.info("input: %s: ignored %d %s (%s)", location, len(others), what, names)
    return sorted(selected, key=lambda source: source.path)


def kind_named(location: str) -> Kind:
    """Return the kind of a file by its suffix; no suffix means text. Raises ConfigError for unknown suffixes."""
    kind = _kind(location)
    if kind is None:
        name = location.rpartition("/")[2]
        if "." in name.strip("."):
            raise ConfigError(
                f"dataset_path {location!r}: this kind of file is not supported; give .txt (running text or "
                "one document per line) or .jsonl (objects with `text`), also with .gz or .zst added, or rename it"
            )
        return "text"
    return kind


def _kind(path: str) -> Kind | None:
    name = path.rpartition("/")[2].lower()
    for suffix in _COMPRESSED_SUFFIXES:
        name = name.removesuffix(suffix)
    return _KINDS.get(os.path.splitext(name)[1])


def _source(store: Store, entry: Entry, kind: Kind) -> Source:
    version, size_bytes = entry.etag or "", entry.size_bytes
    if isinstance(store, FileStore):
        try:
            status = store.path_of(entry.path).stat()
            version = f"{status.st_ctime_ns}-{status.st_ino}"
        except OSError:  # a dangling link; the error on opening it names it
            version, size_bytes = "absent", 1
    return Source(store=store, path=entry.path, size_bytes=size_bytes, version=version, kind=kind)


def _decompressed(raw: BinaryIO) -> BinaryIO:
    magic = raw.read(4)
    raw.seek(0)
    if magic.startswith(b"\x1f\x8b"):
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
    if magic == b"\x28\xb5\x2f\xfd":
        return cast(BinaryIO, zstd.ZstdFile(raw))
    return raw
