"""How fast a run is: units a second, share of the device's peak, memory."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any

import torch

from estiba.gpus import find_device
from estiba.loop.work import Work
from estiba.progress import peak_memory_bytes
from estiba.ranks import Ranks


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Floating-point operations a second at best, or None where it is not known."""
    if device.type != "cuda" or dtype == torch.float32:
        return None
    gpu = find_device(torch.cuda.get_device_name(device))
    return None if gpu is None else gpu.peak_flops


class Meter:
    """Sums since the last row. Nothing is read from the device before a row is made."""

    def __init__(self, work: Work[Any], device: torch.device, dtype: torch.dtype, devices: int) -> None:
        self._work, self._device = work, device
        self._peak = peak_flops(device, dtype)
        self._devices = devices
        self._started = 0.0
        self._seconds_before = 0.0
        self._loss = self._units_good = self._bad = self._norm = torch.zeros((), dtype=torch.float64)
        self._units, self._steps = 0.0, 0
        self.units_total = 0.0
        self.seconds_total = 0.0
        self.seconds_per_step: float | None = None

    def start(self) -> None:
        self._started = time.monotonic() - self._seconds_before

    def add(self, loss_sum: torch.Tensor, norm: torch.Tensor, units_here: int, units: float) -> None:
        """One step: the summed loss and units of this rank, and the units of all."""
        # A sum that is not finite would hide the other steps of the row.
        is_good = torch.isfinite(loss_sum) & torch.isfinite(norm.to(loss_sum.device))
        self._loss = self._loss + torch.where(is_good, loss_sum, 0.0).double()
        self._units_good = self._units_good + torch.where(is_good, float(units_here), 0.0).double()
        self._bad = self._bad + (~is_good).double()
        self._norm = norm.detach()
        self._units += units
        self._steps += 1

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time in here is not training time."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._started += time.monotonic() - began

    def row(self, ranks: Ranks) -> dict[str, Any]:
        """The numbers since the last row, agreed over all ranks; `bad_steps` counts what was not finite."""
        here = [float(self._loss), float(self._units_good)]
        loss, units_good = ranks.sums(*here)
        bad = ranks.largest(float(self._bad))[0]
        now = time.monotonic()
        seconds = max(now - self._started, 1e-9)
        self._started = now
        rate = self._units / seconds
        self.units_total += self._units
        self.seconds_total += seconds
        self.seconds_per_step = seconds / max(1, self._steps)
        unit = self._work.unit
        row: dict[str, Any] = {
            "train_loss": loss / units_good if units_good else math.nan,
            "grad_norm": float(self._norm),
            unit: round(self.units_total),
            f"{unit}_per_s": round(rate, 1),
            "bad_steps": int(bad),
        }
        if self._peak and self._work.flops_per_unit:
            row["mfu"] = round(rate * self._work.flops_per_unit / (self._peak * self._devices), 4)
        memory = torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else peak_memory_bytes()
        row["memory_mb"] = round(memory / 1e6)
        self._clear()
        return row

    def state_dict(self) -> dict[str, Any]:
        return {
            "units_total": self.units_total,
            "seconds_total": self.seconds_total,
            "loss": float(self._loss),
            "units_good": float(self._units_good),
            "bad": float(self._bad),
            "units": self._units,
            "seconds": time.monotonic() - self._started if self._started else 0.0,
            "steps": self._steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.units_total, self.seconds_total = state["units_total"], state["seconds_total"]
        self._loss = torch.tensor(state["loss"], dtype=torch.float64)
        self._units_good = torch.tensor(state["units_good"], dtype=torch.float64)
        self._bad = torch.tensor(state["bad"], dtype=torch.float64)
        self._units, self._steps = state["units"], state["steps"]
        self._seconds_before = state.get("seconds", 0.0)  # else the row after a resume counts units and not their time

    def _clear(self) -> None:
        zero = torch.zeros((), dtype=torch.float64)
        self._loss, self._units_good, self._bad, self._norm = zero, zero, zero, zero
        self._units, self._steps = 0.0, 0
