"""Whole processes: our job and the original's loop from parquet to parquet, the first batch, the memory.

`python` has the libraries of the image.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

from embedders.corpus import Corpus, texts_of, write_parquet
from embedders.turns import WORKERS, environ_of

MEMORY_MAX_LENGTH = 64
"""Tokens read of a text where memory is measured, which is about many rows and not about long ones."""


def measured(command: list[str], environ: dict[str, str], log: Path) -> dict[str, float]:
    """Run a command to its end. Returns its seconds. Raises RuntimeError with what it said last."""
    began = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environ, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{command[1:3]} ended with {process.returncode}: {log.read_text()[-300:]}")
    return {"wall_s": round(time.monotonic() - began, 3), "cpu_s": round(used.ru_utime + used.ru_stime, 3)}


def our_job(
    python: Path, place: Path, name: str, source: Path, model: Path, threads: int, *options: str
) -> dict[str, Any]:
    """`python -m embed` with its defaults: its seconds, and its results.json."""
    folder = place / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command = [str(python), "-m", "embed", "--input-path", str(source), "--output-path", str(folder / "out")]
    command += ["--checkpoint-path", str(folder / "checkpoints"), "--model", str(model), "--device", "cpu", *options]
    environ = {**environ_of(place, threads), "ESTIBA_ROOT": str(folder)}
    seconds = measured(command, environ, place / f"{name}.log")
    results = json.loads((folder / "out/results.json").read_text())
    return {**seconds, "results": results}


def whole_jobs(python: Path, place: Path, corpus: Corpus, model: Path, threads: int) -> dict[str, Any]:
    """Both read and write the same parquet files; start and loading are counted."""
    ours = our_job(python, place, "job", corpus.parquet, model, threads)
    results = ours.pop("results")
    out = place / "loop"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    command = [str(python), str(WORKERS / "whole_loop.py"), str(model), str(corpus.parquet), str(out)]
    theirs = measured(command, environ_of(place, threads), place / "loop.log")
    keys = ("tokens_per_s", "engine", "stages", "seconds", "peak_memory_bytes", "speed")
    return {
        "ours": {**ours, **{key: results.get(key) for key in keys}},
        "sentence-transformers": theirs,
        "ratio": round(theirs["wall_s"] / ours["wall_s"], 2),
        "cpu_ratio": round(theirs["cpu_s"] / ours["cpu_s"], 2),
    }


def first_batch(python: Path, place: Path, corpus: Corpus, model: Path, threads: int, rounds: int) -> dict[str, Any]:
    """From the start of Python until eight texts have vectors; the conversion is in the cache."""
    command = [str(python), str(WORKERS / "first_batch.py"), str(model), str(corpus.files[0])]
    found = [measured(command, environ_of(place, threads), place / "first_batch.log") for _ in range(rounds)]
    return {"median_s": statistics.median(each["wall_s"] for each in found), "rounds": found}


def memory(
    python: Path, place: Path, documents: list[list[str]], model: Path, threads: int, rows: int
) -> dict[str, Any]:
    """The peak of our job's main process over some rows, and over ten times as many, in one file of one row group."""
    peaks = {}
    for times in (1, 10):
        source = write_parquet(place / f"rows-{times}", [texts_of(documents, rows * times, seed=times)])
        done = our_job(python, place, f"memory-{times}", source, model, threads, "--max-length", str(MEMORY_MAX_LENGTH))
        peaks[times] = done["results"]["peak_memory_bytes"]
    return {
        "rows": rows,
        "max_length": MEMORY_MAX_LENGTH,
        "peak_bytes": peaks[1],
        "peak_bytes_10x": peaks[10],
        "ratio": round(peaks[10] / peaks[1], 3),
    }
