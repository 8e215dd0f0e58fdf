"""The embed job as the contract's checks run it (tests/contract)."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from contract.containers import Image
from contract.workloads import NO_INPUT, Job, Prepared, Refusal, Setting

WORDS = "el barco zarpa al alba con la bodega llena de trigo y vino hacia otro puerto".split()
# safetensors writes files that only their owner can read
MAKE_MODEL = """
python -c 'import pathlib, tiny_model; tiny_model.build(pathlib.Path("/made/tiny"))' && chmod -R a+rX /made
"""
SLOW_FILES, SLOW_ROW_GROUPS, SLOW_ROWS = 4, 50, 6


def prepare(image: Image, folder: Path) -> Prepared:
    """A model of one layer, built in the image itself; three small files, and four of fifty row groups."""
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
    image.output_of(
        ["sh", "-c", MAKE_MODEL],
        environment={"PYTHONPATH": "/opt/estiba:/recipe", "PYTHONDONTWRITEBYTECODE": "1"},
        volumes={
            str(Path(__file__).parent): {"bind": "/recipe", "mode": "ro"},
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
        "batch-size": 1,  # some CPUs round by the shape of a batch, and hosts share the rows of a batch otherwise
    }
    channels = {"dataset": quick, "model": model / "tiny"}
    return Prepared(
        quick=Job(channels=channels, settings=settings),
        slow=Job(
            channels={**channels, "dataset": slow},
            settings={**settings, "max-length": 256, "checkpoint-every": 1},
        ),
        commits=lambda checkpoints: sum(1 for _ in checkpoints.rglob("*.piece")),
        commits_before_a_signal=10,
        ignore=("results*.json",),
        resumed=re.compile(r"resuming: [1-9]\d* rows|[1-9]\d* files already complete"),
        misspelt=("text-colum", "text-column"),
        ill_typed=("batch-size", "muchas"),
        refusals=(
            NO_INPUT,
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
