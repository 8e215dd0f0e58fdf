"""The embed image on the local host, with a model of one layer: the same bytes by whatever way a job is given, and
after interruptions.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import estiba_launch
from estiba_launch.drill.reference import digests
from estiba_launch.jobs.options import SubmitOptions
from estiba_launch.targets import operations as jobs

pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.timeout(500)]

EMBED = Path(__file__).parents[2] / "images/embed/job.yaml"
WORDS = "el la barco zarpa alba bodega llena trigo vino capitán mira estrellas mar puerto carga estiba amarra".split()


def corpus(folder: Path, *, files: int, rows: int) -> Path:
    """Parquet with some text in it, the same every time."""
    dice = random.Random(1)
    folder.mkdir()
    for number in range(files):
        texts = [" ".join(dice.choices(WORDS, k=dice.randint(1, 30))) for _ in range(rows)]
        table = pa.table({"id": list(range(rows)), "texto": texts})
        pq.write_table(table, folder / f"f{number}.parquet", row_group_size=max(rows // 8, 1))
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("ESTIBA_STATE", str(tmp_path / "state"))
    return tmp_path


def estiba(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(Path(jobs.__file__).parents[2])}
    return subprocess.run(
        [sys.executable, "-m", "estiba_launch.cli.app", *words],
        env=env, cwd=cwd, text=True, capture_output=True, timeout=450, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def settings(place: Path, model: Path, image: str) -> list[str]:
    values = {
        "IMAGE": image, "DATASET_URI": f"file://{place}/data", "MODEL_URI": f"file://{model}",
        "OUTPUT_URI": f"file://{place}/out",
    }  # fmt: skip
    return [word for name, value in values.items() for word in ("--set", f"{name}={value}")]


def test_train_with_hyperparameters_and_channels_gives_the_bytes_of_flags_and_of_the_api(
    place, tiny_model, embed_image
):
    corpus(place / "data", files=3, rows=40)
    ran = estiba("run", str(EMBED), "--target", "local", "--yes", "--gpus", "none",
                 *settings(place, tiny_model, embed_image), cwd=place)  # fmt: skip
    assert ran.returncode == 0, ran.stderr + ran.stdout
    got = estiba("fetch", "--into", str(place / "by-train"), cwd=place)
    assert got.returncode == 0, got.stderr

    (place / "by-flags").mkdir()
    words = ["docker", "run", "--rm", "--network", "none", "--volume", f"{place}/data:/in:ro"]
    words += ["--volume", f"{tiny_model}:/m:ro", "--volume", f"{place}/by-flags:/out", embed_image]
    flags = [
        "--input-path",
        "/in",
        "--output-path",
        "/out",
        "--model",
        "/m",
        "--text-column",
        "texto",
        "--no-checkpoint",
    ]
    by_flags = subprocess.run([*words, *flags], capture_output=True, text=True, check=False)
    assert by_flags.returncode == 0, by_flags.stderr

    job = estiba_launch.launch_training_job(
        image_uri=embed_image,
        output_path=f"file://{place}/out",
        hyperparameters={"model": "/opt/ml/input/data/model", "text-column": "texto"},
        channels={"dataset": f"file://{place}/data", "model": f"file://{tiny_model}"},
        checkpoint_s3_uri=f"file://{place}/api-checkpoints",
        use_spot=True,
        options=SubmitOptions(sync_every_s=0.5),
    )
    assert job.wait(200)["TrainingJobStatus"] == "Completed", list(job.logs())
    job.fetch(place / "by-api")

    outputs = [
        {name: digest for name, digest in digests(folder).items() if name != "results.json"}
        for folder in (place / "by-train" / "output", place / "by-flags", place / "by-api" / "output")
    ]
    assert sorted(outputs[0]) == ["f0.parquet", "f1.parquet", "f2.parquet"]
    assert outputs[0] == outputs[1] == outputs[2]
    results = json.loads((place / "by-train/output/results.json").read_text())
    assert results["rows"]["embedded"] == 120
    assert results["job"].startswith("embed-")


def test_a_drill_of_embed_passes_with_three_random_kills(place, tiny_model, embed_image):
    corpus(place / "data", files=6, rows=4000)  # long enough for three on a quiet machine
    drilled = estiba(
        "drill", str(EMBED), "--kills", "3", "--seed", "1", "--json", "--gpus", "none", "--sync-every-s", "0.5",
        "--log-interval-s", "0.1", "--max-lost", "60s", *settings(place, tiny_model, embed_image), cwd=place,
    )  # fmt: skip
    assert drilled.returncode == 0, drilled.stdout + drilled.stderr
    document = json.loads(drilled.stdout)
    assert document["result"] == "PASS"
    assert len(document["attempts"]) == 4
    assert document["reference"]["files_compared"] == 6
    assert document["reference"]["differences"] == []
    assert document["attempts"][-1]["started_from"] > 0
    assert all(entry["unit"] == "rows" and entry["total"] == 24_000 for entry in document["attempts"])
