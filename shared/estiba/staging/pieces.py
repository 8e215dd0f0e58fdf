"""The pieces of a staged model: which bytes of which object, and which host fetches them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from estiba.errors import StoreError
from estiba.storage import Entry

PIECE_BYTES = 8 * 2**20
"""A host that dies loses the pieces that are on their way to it, one for each connection."""


@dataclass(frozen=True)
class Piece:
    """A range of one object. `index` counts through all objects."""

    index: int
    file: int
    start: int
    size_bytes: int


class PieceTable:
    """All objects of a source, cut into pieces. Equal listings give equal tables on every host."""

    def __init__(self, source: str, entries: Sequence[Entry], piece_bytes: int = PIECE_BYTES) -> None:
        """Raises StoreError if the names cannot be files of one directory."""
        self.source = source
        self.files = tuple(sorted(entries, key=lambda entry: entry.path))
        self.piece_bytes = piece_bytes
        _check_names(source, self.files)
        self.pieces: list[Piece] = []
        for number, entry in enumerate(self.files):
            for start in range(0, entry.size_bytes, piece_bytes):
                size = min(piece_bytes, entry.size_bytes - start)
                self.pieces.append(Piece(len(self.pieces), number, start, size))

    @property
    def size_bytes(self) -> int:
        return sum(entry.size_bytes for entry in self.files)

    @property
    def fingerprint(self) -> str:
        """A digest of names, sizes and ETags. Only a reader of the source's listing can compute it."""
        rows = [[entry.path, entry.size_bytes, entry.etag] for entry in self.files]
        return hashlib.sha256(json.dumps([self.source, self.piece_bytes, rows]).encode()).hexdigest()

    def owner(self, piece: Piece, host_count: int) -> int:
        """Return the number of the host that fetches a piece from the source."""
        return piece.index % host_count

    def url_of(self, piece: Piece) -> str:
        return f"{self.source}/{self.files[piece.file].path}"


def _check_names(source: str, files: Sequence[Entry]) -> None:
    paths = {entry.path for entry in files}
    for path in paths:
        parts = path.split("/")
        if path.startswith("/") or ".." in parts or "" in parts or "\0" in path:
            raise StoreError(f"{source}/{path}: its name leads outside the target directory; rename the object")
        if any(len(part.encode("utf-8", "surrogateescape")) > 255 for part in parts):
            raise StoreError(
                f"{source}/{path}: a part of its name is longer than the 255 bytes of a file name; rename it"
            )
        for depth in range(1, len(parts)):
            parent = "/".join(parts[:depth])
            if parent in paths:
                raise StoreError(
                    f"{source}/{parent}: is an object, and {path} needs a directory of that name; rename one of them"
                )
