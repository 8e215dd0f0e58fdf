"""Files to packed sequences of tokens. Those of a step are a pure function of (seed, step), on any number of ranks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash

from estiba.errors import DataError
from estiba.storage import Store, open_store, split_location

IGNORED = -100
"""The label of a position without a loss: padding of the last sequence."""
DOCUMENTS_AT_ONCE = 256
TEXT_SUFFIXES = (".txt", ".md", ".text")
JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")


class Batch(NamedTuple):
    """int64[sequences, length]: inputs, and the token after each of them, or IGNORED."""

    inputs_BT: torch.Tensor
    labels_BT: torch.Tensor


# --- documents -----------------------------------------------------------------------------------------------------


def read_documents(location: str, column: str) -> Iterator[str]:
    """Yield every document below a path or URL, in the order of file names. Raises DataError with file and line."""
    store, paths = _files(location)
    for path in paths:
        suffix = PurePosixPath(path).suffix.lower()
        if suffix == ".parquet":
            yield from _parquet(store, path, column)
        elif suffix in JSON_SUFFIXES:
            yield from _json_lines(store, path, column)
        else:
            yield _decoded(store.read(path), store.url_of(path))


def _files(location: str) -> tuple[Store, list[str]]:
    if "://" not in location and Path(location).is_file():
        location, name = split_location(location)
        return open_store(location), [name]
    store = open_store(location)
    known = (*TEXT_SUFFIXES, *JSON_SUFFIXES, ".parquet")
    paths: list[str] = []
    others: list[str] = []
    for entry in store.list():
        path = PurePosixPath(entry.path)
        if any(part.startswith((".", "_")) for part in path.parts) or ".sagemaker-upload" in path.name:
            continue
        (paths if path.suffix.lower() in known else others).append(entry.path)
    if others:
        raise DataError(
            f"{store.url_of(others[0])}: files of this kind are not read; give {', '.join(known)}, and keep others "
            "out of the channel"
        )
    if not paths:
        raise DataError(f"{location}: no files; give text, JSON lines or parquet with a column of text")
    return store, paths


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: byte {error.start} is not UTF-8; convert the file") from None


def _json_lines(store: Store, path: str, column: str) -> Iterator[str]:
    with store.open(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[column]
                if not isinstance(text, str):
                    raise TypeError
            except (ValueError, KeyError, TypeError):
                raise DataError(
                    f"{store.url_of(path)}: line {number} is no JSON object with a string {column!r}; "
                    "name the field that holds the text by --text-column"
                ) from None
            yield text


def _parquet(store: Store, path: str, column: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with store.open(path) as file:
            table = pq.ParquetFile(file)
            if column not in table.schema_arrow.names:
                raise DataError(
                    f"{store.url_of(path)}: has no column {column!r} (it has {', '.join(table.schema_arrow.names)}); "
                    "name the one that holds the text by --text-column"
                )
            for batch in table.iter_batches(batch_size=DOCUMENTS_AT_ONCE, columns=[column]):
                for row, text in enumerate(batch.column(0).to_pylist()):
                    if not isinstance(text, str):
                        raise DataError(
                            f"{store.url_of(path)}: row {row} of a batch has no text in {column!r}; remove it"
                        )
                    yield text
    except pa.ArrowInvalid as error:
        raise DataError(f"{store.url_of(path)}: is not a parquet file ({error}); write it again") from None


# --- tokens --------------------------------------------------------------------------------------------------------


def tokenize(documents: Iterable[str], tokenizer: Any, eos_id: int, path: Path) -> None:
    """Write the tokens of all documents, each followed by the end token, to a file of uint32."""
    waiting: list[str] = []
    with open(path, "wb") as file:

        def flush() -> None:
            if waiting:
                for ids in tokenizer(waiting, add_special_tokens=False)["input_ids"]:
                    np.asarray([*ids, eos_id], dtype=np.uint32).tofile(file)
                waiting.clear()

        for text in documents:
            if text.strip():
                waiting.append(text)
            if len(waiting) >= DOCUMENTS_AT_ONCE:
                flush()
        flush()


@dataclass(frozen=True)
class Sequences:
    """Packed sequences of `length` tokens, in a file that is mapped into memory. Every token is learnt once."""

    tokens: np.ndarray[Any, np.dtype[np.uint32]]
    length: int
    seed: int

    def __len__(self) -> int:
        return -(-(len(self.tokens) - 1) // self.length)

    @property
    def identity(self) -> str:
        return xxhash.xxh3_128_hexdigest(self.tokens.data) + f"/{self.length}"

    def step(self, step: int, size: int) -> list[int]:
        """Return the sequences of a step. Each epoch is another permutation, and a step may span two epochs."""
        first = step * size
        return [
            int(self._order(position // len(self))[position % len(self)]) for position in range(first, first + size)
        ]

    def batch(self, indices: Iterable[int], size: int) -> Batch:
        """Return a batch of `size` sequences; those that are missing have no loss."""
        inputs = torch.zeros(size, self.length, dtype=torch.int64)
        labels = torch.full((size, self.length), IGNORED, dtype=torch.int64)
        for row, index in enumerate(indices):
            start = index * self.length
            window = torch.from_numpy(self.tokens[start : start + self.length + 1].astype(np.int64))
            count = len(window) - 1
            inputs[row, :count], labels[row, :count] = window[:-1], window[1:]
        return Batch(inputs, labels)

    def _order(self, epoch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        cached: dict[int, Any] = self.__dict__.setdefault("_orders", {})
        if epoch not in cached:
            cached.clear()
            cached[epoch] = np.random.default_rng([self.seed, epoch]).permutation(len(self))
        return cached[epoch]


def map_sequences(path: Path, location: str, *, length: int, seed: int) -> Sequences:
    """Map what `tokenize` wrote of the text at `location`. Raises DataError if there is nothing to predict."""
    count = path.stat().st_size // 4
    if count < 2:
        raise DataError(f"{location}: {count} tokens, and at least 2 are needed; give more text")
    return Sequences(np.memmap(path, dtype=np.uint32, mode="r"), length, seed)
