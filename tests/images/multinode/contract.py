"""The multinode job for the checks of tests/contract: its default script, on one host."""

from __future__ import annotations

import random
import re
import subprocess
from pathlib import Path

from contract.containers import Image
from contract.workloads import Job, Prepared, Refusal, Setting, newest_step

MAKE_MODEL = """
import os, pathlib, tiny_model
for path in tiny_model.build(pathlib.Path("/made"), "llama-tied").iterdir():
    os.chmod(path, 0o644)
"""
WORDS = "el barco zarpa al alba con la bodega llena de trigo y vino hacia otro puerto".split()


def prepare(image: Image, folder: Path) -> Prepared:
    """A random model of three layers on a few kilobytes of text: a dozen steps, or several hundred."""
    dice = random.Random(0)
    text = folder / "text"
    text.mkdir()
    for name in ("a.txt", "b.txt"):
        (text / name).write_text("".join(" ".join(dice.choices(WORDS, k=10)) + ".\n" for _ in range(100)))
    model = folder / "model"
    model.mkdir(mode=0o777)
    model.chmod(0o777)
    subprocess.run(
        ["docker", "run", "--rm", "--network", "none", "--env", "PYTHONPATH=/opt/estiba:/tests",
         "--entrypoint", "python",
         "--volume", f"{Path(__file__).parent}:/tests:ro", "--volume", f"{model}:/made", image.reference,
         "-c", MAKE_MODEL],
        check=True, capture_output=True,
    )  # fmt: skip
    settings: dict[str, Setting] = {
        "learning-rate": 0.003,
        "batch-size": 2,
        "global-batch-size": 5,
        "max-sequence-length": 64,
        "max-steps": 12,
        "eval-steps": 5,
        "log-interval": 3,
        "seed": 7,
    }
    slow = {**settings, "max-steps": 400, "save-steps": 5, "eval-steps": 100}
    channels = {"training": text, "model": model}
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
            Refusal(what="no base model", settings={}, says=("--model", "`model`"), without_channels=("model",)),
            Refusal(
                what="a precision that sharded training lacks",
                settings={"precision": "float16"},
                says=("--precision float16", "bfloat16"),
            ),
            Refusal(
                what="replicas that do not divide the ranks",
                settings={"replicas": 2},
                says=("--replicas 2", "1 ranks"),
            ),
        ),
        writes="model",
        trains_across_hosts=True,
    )
