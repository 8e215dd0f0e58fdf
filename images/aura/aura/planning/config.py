"""The settings of `aura plan`, apart from the planner so that --help need not import torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from estiba.config import Config


class PlanConfig(Config):
    """Recommend model size, batch, optimizer and checkpointing for a budget of hours, here or on a named GPU."""

    hours: Annotated[float, Field(gt=0)] = 72.0
    """Training time in hours."""
    gpu: str | None = None
    """GPU name, such as A100-80GB; default is to measure this machine, in a few seconds."""
    gpus: Annotated[int, Field(ge=1)] = 1
    """Number of GPUs in one host."""
    memory_gb: Annotated[float, Field(gt=0)] | None = None
    """Memory of one GPU in 10^9 bytes; default is the GPU's own."""
    tokens_per_s: Annotated[float, Field(gt=0)] | None = None
    """Measured tokens per second of one GPU without checkpointing; default is an estimate."""
    measured_on: str = "auto"
    """The preset that --tokens-per-s was measured with."""
    utilization: Annotated[float, Field(gt=0, le=1)] = 0.45
    """Fraction of a named GPU's peak that training reaches."""
    preset: str = "auto"
    """The preset to check; auto is the one that training would choose."""
    tokens: Annotated[float, Field(gt=0)] | None = None
    """Tokens of text available; default is unlimited."""
    vocab_size: Annotated[int, Field(ge=256)] = 32_000
    """Size of the vocabulary."""
    seq_length: Annotated[int, Field(ge=16)] | None = None
    """Context length in tokens for sizes that are not presets; default is 2048, or 256 on a CPU."""
    as_json: bool = False
    """Print one JSON document instead of a table."""
