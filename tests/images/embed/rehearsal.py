"""Rehearse interruptions of a real embed process: kill it, restart it, count the rows that were computed twice.

Used by test_kills.py (a short version) and benchmarks/embed_kills.py (the long one).
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

WORDS = (
    "el la barco zarpa alba bodega llena trigo vino capitán mira estrellas mar puerto carga estiba amarra viento norte "
    "vela ancla marea costa faro niebla rumbo ola cubierta proa popa timón brújula mapa isla ruta flete muelle saco"
).split()

TRACED = """
import json, os, sys, time
from embed import model
pace_s = float(os.environ.pop("PACE_S"))
trace = os.open(os.environ.pop("TRACE_FILE"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
original = model.Encoder._launch
def launch(self, engine, window, batch):
    os.write(trace, (json.dumps({"rows": len(batch)}) + "\\n").encode())
    time.sleep(pace_s)
    return original(self, engine, window, batch)
model.Encoder._launch = launch
sys.argv[0] = "embed"
from embed.config import EmbedConfig
from estiba.platform.workload import main
main(EmbedConfig, "embed.job:embed")
"""
"""The workload with two additions: it records in a file how many rows each batch has that it starts, and pauses before
it, so that a kill comes while a tiny model still has work left."""
PACE_S = 0.05


@dataclass(kw_only=True)
class Rehearsal:
    attempts: int = 0
    kills: list[float] = field(default_factory=list)
    """Time of each kill, in seconds from the start of its attempt."""
    rows: int = 0
    """With text, so each is in a batch."""
    rows_started: int = 0
    largest_row_group: int = 0
    equal: bool = False
    different: list[str] = field(default_factory=list)

    @property
    def rows_twice(self) -> int:
        return self.rows_started - self.rows

    @property
    def within_bound(self) -> bool:
        return self.rows_twice <= len(self.kills) * self.largest_row_group


def make_input(folder: Path, *, files: int, rows: int, seed: int) -> int:
    """Parquet files of several shapes. Returns the rows of the largest row group."""
    dice = random.Random(seed)
    largest = 0
    for index in range(files):
        count = dice.randint(rows // 2, rows * 3 // 2)
        texts: list[str | None] = [
            f"{index} {row} " + " ".join(dice.choices(WORDS, k=dice.randint(1, 60))) for row in range(count)
        ]
        texts[count // 3], texts[count // 2] = None, " "
        table = pa.table({"id": pa.array(range(count), pa.int64()), "texto": pa.array(texts, pa.string())})
        path = folder / (f"puerto-{index % 3}" if index % 2 else ".") / f"f{index:03d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        group = dice.choice([count, max(1, count // 4), 150, 60])
        pq.write_table(table, path, row_group_size=group)
        largest = max(largest, min(group, count))
    return largest


def rows_started(trace: Path) -> int:
    return sum(json.loads(line)["rows"] for line in trace.read_text().splitlines())


def start(folder: Path, model: Path, trace: Path, *flags: str) -> subprocess.Popen[bytes]:
    importable = os.pathsep.join(os.path.abspath(item) for item in sys.path)
    environ = {
        **os.environ,
        "PYTHONPATH": importable,
        "ESTIBA_ROOT": str(folder),
        "TRACE_FILE": str(trace),
        "PACE_S": str(PACE_S),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-c", TRACED, "--input-path", str(folder / "in"), "--model", str(model), *flags]
    return subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, cwd=folder)


def finish(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate()
    if process.returncode != 0:
        raise AssertionError(f"exit {process.returncode}: {errors.decode()[-2000:]}")


def rehearse(
    folder: Path,
    model: Path,
    *,
    kills: int,
    seed: int,
    is_new_host: bool,
    files: int = 40,
    rows: int = 200,
    signum: signal.Signals = signal.SIGKILL,
    flags: tuple[str, ...] = (),
) -> Rehearsal:
    """One uninterrupted run and one killed `kills` times at random moments.

    `is_new_host` keeps only the checkpoint directory between attempts, as SageMaker does after a spot interruption.
    """
    dice = random.Random(seed)
    result = Rehearsal()
    whole, broken = folder / "whole", folder / "broken"
    for root in (whole, broken):
        (root / "in").mkdir(parents=True)
    result.largest_row_group = make_input(whole / "in", files=files, rows=rows, seed=seed)
    shutil.copytree(whole / "in", broken / "in", dirs_exist_ok=True)

    began = time.monotonic()
    finish(start(whole, model, folder / "trace-whole", *flags))
    whole_s = time.monotonic() - began
    result.rows = rows_started(folder / "trace-whole")
    work_s = json.loads((whole / "output/data/results.json").read_text())["seconds"]["embedding"]

    trace = folder / "trace-broken"
    ended_by_itself, attempt_s = False, whole_s - work_s  # the first estimate: the time to load
    while len(result.kills) < kills:
        result.attempts += 1
        began = time.monotonic()
        size = trace.stat().st_size if trace.exists() else 0
        process = start(broken, model, trace, *flags)
        # Most kills hit the computing, a few the loading and, once all rows are computed, the joining and the end.
        is_all_started = size > 0 and ended_by_itself
        if dice.random() < 0.85 and not is_all_started:
            while process.poll() is None and (not trace.exists() or trace.stat().st_size == size):
                time.sleep(0.005)
            time.sleep(dice.uniform(0, work_s / kills / 2))  # so that work is left for the last kill too
        else:
            time.sleep(dice.uniform(0, attempt_s))
        if process.poll() is None:
            process.send_signal(signum)
            result.kills.append(round(time.monotonic() - began, 3))
        process.communicate()
        ended_by_itself = process.returncode == 0
        attempt_s = time.monotonic() - began if ended_by_itself else attempt_s
        if is_new_host:
            shutil.rmtree(broken / "output", ignore_errors=True)
        elif ended_by_itself:
            break
        if result.attempts > 4 * kills:
            break
    result.attempts += 1
    finish(start(broken, model, trace, *flags))
    result.rows_started = rows_started(trace)
    result.different = compare(whole / "output/data", broken / "output/data")
    result.equal = not result.different
    return result


def compare(one: Path, other: Path) -> list[str]:
    """Names of files that are missing on one side or differ in any byte; results.json holds times and is left out."""
    names = {
        path.relative_to(root).as_posix()
        for root in (one, other)
        for path in root.rglob("*")
        if path.is_file() and path.name != "results.json"
    }
    return sorted(
        name
        for name in names
        if not (one / name).exists()
        or not (other / name).exists()
        or (one / name).read_bytes() != (other / name).read_bytes()
    )
