"""How large a model the hours pay for: `python -m aura plan --hours 72 --gpu A100-80GB`.

The machine is measured for some seconds, or stated: as tokens a second that a run has shown, or as a GPU by name.
sizing.py weighs, hardware.py knows memory and speed; here are the flags, and what a person reads.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

import torch
from pydantic import Field

from aura import presets
from aura.hardware import measure, memory_needed
from aura.sizing import Candidate, Plan, count, expected_loss, plan, shape_of
from estiba.config import Config, load
from estiba.errors import ConfigError
from estiba.gpus import find_device

__all__ = ["Candidate", "Plan", "PlanConfig", "expected_loss", "main", "memory_needed", "plan", "plan_for", "table"]


class PlanConfig(Config):
    """Recommend a size, batch, optimizer and checkpointing for the hours there are, on a GPU or on this machine."""

    hours: Annotated[float, Field(gt=0)] = 72.0
    """How long training may take."""
    gpu: str | None = None
    """A GPU by name, such as A100-80GB; default is this machine's, measured for some seconds."""
    gpus: Annotated[int, Field(ge=1)] = 1
    """GPUs of that kind in one box."""
    memory_gb: Annotated[float, Field(gt=0)] | None = None
    """Memory of one GPU, in 10^9 bytes; default is the GPU's own."""
    tokens_per_s: Annotated[float, Field(gt=0)] | None = None
    """Tokens a second of one GPU as a run has shown them, without checkpointing; default is an estimate."""
    measured_on: str = "auto"
    """The preset that showed these tokens a second."""
    utilization: Annotated[float, Field(gt=0, le=1)] = 0.45
    """Part of a GPU's peak that training reaches, where nothing was measured."""
    preset: str = "auto"
    """The preset to warn about; auto is the one that training would take."""
    tokens: Annotated[float, Field(gt=0)] | None = None
    """Tokens of text there are; default is enough."""
    vocab_size: Annotated[int, Field(ge=256)] = 32_000
    """Words of the tokenizer."""
    seq_length: Annotated[int, Field(ge=16)] | None = None
    """Tokens of context, of sizes that are no preset's; default is 2048, and 256 on a CPU."""
    as_json: bool = False
    """Print one JSON document instead of a table."""


def main(argv: Sequence[str]) -> int:
    """`aura plan`: print the recommendation. Raises ConfigError on a mistake in the flags."""
    config = load(PlanConfig, argv=argv, environ=None, hyperparameters=None)
    made = plan_for(config)
    print(json.dumps(as_json(made)) if config.as_json else table(made))
    return 0


def plan_for(config: PlanConfig) -> Plan:
    """The plan that flags ask for. Measures this machine where they name neither a GPU nor a speed."""
    sheet, memory = None, None if config.memory_gb is None else int(config.memory_gb * 1e9)
    cuda = torch.cuda.is_available()
    name = config.gpu or (torch.cuda.get_device_name(0) if cuda else None)
    if config.gpu is not None:
        sheet = find_device(config.gpu)
        if sheet is None and (config.tokens_per_s is None or memory is None):
            raise ConfigError(
                f"--gpu {config.gpu}: no data sheet of it here; name another (A100-80GB, H100, L4, ...) or pass "
                "--tokens-per-s and --memory-gb"
            )
    if memory is None:
        memory = sheet.memory_bytes if sheet else _own_memory_bytes(cuda)
    if config.tokens_per_s is not None:
        on = presets.find(config.measured_on, memory_bytes=memory if name else None)
        speed = config.tokens_per_s * shape_of(on, config.vocab_size).flops_per_token()
        source = f"{config.tokens_per_s:g} tokens/s measured on {on.name}"
    elif sheet is not None:
        speed = sheet.peak_flops * config.utilization
        source = f"assumed: {config.utilization:.0%} of {sheet.name}'s peak of {sheet.peak_flops / 1e12:.0f} TFLOP/s"
    else:
        speed = measure(torch.device("cuda" if cuda else "cpu"))
        source = f"measured now on {name or 'this CPU'}"
    preset = config.preset if name or config.preset != "auto" else presets.choose(None).name
    return plan(
        hours=config.hours, flops_per_s=speed, memory_bytes=memory, speed_from=source, gpus=config.gpus,
        vocab_size=config.vocab_size, seq_length=config.seq_length or (2048 if name else 256),
        tokens_available=config.tokens, preset=preset,
    )  # fmt: skip


def table(plan: Plan) -> str:
    """The plan for a person: what to pass, what was weighed, what to be warned of."""
    best = plan.best
    speed = f"{plan.flops_per_s / 1e12:.3g} TFLOP/s ({plan.speed_from})"
    columns = (
        f"{'model':<18} {'params':>7} {'width x layers':>14} {'batch':>7} {'optimizer':>9} {'checkpt.':>9} {'GB':>6}"
    )
    columns += f" {'tok/s':>7} {'tokens':>7} {'tok/par':>8} {'epochs':>6} {'loss':>6}"
    lines = [f"{plan.hours:g} h at {speed}; {plan.memory_bytes / 1e9:.0f} GB of memory for each device", "", columns]
    for c in plan.candidates:
        lines.append(
            f"{c.name or '-':<18} {count(c.parameters):>7} {f'{c.shape.embed_size} x {c.shape.num_layers}':>14} "
            f"{f'{c.batch_size} x {c.gradient_accumulation_steps}':>7} {c.optimizer:>9} {c.checkpointing or 'none':>9} "
            f"{c.memory_bytes / 1e9:>6.1f} {count(c.tokens_per_s):>7} {count(c.tokens):>7} "
            f"{c.tokens_per_parameter:>8.1f} {'-' if c.epochs is None else f'{c.epochs:.1f}':>6} {_loss(c):>6}"
            + ("  <- recommended" if c is best else "" if c.fits else "  does not fit")
        )
    lines += ["", "Recommended: " + flags(best), "Expected losses rank sizes; what yours will be, your text decides."]
    if plan.warnings:
        lines += ["", *(f"WARNING {number}: {text}" for number, text in enumerate(plan.warnings, start=1))]
    return "\n".join(lines)


def _loss(candidate: Candidate) -> str:
    """A model that knows nothing has ln(vocabulary); a law that says more is out of its depth."""
    most = math.log(candidate.shape.vocab_size)
    return f"{candidate.loss:.3f}" if candidate.loss < most else f">{most:.1f}"


def flags(candidate: Candidate) -> str:
    """What to pass to training. Checkpointing is not among it: training takes as much as memory asks for by itself."""
    shape = candidate.shape
    parts = [
        f"--model-preset {candidate.name or 'manual'}", f"--batch-size {candidate.batch_size}",
        f"--gradient-accumulation-steps {candidate.gradient_accumulation_steps}", f"--optimizer {candidate.optimizer}",
    ]  # fmt: skip
    if not candidate.name:
        parts[1:1] = [
            f"--embed-size {shape.embed_size}", f"--num-layers {shape.num_layers}", f"--num-heads {shape.num_heads}",
            f"--seq-length {shape.seq_length}", f"--learning-rate {candidate.learning_rate:g}",
        ]  # fmt: skip
    parts += [f"--vocab-size {shape.vocab_size}", f"--max-steps {candidate.steps}"]
    return " ".join(parts)


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain values."""
    return asdict(plan) | {"flags": flags(plan.best)}


def _own_memory_bytes(cuda: bool) -> int:
    if cuda:
        return torch.cuda.get_device_properties(0).total_memory
    import psutil

    return psutil.virtual_memory().total
