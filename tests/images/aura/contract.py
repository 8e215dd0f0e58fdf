"""The aura job for the checks of tests/contract."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

from contract.containers import Image
from contract.workloads import NO_INPUT, Job, Prepared, Refusal, Setting, newest_step

WORDS = "el barco zarpa al alba con la bodega llena de trigo y vino hacia otro puerto".split()


def prepare(image: Image, folder: Path) -> Prepared:
    """Two files of generated sentences, for a one-layer model (a dozen steps) and a larger one (about a hundred)."""
    dice = random.Random(0)
    text = folder / "text"
    text.mkdir()
    lines = [" ".join(dice.choices(WORDS, k=dice.randint(4, 30))).capitalize() + "." for _ in range(1500)]
    (text / "a.txt").write_text("\n".join(lines[:1000]) + "\n")
    (text / "b.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines[1000:]))
    settings: dict[str, Setting] = {
        "model-preset": "manual",
        "embed-size": 32,
        "num-layers": 1,
        "num-heads": 2,
        "seq-length": 32,
        "vocab-size": 300,
        "batch-size": 4,
        "gradient-accumulation-steps": 2,
        "learning-rate": 0.005,
        "dropout": 0.2,
        "seed": 7,
        "max-steps": 12,
        "validation-split": 0.05,
        "eval-batches": 3,
        "save-steps": 5,
        "log-interval": 3,
        "text-format": "lines",
        "sample-tokens": 8,
    }
    slow = {**settings, "max-steps": 400, "seq-length": 64, "embed-size": 128, "num-layers": 2, "eval-steps": 40}
    return Prepared(
        quick=Job(channels={"dataset": text}, settings=settings),
        slow=Job(channels={"dataset": text}, settings=slow),
        commits=newest_step,
        commits_before_a_signal=40,
        # interrupt-step-N.pt and its digest are written on Ctrl+C, and are the person's to delete.
        ignore=("results.json", "metrics.jsonl", "events.out.tfevents.*", "interrupt-step-*.pt*"),
        resumed=re.compile(r"resuming at step [1-9]"),
        misspelt=("learning-rat", "learning-rate"),
        ill_typed=("batch-size", "muchas"),
        refusals=(
            NO_INPUT,
            Refusal(what="no such preset", settings={"model-preset": "enorme"}, says=("'enorme'", "aura-72h-max")),
            Refusal(what="heads that do not fit", settings={"num-heads": 3}, says=("embed_size 32", "num_heads 3")),
            Refusal(
                what="no such tokenizer",
                settings={"tokenizer-name-or-path": "/opt/ml/input/data/nadie", "vocab-size": "none"},
                says=("/opt/ml/input/data/nadie", "no such file or directory"),
            ),
        ),
        writes="model",
        commands=("plan", "tokenizer train", "export", "sample"),
    )
