"""What is staged in a directory: the digest of each piece. A killed process resumes from it.

While pieces arrive, the ledger lies in the directory itself. At the end it moves beside the directory, where no script
that lists its data finds it, and tells the next process that nothing is left to do.
"""

from __future__ import annotations

import contextlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

import xxhash

from estiba.staging.files import StagedFiles, digest_of, disk_error
from estiba.staging.pieces import Piece, PieceTable
from estiba.storage import TEMPORARY_SUFFIX, Entry

VERSION = 1
VERIFIERS = 8
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Ledger:
    """The digests of the pieces that a directory holds."""

    def __init__(self, table: PieceTable, folder: Path) -> None:
        self.table, self.folder = table, folder
        self.digests: dict[int, bytes] = {}
        self.published: set[int] = set()
        """Files that are complete under their final names."""
        self._file: TextIO | None = None

    @property
    def path(self) -> Path:
        name = xxhash.xxh3_64_hexdigest(self.table.source.encode("utf-8", "surrogateescape"))
        return self.folder / f".stage-{name}{TEMPORARY_SUFFIX}"

    @property
    def finished_path(self) -> Path:
        name = xxhash.xxh3_64_hexdigest(f"{self.folder} {self.table.source}".encode("utf-8", "surrogateescape"))
        return self.folder.parent / f".staged-{name}{TEMPORARY_SUFFIX}"

    def load(self, files: StagedFiles) -> None:
        """Find the pieces that an earlier process left, and verify them."""
        for path in (self.path, self.finished_path):
            claimed, times, gone = _read(path, self.table)
            for name in gone:
                files.discard(name)
            if claimed:
                self._verify(files, claimed, times)
                return

    def start(self) -> None:
        """Write the verified pieces to a new ledger, which `add` extends. Raises StoreError."""
        header = {
            "version": VERSION,
            "piece_bytes": self.table.piece_bytes,
            "files": [[entry.path, entry.size_bytes, entry.etag] for entry in self.table.files],
        }
        lines = [json.dumps(header), *(f"{index} {digest.hex()}" for index, digest in sorted(self.digests.items()))]
        try:
            temporary = self.path.with_name(f"{self.path.name}.new{TEMPORARY_SUFFIX}")
            temporary.write_text("\n".join(lines) + "\n", encoding="ascii")
            os.replace(temporary, self.path)
            self._file = open(self.path, "a", encoding="ascii")  # noqa: SIM115 - closed by `finish` and `close`
        except OSError as error:
            raise disk_error(self.folder, error) from None

    def add(self, piece: Piece, digest: bytes) -> None:
        """Record a piece that is on the disk. One caller at a time."""
        self.digests[piece.index] = digest
        if self._file is not None:
            try:
                self._file.write(f"{piece.index} {digest.hex()}\n")
                self._file.flush()
            except OSError as error:
                raise disk_error(self.folder, error) from None

    def finish(self, files: StagedFiles) -> None:
        """Move the ledger beside the directory, with the times of the published files."""
        self.close()
        times = {}
        for number, entry in enumerate(self.table.files):
            times[entry.path] = os.stat(files.final_path(number)).st_mtime_ns
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"boot_id": _boot_id(), "times": times}) + "\n")
            os.replace(self.path, self.finished_path)
        except OSError:  # the directory is a mount of its own, or its parent is not writable: the next run stages again
            with contextlib.suppress(OSError):
                self.path.unlink()

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None

    def _verify(self, files: StagedFiles, claimed: dict[int, bytes], times: dict[str, int]) -> None:
        by_file: dict[int, list[Piece]] = {}
        for index in claimed:
            piece = self.table.pieces[index]
            by_file.setdefault(piece.file, []).append(piece)
        with ThreadPoolExecutor(VERIFIERS) as pool:
            for file, entry in enumerate(self.table.files):
                pieces = by_file.get(file, [])
                final = files.final_path(file)
                status = _stat(final)
                count = -(-entry.size_bytes // self.table.piece_bytes)
                if status is not None and status.st_size == entry.size_bytes and len(pieces) == count:
                    trusted = times.get(entry.path) == status.st_mtime_ns
                    good = pieces if trusted else _good(pool, final, pieces, claimed)
                    if len(good) == count:
                        self.published.add(file)
                        self.digests |= {piece.index: claimed[piece.index] for piece in good}
                        continue
                good = _good(pool, files.temporary_path(file), pieces, claimed)
                self.digests |= {piece.index: claimed[piece.index] for piece in good}


def _good(pool: ThreadPoolExecutor, path: Path, pieces: list[Piece], claimed: dict[int, bytes]) -> list[Piece]:
    """Return the pieces whose bytes in `path` have the claimed digest."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return []
    try:
        digests = list(pool.map(lambda piece: digest_of(descriptor, piece), pieces))
    except OSError:
        return []
    finally:
        os.close(descriptor)
    return [piece for piece, digest in zip(pieces, digests, strict=True) if digest == claimed[piece.index]]


def _read(path: Path, table: PieceTable) -> tuple[dict[int, bytes], dict[str, int], list[str]]:
    """Return digests by the piece's index in `table`, times of published files of this boot, objects that are gone.

    An object with another size or ETag than the ledger's has no pieces. A torn line, the last of a killed process, is
    ignored.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        header = json.loads(lines[0])
        if header["version"] != VERSION or header["piece_bytes"] != table.piece_bytes:
            return {}, {}, []
        old = PieceTable(table.source, [Entry(*row) for row in header["files"]], table.piece_bytes)
    except (OSError, ValueError, LookupError, TypeError):
        return {}, {}, []
    current = {entry: file for file, entry in enumerate(table.files)}
    index_of = {(piece.file, piece.start): piece.index for piece in table.pieces}
    digests: dict[int, bytes] = {}
    times: dict[str, int] = {}
    for line in lines[1:]:
        with contextlib.suppress(ValueError, LookupError, TypeError):
            if line.startswith("{"):
                last: dict[str, Any] = json.loads(line)
                # After a crash of the machine a file may have its size and time, and not its bytes.
                times = last["times"] if last["boot_id"] == _boot_id() else {}
                continue
            number, _, text = line.partition(" ")
            piece = old.pieces[int(number)]
            entry = old.files[piece.file]
            if entry.etag and entry in current and len(text) == 32:
                digests[index_of[current[entry], piece.start]] = bytes.fromhex(text)
    paths = {entry.path for entry in table.files}
    return digests, times, [entry.path for entry in old.files if entry.path not in paths]


def _boot_id() -> str:
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None
