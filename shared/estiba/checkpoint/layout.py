"""The layout of tensors in a safetensors file, and tensors as views of its bytes.

Source: the safetensors format, github.com/huggingface/safetensors: u64 header length, JSON header, tensor bytes without
gaps. Here tensors are sorted by element size, largest first, and the header ends on a multiple of 64, so
every view is aligned. Every safetensors reader accepts such files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from estiba.errors import CheckpointError

ALIGNMENT = 64
DTYPES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_BY_NAME = {name: dtype for dtype, name in DTYPES.items()}


@dataclass(frozen=True)
class Layout:
    """A file's header, and each tensor's offset from the start of the file, in bytes."""

    header: bytes
    offsets: Mapping[str, int]
    size_bytes: int


def lay_out(tensors: Mapping[str, torch.Tensor]) -> Layout:
    """Lay out a file. Raises CheckpointError for a dtype that the format lacks."""
    entries: dict[str, Any] = {}
    offset = 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):
        tensor = tensors[name]
        if tensor.dtype not in DTYPES:
            raise CheckpointError(f"state {name}: tensors of {tensor.dtype} cannot be saved; convert it first")
        end = offset + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    return Layout(
        header=header,
        offsets={name: len(header) + entry["data_offsets"][0] for name, entry in entries.items()},
        size_bytes=len(header) + offset,
    )


def view(buffer: Any, offset: int, like: torch.Tensor) -> torch.Tensor:
    """Return a CPU tensor of `like`'s shape and dtype over a writable buffer, without a copy."""
    return _view(buffer, offset, like.dtype, tuple(like.shape))


def _view(buffer: Any, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    count = 1
    for length in shape:
        count *= length
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(buffer, dtype=dtype, count=count, offset=offset).view(shape)


def read(buffer: Any) -> dict[str, torch.Tensor]:
    """Return every tensor of a safetensors file in memory, as views. Raises CheckpointError for another format."""
    size = len(buffer)
    try:
        length = int.from_bytes(bytes(buffer[:8]), "little")
        if not 2 <= length <= size - 8:
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        header = json.loads(bytes(buffer[8 : 8 + length]))
        header.pop("__metadata__", None)
        tensors = {}
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            dtype, shape = _BY_NAME[entry["dtype"]], tuple(entry["shape"])
            count = torch.Size(shape).numel()
            if not 0 <= start <= end <= size - 8 - length or count * dtype.itemsize != end - start:
                raise ValueError(f"{name}: bytes {start} to {end} for {list(shape)} of {entry['dtype']}")
            position = 8 + length + start
            if position % dtype.itemsize:  # a file from another program may be unaligned
                tensors[name] = _view(bytearray(buffer[position : position + end - start]), 0, dtype, shape)
            else:
                tensors[name] = _view(buffer, position, dtype, shape)
        return tensors
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"not a safetensors file ({error}); give a file that save_file wrote") from None
