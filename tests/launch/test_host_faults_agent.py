"""Drills of one host's faults against the multinode image: a gloo script, and the host agent that ends its hosts."""

from __future__ import annotations

from typing import Any

import docker
import pytest

from base_image import NEEDS_BASE_IMAGE
from drill_run import drills

IMAGE = "estiba/multinode:local"
pytestmark = [*NEEDS_BASE_IMAGE, pytest.mark.slow, pytest.mark.timeout(330)]

TRAINS = """
import json, os, pathlib, time
import torch, torch.distributed as dist
hosts = json.loads(os.environ["SM_HOSTS"])
rank = hosts.index(os.environ["SM_CURRENT_HOST"])
os.environ["RANK"], os.environ["WORLD_SIZE"] = str(rank), str(len(hosts))
dist.init_process_group("gloo")
folder = pathlib.Path("/opt/ml/checkpoints") / f"rank-{rank}"
folder.mkdir(exist_ok=True)
saved = folder / "step"
steps = [None] * len(hosts)
dist.all_gather_object(steps, int(saved.read_text()) if saved.exists() else 0)
step = min(steps)
if step:
    print(f"resuming: {step} steps are saved", flush=True)
value = torch.zeros(1000)
while step < 60:
    time.sleep(0.1)
    dist.all_reduce(value)
    step += 1
    with (folder / "step.new").open("w") as file:
        file.write(str(step)); file.flush(); time.sleep(0.05); os.fsync(file.fileno())
    (folder / "step.new").rename(saved)
    print(f"step={step} of=60", flush=True)
dist.barrier()
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    try:
        docker.from_env().images.get(IMAGE)
    except docker.errors.ImageNotFound:
        pytest.skip(f"no image {IMAGE}; run `make build/multinode BASE=local`")
    yield from drills(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("words", "hosts", "attempts"),
    [
        (("lost-host", "--seed", "1"), 3, 2),
        (("first-host", "--seed", "2"), 2, 2),
        (("lost-in-save", "--seed", "3"), 2, 2),
        (("silent-host", "--seed", "4"), 2, 2),
        (("partition", "--fault-s", "90", "--seed", "5"), 2, 2),
        (("partition", "--fault-s", "5", "--seed", "6"), 2, 1),
        (("pause", "--fault-s", "5", "--seed", "7"), 2, 1),
        (("late-host", "--fault-s", "10", "--seed", "8"), 2, 1),
        (("late-dns", "--fault-s", "10", "--seed", "9"), 2, 1),
        (("no-interface",), 2, 1),
        (("host-names",), 3, 1),
    ],
    ids=lambda value: "-".join(value[:1]) if isinstance(value, tuple) else None,
)
def test_no_host_hangs_and_each_names_the_right_one(run, words: tuple[str, ...], hosts: int, attempts: int):
    (run.tmp / "code" / "train.py").write_text(TRAINS)
    request: dict[str, Any] = {
        "AlgorithmSpecification": {"TrainingImage": IMAGE, "TrainingInputMode": "File"},
        "ResourceConfig": {"InstanceType": "ml.c5.2xlarge", "InstanceCount": hosts, "VolumeSizeInGB": 1},
        "StoppingCondition": {"MaxRuntimeInSeconds": 400, "MaxWaitTimeInSeconds": 800},
        "Environment": {
            "SAGEMAKER_PROGRAM": "train.py",
            "SAGEMAKER_SUBMIT_DIRECTORY": "/opt/ml/input/data/code",
            "OMP_NUM_THREADS": "1",
        },
    }
    code, document, stderr = run.drill("", "--no-reference", "--grace-s", "10", "--fault", *words, request=request)
    assert (code, document["problems"]) == (0, []), (document, stderr)
    assert {entry["attempt"] for entry in document["attempts"]} == set(range(1, attempts + 1))
