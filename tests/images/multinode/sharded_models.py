"""What runs on each rank in test_model.py."""

from __future__ import annotations

import math
import resource
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from estiba.distributed import DistContext
from estiba.training.sharding import device_mesh, whole
from multinode.artifacts import write_weights
from multinode.model import checkpoint_activations, find_base, load_sharded

CPU = torch.device("cpu")
INPUTS = [[3, 7, 11, 200, 45, 9, 30, 31, 90, 91, 92, 93, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25]]


def logits_and_gradients(models: dict[str, str], out: str) -> dict[str, Any]:
    """Logits and norms of gradients of a fixed sequence, by model. The main rank writes the models below `out`."""
    dist = DistContext.init("cpu")
    mesh = device_mesh(dist, CPU)
    results = {
        kind: _logits_and_gradients(location, mesh, Path(out) / kind if dist.is_main else None, kind == "qwen3")
        for kind, location in models.items()
    }
    dist.destroy()
    return results


def _logits_and_gradients(location: str, mesh: DeviceMesh, out: Path | None, checkpointing: bool) -> dict[str, Any]:
    base = find_base(location)
    model = load_sharded(base, mesh, CPU, torch.float32)
    if checkpointing:
        checkpoint_activations(model)
    model.train()
    ids = torch.tensor(INPUTS)
    logits = model(input_ids=ids, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).backward()
    norms = {name: float(whole(parameter.grad).norm()) for name, parameter in model.named_parameters()}
    if out is not None:
        out.mkdir(parents=True)
    write_weights(dict(model.named_parameters()), torch.float32, out)
    return {
        "logits": logits[0, -1].tolist(),
        "norms": norms,
        "local": sum(parameter.to_local().numel() for parameter in model.parameters()),
        "total": sum(parameter.numel() for parameter in model.parameters()),
    }


def peak_while_loading(location: str) -> dict[str, float]:
    """Bytes of this rank's shard, and by how much its memory grew at most while it was loaded."""
    dist = DistContext.init("cpu")
    mesh = device_mesh(dist, CPU)
    base = find_base(location)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    model = load_sharded(base, mesh, CPU, torch.float32)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    shard = sum(parameter.to_local().numel() * 4 for parameter in model.parameters())
    whole_bytes = 4 * sum(math.prod(parameter.shape) for parameter in model.parameters())
    dist.destroy()
    return {"shard": shard, "grew": after - before, "whole": whole_bytes}
