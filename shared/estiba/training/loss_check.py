"""A check at the start of a run: the task's loss is a sum over its batch, as the trainer needs, and not a mean.

The trainer divides by the units of all micro-batches. A mean would shrink the gradients by the size of the batch, and
nothing else would show it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch

from estiba.training import rng
from estiba.training.precision import AmpContext
from estiba.training.prefetch import to_device
from estiba.training.task import TrainTask

TOLERANCE = 0.02
T = TypeVar("T")


def check_loss_is_a_sum(task: TrainTask[Any], batches: Sequence[Any], amp: AmpContext, device: torch.device) -> None:
    """Compare the loss of the first of `batches` with that of its halves. Raises TypeError for a mean.

    Draws no random numbers and changes no state. A batch that cannot be halved, or a loss that depends on the whole
    batch in another way, is not judged.
    """
    if not batches or (size := _rows(batches[0])) is None or size < 2:
        return
    batch = batches[0]
    halves = [_slice(batch, 0, size // 2), _slice(batch, size // 2, size)]
    was_training = task.model.training
    task.model.eval()
    try:
        with rng.preserved(), torch.no_grad(), amp.forward():
            units = [task.units_in(half) for half in halves]
            whole, first, second = (float(task.loss(task.model, to_device(part, device))) for part in (batch, *halves))
    except Exception:  # a task need not accept half a batch
        return
    finally:
        task.model.train(was_training)
    if not sum(units) or min(units) <= 0:
        return
    mean = (first * units[0] + second * units[1]) / sum(units)
    is_mean = abs(whole - mean) <= TOLERANCE * abs(whole)
    is_sum = abs(whole - first - second) <= 0.25 * abs(whole)
    if whole > 0 and is_mean and not is_sum:
        raise TypeError(
            f"{type(task).__name__}.loss returned {whole:.4g} for a batch and {first:.4g} and {second:.4g} for its "
            'halves: it is a mean, and must be the SUM over the batch\'s units (reduction="sum"), which units_in counts'
        )


def _rows(value: Any) -> int | None:
    """Return the size of the first dimension that all tensors of a batch share, or None."""
    if isinstance(value, torch.Tensor):
        return value.shape[0] if value.ndim else None
    items = list(value.values()) if isinstance(value, dict) else list(value) if isinstance(value, (list, tuple)) else []
    sizes = {_rows(item) for item in items}
    return sizes.pop() if len(sizes) == 1 else None


def _slice(value: T, start: int, end: int) -> T:
    part: Any
    if isinstance(value, torch.Tensor):
        part = value[start:end]
    elif isinstance(value, dict):
        part = {name: _slice(item, start, end) for name, item in value.items()}
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        part = type(value)(*(_slice(item, start, end) for item in value))
    else:
        part = type(value)(_slice(item, start, end) for item in value)  # type: ignore[call-arg, attr-defined]
    return part  # type: ignore[no-any-return]
