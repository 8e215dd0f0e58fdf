"""The default script on one, two and three hosts of the local target: the same losses, and checkpoints that fit any."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import docker
import pytest

import estiba_launch
from estiba_launch.jobs.options import SubmitOptions

pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.timeout(900)]
IMAGE = "estiba/multinode:local"
STEPS = 8
TESTS = Path(__file__).parents[1] / "images/multinode"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model of three layers, made inside the image, and a text."""
    try:
        docker.from_env(timeout=10).images.get(IMAGE)
    except docker.errors.ImageNotFound:
        pytest.skip(f"no image {IMAGE}; run `make build/multinode BASE=local`")
    monkeypatch.setenv("ESTIBA_STATE", str(tmp_path / "state"))
    made = tmp_path / "made"
    made.mkdir()
    made.chmod(0o777)
    words = ["docker", "run", "--rm", "--network", "none", "--env", "PYTHONPATH=/opt/estiba:/tests"]
    words += ["--volume", f"{TESTS}:/tests:ro", "--volume", f"{made}:/made", "--entrypoint", "python", IMAGE, "-c"]
    code = "import pathlib, tiny_model; tiny_model.build(pathlib.Path('/made/model'), 'llama-tied')"
    done = subprocess.run([*words, code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (tmp_path / "text").mkdir()
    lines = [f"The {number * 7919 % 1000} of {number * 104729 % 1000} sails at dawn.\n" for number in range(200)]
    (tmp_path / "text/a.txt").write_text("".join(lines))
    return tmp_path


def start(place: Path, name: str, hosts: int, **settings: Any) -> estiba_launch.Job:
    return estiba_launch.launch_training_job(
        image_uri=IMAGE,
        job_name=name,
        instance_count=hosts,
        instance_type="ml.c5.2xlarge",
        output_path=f"file://{place}/out",
        channels={"training": f"file://{place}/text", "model": f"file://{place}/made/model"},
        # A batch that neither two nor three ranks divide.
        hyperparameters={
            "max_sequence_length": 32, "global_batch_size": 7, "batch_size": 2, "learning_rate": 0.003,
            "lr_schedule": "constant", "warmup_ratio": 0, "max_steps": STEPS, "log_interval": 1, **settings,
        },
        checkpoint_s3_uri=f"file://{place}/checkpoints-{name.partition('-')[0]}",
        environment={"OMP_NUM_THREADS": "1", "ESTIBA_STOP_GRACE_S": "60"},
        use_spot=True,
        options=SubmitOptions(sync_every_s=0.5),
    )  # fmt: skip


def losses(place: Path, job: estiba_launch.Job) -> list[float]:
    """The training losses by step, from what the job left."""
    assert job.wait(400)["TrainingJobStatus"] == "Completed", "\n".join(job.logs())
    job.fetch(place / job.name)
    (path,) = (place / job.name).rglob("metrics.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row["train_loss"] for row in rows if "train_loss" in row]


def differ(one: list[float], other: list[float]) -> float:
    assert len(one) == len(other) == STEPS
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def test_one_two_and_three_hosts_have_the_same_losses_and_what_three_saved_two_and_one_resume(place: Path) -> None:
    expected = losses(place, start(place, "one", 1))
    assert expected[-1] < expected[0] - 0.1
    for name, hosts in (("two", 2), ("three", 3)):
        assert differ(expected, losses(place, start(place, name, hosts))) <= 1e-6

    # Three hosts train the first steps, two the next, one the last: one checkpoint address for all of them.
    start(place, "chain-3", 3, max_steps=3).wait(400)
    for name, hosts, before, steps in (("chain-2", 2, 3, 6), ("chain-1", 1, 6, STEPS)):
        job = start(place, name, hosts, max_steps=steps, accept_changed_plan="true")
        found = losses(place, job)
        assert f"resuming at step {before} of {steps}" in "\n".join(job.logs())
    assert differ(expected, found) <= 1e-6
