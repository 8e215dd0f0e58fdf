"""Where text lies: files, directories, globs and lists, local or s3://, plain, gzip or zstd, as streams of bytes."""

from __future__ import annotations

import glob
import gzip
import io
import os
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import BinaryIO, Literal, cast

import zstandard

from estiba.errors import ConfigError, DataError
from estiba.stop import say
from estiba.store import Entry, FileStore, Store, open_store, split_location

Kind = Literal["text", "jsonl"]

_KINDS: dict[str, Kind] = {".txt": "text", ".text": "text", ".jsonl": "jsonl", ".ndjson": "jsonl"}
_PACKED = (".gz", ".zst")
_WILD = re.compile(r"[*?\[]")
_NAMES_SHOWN = 4


@dataclass(frozen=True, kw_only=True)
class Source:
    """One input file."""

    store: Store
    path: str
    size_bytes: int
    """As it lies there, compressed or not."""
    version: str
    """Changes when the file does: the ETag of an object; change time and inode of a file."""
    kind: Kind

    @property
    def url(self) -> str:
        return self.store.url_of(self.path)

    def open(self) -> Stream:
        return Stream(self)


class Stream:
    """The bytes of a source, decompressed by what they are, whatever the name says."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._raw = source.store.open(source.path, source.size_bytes)
        self._file = _decompressed(self._raw)

    def read(self, size_bytes: int) -> bytes:
        """That many bytes, fewer only at the end. Raises DataError where the file is damaged."""
        parts = []
        left = size_bytes
        try:
            while left and (part := self._file.read(left)):
                parts.append(part)
                left -= len(part)
        except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
            raise DataError(f"{self._source.url}: damaged or cut short ({error}); copy or compress it again") from error
        return b"".join(parts) if len(parts) != 1 else parts[0]

    def raw_position(self) -> int:
        """Bytes of the file as it lies there that were read."""
        return min(self._raw.tell(), self._source.size_bytes)

    def close(self) -> None:
        self._raw.close()


def find_sources(dataset_path: str) -> list[Source]:
    """The files at a path, in the order of their names; a list (separated by commas) is read in its own order.

    Each member is a file, a directory (with what is below it), a glob (`**` goes through directories) or an s3:// URL
    of any of these. Raises ConfigError where there is nothing, or nothing that can be read, and DataError on an empty
    file.
    """
    found: dict[str, Source] = {}
    for location in _members(dataset_path):
        for source in _sources_at(location):
            found.setdefault(source.url, source)  # named twice, read once
    for source in found.values():
        if source.size_bytes == 0:
            raise DataError(f"{source.url}: is empty (0 bytes); remove it, or put its text there again")
    return list(found.values())


def _members(dataset_path: str) -> list[str]:
    if not dataset_path.strip():
        raise ConfigError("dataset_path is empty; give a .txt or .jsonl file, a directory or a glob of them, or s3://")
    whole = dataset_path if os.path.exists(dataset_path) else dataset_path.strip()
    if "," not in whole or os.path.exists(whole):
        return [whole]
    return [part.strip() for part in whole.split(",") if part.strip()]


def _sources_at(location: str) -> list[Source]:
    if "://" not in location:
        if os.path.isdir(location):
            return _below(location)
        if os.path.exists(location):
            return [_named(location)]
        if _WILD.search(location):
            return _matching_here(location)
        raise ConfigError(
            f"dataset_path {location!r}: no such file or directory; give a .txt or .jsonl file, a directory, a glob or "
            "s3://bucket/prefix. In a container, mount it (-v DIR:/opt/ml/input/data/dataset) or name the channel so"
        )
    scheme, _, rest = location.partition("://")
    if _WILD.search(rest):
        return _matching_there(f"{scheme}://", rest)
    parent, name = split_location(location)
    if not location.endswith("/") and "/" in rest.rstrip("/"):
        store = open_store(parent)
        if (entry := store.head(name)) is not None:
            return [_source(store, entry, kind_named(location))]
    return _below(location)


def _named(location: str) -> Source:
    parent, name = split_location(location)
    store = open_store(parent)
    entry = store.head(name)
    if entry is None:
        raise ConfigError(f"dataset_path {location!r}: neither a file nor a directory; give a .txt or .jsonl file")
    return _source(store, entry, kind_named(location))


def _below(location: str) -> list[Source]:
    store = open_store(location)
    entries = store.list()
    return _chosen(location, [(store, entry) for entry in entries])


def _matching_here(pattern: str) -> list[Source]:
    paths = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
    files = []
    for path in paths:
        parent, name = split_location(path)
        store = open_store(parent)
        if (entry := store.head(name)) is not None:
            files.append((store, entry))
    return _chosen(pattern, files)


def _matching_there(scheme: str, pattern: str) -> list[Source]:
    """An object store knows no globs: list what is below the part before the first wildcard."""
    first = _WILD.search(pattern)
    assert first is not None
    root = pattern[: first.start()].rpartition("/")[0]
    if not root:
        raise ConfigError(f"dataset_path {scheme}{pattern}: a wildcard in the bucket's name; name the bucket")
    wanted = re.compile(_as_regex(pattern[len(root) + 1 :]))
    store = open_store(scheme + root)
    return _chosen(scheme + pattern, [(store, entry) for entry in store.list() if wanted.fullmatch(entry.path)])


def _as_regex(pattern: str) -> str:
    """`**/` is any directories, `*` and `?` stay within one, `[...]` is a set of characters."""
    out, i = "", 0
    while i < len(pattern):
        if pattern.startswith("**/", i):
            out, i = out + r"(?:[^/]+/)*", i + 3
        elif pattern.startswith("**", i):
            out, i = out + ".*", i + 2
        elif pattern[i] == "[" and "]" in pattern[i + 2 :]:
            end = pattern.index("]", i + 2)
            inside = pattern[i + 1 : end].replace("\\", r"\\")
            out, i = out + "[" + ("^" + inside[1:] if inside[0] == "!" else inside) + "]", end + 1
        else:
            out, i = out + {"*": "[^/]*", "?": "[^/]"}.get(pattern[i], re.escape(pattern[i])), i + 1
    return out


def _chosen(location: str, files: Iterable[tuple[Store, Entry]]) -> list[Source]:
    """The files whose names say text, with a word about the others. Raises ConfigError where there is none."""
    chosen, others = [], []
    for store, entry in files:
        hidden = any(part.startswith(".") for part in entry.path.split("/"))
        kind = None if hidden else _kind(entry.path)
        if kind is None:
            others.append(entry.path)
        else:
            chosen.append(_source(store, entry, kind))
    names = ", ".join(sorted(others)[:_NAMES_SHOWN]) + (", ..." if len(others) > _NAMES_SHOWN else "")
    if not chosen:
        raise ConfigError(
            f"dataset_path {location!r}: no .txt or .jsonl file there (found {names or 'nothing'}); give text, also "
            "as .txt.gz or .jsonl.zst, and name the directory or quote the glob"
        )
    if others:
        what = "file of another kind" if len(others) == 1 else "files of other kinds"
        say(f"input: {location}: {len(others)} {what} left alone ({names})")
    return sorted(chosen, key=lambda source: source.path)


def kind_named(location: str) -> Kind:
    """What a file holds by its name; one without an ending is text. Raises ConfigError for another ending."""
    kind = _kind(location)
    if kind is None:
        name = location.rpartition("/")[2]
        if "." in name.strip("."):
            raise ConfigError(
                f"dataset_path {location!r}: not a kind of file that is read here; give .txt (running text or a "
                "document a line) or .jsonl (objects with `text`), also with .gz or .zst behind, or rename it"
            )
        return "text"
    return kind


def _kind(path: str) -> Kind | None:
    name = path.rpartition("/")[2].lower()
    for suffix in _PACKED:
        name = name.removesuffix(suffix)
    return _KINDS.get(os.path.splitext(name)[1])


def _source(store: Store, entry: Entry, kind: Kind) -> Source:
    version = entry.etag or ""
    if isinstance(store, FileStore):
        try:
            status = store.path_of(entry.path).stat()
            version = f"{status.st_ctime_ns}-{status.st_ino}"
        except OSError:  # a dangling link: opening it says so, by its name
            version = "absent"
    size = entry.size_bytes if version != "absent" else 1
    return Source(store=store, path=entry.path, size_bytes=size, version=version, kind=kind)


def _decompressed(raw: BinaryIO) -> BinaryIO:
    magic = raw.read(4)
    raw.seek(0)
    if magic.startswith(b"\x1f\x8b"):
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
    if magic == b"\x28\xb5\x2f\xfd":
        return cast(BinaryIO, io.BufferedReader(_Frames(raw), 2**20))
    return raw


class _Frames(io.RawIOBase):
    """Zstandard frames, one after another. The library's own reader takes a frame that is cut short for a whole one."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._is_open = False
        self._in, self._out = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._out:
            self._in = self._in or self._raw.read(2**17)
            if not self._in:
                if self._is_open:
                    raise EOFError("a zstd frame without an end")
                return 0
            self._out = memoryview(self._frame.decompress(self._in))
            self._in, self._is_open = b"", True
            if self._frame.eof:
                self._in, self._is_open = self._frame.unused_data, False
                self._frame = zstandard.ZstdDecompressor().decompressobj()
        size = min(len(buffer), len(self._out))
        buffer[:size] = self._out[:size]
        self._out = self._out[size:]
        return size
