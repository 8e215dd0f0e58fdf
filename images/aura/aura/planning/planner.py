"""`aura plan --hours 72 --gpu A100-80GB`: how large a model to train in the hours available.

The speed is estimated for a named GPU, given in tokens per second, or measured on this machine in a few seconds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict

import psutil
import torch

from aura.planning import presets
from aura.planning.budget import Budget, Candidate, count, plan_budget
from aura.planning.config import PlanConfig
from aura.planning.hardware import measure
from estiba.errors import ConfigError
from estiba.gpus import find_device


def plan(config: PlanConfig) -> None:
    """Print the recommendation. Raises ConfigError."""
    budget = budget_for(config)
    print(json.dumps(asdict(budget) | {"flags": flags(budget.best)}) if config.as_json else table(budget))


def budget_for(config: PlanConfig) -> Budget:
    """Plan from the flags. Measures this machine if they give neither a GPU nor a speed."""
    spec, memory_bytes = None, None if config.memory_gb is None else int(config.memory_gb * 1e9)
    cuda = torch.cuda.is_available()
    name = config.gpu or (torch.cuda.get_device_name(0) if cuda else None)
    if config.gpu is not None:
        spec = find_device(config.gpu)
        if spec is None and (config.tokens_per_s is None or memory_bytes is None):
            raise ConfigError(
                f"--gpu {config.gpu}: no data sheet for this GPU; name another (A100-80GB, H100, L4, ...) or pass "
                "--tokens-per-s and --memory-gb"
            )
    if memory_bytes is None:
        own = torch.cuda.get_device_properties(0).total_memory if cuda else psutil.virtual_memory().total
        memory_bytes = spec.memory_bytes if spec else own
    if config.tokens_per_s is not None:
        measured_on = presets.find(config.measured_on, memory_bytes=memory_bytes if name else None)
        flops_per_s = config.tokens_per_s * measured_on.model(config.vocab_size).flops_per_token()
        speed_from = f"{config.tokens_per_s:g} tokens/s measured on {measured_on.name}"
    elif spec is not None:
        flops_per_s = spec.peak_flops * config.utilization
        peak = f"{spec.name}'s peak of {spec.peak_flops / 1e12:.0f} TFLOP/s"
        speed_from = f"assumed: {config.utilization:.0%} of {peak}"
    else:
        flops_per_s = measure(torch.device("cuda" if cuda else "cpu"))
        speed_from = f"measured now on {name or 'this CPU'}"
    preset = config.preset if name or config.preset != "auto" else presets.choose(None).name
    return plan_budget(
        hours=config.hours, flops_per_s=flops_per_s, memory_bytes=memory_bytes, speed_from=speed_from, gpus=config.gpus,
        vocab_size=config.vocab_size, seq_length=config.seq_length or (2048 if name else 256),
        tokens_available=config.tokens, preset=preset,
    )  # fmt: skip


def table(budget: Budget) -> str:
    """Return the recommendation, the alternatives and the warnings as text."""
    columns = "model params width_x_layers batch optimizer checkpt. GB tok/s tokens tok/par epochs loss".split()
    speed = f"{budget.flops_per_s / 1e12:.3g} TFLOP/s ({budget.speed_from})"
    lines = [f"{budget.hours:g} h at {speed}; {budget.memory_bytes / 1e9:.0f} GB of memory for each device", ""]
    lines.append(_row([column.replace("_", " ") for column in columns]))
    for c in budget.candidates:
        row = _row(
            [
                c.name or "-", count(c.parameters), f"{c.shape.embed_size} x {c.shape.num_layers}",
                f"{c.batch_size} x {c.gradient_accumulation_steps}", c.optimizer, str(c.checkpointing or "none"),
                f"{c.memory_bytes / 1e9:.1f}", count(c.tokens_per_s), count(c.tokens), f"{c.tokens_per_parameter:.1f}",
                "-" if c.epochs is None else f"{c.epochs:.1f}", _loss(c),
            ]
        )  # fmt: skip
        lines.append(row + ("  <- recommended" if c is budget.best else "" if c.fits else "  does not fit"))
    lines += ["", "Recommended: " + flags(budget.best), "Expected losses only rank sizes; yours depend on the text."]
    if budget.warnings:
        lines += ["", *(f"WARNING {number}: {text}" for number, text in enumerate(budget.warnings, start=1))]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    widths = (-18, 7, 14, 7, 9, 9, 6, 7, 7, 8, 6, 6)
    pairs = zip(cells, widths, strict=True)
    return " ".join(cell.ljust(-width) if width < 0 else cell.rjust(width) for cell, width in pairs)


def _loss(candidate: Candidate) -> str:
    """Format the expected loss. The law does not apply above ln(vocabulary), the loss of a random guess."""
    highest = math.log(candidate.shape.vocab_size)
    return f"{candidate.loss:.3f}" if candidate.loss < highest else f">{highest:.1f}"


def flags(candidate: Candidate) -> str:
    """Return the flags for training, which chooses activation checkpointing by itself."""
    shape = candidate.shape
    parts = [
        f"--model-preset {candidate.name or 'manual'}", f"--batch-size {candidate.batch_size}",
        f"--gradient-accumulation-steps {candidate.gradient_accumulation_steps}", f"--optimizer {candidate.optimizer}",
    ]  # fmt: skip
    if not candidate.name:
        parts[1:1] = [
            f"--embed-size {shape.embed_size}", f"--num-layers {shape.num_layers}", f"--num-heads {shape.num_heads}",
            f"--seq-length {shape.seq_length}", f"--learning-rate {candidate.learning_rate:g}",
            f"--dropout {shape.dropout:g}", f"--tie-embeddings {str(shape.tie_embeddings).lower()}",
        ]  # fmt: skip
    parts += [f"--vocab-size {shape.vocab_size}", f"--max-steps {candidate.steps}"]
    return " ".join(parts)
