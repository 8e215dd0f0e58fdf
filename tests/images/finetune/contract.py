"""The finetune job for the checks of tests/contract."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
from pathlib import Path

from contract.containers import Image
from contract.workloads import Job, Prepared, Refusal, Setting, newest_step

MAKE_MODEL = """
import os, pathlib, tiny_model
for path in tiny_model.build(pathlib.Path("/made")).iterdir():
    os.chmod(path, 0o644)
"""
CODES = {"H01": "Total income", "H05": "Wages", "H11": "Rent", "H20": "Stock", "H24": "Fixed assets"}


def prepare(image: Image, folder: Path) -> Prepared:
    """A table of codes and their names, for a random model of two layers (a dozen steps, or several hundred)."""
    dice = random.Random(0)
    table = folder / "table"
    table.mkdir()
    lines = ["Year,Code,Name,Value"]
    lines += [
        f"{dice.randint(2013, 2023)},{code},{CODES[code]},{dice.randint(1, 999)}"
        for code in dice.choices(list(CODES), k=300)
    ]
    (table / "table.csv").write_text("\n".join(lines) + "\n")
    model = folder / "model"
    model.mkdir(mode=0o777)
    model.chmod(0o777)
    tests = Path(__file__).parent
    subprocess.run(
        ["docker", "run", "--rm", "--network", "none", "--env", "PYTHONPATH=/opt/estiba:/tests",
         "--entrypoint", "python",
         "--volume", f"{tests}:/tests:ro", "--volume", f"{model}:/made", image.reference,
         "-c", MAKE_MODEL],
        check=True, capture_output=True,
    )  # fmt: skip
    settings: dict[str, Setting] = {
        "learning-rate": 0.0005,
        "batch-size": 3,
        "gradient-accumulation-steps": 2,
        "lora-dropout": 0.1,
        "max-steps": 12,
        "eval-steps": 5,
        "eval-records": 8,
        "answer-questions": 4,
        "log-interval": 3,
        "seed": 7,
    }
    slow = {**settings, "max-steps": 400, "save-steps": 5, "eval-steps": 100}
    shutil.rmtree(model / ".cache", ignore_errors=True)
    channels = {"training": table, "model": model}
    return Prepared(
        quick=Job(channels=channels, settings=settings),
        slow=Job(channels=channels, settings=slow),
        commits=newest_step,
        commits_before_a_signal=40,
        ignore=("results.json", "metrics.jsonl", "events.out.tfevents.*"),
        resumed=re.compile(r"resuming at step [1-9]"),
        misspelt=("learning-rat", "learning-rate"),
        ill_typed=("batch-size", "muchas"),
        refusals=(
            Refusal(
                what="no data",
                settings={},
                says=("/opt/ml/input/data/training", "-v DIR:/opt/ml/input/data/training"),
                without_channels=("training",),
            ),
            Refusal(what="no base model", settings={}, says=("--base-model", "`model`"), without_channels=("model",)),
            Refusal(
                what="adapters on a layer that does not exist",
                settings={"lora-targets": '["nadie"]'},
                says=("nadie", "q_proj"),
            ),
            Refusal(
                what="answers that do not fit",
                settings={"max-sequence-length": 16},
                says=("--max-sequence-length 16",),
                code=1,
            ),
        ),
        writes="model",
    )
