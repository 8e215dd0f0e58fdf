"""GPU specifications from NVIDIA's data sheets."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Device:
    """One GPU model."""

    name: str
    pattern: str
    """Regular expression for the GPU's name in upper case, without spaces, dashes and underscores."""
    peak_flops: float
    """Dense FLOP/s in bfloat16, or float16 on older GPUs, with float32 accumulation."""
    memory_bytes: int


def _device(name: str, pattern: str, peak_tflops: float, memory_gb: float) -> Device:
    return Device(name=name, pattern=pattern, peak_flops=peak_tflops * 1e12, memory_bytes=int(memory_gb * 1e9))


DEVICES = (
    _device("B200", r"B200", 2250, 180),
    _device("GH200", r"GH200", 989, 96),
    _device("H200", r"H200", 989, 141),
    _device("H100-PCIe", r"H100.*PCIE", 756, 80),
    _device("H100", r"H100", 989, 80),
    _device("A100-40GB", r"A100.*40G", 312, 40),
    _device("A100-80GB", r"A100(?!0)", 312, 80),
    _device("L40S", r"L40S", 362, 48),
    _device("L4", r"L4(?!0)", 121, 24),
    _device("L40", r"L40(?!0)", 181, 48),
    _device("A10G", r"A10G", 70, 24),
    _device("A10", r"A10(?!0)", 125, 24),
    _device("A30", r"A30(?!0)", 165, 24),
    _device("RTX-6000-Ada", r"6000ADA", 364, 48),
    _device("A6000", r"A6000", 155, 48),
    _device("A40", r"A40(?!0)", 150, 48),
    _device("RTX-5090", r"5090", 209, 32),
    _device("RTX-4090", r"4090", 165, 24),
    _device("RTX-3090", r"3090", 71, 24),
    _device("V100-32GB", r"V100.*32G", 125, 32),
    _device("V100-16GB", r"V100", 125, 16),
    _device("T4", r"T4(?!\d)", 65, 16),
)
"""The first whose pattern matches is used. Peaks are from NVIDIA's data sheets, without sparsity."""


def find_device(name: str) -> Device | None:
    """Return the specifications of "A100-80GB" or "NVIDIA A100-SXM4-80GB"; None for an unknown GPU."""
    normalized = re.sub(r"[\s_-]", "", name.upper())
    return next((device for device in DEVICES if re.search(device.pattern, normalized)), None)
