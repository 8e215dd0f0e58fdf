# environment: torch
"""What a busy neighbour, a second embed job and a second worker cost, with OpenMP's spinning threads and without.

    make bench/embed_contention
    python benchmarks/embed_contention.py --tiny     # a few seconds each, to see that it runs

By turns: "before" is torch with OpenMP's own default (GOMP_SPINCOUNT=300000, every process as many threads as cores),
"after" is torch as the image runs it: idle threads sleep after 3,000 spins, and the workers of a job share the cores;
"default" is the image's own choice, OpenVINO with a stream per core. Goals: two jobs at once at least twice the tokens
per second of before, two workers not slower than one, and beside a neighbour at least the fair share of two threads
among three on two cores, two thirds of the quiet speed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from document import goal, publish

ROOT = Path(__file__).resolve().parent.parent
BUSY = "while True: pass"
MODES = {"before": ("300000", "torch"), "after": ("3000", "torch"), "default": ("3000", "auto")}
"""GOMP_SPINCOUNT and the engine."""


def make_job(folder: Path, rows: int) -> Path:
    """A tiny model, whose many small operations leave the threads idle most often, and one file of text."""
    sys.path[:0] = [str(ROOT / part) for part in ("tests/images/embed", "images/embed", "shared")]
    import pyarrow as pa
    import pyarrow.parquet as pq
    import tiny_model  # type: ignore[import-not-found]
    from rehearsal import WORDS  # type: ignore[import-not-found]

    dice = random.Random(0)
    texts = [" ".join(dice.choices(WORDS, k=dice.randint(20, 200))) for _ in range(rows)]
    (folder / "in").mkdir()
    for index in range(4):
        part = texts[index::4]
        pq.write_table(pa.table({"texto": part}), folder / f"in/{index}.parquet", row_group_size=500)
    return tiny_model.build(folder / "model")


def start(folder: Path, model: Path, name: str, mode: str, workers: int) -> subprocess.Popen[bytes]:
    place = folder / name
    spins, engine = MODES[mode]
    environ = {**os.environ, "GOMP_SPINCOUNT": spins, "HF_HUB_OFFLINE": "1", "ESTIBA_ROOT": str(place)}
    environ["PYTHONPATH"] = os.pathsep.join(str(ROOT / part) for part in ("shared", "images/embed"))
    environ.pop("OMP_NUM_THREADS", None)
    if mode == "before":
        environ["OMP_NUM_THREADS"] = str(os.cpu_count())
    command = [sys.executable, "-m", "embed", "--input-path", str(folder / "in"), "--model", str(model)]
    command += ["--workers", str(workers), "--device", "cpu", "--no-checkpoint", "--engine", engine]
    return subprocess.Popen(command, env=environ, stderr=subprocess.DEVNULL)


def measure(folder: Path, model: Path, mode: str, *, jobs: int = 1, workers: int = 1, busy: int = 0) -> list[float]:
    """Tokens per second of each job, without loading the model."""
    neighbours = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(busy)]
    try:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            names = [f"{Path(place).name}/{index}" for index in range(jobs)]
            for process in [start(folder, model, name, mode, workers) for name in names]:
                if process.wait() != 0:
                    raise SystemExit(f"embed ended with {process.returncode}")
            results = [json.loads((folder / name / "output/data/results.json").read_text()) for name in names]
    finally:
        for neighbour in neighbours:
            neighbour.kill()
    return [result["tokens_per_s"] for result in results]


SITUATIONS: dict[str, dict[str, int]] = {
    "quiet": {},
    "beside a busy process": {"busy": 1},
    "two jobs at once": {"jobs": 2},
    "two workers": {"workers": 2},
}


def ratio(over: list[float], under: list[float]) -> dict[str, Any]:
    """The median and the range of the ratios, round by round."""
    found = [one / other for one, other in zip(over, under, strict=True)]
    return {"median": round(statistics.median(found), 2), "range": [round(min(found), 2), round(max(found), 2)]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="one round of 400 rows")
    options = parser.parse_args()
    rows, rounds = (400, 1) if options.tiny else (options.rows, options.rounds)
    found: dict[str, dict[str, list[float]]] = {name: {mode: [] for mode in MODES} for name in SITUATIONS}
    with tempfile.TemporaryDirectory(prefix="embed-contention-") as place:
        model = make_job(Path(place), rows)
        for number in range(rounds):
            for name, situation in SITUATIONS.items():
                for mode in MODES:
                    speeds = measure(Path(place), model, mode, **situation)
                    found[name][mode].append(sum(speeds))
                    print(f"round {number + 1}, {name}, {mode}: {sum(speeds):.0f} tokens/s", file=sys.stderr)
    medians: dict[str, dict[str, Any]] = {
        name: {mode: round(statistics.median(values), 1) for mode, values in modes.items()}
        for name, modes in found.items()
    }
    for name, modes in found.items():
        for mode in ("after", "default"):
            medians[name][f"{mode} / before"] = ratio(modes[mode], modes["before"])
    shares = {mode: ratio(found["beside a busy process"][mode], found["quiet"][mode]) for mode in MODES}
    workers = {mode: ratio(found["two workers"][mode], found["quiet"][mode]) for mode in MODES}
    goals = [
        goal("two jobs at once, after / before", medians["two jobs at once"]["after / before"]["median"], ">=2"),
        goal("beside a busy process / quiet, default", shares["default"]["median"], ">=0.66"),
        goal("two workers / one worker, after", workers["after"]["median"], ">=1"),
        goal("two workers / one worker, default", workers["default"]["median"], ">=1"),
    ]
    medians |= {"beside a busy process / quiet": shares, "two workers / one": workers}
    publish("embed_contention", {"rows": rows, "rounds": rounds, "tokens_per_s": medians}, goals)
    return 0


if __name__ == "__main__":
    sys.exit(main())
