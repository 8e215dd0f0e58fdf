"""How to run each image's job fast: one row of `WORKLOADS` an image; the rest of this folder is the same for all.

A new image adds its row; a missing one fails every check of that image.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from contract.containers import Image

TESTS = Path(__file__).resolve().parents[1]

Setting = str | int | float | bool


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A mistake of configuration: exit status 2, said in these words."""

    what: str
    settings: Mapping[str, Setting]
    """Instead of, or beside, the quick job's."""
    says: Sequence[str]
    """Parts of the message: the value seen, and the remedy."""
    without_channels: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Job:
    """One job: its channels and its settings, by their hyperparameter names."""

    channels: Mapping[str, Path]
    settings: Mapping[str, Setting]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A small job, a slow one, and the ways to get it wrong."""

    quick: Job
    """Seconds. Its settings differ from the defaults wherever that shows in the results' bytes."""
    slow: Job
    """Commits early and often, and goes on for some seconds after the first commit."""
    commits: Callable[[Path], int]
    """How much a checkpoint directory holds; grows as the job goes on."""
    commits_before_a_signal: int
    ignore: Sequence[str]
    """Results that tell times, so differ from run to run."""
    resumed: re.Pattern[str]
    """What a log says that found saved work."""
    misspelt: tuple[str, str]
    """A setting that does not exist, and the one that was meant."""
    ill_typed: tuple[str, str]
    """A setting, and a value that it cannot have."""
    refusals: Sequence[Refusal] = field(default_factory=tuple)
    writes: str = "output"
    """The folder below /opt/ml that its results go to."""
    splits_files_by_host: bool = False
    """Hosts with all of the input share its files, and need nothing of each other."""


# --- one setting, three ways ---------------------------------------------------------------------------------------


def as_json_strings(settings: Mapping[str, Setting]) -> dict[str, str]:
    """Hyperparameters as version 2 of AWS's SDK sends them: each value JSON, so that a string has quotes in it."""
    return {name: json.dumps(value) for name, value in settings.items()}


def as_plain_strings(settings: Mapping[str, Setting]) -> dict[str, str]:
    """Hyperparameters as version 3 of AWS's SDK sends them, and with underscores in their names."""
    return {name.replace("-", "_"): str(value) for name, value in settings.items()}


def as_flags(settings: Mapping[str, Setting]) -> list[str]:
    flags: list[str] = []
    for name, value in settings.items():
        flags += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return flags


def as_environment(settings: Mapping[str, Setting]) -> dict[str, str]:
    return {f"ESTIBA_{name.upper().replace('-', '_')}": str(value) for name, value in settings.items()}


# --- embed ---------------------------------------------------------------------------------------------------------

WORDS = "el barco zarpa al alba con la bodega llena de trigo y vino hacia otro puerto".split()
# safetensors makes files that only their owner can read
MAKE_MODEL = """
python -c 'import pathlib, tiny_model; tiny_model.build(pathlib.Path("/made/tiny"))' && chmod -R a+rX /made
"""
SLOW_FILES, SLOW_ROW_GROUPS, SLOW_ROWS = 4, 50, 6


def prepare_embed(image: Image, folder: Path) -> Prepared:
    """A model of one layer, made in the image itself; three small files, and four of fifty row groups."""
    dice = random.Random(0)
    quick, slow, model = folder / "quick", folder / "slow", folder / "model"

    def write(path: Path, rows: int, row_group: int, words: int) -> None:
        texts: list[str | None] = [" ".join(dice.choices(WORDS, k=dice.randint(1, words))) for _ in range(rows)]
        texts[rows // 3], texts[rows // 2] = None, " "
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"id": range(rows), "frase": texts}), path, row_group_size=row_group)

    for index, name in enumerate(("a.parquet", "b.parquet", "puerto/c.parquet")):
        write(quick / name, 12 + index, 5, 20)
    for index in range(SLOW_FILES):
        write(slow / f"s{index}.parquet", SLOW_ROW_GROUPS * SLOW_ROWS, SLOW_ROWS, 120)
    model.mkdir()
    image.tell(
        ["sh", "-c", MAKE_MODEL],
        environment={"PYTHONPATH": "/opt/estiba:/recipe", "PYTHONDONTWRITEBYTECODE": "1"},
        volumes={
            str(TESTS / "images/embed"): {"bind": "/recipe", "mode": "ro"},
            str(model): {"bind": "/made", "mode": "rw"},
        },
    )
    settings: dict[str, Setting] = {
        "model": "/opt/ml/input/data/model",
        "text-column": "frase",
        "embedding-column": "vector",
        "prompt": "consulta: ",
        "dimensions": 16,
        "max-length": 24,
        "n-tokens": True,
        "batch-size": 4,
    }
    channels = {"dataset": quick, "model": model / "tiny"}
    return Prepared(
        quick=Job(channels=channels, settings=settings),
        slow=Job(
            channels={**channels, "dataset": slow},
            settings={**settings, "batch-size": 1, "max-length": 256, "checkpoint-every": 1},
        ),
        commits=lambda checkpoints: sum(1 for _ in checkpoints.rglob("*.piece")),
        commits_before_a_signal=10,
        ignore=("results*.json",),
        resumed=re.compile(r"resuming: [1-9]\d* rows|[1-9]\d* files already complete"),
        misspelt=("text-colum", "text-column"),
        ill_typed=("batch-size", "muchas"),
        refusals=(
            Refusal(
                what="no input",
                settings={},
                says=("/opt/ml/input/data/dataset", "-v DIR:/opt/ml/input/data/dataset"),
                without_channels=("dataset",),
            ),
            Refusal(
                what="no such column",
                settings={"text-column": "texto"},
                says=("'texto'", "'frase'", "--text-column"),
            ),
            Refusal(
                what="no such model directory",
                settings={"model": "/opt/ml/input/data/nadie"},
                says=("/opt/ml/input/data/nadie", "--model DIRECTORY"),
            ),
            Refusal(
                what="a hub model without a network",
                settings={"model": "nadie/ninguno"},
                says=("nadie/ninguno", "--model DIRECTORY"),
            ),
        ),
        splits_files_by_host=True,
    )


# --- aura ----------------------------------------------------------------------------------------------------------


def prepare_aura(image: Image, folder: Path) -> Prepared:
    """Two files of made-up sentences: a model of one layer for a dozen steps, and one for some hundred."""
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
        # interrupt-step-N.pt is written on Ctrl+C, and is the person's to delete.
        ignore=("results.json", "metrics.jsonl", "events.out.tfevents.*", "interrupt-step-*.pt"),
        resumed=re.compile(r"resuming at step [1-9]"),
        misspelt=("learning-rat", "learning-rate"),
        ill_typed=("batch-size", "muchas"),
        refusals=(
            Refusal(
                what="no input",
                settings={},
                says=("/opt/ml/input/data/dataset", "-v DIR:/opt/ml/input/data/dataset"),
                without_channels=("dataset",),
            ),
            Refusal(what="no such preset", settings={"model-preset": "enorme"}, says=("'enorme'", "aura-72h-max")),
            Refusal(what="heads that do not fit", settings={"num-heads": 3}, says=("embed_size 32", "num_heads 3")),
            Refusal(
                what="no such tokenizer",
                settings={"tokenizer-name-or-path": "/opt/ml/input/data/nadie", "vocab-size": "none"},
                says=("/opt/ml/input/data/nadie", "no such file or directory"),
            ),
        ),
        writes="model",
    )


# --- brain-to-text -------------------------------------------------------------------------------------------------

MAKE_RECORDINGS = "brain-to-text generate --out /made/data --sessions 3 --trials 8 --features 12 --longest-words 2"


def prepare_brain_to_text(image: Image, folder: Path) -> Prepared:
    """Three sessions of a few short trials, made in the image itself; a decoder of two small layers."""
    made = folder / "made"
    made.mkdir()
    image.tell(
        ["sh", "-c", f"{MAKE_RECORDINGS} && chmod -R a+rX /made"],
        volumes={str(made): {"bind": "/made", "mode": "rw"}},
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
    channels = {"dataset": made / "data"}
    return Prepared(
        quick=Job(channels=channels, settings=settings),
        slow=Job(channels=channels, settings=slow),
        commits=newest_step,
        commits_before_a_signal=20,
        ignore=("results.json", "metrics.jsonl", "events.out.tfevents.*"),
        resumed=re.compile(r"resuming at step [1-9]"),
        misspelt=("n-unit", "n-units"),
        ill_typed=("batch-size", "muchos"),
        refusals=(
            Refusal(
                what="no input",
                settings={},
                says=("/opt/ml/input/data/dataset", "-v DIR:/opt/ml/input/data/dataset"),
                without_channels=("dataset",),
            ),
            Refusal(what="no such settings file", settings={"config-file": "nadie.yaml"}, says=("nadie.yaml",)),
        ),
        writes="model",
    )


def newest_step(checkpoints: Path) -> int:
    """Of the verified checkpoints: retention keeps their number, and not their steps, from growing."""
    found = (path.parent.name.split("-")[1] for path in checkpoints.glob("step-*/manifest.json"))
    return max(map(int, found), default=0)


WORKLOADS: Mapping[str, Callable[[Image, Path], Prepared]] = {
    "aura": prepare_aura,
    "brain-to-text": prepare_brain_to_text,
    "embed": prepare_embed,
}
