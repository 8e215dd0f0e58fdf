"""Throughput: units per second, model FLOPs utilization (MFU), memory."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any

import torch

from estiba.distributed import DistContext
from estiba.gpus import find_device
from estiba.progress import peak_memory_bytes
from estiba.training.task import TrainTask


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the device's peak, dense floating-point operations per second, or None for an unlisted device."""
    if device.type != "cuda" or dtype == torch.float32:
        return None
    gpu = find_device(torch.cuda.get_device_name(device))
    return None if gpu is None else gpu.peak_flops


class ThroughputMeter:
    """Sums since the last row of metrics. They stay on the device until `row` is called."""

    def __init__(self, task: TrainTask[Any], device: torch.device, dtype: torch.dtype, world_size: int) -> None:
        self._task, self._device = task, device
        self._peak = peak_flops(device, dtype)
        self._world_size = world_size
        self._started = 0.0
        self._seconds_before = 0.0
        self._loss = self._units_good = self._bad = self._norm = torch.zeros((), dtype=torch.float64)
        self._bad_in_a_row = self._most_in_a_row = torch.zeros((), dtype=torch.float64)
        self._units, self._steps = 0.0, 0
        self._epoch_loss = self._epoch_units = 0.0
        self.units_total = 0.0
        self.seconds_total = 0.0
        self.seconds_per_step: float | None = None

    def start(self) -> None:
        self._started = time.monotonic() - self._seconds_before

    def add(self, loss_sum: torch.Tensor, norm: torch.Tensor, units_local: int, units: float) -> None:
        """Add one step: the summed loss and the units of this rank, and the units of all ranks."""
        # One non-finite sum would hide the row's other steps.
        is_good = torch.isfinite(loss_sum) & torch.isfinite(norm.to(loss_sum.device))
        self._loss = self._loss + torch.where(is_good, loss_sum, 0.0).double()
        self._units_good = self._units_good + torch.where(is_good, float(units_local), 0.0).double()
        is_bad = (~is_good).double()
        self._bad = self._bad + is_bad
        self._bad_in_a_row = (self._bad_in_a_row + 1.0) * is_bad
        self._most_in_a_row = torch.maximum(self._most_in_a_row, self._bad_in_a_row)
        self._norm = norm.detach()
        self._units += units
        self._steps += 1

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the block's time from the throughput."""
        started = time.monotonic()
        try:
            yield
        finally:
            self._started += time.monotonic() - started

    def row(self, dist: DistContext) -> dict[str, Any]:
        """Return the metrics since the last row, over all ranks. `bad_steps` counts non-finite steps."""
        loss, units_good = dist.all_reduce_sum(float(self._loss), float(self._units_good))
        bad = dist.all_reduce_max(float(self._bad))[0]
        self._epoch_loss, self._epoch_units = self._epoch_loss + loss, self._epoch_units + units_good
        now = time.monotonic()
        seconds = max(now - self._started, 1e-9)
        self._started = now
        rate = self._units / seconds
        self.units_total += self._units
        self.seconds_total += seconds
        self.seconds_per_step = seconds / max(1, self._steps)
        unit = self._task.unit
        row: dict[str, Any] = {
            "train_loss": loss / units_good if units_good else math.nan,
            "grad_norm": float(self._norm),
            unit: round(self.units_total),
            f"{unit}_per_s": round(rate, 1),
            "bad_steps": int(bad),
        }
        if self._peak and self._task.flops_per_unit:
            row["mfu"] = round(rate * self._task.flops_per_unit / (self._peak * self._world_size), 4)
        memory = torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else peak_memory_bytes()
        row["memory_mb"] = round(memory / 1e6)
        self._clear()
        return row

    def bad_in_a_row(self, dist: DistContext) -> int:
        """Return the most non-finite steps in a row since the last call, over all ranks. Waits for the device."""
        most = int(dist.all_reduce_max(float(self._most_in_a_row))[0])
        self._most_in_a_row = self._bad_in_a_row
        return most

    def end_epoch(self) -> float:
        """Return the mean loss of all rows since the last call, over all ranks."""
        mean = self._epoch_loss / self._epoch_units if self._epoch_units else math.nan
        self._epoch_loss = self._epoch_units = 0.0
        return mean

    def state_dict(self, dist: DistContext | None = None) -> dict[str, Any]:
        """Return the sums of this rank, and with `dist` those of all ranks too: another number of ranks may resume."""
        loss, units_good = float(self._loss), float(self._units_good)
        return {
            "units_total": self.units_total,
            "seconds_total": self.seconds_total,
            "loss": loss,
            "units_good": units_good,
            "of_all": [loss, units_good] if dist is None else dist.all_reduce_sum(loss, units_good),
            "bad": float(self._bad),
            "norm": float(self._norm),
            "bad_in_a_row": float(self._bad_in_a_row),
            "epoch": [self._epoch_loss, self._epoch_units],
            "units": self._units,
            "seconds": time.monotonic() - self._started if self._started else 0.0,
            "steps": self._steps,
        }

    def load_state_dict(self, state: dict[str, Any], *, of_all: bool = False) -> None:
        """Load this rank's sums, or with `of_all` those of all ranks."""
        loss, units_good = state["of_all"] if of_all and "of_all" in state else (state["loss"], state["units_good"])
        self.units_total, self.seconds_total = state["units_total"], state["seconds_total"]
        self._loss = torch.tensor(loss, dtype=torch.float64)
        self._units_good = torch.tensor(units_good, dtype=torch.float64)
        self._bad = torch.tensor(state["bad"], dtype=torch.float64)
        self._norm = torch.tensor(state.get("norm", 0.0), dtype=torch.float64)
        self._bad_in_a_row = torch.tensor(state.get("bad_in_a_row", 0.0), dtype=torch.float64)
        self._most_in_a_row = self._bad_in_a_row
        self._epoch_loss, self._epoch_units = state.get("epoch", (0.0, 0.0))
        self._units, self._steps = state["units"], state["steps"]
        self._seconds_before = state.get("seconds", 0.0)  # the row after a resume counts these units

    def _clear(self) -> None:
        zero = torch.zeros((), dtype=torch.float64)
        self._loss, self._units_good, self._bad, self._norm = zero, zero, zero, zero
        self._units, self._steps = 0.0, 0
