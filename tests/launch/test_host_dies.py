"""A machine that fails under a job: nothing finished is lost, and the job's status says what became of it.

That the engine goes away, alone or with its containers, is in test_localhost.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import pytest

from base_image import NEEDS_BASE_IMAGE, request_of
from estiba_launch.jobs import control
from estiba_launch.jobs import directory as state
from estiba_launch.jobs.control import Fault
from estiba_launch.jobs.options import SubmitOptions
from estiba_launch.request import jobfile
from estiba_launch.targets import operations as jobs
from estiba_launch.targets import registry
from s3server import S3Server, s3_server

pytestmark = NEEDS_BASE_IMAGE

STEPS = """
cd /opt/ml/checkpoints
step=$(cat step 2>/dev/null || echo 0)
echo "from $step"
trap 'exit 143' TERM
while [ "$step" -lt "${LAST:-30}" ]; do
  step=$((step + 1)); echo $step > step.new && mv step.new step || { echo "cannot save"; exit 1; }
  echo "step=$step"; sleep 0.2
  if [ -n "$FILL_AT" ] && [ "$step" = "$FILL_AT" ]; then
    sleep 1; cat /dev/zero > /opt/ml/output/data/big; echo "the disk is full"
  fi
done
echo weights > /opt/ml/model/weights
"""


def start(tmp: Path, script: str, **changes: Any) -> str:
    name = f"dies-{os.getpid()}-{time.monotonic_ns() % 10**9}"
    request = request_of(tmp, script, TrainingJobName=name, **changes)
    job = jobfile.check(tmp / "job.yaml", request, registry.parse("local"))
    jobs.start(jobs.prepare(job, SubmitOptions(sync_every_s=0.2, stop_grace_s=5)))
    return job.name


def log_of(name: str) -> list[str]:
    return list(jobs.log_lines(name, follow=False))


def wait_for(name: str, text: str, timeout_s: float = 40) -> None:
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        if any(text in line for line in log_of(name)):
            return
        time.sleep(0.1)
    raise AssertionError(f"{text!r} not in {log_of(name)}")


def end_all() -> None:
    for name in state.job_names():
        if control.supervised(state.job_dir(name)):
            control.request_stop(state.job_dir(name), "the test is over")
            jobs.wait(name, 30)
        assert docker.from_env().containers.list(all=True, filters={"label": f"estiba.job={name}"}) == []


@pytest.fixture
def place(tmp_path, monkeypatch) -> Iterator[Path]:
    monkeypatch.setenv("ESTIBA_STATE", str(tmp_path / "state"))
    yield tmp_path
    end_all()


@pytest.fixture
def s3(monkeypatch) -> Iterator[S3Server]:
    with s3_server() as server:
        for name, value in server.environ.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("AWS_CA_BUNDLE", raising=False)
        server.make_bucket("checkpoints")
        yield server


@pytest.mark.slow
def test_an_s3_endpoint_that_goes_away_while_a_host_is_lost_costs_the_wait_and_no_work(place, s3):
    name = start(place, STEPS, CheckpointConfig={"S3Uri": "s3://checkpoints/job"}, Environment={"LAST": "25"})
    wait_for(name, "step=3")
    s3.stop()
    wait_for(name, "step=6")
    jobs.interrupt(name, Fault(grace_s=5))
    time.sleep(6)
    assert jobs.status(name).to_json()["TrainingJobStatus"] == "InProgress"
    assert len(jobs.status(name).to_json()["Estiba"]["Attempts"]) == 1
    s3.start()
    value = jobs.wait(name, 90).to_json()
    log = log_of(name)
    assert value["TrainingJobStatus"] == "Completed", log
    starts = [int(line.split()[1]) for line in log if line.startswith("from ")]
    counted = [int(line.removeprefix("step=")) for line in log if line.startswith("step=")]
    assert len(starts) == 2
    assert starts[1] >= 6
    # Every step once: nothing that was finished was done again.
    assert counted == list(range(1, 26))


@pytest.mark.slow
def test_an_s3_endpoint_that_is_away_when_a_new_host_starts_is_waited_for(place, s3, monkeypatch):
    name = start(place, STEPS, CheckpointConfig={"S3Uri": "s3://checkpoints/job"}, Environment={"LAST": "15"})
    wait_for(name, "step=3")
    time.sleep(1)
    jobs.interrupt(name, Fault(notice=False, capacity_wait_s=2.0))
    wait_for(name, "waiting 2 s for capacity")
    s3.stop()
    time.sleep(8)
    assert jobs.status(name).to_json()["TrainingJobStatus"] == "InProgress"
    s3.start()
    value = jobs.wait(name, 100).to_json()
    assert value["TrainingJobStatus"] == "Completed", log_of(name)
    assert [entry["Outcome"] for entry in value["Estiba"]["Attempts"]] == ["Interrupted", "Completed"]
    starts = [int(line.split()[1]) for line in log_of(name) if line.startswith("from ")]
    assert starts[1] >= 3


@pytest.fixture
def small_disk(tmp_path, monkeypatch) -> Iterator[Path]:
    """State on a disk of 6 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.decode()[:200]}")
    monkeypatch.setenv("ESTIBA_STATE", str(disk / "state"))
    yield disk
    try:
        end_all()
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_full_disk_fails_the_job_with_that_reason_and_keeps_what_was_saved(small_disk, tmp_path):
    name = start(tmp_path, STEPS, Environment={"LAST": "30", "FILL_AT": "5"})
    value = jobs.wait(name, 60).to_json()
    assert value["TrainingJobStatus"] == "Failed", value
    assert "is full: make room there" in value["FailureReason"]
    assert (tmp_path / "checkpoints" / "step").read_text() == "5\n"
    assert json.loads((state.job_dir(name) / "describe.json").read_text())["TrainingJobStatus"] == "Failed"
    # The saved work is there for the next job, which has room.
    for path in (small_disk / "state" / "jobs" / name).rglob("big"):
        path.unlink()
    again = start(tmp_path, STEPS, Environment={"LAST": "8"})
    assert jobs.wait(again, 60).to_json()["TrainingJobStatus"] == "Completed", log_of(again)
    assert "from 5" in log_of(again)
