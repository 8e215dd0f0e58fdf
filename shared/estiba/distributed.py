"""This process's rank in a run of several processes, and collectives on plain values.

`processes.run_ranks` or torchrun starts the ranks; without either, the world size is 1.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = timedelta(minutes=30)
CONTROL_TIMEOUT = timedelta(days=2)
"""The main rank may tokenize a corpus or write to a slow disk while the others wait."""


@dataclass(frozen=True)
class DistContext:
    """This process's rank among the `world_size` ranks of a run."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    control_group: Any = None
    """A gloo group, so that collectives on plain values do not wait for the GPU."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @classmethod
    def init(cls, device_type: str, environ: Mapping[str, str] = os.environ) -> DistContext:
        """Join the process group of torchrun's RANK and WORLD_SIZE. Without them there is one rank and no group.

        A rank's GPU is the current one by now.
        """
        world_size = int(environ.get("WORLD_SIZE", "1"))
        if world_size == 1:
            return cls()
        local_rank = int(environ.get("LOCAL_RANK", environ["RANK"]))
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device_type == "cuda" else "gloo", timeout=TIMEOUT)
        control_group = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)
        return cls(rank=dist.get_rank(), world_size=world_size, local_rank=local_rank, control_group=control_group)

    def all_reduce_max(self, *values: float) -> list[float]:
        """Return the largest of each value over all ranks."""
        return self._all_reduce(values, dist.ReduceOp.MAX)

    def all_reduce_sum(self, *values: float) -> list[float]:
        """Return the sum of each value over all ranks, in float64."""
        return self._all_reduce(values, dist.ReduceOp.SUM)

    def _all_reduce(self, values: tuple[float, ...], op: Any) -> list[float]:
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, op=op, group=self.control_group)
        return [float(value) for value in tensor]

    def broadcast(self, value: Any) -> Any:
        """Return the main rank's value, which must be picklable."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.control_group)
        return values[0]

    def all_gather(self, value: Any) -> list[Any]:
        """Return every rank's value, which must be picklable, by rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control_group)
        return values

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier(group=self.control_group)

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the block on the main rank while the others wait, then on the others."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()

    def destroy(self) -> None:
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()
