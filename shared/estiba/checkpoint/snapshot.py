"""A copy of a training state in the staging buffer, laid out as the files of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from estiba.checkpoint import layout, tree_spec
from estiba.checkpoint.disk import padded
from estiba.checkpoint.staging import StagingBuffer

MODEL_FILE = "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The location of a state in the staging buffer."""

    files: list[dict[str, Any]]
    """[{"name", "start", "size"}]: tensor files, at byte offsets in the buffer."""
    texts: dict[str, str]
    """JSON files, by name."""

    @property
    def size_bytes(self) -> int:
        return sum(file["size"] for file in self.files)


@dataclass(frozen=True)
class TensorFile:
    """A file of a checkpoint before it is written."""

    name: str
    layout: layout.Layout
    tensors: Mapping[str, torch.Tensor]


def file_stem(rank: int, ranks: int) -> str:
    """Return the name of a rank's files without suffix: the main rank has `state`, the others one each."""
    return "state" if rank == 0 or ranks == 1 else f"state-{rank:05d}"


def reserve(buffer: StagingBuffer, state: Mapping[str, Any], stem: str) -> None:
    """Grow the buffer to the size of a snapshot."""
    tensors, _ = tree_spec.flatten(state)
    _reserve(buffer, _tensor_files(tensors, stem))


def take(buffer: StagingBuffer, state: Mapping[str, Any], stem: str) -> Snapshot:
    """Copy a state into the buffer. Raises CheckpointError for a state that cannot be saved."""
    tensors, spec = tree_spec.flatten(state)
    planned = _tensor_files(tensors, stem)
    _reserve(buffer, planned)
    buffer.pin()
    files, start = [], 0
    for file in planned:
        copy_file(buffer, start, file)
        files.append({"name": file.name, "start": start, "size": file.layout.size_bytes})
        start += padded(file.layout.size_bytes)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return Snapshot(files=files, texts={f"{stem}.json": json.dumps(spec)})


def _tensor_files(tensors: Mapping[str, torch.Tensor], stem: str) -> list[TensorFile]:
    model = {key.removeprefix("model/"): tensor for key, tensor in tensors.items() if key.startswith("model/")}
    rest = {key: tensor for key, tensor in tensors.items() if not key.startswith("model/")}
    groups = ((MODEL_FILE, model), (f"{stem}.safetensors", rest))
    return [TensorFile(name, layout.lay_out(members), members) for name, members in groups if members]


def _reserve(buffer: StagingBuffer, files: list[TensorFile]) -> None:
    buffer.reserve(sum(padded(file.layout.size_bytes) for file in files))


def copy_file(buffer: StagingBuffer, start: int, file: TensorFile) -> None:
    """Copy a file's header and tensors to an offset in the buffer."""
    memory = buffer.memory
    memory[start : start + len(file.layout.header)] = file.layout.header
    for name, tensor in file.tensors.items():
        if tensor.numel():
            target = layout.view(memory, start + file.layout.offsets[name], tensor)
            target.copy_(tensor, non_blocking=True)
