"""The results of a complete run: the model as safetensors with its configuration and tokenizer, and results.json."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from estiba import __version__
from estiba.checkpoint import layout
from estiba.storage import FileStore
from estiba.training.fit import Run
from estiba.training.sharding import whole
from estiba.training.trainer import Trainer
from multinode.config import MultinodeConfig
from multinode.model import BaseModel, write_config
from multinode.task import CausalTask
from multinode.weights import INDEX, SINGLE

MAX_FILE_BYTES = 5_000_000_000
"""A larger model has several files, as the Hugging Face libraries write them."""
SAVE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def write_artifacts(run: Run[MultinodeConfig], task: CausalTask, trainer: Trainer, base: BaseModel) -> None:
    """Write the model on the main host, tensor by tensor. All ranks call it, as they hold the shards."""
    name = run.config.save_dtype
    dtype = base.dtype if name == "auto" else SAVE_DTYPES[name]
    write_weights(task.model_state(), dtype, run.output if run.dist.is_main else None)
    if not run.dist.is_main:
        return
    write_config(base, dtype, run.output)
    results = {
        "status": "complete",
        "job": run.job.name,
        "version": __version__,
        "steps": trainer.step,
        "hosts": run.job.host_count,
        "ranks": run.dist.world_size,
        **trainer.metrics,
    }
    FileStore(run.output).write("results.json", (json.dumps(results, indent=2) + "\n").encode())


def write_weights(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype, folder: Path | None) -> None:
    """Gather one tensor at a time, and write it if this rank has a `folder`. Each file appears when it is whole."""
    meta = {
        name: torch.empty(tensor.shape, dtype=dtype if tensor.is_floating_point() else tensor.dtype, device="meta")
        for name, tensor in tensors.items()
    }
    files = _files(meta)
    for file, names in files.items():
        plan = layout.lay_out({name: meta[name] for name in names})
        path = None if folder is None else folder / f".{file}.partial"
        with open(path or os.devnull, "wb") as out:
            if path is not None:
                out.write(plan.header)
            for name in names:
                tensor = whole(tensors[name].detach()).to("cpu", meta[name].dtype).contiguous()
                if path is not None:
                    out.seek(plan.offsets[name])
                    out.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
            out.flush()
            if path is not None:
                os.fsync(out.fileno())
        if path is not None and folder is not None:
            os.replace(path, folder / file)
    if folder is not None and len(files) > 1:
        size_bytes = sum(tensor.numel() * tensor.element_size() for tensor in meta.values())
        content: dict[str, Any] = {
            "metadata": {"total_size": size_bytes},
            "weight_map": {name: file for file, names in files.items() for name in names},
        }
        FileStore(folder).write(INDEX, (json.dumps(content, indent=2) + "\n").encode())


def _files(tensors: Mapping[str, torch.Tensor]) -> dict[str, list[str]]:
    """Divide the tensors into files of at most MAX_FILE_BYTES."""
    groups: list[list[str]] = [[]]
    size_bytes = 0
    for name, tensor in tensors.items():
        tensor_bytes = tensor.numel() * tensor.element_size()
        if groups[-1] and size_bytes + tensor_bytes > MAX_FILE_BYTES:
            groups.append([])
            size_bytes = 0
        groups[-1].append(name)
        size_bytes += tensor_bytes
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{index:05d}-of-{len(groups):05d}.safetensors": names for index, names in enumerate(groups, start=1)}
