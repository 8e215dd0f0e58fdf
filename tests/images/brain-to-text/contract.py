"""The brain-to-text jobs that the contract suite runs (tests/contract)."""

from __future__ import annotations

import re
from pathlib import Path

from contract.containers import Image
from contract.workloads import NO_INPUT, Job, Prepared, Refusal, Setting, newest_step

MAKE_RECORDINGS = "brain-to-text generate --out /generated/data --sessions 3 --trials 8 --features 12 --longest-words 2"

MAKE_LONG_RECORDINGS = (
    "brain-to-text generate --out /generated/long --sessions 4 --trials 16 --bins-per-phoneme 26 --features 128"
)
"""Batches of 64 take about 40 MB, and a step a GB."""


def prepare(image: Image, folder: Path) -> Prepared:
    """Generate three sessions of a few short trials with the image itself, and configure a small two-layer decoder."""
    generated = folder / "generated"
    generated.mkdir()
    image.output_of(
        ["sh", "-c", f"{MAKE_RECORDINGS} && {MAKE_LONG_RECORDINGS} && chmod -R a+rX /generated"],
        volumes={str(generated): {"bind": "/generated", "mode": "rw"}},
    )
    settings: dict[str, Setting] = {
        "n-input-features": 12,
        "n-units": 16,
        "n-layers": 2,
        "batch-size": 6,
        "days-per-batch": 2,
        "num-training-batches": 12,
        "lr-warmup-steps": 3,
        "lr-max": 0.01,
        "epsilon": 1e-6,
        "batches-per-val-step": 5,
        "batches-per-train-log": 3,
        "seed": 7,
        "ema-decay": 0.9,
        "num-dataloader-workers": 1,
        "cache-gb": 0.1,
    }
    slow = {**settings, "num-training-batches": 400, "n-units": 96, "batch-size": 16}
    channels = {"dataset": generated / "data"}
    large = {"n-input-features": 128, "n-units": 32, "n-layers": 2, "batch-size": 64, "num-training-batches": 12,
             "lr-warmup-steps": 3, "num-dataloader-workers": 1}  # fmt: skip
    return Prepared(
        quick=Job(channels=channels, settings=settings),
        slow=Job(channels=channels, settings=slow),
        memory_limit="1600m",
        large=Job(channels={"dataset": generated / "long"}, settings=large),
        commits=newest_step,
        commits_before_a_signal=20,
        ignore=("results.json", "metrics.jsonl", "events.out.tfevents.*"),
        resumed=re.compile(r"resuming at step [1-9]"),
        misspelt=("n-unit", "n-units"),
        ill_typed=("batch-size", "muchos"),
        refusals=(
            NO_INPUT,
            Refusal(what="no such settings file", settings={"config-file": "nadie.yaml"}, says=("nadie.yaml",)),
        ),
        writes="model",
        commands=("evaluate", "generate", "index", "show-config"),
    )
