"""States whose every bit follows from their step, and ways to compare and to damage saved ones."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import torch

from estiba.checkpoint.format import MANIFEST

PAGE_BYTES = 4096


def state_of(step: int, *, width: int = 64, layers: int = 4) -> dict[str, Any]:
    """Model and optimizer of one step: `layers` matrices of `width` x `width`, two moments each."""
    base = torch.arange(width * width, dtype=torch.float32).view(width, width)
    model = {f"layers.{index}.weight": base * (index + 1) + step for index in range(layers)}
    model["norm.weight"] = torch.full((width,), float(step)).bfloat16()
    moments = {
        index: {
            "step": torch.tensor(float(step)),
            "exp_avg": base / (step + index + 1),
            "exp_avg_sq": base.square() + step,
        }
        for index in range(layers)
    }
    groups = [{"lr": 0.1 / (step + 1), "betas": (0.9, 0.95), "params": list(range(layers))}]
    return {"model": model, "optimizer": {"state": moments, "param_groups": groups}, "loop": {"step": step}}


def is_same(left: Any, right: Any) -> bool:
    """Bit by bit, type by type; NaN equals the same NaN."""
    if isinstance(left, torch.Tensor):
        if not isinstance(right, torch.Tensor) or left.dtype != right.dtype or left.shape != right.shape:
            return False
        return bytes_of(left) == bytes_of(right)
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return (
            list(left) == list(right)
            and [type(key) for key in left] == [type(key) for key in right]
            and all(is_same(left[key], right[key]) for key in left)
        )
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(is_same, left, right))
    if isinstance(left, float):
        return struct.pack("d", left) == struct.pack("d", right) or (math.isnan(left) and math.isnan(right))
    return bool(left == right)


def bytes_of(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def files_of(checkpoint: Path) -> list[str]:
    """Everything that a checkpoint is made of, its manifest last."""
    names = sorted(path.name for path in checkpoint.iterdir())
    return [name for name in names if name != MANIFEST] + [MANIFEST]


def flip_bit(path: Path, bit: int) -> None:
    """Turn over one bit, counted from the start of the file; the size stays."""
    with open(path, "r+b") as file:
        file.seek(bit // 8)
        old = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([old ^ (1 << bit % 8)]))


def zero_page(path: Path, page: int) -> None:
    """One page of zeros, as a disk that lost a write gives back; the size stays."""
    size = path.stat().st_size
    start = page * PAGE_BYTES
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(bytes(min(PAGE_BYTES, size - start)))
