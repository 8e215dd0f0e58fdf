"""Every benchmark runs from a fresh clone: its first lines declare what scripts/bench.sh must prepare."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
from pathlib import Path

import pytest

import wheelhouse

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py"))
SMALLEST = {
    "aura_data": "--rounds 1 --copies 1",
    "aura_init": "--tiny",
    "aura_throughput": "--rounds 1 --steps 1",
    "brain_accuracy": "--seeds 1 --only baseline --steps 60",
    "brain_step": "--rounds 1",
    "brain_whole_step": "--rounds 1 --steps 1",
    "checkpoint_kills": "--kills 2 --damages 2",
    "checkpoint_save": "--rounds 1 --scale 0.1",
    "embed_contention": "--tiny",
    "embed_gpu": "--tiny",
    "embed_kills": "--kills 1 --files 4 --rows 60",
    "embed_memory": "--gigabytes 0.02",
    "embed_peers": "--tiny",
    "embed_precision": "--rows 100 --queries 10",
    "embed_reuse": "--rows 500",
    "embed_speed": "--rows 40 --rounds 1",
    "finetune_throughput": "--tiny --rounds 1 --answers 4",
    "hdf5_s3": "--rounds 1 --seconds 0.5 --sessions 2 --peers local,ours_cold",
    "stage": "--tiny",
}
"""The shortest run of each benchmark that goes through all of its code."""


@pytest.mark.slow
@pytest.mark.docker
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_runs_by_its_one_command(name: str) -> None:
    command = ["bash", str(ROOT / "scripts/bench.sh"), name, *SMALLEST[name].split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    document = json.loads(done.stdout.splitlines()[-1])
    assert {"benchmark", "hardware", "date", "commit", "results", "goals"} <= set(document)


def test_the_torch_environment_holds_what_the_images_require() -> None:
    pins = wheelhouse.requirements(ROOT / "benchmarks/peers.txt")
    peers = {wheelhouse.normal(name): version for name, version in (pin.split("==") for pin in pins)}
    missing = []
    for image in ("aura", "brain-to-text", "embed"):
        lock = wheelhouse.requirements(ROOT / f"images/{image}/requirements.txt")
        for line in wheelhouse.for_target(lock, "3.11"):
            name, version = line.split(" --hash=")[0].split("==")
            if peers.get(name) != version:
                missing.append(f"{image}: {name}=={version}")
    assert missing == []


def test_every_benchmark_has_a_shortest_run() -> None:
    assert sorted(SMALLEST) == BENCHMARKS


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_declares_its_environment_and_its_needs(name: str, images: list[str]) -> None:
    first, second = (ROOT / f"benchmarks/{name}.py").read_text().splitlines()[:2]
    assert re.fullmatch("# environment: (host|torch)", first)
    known = {"demo", "corpus", *images, *(f"{image}-test" for image in images)}
    if second.startswith("# needs: "):
        assert set(second.removeprefix("# needs: ").split()) <= known


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_that_imports_libraries_the_host_lacks_declares_torch(name: str) -> None:
    """The host has neither torch nor an image's libraries. Benchmarks hold code for a container as a string."""
    text = re.sub(r'"""(?s:.*?)"""', "", (ROOT / f"benchmarks/{name}.py").read_text())
    if re.search(r"^ *(import|from) (torch|numpy|aura|brain_to_text|estiba\.training)\b", text, re.MULTILINE):
        assert text.startswith("# environment: torch\n")


@pytest.mark.parametrize(
    ("value", "bound", "is_met"),
    [(2.0, ">=2", True), (1.99, ">=2", False), (0.5, "<=0.5", True), (0.51, "<=0.5", False), (0, "==0", True),
     (None, "<=1", False)],
)  # fmt: skip
def test_a_goal_is_met_if_the_value_keeps_to_its_bound(value: float | None, bound: str, is_met: bool) -> None:
    goal = runpy.run_path(str(ROOT / "benchmarks/document/__init__.py"))["goal"]
    assert goal("a name", value, bound) == {"name": "a name", "value": value, "goal": bound, "met": is_met}
