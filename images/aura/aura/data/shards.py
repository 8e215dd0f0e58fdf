"""The shards of a corpus: token ids in files that are written once, verified when opened, and memory-mapped.

A few megabytes of text become one shard, `<key>.<xxh3-128>.tokens`: the training ids, the held-out ids, then a footer
of statistics. The key is a digest of the text; the directory's name contains a digest of tokenizer and split. So the
same input gives the same files for any number of processes, a killed run continues, and only changed text is repacked.
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

from aura.data import documents
from aura.data.documents import TextFormat
from aura.data.packing import PackingConfig, ShardText, TextStats, pack_here, pack_in_workers, split_into_shards
from aura.data.sources import Source
from estiba.errors import CheckpointError
from estiba.log import get_logger
from estiba.paths import writable
from estiba.platform.stop import Stop
from estiba.progress import Progress
from estiba.storage import TEMPORARY_SUFFIX, FileStore

logger = get_logger(__name__)

SUFFIX = ".tokens"
MAX_ATTEMPTS = 3
"""If shards fail verification this often in a row, the disk is at fault."""
_NAME = re.compile(r"(?P<key>[0-9a-f]{32})\.(?P<digest>[0-9a-f]{32})" + re.escape(SUFFIX))
_INDEX = re.compile(r"index\.(?P<digest>[0-9a-f]{32})\.json")
_DIRECTORY = re.compile(r"text-[0-9a-f]{16}")


@dataclass(frozen=True)
class Shard:
    """An open, verified shard."""

    key: str
    digest: str
    stats: TextStats
    train: np.ndarray
    """uint16 or uint32, memory-mapped."""
    validation: np.ndarray


def pack(
    sources: Sequence[Source], *, config: PackingConfig, text_format: TextFormat, folder: Path, workers: int, stop: Stop
) -> list[Shard]:
    """Return all shards in the order of the text, packing those that `folder` does not have yet.

    Raises DataError (file and line), Interrupted after a stop, CheckpointError if shards repeatedly fail to verify.
    """
    with _locked(folder, stop):
        store = ShardStore(folder / f"text-{config.identity}", config)
        signature = _signature(sources, text_format)
        for _ in range(MAX_ATTEMPTS):
            keys = store.read_index(signature)
            if keys is None or any(key not in store.names for key in keys):
                keys = _pack_missing(sources, text_format, store, workers, stop)
                store.write_index(signature, keys)
            shards = store.open(keys)
            if all(shards):
                store.clean(keys)
                return [shard for shard in shards if shard is not None]
    raise CheckpointError(f"{folder}: shards did not verify after {MAX_ATTEMPTS} attempts; check the disk")


class ShardStore:
    """The shards of one packing configuration, by key."""

    def __init__(self, folder: Path, config: PackingConfig) -> None:
        self.config = config
        self._folder = folder
        self._store = FileStore(folder)
        self.names: dict[str, str] = {}
        for entry in self._store.list():
            if match := _NAME.fullmatch(entry.path):
                self.names[match["key"]] = entry.path

    def put(self, key: str, data: bytes) -> None:
        """Publish one shard."""
        name = f"{key}.{xxhash.xxh3_128_hexdigest(data)}{SUFFIX}"
        self._store.write(name, data)
        self.names[key] = name

    def open(self, keys: Sequence[str]) -> list[Shard | None]:
        """Return each key's shard, or None if it does not verify; its file is then quarantined."""
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing releases the interpreter lock
            return list(pool.map(self._open, keys))

    def _open(self, key: str) -> Shard | None:
        name = self.names[key]
        match = _NAME.fullmatch(name)
        assert match is not None
        path = self._folder / name
        problem = "its bytes do not match its digest"
        try:
            shard = _open_verified(path, key, match["digest"], self.config)
        except OSError as error:
            shard, problem = None, error.strerror or str(error)
        if shard is None:
            logger.warning("%s: %s; quarantined; the shard will be packed again", path, problem)
            self.names.pop(key, None)
            with contextlib.suppress(OSError):
                path.rename(path.with_name(name + ".bad"))
        return shard

    def read_index(self, signature: str) -> list[str] | None:
        """Return the shard keys of an input unchanged since it was packed, which need not be read; else None."""
        for path in self._folder.glob("index.*.json"):
            match = _INDEX.fullmatch(path.name)
            data = path.read_bytes()
            if match and xxhash.xxh3_128_hexdigest(data) == match["digest"]:
                index = json.loads(data)
                if index["signature"] == signature:
                    return list(index["units"])
        return None

    def write_index(self, signature: str, keys: Sequence[str]) -> None:
        data = json.dumps({"signature": signature, "units": keys}).encode()
        name = f"index.{xxhash.xxh3_128_hexdigest(data)}.json"
        self._store.write(name, data)
        for path in self._folder.glob("index.*.json"):
            if path.name != name:
                path.unlink(missing_ok=True)

    def clean(self, keys: Sequence[str]) -> None:
        """Delete shards of other inputs or configurations, and leftovers of killed runs."""
        needed = {self.names[key] for key in keys}
        for path in self._folder.iterdir():
            is_unneeded = _NAME.fullmatch(path.name) and path.name not in needed
            if is_unneeded or path.name.endswith((TEMPORARY_SUFFIX, ".bad")):
                path.unlink(missing_ok=True)
        for path in self._folder.parent.iterdir():
            if _DIRECTORY.fullmatch(path.name) and path != self._folder:
                shutil.rmtree(path, ignore_errors=True)


def _pack_missing(
    sources: Sequence[Source], text_format: TextFormat, store: ShardStore, workers: int, stop: Stop
) -> list[str]:
    """Read the whole input and pack missing shards. Returns the keys of all shards in order."""
    keys: list[str] = []
    size_bytes = sum(source.size_bytes for source in sources)
    progress = Progress(total=round(size_bytes / 1e6, 1), unit="text_mb")
    files: dict[str, set[str]] = {}

    def missing() -> Iterator[ShardText]:
        pending: set[str] = set()
        for text in split_into_shards(sources, text_format):
            keys.append(text.key)
            for chunk in text.chunks:
                files.setdefault(chunk.layout, set()).add(chunk.url)
            if text.key in store.names or text.key in pending:
                progress.resumed += text.raw_bytes / 1e6
                progress.advance(text.raw_bytes / 1e6)
            else:
                pending.add(text.key)
                yield text
            if stop():
                return

    # Workers take a second to start, in which this process packs a small input; the tokenizer has its own threads.
    if workers > 1 and size_bytes > documents.CHUNK_BYTES:
        packed = pack_in_workers(missing(), store.config, workers, stop)
    else:
        packed = pack_here(missing(), store.config, stop)
    with contextlib.closing(progress), contextlib.closing(packed):  # type: ignore[type-var]
        for text, data in packed:
            store.put(text.key, data)
            progress.advance(text.raw_bytes / 1e6)
    if stop():
        raise stop.interrupted(f"{len(store.names)} shards of text are packed and kept")
    if text_format == "auto" and ("lines" in files or "running" in files):
        names = {"running": "running text", "lines": "one document per line"}
        parts = [f"{len(files[layout])} as {name}" for layout, name in names.items() if layout in files]
        logger.info("input: text files detected: %s (--text_format running|lines overrides)", ", ".join(parts))
    return keys


def _open_verified(path: Path, key: str, digest: str, config: PackingConfig) -> Shard | None:
    """Map a shard. Returns None if its bytes do not verify."""
    size = path.stat().st_size
    if size < 4:
        return None
    # torch's mapping keeps no file open, so a corpus may have more shards than a process may open files.
    data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).numpy()
    if xxhash.xxh3_128_hexdigest(data) != digest:
        return None
    (footer_bytes,) = struct.unpack("<I", data[-4:].tobytes())
    stats = TextStats(**json.loads(data[-4 - footer_bytes : -4].tobytes()))
    tokens = data[: (stats.train_tokens + stats.validation_tokens) * config.dtype.itemsize].view(config.dtype)
    tokens.flags.writeable = False
    return Shard(key, digest, stats, tokens[: stats.train_tokens], tokens[stats.train_tokens :])


def _signature(sources: Sequence[Source], text_format: TextFormat) -> str:
    files = [[source.url, source.size_bytes, source.version, source.kind] for source in sources]
    return xxhash.xxh3_128_hexdigest(json.dumps([text_format, documents.CHUNK_BYTES, files]).encode())


@contextlib.contextmanager
def _locked(folder: Path, stop: Stop) -> Iterator[None]:
    """Let one process pack at a time. The others wait, then find the shards already packed."""
    path = writable(folder, "--checkpoint-path") / ".packing.lock"
    path.touch()
    with path.open("r+b", buffering=0) as lock:  # to write alone would wait for a reader if it is a FIFO
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if stop.wait(0.2):
                    raise stop.interrupted("another process was packing the text") from None
            except OSError:
                break  # a file system without locks
        yield
