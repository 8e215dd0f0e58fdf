"""The new-image job as the contract's checks run it (tests/contract)."""

from __future__ import annotations

import random
import re
from pathlib import Path

from contract.containers import Image
from contract.workloads import NO_INPUT, Job, Prepared, Refusal, Setting, newest_step

WORDS = "el barco zarpa al alba con la bodega llena de trigo y vino hacia otro puerto".split()


def prepare(image: Image, folder: Path) -> Prepared:
    """A model of 32 units for 12 steps, and one of 128 units for 400."""
    dice = random.Random(0)
    text = folder / "text"
    text.mkdir()
    for name in ("a.txt", "b.txt"):
        (text / name).write_text("".join(" ".join(dice.choices(WORDS, k=10)) + ".\n" for _ in range(400)))
    settings: dict[str, Setting] = {
        "steps": 12,
        "batch-size": 4,
        "seq-length": 32,
        "learning-rate": 0.01,
        "eval-steps": 5,
        "hidden-size": 32,
        "dropout": 0.2,
        "seed": 7,
    }
    slow = {**settings, "steps": 400, "seq-length": 128, "hidden-size": 128, "batch-size": 16, "save-steps": 5}
    return Prepared(
        quick=Job(channels={"dataset": text}, settings=settings),
        slow=Job(channels={"dataset": text}, settings={**slow, "eval-steps": 50}),
        commits=newest_step,
        commits_before_a_signal=40,
        ignore=("results.json", "metrics.jsonl", "training_log.csv", "events.out.tfevents.*"),
        resumed=re.compile(r"resuming at step [1-9]"),
        misspelt=("learning-rat", "learning-rate"),
        ill_typed=("batch-size", "muchas"),
        refusals=(
            NO_INPUT,
            Refusal(
                what="too little text",
                settings={"seq-length": 1_000_000},
                says=("2 files with", "--seq-length"),
                code=1,
            ),
        ),
        writes="model",
    )
