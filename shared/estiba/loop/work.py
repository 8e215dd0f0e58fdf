"""What a workload gives to the loop: batches, a loss, an evaluation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch

B = TypeVar("B")
Sums = Mapping[str, tuple[float | torch.Tensor, float]]
"""Of one evaluation batch: name -> (sum, count), such as {"val_loss": (812.4, 2048)}."""


class Work(ABC, Generic[B]):
    """One model on one kind of data.

    `batches` is a pure function of the step (and the rank), so that a resume needs to know nothing but the step.
    """

    model: torch.nn.Module
    """On its device."""
    optimizer: torch.optim.Optimizer
    """Its groups' `lr` are set by the loop each step: the schedule's times the group's `lr_scale` (1 if absent)."""
    unit = "tokens"
    """What the loss is averaged over, and what throughput counts."""
    flops_per_unit: float | None = None
    """Floating-point operations to train on one unit, for MFU; None does not know."""

    @abstractmethod
    def batches(self, step: int) -> Sequence[B]:
        """This rank's micro-batches of one step, on the CPU. Called in a thread, ahead of time."""

    @abstractmethod
    def count(self, batch: B) -> int:
        """How many units the loss of this micro-batch is a sum over."""

    @abstractmethod
    def loss(self, model: torch.nn.Module, batch: B) -> torch.Tensor:
        """The loss SUMMED over the batch's units, so that a step averages over units and not over micro-batches.

        `model` is `self.model` as the loop wrapped it; `batch` is on its device.
        """

    @abstractmethod
    def evaluation(self, model: torch.nn.Module) -> Iterator[Sums]:
        """Evaluate, one `yield` a batch; the loop looks for a stop in between. This rank's share of the data."""

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> Mapping[str, float]:
        """After an evaluation, on the first rank; further metrics. Random numbers drawn here leave no trace."""
        del step, metrics
        return {}

    def fields(self, step: int) -> Mapping[str, Any]:
        """What each row of metrics says beside the loop's own, such as the epoch."""
        del step
        return {}

    def plan(self) -> Mapping[str, Any]:
        """What must not change between a checkpoint and its resume: JSON values."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Anything else that a resume needs."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        del state
