"""The processes that train one model together: who this one is, and what all of them agree on.

Started by `processes.run_on_every_gpu` or by torchrun; alone where neither did.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = timedelta(minutes=30)
CONTROL_TIMEOUT = timedelta(days=2)
"""The first rank may be making tokens of a corpus, or writing to a slow disk, while the others wait."""


@dataclass(frozen=True)
class Ranks:
    """This process among `count`."""

    rank: int = 0
    count: int = 1
    local: int = 0
    control: Any = None
    """A group on the CPU, so that agreeing on something does not wait for a GPU."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @classmethod
    def join(cls, device_type: str, environ: Mapping[str, str] = os.environ) -> Ranks:
        """Meet the others, where there are any (RANK and WORLD_SIZE, as torchrun sets them)."""
        count = int(environ.get("WORLD_SIZE", "1"))
        if count == 1:
            return cls()
        local = int(environ.get("LOCAL_RANK", environ["RANK"]))
        if device_type == "cuda":
            torch.cuda.set_device(local)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device_type == "cuda" else "gloo", timeout=TIMEOUT)
        control = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)
        return cls(rank=dist.get_rank(), count=count, local=local, control=control)

    def largest(self, *values: float) -> list[float]:
        """The largest of each value over all ranks."""
        return self._reduce(values, dist.ReduceOp.MAX) if self.count > 1 else list(values)

    def sums(self, *values: float) -> list[float]:
        """The sum of each value over all ranks, in float64."""
        return self._reduce(values, dist.ReduceOp.SUM) if self.count > 1 else list(values)

    def _reduce(self, values: tuple[float, ...], how: Any) -> list[float]:
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, op=how, group=self.control)
        return [float(value) for value in tensor]

    def from_first(self, value: Any) -> Any:
        """What the first rank has: plain values."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def wait(self) -> None:
        if self.count > 1:
            dist.barrier(group=self.control)

    def leave(self) -> None:
        if self.count > 1 and dist.is_initialized():
            dist.destroy_process_group()
