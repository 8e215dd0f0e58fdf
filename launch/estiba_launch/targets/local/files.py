"""Files that a container made as root, for a user who may not read them: the engine reads them."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, cast

import requests

from estiba_launch.jobs.keys import shown
from estiba_launch.jobs.mirror import KeyRefused, Signature
from estiba_launch.targets.local.engine import Engine


class ContainerFiles:
    """A directory of a host's container."""

    def __init__(self, engine: Engine, container: Callable[[], str], folder: str) -> None:
        self._engine, self._container, self._folder = engine, container, folder

    def list(self, folder: str) -> dict[str, Signature]:
        """Raises HostError, also when the container has ended or its image has no `find`."""
        place = f"{self._folder}/{folder}"
        text = self._engine.execute(self._container(), ["find", place, "-type", "f", "-printf", r"%s %T@ %i %P\0"])
        found: dict[str, Signature] = {}
        for line in filter(None, text.split(b"\0")):
            size, changed, inode, name = line.decode("utf-8", "surrogateescape").split(" ", 3)
            seconds, _, part = changed.partition(".")
            key = f"{folder}/{name}" if folder else name
            found[key] = (int(size), int(seconds) * 10**9 + int(part[:9].ljust(9, "0")), int(inode))
        return found

    def copy(self, key: str, path: Path) -> None:
        try:
            chunks = self._engine.archive(self._container(), f"{self._folder}/{key}")
            with tarfile.open(fileobj=cast("IO[bytes]", Stream(chunks)), mode="r|") as tar, path.open("wb") as target:
                member = tar.next()
                source = tar.extractfile(member) if member else None
                while source and (chunk := source.read(1 << 20)):
                    target.write(chunk)
        except (tarfile.TarError, requests.RequestException, OSError) as error:
            raise KeyRefused(f"{shown(key)}: not read through the container ({error})") from error


class Stream:
    """What tarfile reads from: pieces of any size as one file."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._rest = chunks, b""

    def read(self, size: int) -> bytes:
        while len(self._rest) < size:
            chunk = next(self._chunks, b"")
            if not chunk:
                break
            self._rest += chunk
        piece, self._rest = self._rest[:size], self._rest[size:]
        return piece
