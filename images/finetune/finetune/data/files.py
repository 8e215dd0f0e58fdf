"""Find the files at a path and read them, decompressed. Compression is detected from the content, not the suffix."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import re
import stat
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from backports import zstd

from estiba.errors import ConfigError, DataError

MAX_FILE_BYTES = 2 * 2**30
"""A file is parsed in memory, which takes several times its size."""
BOMB_BYTES, BOMB_RATIO = 256 * 2**20, 500
"""A file that expands past both is damaged or hostile: repetitive tables shrink a hundredfold."""

_MAGIC: tuple[tuple[bytes, Callable[[BinaryIO], BinaryIO]], ...] = (
    (b"\x1f\x8b", lambda raw: cast(BinaryIO, gzip.GzipFile(fileobj=raw))),
    (b"\x28\xb5\x2f\xfd", lambda raw: cast(BinaryIO, zstd.ZstdFile(raw))),
    (b"\xfd7zXZ\x00", lambda raw: cast(BinaryIO, lzma.LZMAFile(raw))),  # noqa: SIM115 - closed by the caller
    (b"\x5d\x00\x00", lambda raw: cast(BinaryIO, lzma.LZMAFile(raw))),  # noqa: SIM115 - closed by the caller
    (b"BZh", lambda raw: cast(BinaryIO, bz2.BZ2File(raw))),
)
_MAX_LAYERS = 2
_DAMAGED = (EOFError, OSError, zlib.error, lzma.LZMAError, zstd.ZstdError, ValueError)
_COMPANIONS = re.compile(
    r"(readme|licen[cs]e|copying|notice|changelog|contributing)(\.\w+)?|_.*|dataset_infos?\.json|requirements\.txt"
    r"|.*\.(py|sh|crc|md5|sha\d+|manifest)|.*_\$folder\$",
    re.IGNORECASE,
)
"""Files that stand beside data and are not data. Given by name, they are read."""


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """One file to read."""

    path: Path
    name: str
    """Relative to the folder that was given, unless two files would have one name; errors and the report use it."""


@dataclass(frozen=True, kw_only=True)
class FoundFiles:
    """The files at a path, sorted by name, and how many are passed over."""

    files: list[InputFile]
    hidden: list[str]
    companions: list[str]


def find_files(locations: Sequence[Path]) -> FoundFiles:
    """Return the files at the given files and folders. Raises ConfigError if there are none."""
    files: dict[Path, InputFile] = {}
    taken: set[str] = set()
    hidden: list[str] = []
    companions: list[str] = []
    for location in locations:
        if location.is_dir():
            for path in _walk(location):
                name = path.relative_to(location).as_posix()
                if any(part.startswith(".") for part in name.split("/")):
                    hidden.append(name)
                elif _COMPANIONS.fullmatch(path.name):
                    companions.append(name)
                else:
                    _add(files, taken, path, name)
        elif os.path.lexists(location):
            _add(files, taken, location, location.name)
        else:
            raise ConfigError(f"{location}: no such file or folder; give a data file or a folder of data files")
    if not files:
        passed_over = ", ".join((hidden + companions)[:4])
        where = ", ".join(map(str, locations)) or "no location"
        found = f"only {passed_over}, which is not data" if passed_over else "the folder is empty"
        raise ConfigError(f"{where}: no data file ({found}); put CSV, JSON, JSONL, TXT or parquet files there")
    return FoundFiles(files=list(files.values()), hidden=hidden, companions=companions)


def _add(files: dict[Path, InputFile], taken: set[str], path: Path, name: str) -> None:
    """Add a file once. The second of a name is named by its whole path."""
    real = Path(os.path.realpath(path))
    if real not in files:
        files[real] = InputFile(path=path, name=path.as_posix() if name in taken else name)
        taken.add(files[real].name)


def read_file(file: InputFile) -> bytes:
    """Return a file's content, decompressed. Raises DataError if it is no regular file, empty, damaged or too large."""
    try:
        status = file.path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{file.name}: is not a regular file; give a data file")
        if status.st_size > MAX_FILE_BYTES:
            raise _too_large(file, status.st_size)
        data = file.path.read_bytes()
    except OSError as error:
        raise DataError(f"{file.name}: cannot be read ({error.strerror or error}); check the file or link") from error
    if not data:
        raise DataError(f"{file.name}: is empty (0 bytes); remove it, or restore its content")
    for _ in range(_MAX_LAYERS):
        opener = next((opener for magic, opener in _MAGIC if _is_compressed(data, magic)), None)
        if opener is None:
            return data
        data = _decompressed(file, data, opener)
        if not data:
            raise DataError(f"{file.name}: is empty after decompression; remove it, or restore its content")
    if any(_is_compressed(data, magic) for magic, _ in _MAGIC):
        raise DataError(f"{file.name}: is compressed more than {_MAX_LAYERS} times; decompress it")
    return data


def _walk(folder: Path) -> list[Path]:
    """The files in a folder and in those that it links to, each folder once."""
    paths: list[Path] = []
    visited: set[str] = set()
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=_unreadable):
        visited.add(os.path.realpath(parent))
        folders[:] = [name for name in sorted(folders) if os.path.realpath(os.path.join(parent, name)) not in visited]
        paths += [Path(parent) / name for name in names]
    return sorted(paths, key=lambda path: path.relative_to(folder).as_posix())


def _unreadable(error: OSError) -> None:
    raise DataError(f"{error.filename}: cannot be read ({error.strerror}); check the folder's permissions") from error


def _is_compressed(data: bytes, magic: bytes) -> bool:
    # bzip2's magic is three letters; the block size and the block's own magic follow
    return data.startswith(magic) and (magic != b"BZh" or data[4:10] in (b"1AY&SY", b"\x17rE8P\x90"))


def _decompressed(file: InputFile, data: bytes, opener: Callable[[BinaryIO], BinaryIO]) -> bytes:
    parts: list[bytes] = []
    size_bytes = 0
    try:
        with opener(io.BytesIO(data)) as stream:
            while part := stream.read(2**22):
                parts.append(part)
                size_bytes += len(part)
                if size_bytes > BOMB_BYTES and size_bytes > BOMB_RATIO * len(data):
                    raise DataError(
                        f"{file.name}: {len(data):,} bytes expand to more than {size_bytes:,}; "
                        "it is damaged or no data file: decompress it and look"
                    )
                if size_bytes > MAX_FILE_BYTES:
                    raise _too_large(file, size_bytes)
    except _DAMAGED as error:
        raise DataError(
            f"{file.name}: the compressed data is damaged or cut short ({' '.join(str(error).split())[:120]}); "
            "copy or compress it again"
        ) from error
    return b"".join(parts)


def _too_large(file: InputFile, size_bytes: int) -> DataError:
    return DataError(
        f"{file.name}: is larger than {MAX_FILE_BYTES // 2**30} GiB ({size_bytes:,} bytes); split it into several files"
    )
