"""Text to packed shards: token ids in files that are made once, verified whenever they are opened, and mapped.

A unit is a few megabytes of text; it becomes one shard, `<unit>.<xxh3-128>.tokens`: the training ids, then the held-out
ids, then a footer of counts. A unit's name is a digest of its text, and the folder's of tokenizer and split, so the
same input gives the same files whatever the number of processes, a killed run goes on where it was, and a changed
input makes only what changed again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import xxhash

from aura import documents
from aura.crew import pack_here, pack_in_processes
from aura.documents import TextFormat
from aura.packing import Counts, Recipe, Unit, units_of
from aura.sources import Source
from estiba.errors import CheckpointError
from estiba.progress import Progress
from estiba.stop import Stop, say
from estiba.store import TEMPORARY_SUFFIX, FileStore

SUFFIX = ".tokens"
ROUNDS = 3
"""Shards that come out damaged so often in a row are the disk's doing."""
_NAME = re.compile(r"(?P<unit>[0-9a-f]{32})\.(?P<digest>[0-9a-f]{32})" + re.escape(SUFFIX))
_INDEX = re.compile(r"index\.(?P<digest>[0-9a-f]{32})\.json")
_RECIPE = re.compile(r"text-[0-9a-f]{16}")
_DTYPES = {2: torch.uint16, 4: torch.uint32}


@dataclass(frozen=True)
class Shard:
    """An opened shard. Its bytes were verified."""

    unit: str
    digest: str
    counts: Counts
    train: np.ndarray
    """uint16 or uint32, mapped."""
    validation: np.ndarray


def pack(
    sources: Sequence[Source],
    *,
    recipe: Recipe,
    text_format: TextFormat,
    folder: Path,
    workers: int,
    stop: Stop,
) -> list[Shard]:
    """Every shard of the text, in the text's order; those that are there already are used.

    Raises DataError (file and line), Interrupted when asked to stop, CheckpointError where the disk loses bytes.
    """
    with _held(folder, stop):
        cabinet = Cabinet(folder / f"text-{recipe.identity}", recipe)
        signature = _signature(sources, text_format)
        for _ in range(ROUNDS):
            order = cabinet.read_index(signature)
            if order is None or any(unit not in cabinet.names for unit in order):
                order = _make(sources, text_format, cabinet, workers, stop)
                cabinet.write_index(signature, order)
            found = cabinet.open(order)
            if all(found):
                cabinet.tidy(order)
                return [shard for shard in found if shard is not None]
    raise CheckpointError(f"{folder}: shards come back other than they were written, {ROUNDS} times; check the disk")


class Cabinet:
    """The shards of one recipe, by unit."""

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        self.recipe = recipe
        self._folder = folder
        self._store = FileStore(folder)
        self.names: dict[str, str] = {}
        for entry in self._store.list():
            if match := _NAME.fullmatch(entry.path):
                self.names[match["unit"]] = entry.path

    def put(self, unit: str, data: bytes) -> None:
        """Publish one shard: beside, fsynced, renamed."""
        name = f"{unit}.{xxhash.xxh3_128_hexdigest(data)}{SUFFIX}"
        self._store.write(name, data)
        self.names[unit] = name

    def open(self, units: Sequence[str]) -> list[Shard | None]:
        """Each unit's shard, None where its bytes are not what they were; such a file is set aside."""
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing lets go of the interpreter
            return list(pool.map(self._open, units))

    def _open(self, unit: str) -> Shard | None:
        name = self.names[unit]
        match = _NAME.fullmatch(name)
        assert match is not None
        path = self._folder / name
        try:
            shard = _opened(path, unit, match["digest"], self.recipe)
        except OSError as error:
            shard, problem = None, error.strerror or str(error)
        else:
            problem = "its bytes do not match its digest"
        if shard is None:
            say(f"warning: {path}: {problem}; set aside, this shard is made again")
            self.names.pop(unit, None)
            with contextlib.suppress(OSError):
                path.rename(path.with_name(name + ".bad"))
        return shard

    def read_index(self, signature: str) -> list[str] | None:
        """The units of an input that has not changed since they were made; spares reading it."""
        for path in self._folder.glob("index.*.json"):
            match = _INDEX.fullmatch(path.name)
            data = path.read_bytes()
            if match and xxhash.xxh3_128_hexdigest(data) == match["digest"]:
                index = json.loads(data)
                if index["signature"] == signature:
                    return list(index["units"])
        return None

    def write_index(self, signature: str, units: Sequence[str]) -> None:
        data = json.dumps({"signature": signature, "units": units}).encode()
        name = f"index.{xxhash.xxh3_128_hexdigest(data)}.json"
        self._store.write(name, data)
        for path in self._folder.glob("index.*.json"):
            if path.name != name:
                path.unlink(missing_ok=True)

    def tidy(self, units: Sequence[str]) -> None:
        """Delete what this input does not need: shards of another input or recipe, and what killed runs left."""
        wanted = {self.names[unit] for unit in units}
        for path in self._folder.iterdir():
            is_shard = _NAME.fullmatch(path.name) and path.name not in wanted
            if is_shard or path.name.endswith((TEMPORARY_SUFFIX, ".bad")):
                path.unlink(missing_ok=True)
        for path in self._folder.parent.iterdir():
            if _RECIPE.fullmatch(path.name) and path != self._folder:
                shutil.rmtree(path, ignore_errors=True)


def _make(sources: Sequence[Source], text_format: TextFormat, cabinet: Cabinet, workers: int, stop: Stop) -> list[str]:
    """Read the whole input and pack what is not there yet. Returns its units in order."""
    order: list[str] = []
    total = sum(source.size_bytes for source in sources)
    progress = Progress(total=round(total / 1e6, 1), unit="text_mb")
    forms: dict[str, set[str]] = {}

    def missing() -> Iterator[tuple[str, Unit]]:
        under_way: set[str] = set()
        for unit in units_of(sources, text_format):
            name = unit.name
            order.append(name)
            for stretch in unit.stretches:
                forms.setdefault(stretch.form, set()).add(stretch.url)
            if name in cabinet.names or name in under_way:
                progress.resumed += unit.raw_bytes / 1e6
                progress.advance(unit.raw_bytes / 1e6)
            else:
                under_way.add(name)
                yield name, unit
            if stop():
                return

    # Processes take a second to start, in which a small input is done; and the tokenizer has threads of its own.
    if workers > 1 and total > documents.STRETCH_BYTES:
        packed = pack_in_processes(missing(), cabinet.recipe, workers, stop)
    else:
        packed = pack_here(missing(), cabinet.recipe, stop)
    with contextlib.closing(progress), contextlib.closing(packed):  # type: ignore[type-var]
        for unit, name, data in packed:
            cabinet.put(name, data)
            progress.advance(unit.raw_bytes / 1e6)
    if stop():
        raise stop.interrupted(f"{len(cabinet.names)} shards of text are packed and kept")
    if text_format == "auto" and ("lines" in forms or "running" in forms):
        counts = {"running": "running text", "lines": "a document a line"}
        parts = [f"{len(forms[form])} as {name}" for form, name in counts.items() if form in forms]
        say(f"input: text files read by their looks: {', '.join(parts)} (--text_format running|lines decides)")
    return order


def _opened(path: Path, unit: str, digest: str, recipe: Recipe) -> Shard | None:
    """Map and verify. None where the bytes are others."""
    size = path.stat().st_size
    if size < 4:
        return None
    # torch's mapping keeps no file open, so a corpus may have more shards than a process may have files.
    data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).numpy()
    if xxhash.xxh3_128_hexdigest(data) != digest:
        return None
    (length,) = struct.unpack("<I", data[-4:].tobytes())
    counts = Counts(**json.loads(data[-4 - length : -4].tobytes()))
    tokens = data[: (counts.train_tokens + counts.validation_tokens) * recipe.dtype.itemsize].view(recipe.dtype)
    tokens.flags.writeable = False
    return Shard(unit, digest, counts, tokens[: counts.train_tokens], tokens[counts.train_tokens :])


def _signature(sources: Sequence[Source], text_format: TextFormat) -> str:
    seen = [[source.url, source.size_bytes, source.version, source.kind] for source in sources]
    return xxhash.xxh3_128_hexdigest(json.dumps([text_format, documents.STRETCH_BYTES, seen]).encode())


@contextlib.contextmanager
def _held(folder: Path, stop: Stop) -> Iterator[None]:
    """One process packs; the other ranks of this machine wait for it, and then find everything there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / ".packing.lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise CheckpointError(
            f"{folder}: cannot be written ({error.strerror}) by user {os.getuid()}; mount a writable directory there"
        ) from None
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if stop.wait(0.2):
                    raise stop.interrupted("another process was packing the text") from None
            except OSError:
                break  # a file system without locks
            else:
                break
        yield
    finally:
        os.close(descriptor)
