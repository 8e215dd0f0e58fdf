"""`TrainTask`, which a training image implements: batches, loss, evaluation and checkpoint contents."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import torch

from estiba.training.schedule import Schedule

B = TypeVar("B")
Sums = Mapping[str, tuple[float | torch.Tensor, float]]
"""The sums of one evaluation batch: name -> (sum, count), such as {"val_loss": (812.4, 2048)}."""


class TrainTask(ABC, Generic[B]):
    """One model on one kind of data.

    `batches` is a pure function of the step and the rank, so the step alone determines the position in the data.
    """

    model: torch.nn.Module
    """On its device."""
    optimizer: torch.optim.Optimizer
    """The trainer sets each group's `lr` before each step: its schedule's times the group's `lr_scale` (default 1)."""
    is_sharded = False
    """Whether the model is sharded over the ranks (FSDP2), so that every rank's state holds a part of it."""
    unit = "tokens"
    """The loss is averaged over units, and throughput counts them."""
    flops_per_unit: float | None = None
    """Floating-point operations to train on one unit, for MFU. None: MFU is not reported."""
    fixed_settings: ClassVar[frozenset[str]] = frozenset()
    """Fields of the run fingerprint that even --accept-changed-plan cannot change, such as `model.embed_size`."""

    # --- training

    @abstractmethod
    def batches(self, step: int) -> Sequence[B]:
        """Return this rank's micro-batches of one step, on the CPU. A thread calls it ahead of time.

        The trainer moves tensors to the device, also those in dicts, lists, tuples and named tuples.
        """

    @abstractmethod
    def units_in(self, batch: B) -> int:
        """Return the number of units that the loss of this micro-batch sums over."""

    @abstractmethod
    def loss(self, model: torch.nn.Module, batch: B) -> torch.Tensor:
        """Return the loss SUMMED over the batch's units; a step averages over units, not over micro-batches.

        `model` is `self.model` as the trainer wrapped it; `batch` is on its device.
        """

    def group_schedule(self, group: Mapping[str, Any]) -> Schedule | None:
        """Return the learning-rate schedule of one optimizer group, or None for the trainer's.

        `group` is an entry of `optimizer.param_groups`. A task with schedules of its own adds them to
        `run_fingerprint`.
        """
        del group
        return None

    # --- evaluation

    @abstractmethod
    def evaluate(self, model: torch.nn.Module) -> Iterator[Sums]:
        """Evaluate this rank's share of the data. The trainer checks for a stop after each batch's `yield`.

        It runs in evaluation mode without gradients, also at the last step. Move batches with `prefetch.to_device`.
        """

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> Mapping[str, float]:
        """React to a complete evaluation, on the main rank. Return further metrics.

        Random numbers that are drawn here do not change the training.
        """
        del step, metrics
        return {}

    def should_stop(self, step: int, metrics: Mapping[str, float]) -> str | None:
        """Return why the run is complete before its last step (early stopping), or None to continue.

        The trainer asks on the main rank after each evaluation, with its metrics, and after a resume, with those of
        the last evaluation. The answer must depend only on `metrics` and `state_dict`, so that a resumed run stops
        where an uninterrupted one does.
        """
        del step, metrics
        return None

    def epoch_ending_at(self, step: int) -> float | None:
        """Return the epoch that ends with this step, or None.

        The trainer evaluates there and adds a row with both losses of the epoch.
        """
        del step
        return None

    def log_fields(self, step: int) -> Mapping[str, Any]:
        """Return further fields for each row of metrics, such as the epoch."""
        del step
        return {}

    # --- checkpoints

    def run_fingerprint(self) -> Mapping[str, Any]:
        """Return what must not change between a checkpoint and its resume: JSON values.

        The trainer adds schedule, seed, clip and precision. `fingerprint.DETAILS` explains differences.
        """
        return {}

    def model_state(self) -> Mapping[str, torch.Tensor]:
        """Return the model's tensors to save. Override it to leave out a frozen base."""
        return self.model.state_dict()

    def load_model_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Load what `model_state` returned."""
        self.model.load_state_dict(dict(state))

    def state_dict(self) -> dict[str, Any]:
        """Return what a resume needs besides the model and the optimizer."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned."""
        del state
