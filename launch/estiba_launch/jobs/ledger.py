"""What one host knows of the objects in a store, on disk: a process that takes over goes on from it.

The ssh target copies this file to remote hosts.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path

from estiba_launch.jobs.mirror import Signature, Stored


class Origin(StrEnum):
    UPLOADED = "uploaded"
    RESTORED = "restored"
    FOREIGN = "foreign"
    """Somebody else's, and newer than the local file."""


@dataclass
class Entry:
    """What a host knows of one object."""

    signature: Signature
    """Of the local file when it was last compared with the object."""
    etag: str | None
    """None where the upload did not tell."""
    origin: Origin
    missing: bool = False
    """The local file was not there at the last push."""
    kept: bool = False
    """The folder lost all its files at once, this one too, so its object is not deleted."""

    def is_same(self, seen: Stored) -> bool:
        """Nobody has written the object since."""
        return seen.etag == self.etag if self.etag else is_copy(seen, self.signature)


def is_copy(seen: Stored, local: Signature) -> bool:
    return (seen.size_bytes, seen.modified_ns) == local[:2]


class Ledger:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._written = ""

    def load(self) -> tuple[dict[str, Entry], dict[str, Signature]]:
        """Entries by key, and the uploads that were begun. Empty when there is no file, or half of one."""
        try:
            value = json.loads(self.path.read_text("utf-8"))
            known = {
                key: replace(Entry(**one), signature=tuple(one["signature"]), origin=Origin(one["origin"]))
                for key, one in value["known"].items()
            }
            return known, {key: tuple(one) for key, one in value["begun"].items()}
        except (OSError, ValueError, KeyError, TypeError):
            # Without it, the times of files and objects decide.
            return {}, {}

    def save(self, known: Mapping[str, Entry], begun: Mapping[str, Signature]) -> None:
        """Raises OSError."""
        text = json.dumps({"known": {key: asdict(one) for key, one in known.items()}, "begun": begun})
        if text == self._written:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            Path(part).replace(self.path)
        except BaseException:
            Path(part).unlink(missing_ok=True)
            raise
        self._written = text
