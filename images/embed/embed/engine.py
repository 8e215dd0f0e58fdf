"""One model on one device: token tensors in, float32 vectors out, checked.

Shapes: B rows, T tokens per row, D embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from embed.tokens import TASK, Features

TRIM_BELOW = 0.1
UNIT_NORM_TOLERANCE = 1e-4
"""Vectors are scaled to unit length in float32 whatever the model computes in, so one tolerance serves every dtype."""


@dataclass(frozen=True, kw_only=True)
class Flight:
    """A batch whose vectors are on their way to the host."""

    rows: np.ndarray
    """int64[B]: the rows of the window."""
    vectors_BD: torch.Tensor
    """float32[B, D] in host memory; filled once `arrived` has happened."""
    arrived: torch.cuda.Event | None
    padded_tokens: int

    def land(self) -> np.ndarray:
        """float32[B, D]; waits for the device."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.vectors_BD.numpy()


class Engine:
    """The forward pass, and the budget that batches for it keep to."""

    def __init__(
        self,
        model: SentenceTransformer,
        device: torch.device,
        dtype: torch.dtype,
        *,
        token_budget: int,
        normalize: bool,
        dimensions: int | None,
    ) -> None:
        self.model = model
        self.device = device
        self.dtype = dtype
        self.token_budget = token_budget
        self.multiple = 8 if device.type == "cuda" and dtype != torch.float32 else 1  # tensor cores take eights
        self._normalize = normalize
        self._dimensions = dimensions

    def launch(self, features: Features, rows: np.ndarray) -> Flight:
        """Start one batch. On CUDA this returns before the vectors are there. Raises torch.OutOfMemoryError."""
        padded_tokens = _padded_tokens(features)
        on_device = {key: self._to_device(value) for key, value in features.items()}
        with torch.inference_mode():
            vectors_BD = self.model(on_device, task=TASK)["sentence_embedding"].float()
            if self._dimensions is not None:
                vectors_BD = vectors_BD[:, : self._dimensions]
            if self._normalize:  # a zero vector stays zero: divided by 1e-12, not by 0
                vectors_BD = torch.nn.functional.normalize(vectors_BD, p=2, dim=1)
            arrived = None
            if self.device.type == "cuda":
                on_host_BD = torch.empty(vectors_BD.shape, dtype=torch.float32, pin_memory=True)
                on_host_BD.copy_(vectors_BD, non_blocking=True)
                arrived = torch.cuda.Event()
                arrived.record(torch.cuda.current_stream(self.device))
                vectors_BD = on_host_BD
        return Flight(rows=rows, vectors_BD=vectors_BD, arrived=arrived, padded_tokens=padded_tokens)

    def _to_device(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or self.device.type == "cpu":
            return value
        if self.device.type == "cuda":
            return value.pin_memory().to(self.device, non_blocking=True)
        return value.to(self.device)

    def free(self) -> None:
        """Give memory that no tensor uses back to the device."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def trim(self) -> None:
        """The same, where little is left: a cache full of one file's odd shapes starves the next one's."""
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            if free < TRIM_BELOW * total:
                self.free()

    def broken(self, vectors_BD: np.ndarray) -> np.ndarray:
        """bool[B]: not finite, or, where vectors should have unit length, without it (a zero vector, say)."""
        bad = ~np.isfinite(vectors_BD).all(axis=1)
        if self._normalize:
            with np.errstate(invalid="ignore", over="ignore"):
                norms = np.sqrt(np.einsum("bd,bd->b", vectors_BD, vectors_BD))
                bad |= ~(np.abs(norms - 1) <= UNIT_NORM_TOLERANCE)
        return bad


def ran_out_of_memory(error: BaseException) -> bool:
    """True for the device's allocator, for cuBLAS's workspace, and for the host's allocator."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    signs = ("CUBLAS_STATUS_ALLOC_FAILED", "DefaultCPUAllocator")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def _padded_tokens(features: Features) -> int:
    for key in ("attention_mask", "input_ids"):
        if isinstance(tensor := features.get(key), torch.Tensor):
            return tensor.numel()
    return 0
