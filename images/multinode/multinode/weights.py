"""Safetensors of a Hugging Face model, read by range: each rank reads only the rows that it holds."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from estiba.checkpoint.layout import DTYPES
from estiba.errors import ConfigError, StoreError
from estiba.storage import Store

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
READ_BYTES = 64 << 20
MAX_HEADER_BYTES = 100 << 20
_DTYPE_OF = {name: dtype for dtype, name in DTYPES.items()}


@dataclass(frozen=True)
class Source:
    """Where a tensor is stored."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Offset of its first byte in the file."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one index of the first dimension."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


class Weights:
    """The tensors of a model directory, local or on S3."""

    def __init__(self, store: Store) -> None:
        """Read the headers. Raises ConfigError for a directory without safetensors, or with a damaged one."""
        self.store = store
        self.sources: dict[str, Source] = {}
        for file in self._files():
            self.sources |= self._header(file)

    def _files(self) -> list[str]:
        if self.store.head(INDEX) is not None:
            try:
                names = json.loads(self.store.read(INDEX))["weight_map"].values()
            except (ValueError, KeyError, AttributeError, TypeError):
                raise ConfigError(
                    f"{self.store.url_of(INDEX)}: is not an index of safetensors; copy it again"
                ) from None
            return sorted({str(name) for name in names})
        if self.store.head(SINGLE) is None:
            raise ConfigError(
                f"{self.store.url}: has neither {SINGLE} nor {INDEX}; give a model saved as safetensors "
                "(`model.save_pretrained(DIR)` writes them)"
            )
        return [SINGLE]

    def _header(self, file: str) -> dict[str, Source]:
        where = self.store.url_of(file)
        entry = self.store.head(file)
        if entry is None:
            raise ConfigError(f"{where}: is named by {INDEX} and missing; copy the model again")
        try:
            length = int.from_bytes(self.store.read(file, 0, 8), "little")
            if not 2 <= length <= min(MAX_HEADER_BYTES, entry.size_bytes - 8):
                raise ValueError(f"a header of {length} bytes in a file of {entry.size_bytes}")
            header = json.loads(self.store.read(file, 8, length))
            header.pop("__metadata__", None)
            sources = {}
            for name, one in header.items():
                first, last = one["data_offsets"]
                source = Source(file, _DTYPE_OF[one["dtype"]], tuple(one["shape"]), 8 + length + first)
                if (
                    last - first != math.prod(source.shape) * source.dtype.itemsize
                    or 8 + length + last > entry.size_bytes
                ):
                    raise ValueError(f"{name}: bytes {first} to {last} do not fit")
                sources[name] = source
            return sources
        except (ValueError, KeyError, TypeError, StoreError) as error:
            raise ConfigError(f"{where}: is not a whole safetensors file ({error}); copy the model again") from None

    def read_into(self, name: str, target: torch.Tensor, first_row: int) -> None:
        """Fill `target`, of any dtype, with the rows of a tensor from `first_row` on. Raises StoreError."""
        source = self.sources[name]
        flat, at = target.reshape(-1), 0
        start = source.start + first_row * source.row_bytes
        for data in self._ranges(source.file, start, flat.numel() * source.dtype.itemsize):
            part = torch.frombuffer(data, dtype=source.dtype)
            flat[at : at + len(part)].copy_(part)
            at += len(part)

    def _ranges(self, file: str, start: int, size_bytes: int) -> Iterator[bytearray]:
        for offset in range(0, size_bytes, READ_BYTES):
            yield bytearray(self.store.read(file, start + offset, min(READ_BYTES, size_bytes - offset)))


def names_of(weights: Weights, parameters: Mapping[str, Any], prefix: str) -> dict[str, str]:
    """Return the stored name of each parameter or buffer. Raises ConfigError for one that is missing or left over."""
    stored = set(weights.sources)
    found: dict[str, str] = {}
    for name in parameters:
        for candidate in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
            if candidate in stored:
                found[name] = candidate
                break
    missing = sorted(set(parameters) - set(found))
    if missing:
        others = sorted(stored - set(found.values()))[:3]
        raise ConfigError(
            f"{weights.store.url}: its weights lack {', '.join(missing[:3])} ({len(missing)} of {len(parameters)}"
            f"{'; it has ' + ', '.join(others) if others else ''}); architectures whose stored tensors are converted "
            "when they are loaded are not supported, such as mixtures of experts"
        )
    return found
