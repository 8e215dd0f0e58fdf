"""Mixed precision: the dtype of the forward pass, and a gradient scaler where that dtype is float16."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from estiba.errors import ConfigError
from estiba.training.config import Precision


class AmpContext:
    """Autocast for the forward pass, with a gradient scaler in float16."""

    def __init__(self, precision: Precision, device: torch.device) -> None:
        """Raises ConfigError for a precision that the device does not support."""
        self.device = device
        self.dtype = dtype_for(precision, device)
        self.scaler = torch.amp.GradScaler(device.type) if self.dtype == torch.float16 else None

    def forward(self) -> contextlib.AbstractContextManager[Any]:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    @property
    def name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def state_dict(self) -> dict[str, Any] | None:
        return None if self.scaler is None else self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        if self.scaler is not None and state:
            self.scaler.load_state_dict(state)


def dtype_for(precision: Precision, device: torch.device) -> torch.dtype:
    """Return the dtype of the forward pass. Raises ConfigError for one that the device does not support."""
    has_bf16 = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16 if has_bf16 else torch.float16
    if precision == "bfloat16" and not has_bf16:
        raise ConfigError(f"precision bfloat16: {torch.cuda.get_device_name()} lacks it; use float16 or auto")
    if precision == "float16" and device.type == "cpu":
        raise ConfigError("precision float16: slower than float32 on a CPU; use float32 or bfloat16")
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[precision]
