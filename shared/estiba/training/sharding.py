"""A model that is sharded over the ranks of a run (FSDP2), or over each replica's ranks (HSDP).

mesh = device_mesh(dist, device, replicas=1)
shard_layers(model, mesh, dtype=torch.bfloat16)      # before its parameters exist: they are on the meta device
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
import torch.distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from estiba.distributed import DistContext
from estiba.errors import ConfigError


def device_mesh(dist: DistContext, device: torch.device, *, replicas: int = 1) -> DeviceMesh:
    """Return a mesh of (replicate, shard), or of (shard) for one replica. Raises ConfigError if they do not divide.

    The ranks of a replica are consecutive, so that with a replica on each host the shards stay on its fast links.
    """
    if dist.world_size % replicas:
        raise ConfigError(
            f"--replicas {replicas}: does not divide the {dist.world_size} ranks of this run; give a divisor"
        )
    if not torch.distributed.is_initialized():  # one rank alone: the same code runs on a group of one
        backend = "nccl" if device.type == "cuda" else "gloo"
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # else it looks this host's name up, which may have none
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    if replicas == 1:
        return init_device_mesh(device.type, (dist.world_size,), mesh_dim_names=("shard",))
    shape = (replicas, dist.world_size // replicas)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


def shard_layers(
    model: torch.nn.Module, layers: Iterable[torch.nn.Module], mesh: DeviceMesh, *, dtype: torch.dtype
) -> None:
    """Shard each layer, and the rest of the model, in place. `dtype` is that of the computation; sums are float32."""
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return the whole of a sharded tensor. All ranks call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
