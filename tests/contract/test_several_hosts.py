"""Scripts in the style of public ones, unedited, on two hosts of the multinode image; and hosts that die.

tests/multinode-scripts/README.md describes the scripts. Hosts are containers on one network.
"""

from __future__ import annotations

import shutil
import time
import uuid
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import docker
import pytest

from contract.containers import Ended, Image, Running, Tree

SCRIPTS = Path(__file__).resolve().parents[1] / "multinode-scripts"
HOSTS = ("algo-1", "algo-2")


@pytest.fixture(scope="module")
def image(client: docker.DockerClient, pytestconfig: pytest.Config) -> Image:
    from contract.conftest import LABEL

    image = Image(client, "multinode", pytestconfig.getoption("--tag"), LABEL)
    try:
        client.images.get(image.reference)
    except docker.errors.ImageNotFound:
        pytest.fail(f"{image.reference} is not built; `make build/multinode BASE=local` builds it")
    return image


class Job:
    """One script on several containers."""

    def __init__(self, image: Image, network: Any, folder: Path, hosts: tuple[str, ...] = HOSTS) -> None:
        self.image, self.network, self.hosts = image, network, hosts
        self.trees = {host: Tree(root=folder / host).make() for host in hosts}
        self.running: dict[str, Running] = {}

    def start(self, script: str, program: str, *only: str, env: dict[str, str] | None = None) -> Job:
        for host in only or self.hosts:
            tree = self.trees[host]
            shutil.copytree(SCRIPTS / script, tree.code, dirs_exist_ok=True)
            tree.write_config(
                hyperparameters={"epochs": "2", "backend": '"gloo"'},
                resources={
                    "current_host": host,
                    "hosts": list(self.hosts),
                    "network_interface_name": "ethwe",
                    "current_instance_type": "ml.c5.2xlarge",
                },
                inputs={},
            )
            self.running[host] = self.image.start(
                ["train"],
                tree=tree,
                network=self.network.name,
                hostname=host,
                environment={"SAGEMAKER_PROGRAM": program, "NODE_NUMBER": str(len(self.hosts)), **(env or {})},
            )
        return self

    def wait_for(self, text: str) -> None:
        for running in self.running.values():
            running.wait_for_line(text)

    def end(self, *only: str) -> dict[str, Ended]:
        return {host: self.running[host].end() for host in only or self.hosts}

    def failure(self, host: str) -> str:
        return self.trees[host].failure or "(none)"

    def models(self) -> list[str]:
        return sorted(path.name for tree in self.trees.values() for path in tree.model.iterdir())


@pytest.fixture
def new_job(image: Image, client: docker.DockerClient, tmp_path: Path) -> Iterator[Callable[..., Job]]:
    network = client.networks.create(f"estiba-test-{uuid.uuid4().hex[:12]}")
    jobs: list[Job] = []

    def make(*hosts: str) -> Job:
        jobs.append(Job(image, network, tmp_path / f"job-{len(jobs)}", hosts or HOSTS))
        return jobs[-1]

    yield make
    for job in jobs:
        for running in job.running.values():
            running.container.remove(force=True)
    network.remove()


@pytest.fixture
def job(new_job: Callable[..., Job]) -> Job:
    return new_job()


@pytest.mark.parametrize(
    ("script", "program", "says", "leaves"),
    [
        ("os_system", "start.py", "rank {rank} of 2: loss=", ["model.pt"]),
        ("plain_gloo", "start.py", "rank {rank} epoch 1 loss=0.000141", ["model-0.pth", "model-1.pth"]),
        ("hostfile", "start.py", "rank {rank} of 2: sum 1", ["rank-0", "rank-1"]),
        ("launch", "train.sh", "rank {rank}: value 4 gpus 0", ["rank-0", "rank-1"]),
        ("tee", "train.sh", "rank {rank}: value 4", []),
        ("helper", "start.py", "trained", ["done-algo-1", "done-algo-2"]),
        ("spawn", "start.py", ": 4", []),
        ("c10d", "launch.sh", "epoch 1 rank {rank}/2", ["pytorch_model.bin"]),
        ("spaces", "my trainer.sh", "epoch 1 rank {rank}/2", ["pytorch_model.bin"]),
        ("nohup", "start.sh", "exit code: 0", ["pytorch_model.bin"]),
    ],
)
def test_a_public_script_runs_unedited_on_two_hosts(
    job: Job, script: str, program: str, says: str, leaves: list[str]
) -> None:
    job.start(script, program)
    ended = job.end()
    for rank, host in enumerate(HOSTS):
        assert ended[host].code == 0, ended[host].log
        assert says.format(rank=rank) in ended[host].log
    assert job.models() == leaves


def test_a_shell_script_with_requirements_and_s5cmd_runs_unedited(job: Job, tmp_path: Path) -> None:
    """s5cmd stands beside the script, as the guides have it; here it is a small one that copies folders."""
    for host in HOSTS:
        code = job.trees[host].code
        (code / "wheels").mkdir(parents=True)
        with zipfile.ZipFile(code / "wheels/tiny_requirement-1.0-py3-none-any.whl", "w") as wheel:
            info = "tiny_requirement-1.0.dist-info"
            wheel.writestr("tiny_requirement.py", "VALUE = 7\n")
            wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-requirement\nVersion: 1.0\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
        (code / "s5cmd").write_text(
            '#!/bin/sh\ncase "$3" in s3://*) exit 0 ;; esac\nmkdir -p "$3"\necho 5 >"$3/weights.txt"\n'
        )
    job.start("wheels_and_s5cmd", "train.sh", env={"MODEL_S3_BUCKET": "bucket"})
    ended = job.end()
    for host in HOSTS:
        assert ended[host].code == 0, ended[host].log
        assert "requirement 7" in ended[host].log
        assert "flags ['--backend', 'gloo', '--epochs', '2'] sum 3 weights 5" in ended[host].log
    assert job.models() == ["trained.txt"]


@pytest.mark.parametrize(
    ("script", "program", "says"),
    [
        ("os_system", "start.py", "ValueError: loss is nan at step 10 (rank 1 on algo-2, "),
        ("tee", "train.sh", "RuntimeError: CUDA out of memory. Tried to allocate 20.00 GiB (rank 1 on algo-2, "),
    ],
)
def test_a_hidden_failure_on_one_host_is_the_reason_on_both(job: Job, script: str, program: str, says: str) -> None:
    job.start(script, program, env={"FAIL_RANK": "1"})
    ended = job.end()
    for host in HOSTS:
        assert ended[host].code == 1, ended[host].log
        assert job.failure(host).startswith(says), job.failure(host)


@pytest.mark.parametrize("save_s", [3, pytest.param(45, marks=pytest.mark.slow)])
def test_term_lets_a_rank_save_behind_everything_that_stands_between(job: Job, save_s: int) -> None:
    """torchrun would kill it 30 s after another of its ranks has ended."""
    job.start("slow_save", "start.py", env={"SAVE_S": str(save_s)})
    job.wait_for("training")
    time.sleep(2)
    for host in HOSTS:
        job.running[host].container.kill(signal="TERM")
    ended = job.end()
    for host in HOSTS:
        assert ended[host].code == 143, ended[host].log
        assert job.failure(host).startswith("stopped by SIGTERM")
    assert job.models() == ["saved-0.pt", "saved-2.pt"]


TRAINING = {"SAVE_S": "1", "ESTIBA_STOP_GRACE_S": "20"}
LIMIT_S = 30 + 20 + 15


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["kill", "pause", "cut"])
@pytest.mark.parametrize("lost", HOSTS)
def test_a_host_that_is_gone_is_named_and_the_others_save(job: Job, lost: str, fault: str) -> None:
    other = next(host for host in HOSTS if host != lost)
    job.start("slow_save", "start.py", env=TRAINING)
    job.wait_for("training")
    time.sleep(2)
    container = job.running[lost].container
    started = time.monotonic()
    if fault == "kill":
        container.kill()
    elif fault == "pause":
        container.pause()
    else:
        job.network.disconnect(container)
    ended = job.end(other)[other]
    assert time.monotonic() - started < LIMIT_S
    assert ended.code == 75, ended.log
    assert job.failure(other).startswith(f"lost host {lost}: no heartbeat for "), job.failure(other)
    assert any(name.startswith("saved") for name in (path.name for path in job.trees[other].model.iterdir()))
    if fault == "pause":
        container.unpause()
    if fault != "kill":
        assert job.end(lost)[lost].code == 75
        assert "lost host" in job.failure(lost)


@pytest.mark.slow
def test_a_cut_of_five_seconds_costs_nothing(job: Job) -> None:
    job.start("slow_save", "start.py", env=TRAINING)
    job.wait_for("training")
    container = job.running["algo-2"].container
    job.network.disconnect(container)
    time.sleep(5)
    job.network.connect(container, aliases=["algo-2"])
    time.sleep(25)
    assert all(running.is_running for running in job.running.values())


@pytest.mark.slow
def test_a_host_a_minute_late_is_waited_for(new_job: Callable[..., Job]) -> None:
    """Hosts whose names sort otherwise than their numbers keep the file's order."""
    job = new_job("algo-1", "algo-10", "algo-2")
    job.start("os_system", "start.py", "algo-1", "algo-10")
    time.sleep(60)
    assert all(running.is_running for running in job.running.values())
    assert "waiting for the name of algo-2 to resolve" in job.running["algo-1"].log()
    job.start("os_system", "start.py", "algo-2")
    ended = job.end()
    for rank, host in enumerate(("algo-1", "algo-10", "algo-2")):
        assert ended[host].code == 0, ended[host].log
        assert f"rank {rank} of 3: loss=" in ended[host].log
