"""The source of a staged model: an S3 prefix or one object, read in ranges of one version."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from obstore.exceptions import PreconditionError

from estiba.errors import ConfigError, StoreError
from estiba.staging.pieces import PIECE_BYTES, Piece, PieceTable
from estiba.storage import Entry, open_store, split_location
from estiba.storage.s3 import S3ObjectStore

CHUNK_BYTES = 2**17
"""Larger chunks are put together from what arrives, which is a copy."""


class SourceChanged(StoreError):
    """An object was replaced or deleted while it was staged. What the other hosts have of it is as old."""


class Source:
    """Objects at an s3:// URL."""

    def __init__(self, url: str, piece_bytes: int = PIECE_BYTES) -> None:
        """List the objects. Raises ConfigError if there are none, and StoreError."""
        location = url[:-2] if url.endswith("/*") else url.rstrip("/")  # `s5cmd sync SRC/* DST` means the prefix
        self.is_object = False
        self.store = _s3(location)
        entries = self.store.list()
        if not entries:
            parent, name = split_location(location)
            entry = None
            if parent.count("/") >= 2 and not parent.endswith(":/"):
                self.store = _s3(parent)
                entry = self.store.head(name)
            if entry is None:
                raise ConfigError(f"{url}: nothing there to stage; check the bucket and the prefix")
            entries, self.is_object = [entry], True
        self.table = PieceTable(self.store.url, entries, piece_bytes)

    def read(self, piece: Piece) -> Iterator[Any]:
        """Yield the bytes of a piece as they arrive. Raises SourceChanged, StoreError."""
        entry = self.table.files[piece.file]
        try:
            yield from self.store.read_chunks(
                entry.path, piece.start, piece.size_bytes, etag=entry.etag, chunk_bytes=CHUNK_BYTES
            )
        except (PreconditionError, FileNotFoundError):
            raise self._changed(entry) from None
        except StoreError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise self._changed(entry) from None
            raise

    def _changed(self, entry: Entry) -> SourceChanged:
        return SourceChanged(
            f"{self.store.url_of(entry.path)}: it was replaced or deleted while it was staged (it was the version with "
            f"ETag {entry.etag}); nothing was published. Run the same command again to stage the new version"
        )


def _s3(url: str) -> S3ObjectStore:
    store = open_store(url)
    if not isinstance(store, S3ObjectStore):
        raise ConfigError(f"{url}: is not on S3; the source is s3://BUCKET/PREFIX")
    return store
