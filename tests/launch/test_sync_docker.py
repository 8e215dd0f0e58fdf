"""Checkpoints of several hosts in one place, on real containers, while supervisors and hosts are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import pytest

from base_image import NEEDS_BASE_IMAGE, request_of
from estiba_launch.jobs import control
from estiba_launch.jobs import directory as state
from estiba_launch.jobs.options import SubmitOptions
from estiba_launch.jobs.store import Store, open_store
from estiba_launch.request import jobfile
from estiba_launch.targets import operations as jobs
from estiba_launch.targets import registry
from s3server import s3_server

pytestmark = NEEDS_BASE_IMAGE

STEPS = """
cd /opt/ml/checkpoints
me=$(hostname)
step=$(cat "$me.step" 2>/dev/null || echo 0)
echo "from $step"
trap 'echo "term at $(cat "$me.step")"; exit 143' TERM
write() { echo "$2" > "$1.new" && mv "$1.new" "$1"; }
while [ "$step" -lt "${LAST:-30}" ]; do
  until [ "$step" -lt "$(cat /tmp/gate 2>/dev/null || echo "${GATE:-1000}")" ]; do sleep 0.05; done
  step=$((step + 1))
  write "$me.pt" "weights of $me at $step"
  write shared "$step"
  [ "$me" = algo-1 ] || write leader "$step"
  rm -f "$me"-at-*; : > "$me-at-$step"
  write "$me.step" "$step"
  echo "step=$step"; sleep 0.2
done
echo "$step" > "/opt/ml/model/$me"
"""


def sync_request(tmp: Path, script: str, **changes: Any) -> dict[str, Any]:
    name = f"sync-{os.getpid()}-{time.monotonic_ns() % 10**9}"
    limits = {"MaxRuntimeInSeconds": 200, "MaxWaitTimeInSeconds": 300}
    return request_of(tmp, script, **{"TrainingJobName": name, "StoppingCondition": limits, **changes})


TWO = {"ResourceConfig": {"InstanceType": "ml.g4dn.xlarge", "InstanceCount": 2, "VolumeSizeInGB": 1}}


def start(tmp: Path, script: str, **changes: Any) -> str:
    job = jobfile.check(tmp / "job.yaml", sync_request(tmp, script, **changes), registry.parse("local"))
    jobs.start(jobs.prepare(job, SubmitOptions(sync_every_s=0.2, stop_grace_s=5)))
    return job.name


def log_of(name: str) -> list[str]:
    return list(jobs.log_lines(name, follow=False))


def wait_for(name: str, text: str, timeout_s: float = 60) -> None:
    until = time.monotonic() + timeout_s
    while not any(text in line for line in log_of(name)):
        assert time.monotonic() < until, (text, log_of(name))
        time.sleep(0.1)


def containers_of(name: str) -> list[Any]:
    return docker.from_env().containers.list(all=True, filters={"label": f"estiba.job={name}"})


def open_gate(name: str, up_to_step: int = 1000) -> None:
    """Let both hosts continue, which wait at step GATE so that they are not ahead of the test."""
    until = time.monotonic() + 60
    while len(running := [one for one in containers_of(name) if one.status == "running"]) < 2:
        assert time.monotonic() < until, log_of(name)
        time.sleep(0.05)
    for container in running:
        assert container.exec_run(["sh", "-c", f"echo {up_to_step} > /tmp/gate"]).exit_code == 0


def kill_supervisor(name: str) -> None:
    os.kill(int((state.job_dir(name) / control.LOCK).read_text()), signal.SIGKILL)
    until = time.monotonic() + 10
    while control.supervised(state.job_dir(name)):
        assert time.monotonic() < until
        time.sleep(0.05)


def kill_machine(name: str) -> None:
    """As a reboot: the supervisor and all containers are gone, what is on disk stays."""
    kill_supervisor(name)
    for container in containers_of(name):
        container.kill()
        container.wait()


def host_folder(name: str, host: str, attempt: int = 1) -> Path:
    return state.job_dir(name) / "attempts" / str(attempt) / host / "checkpoints"


def content(store: Store, tmp: Path) -> dict[str, str]:
    found = {}
    for key in store.list():
        store.get(key, tmp / "seen")
        found[key] = (tmp / "seen").read_text()
    return found


@pytest.fixture
def place(tmp_path, monkeypatch) -> Iterator[Path]:
    monkeypatch.setenv("ESTIBA_STATE", str(tmp_path / "state"))
    yield tmp_path
    for name in state.job_names():
        if control.supervised(state.job_dir(name)):
            control.request_stop(state.job_dir(name), "the test is over")
            jobs.wait(name, 30)
        assert containers_of(name) == []


@pytest.fixture(params=["file", pytest.param("s3", marks=pytest.mark.slow)])
def address(request, place, monkeypatch) -> Iterator[str]:
    """Start of addresses for checkpoints."""
    if request.param == "file":
        yield f"file://{place}/stores"
        return
    pytest.importorskip("ministack", reason="the S3 test server is not installed: run `make env`")
    with s3_server() as server:
        for name, value in server.environ.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("AWS_CA_BUNDLE", raising=False)
        server.make_bucket("checkpoints")
        yield "s3://checkpoints"


def test_two_hosts_that_lose_supervisor_and_machine_leave_the_undisturbed_bytes(place, address):
    seed = place / "seed"
    seed.write_text("0\n")
    undisturbed, disturbed = (open_store(f"{address}/{name}") for name in ("undisturbed", "disturbed"))
    for store in (undisturbed, disturbed):
        # Both hosts restore it, and only one writes it: the other has a stale copy from then on.
        store.put(seed, "leader")
        store.put(seed, "before.txt")
    environment = {"LAST": "30"}
    quiet = start(place, STEPS, CheckpointConfig={"S3Uri": undisturbed.uri}, Environment=environment, **TWO)
    assert jobs.wait(quiet, 90).status == "Completed", log_of(quiet)
    environment["GATE"] = "6"
    name = start(place, STEPS, CheckpointConfig={"S3Uri": disturbed.uri}, Environment=environment, **TWO)
    wait_for(name, "step=4")
    disturbed.put(seed, "NOTES.txt")
    for step in (6, 10):
        wait_for(name, f"step={step}")
        kill_supervisor(name)
        assert jobs.status(name).is_orphaned
        # The containers go on; what they write and remove meanwhile is found by the next supervisor.
        folder = host_folder(name, "algo-2")
        open_gate(name, step + 4)
        while int((folder / "algo-2.step").read_text()) <= step:
            time.sleep(0.05)
        assert jobs.resume(name)
        assert "NOTES.txt" in disturbed.list()
    wait_for(name, "step=14")
    kill_machine(name)
    reached = [int((host_folder(name, host) / f"{host}.step").read_text()) for host in ("algo-1", "algo-2")]
    # An old copy, with its old time, takes the place of the file that was uploaded.
    for host in ("algo-1", "algo-2"):
        stale = host_folder(name, host) / "leader"
        stale.unlink()
        stale.write_text("4\n")
        os.utime(stale, (time.time() - 3600,) * 2)
    before = int(content(disturbed, place)["leader"])
    assert jobs.resume(name)
    wait_for(name, "attempt 2")
    open_gate(name)
    assert int(content(disturbed, place)["leader"]) >= before
    value = jobs.wait(name, 90).to_json()
    assert value["TrainingJobStatus"] == "Completed", log_of(name)
    assert [one["Outcome"] for one in value["Estiba"]["Attempts"]] == ["HostLost", "Completed"]
    starts = sorted(line for line in log_of(name) if "] from " in line and not line.endswith("from 0"))
    # What was on the disk of the machine is not done again.
    assert starts == [f"[algo-1] from {reached[0]}", f"[algo-2] from {reached[1]}"]
    assert content(disturbed, place) == {**content(undisturbed, place), "NOTES.txt": "0\n"}
    assert content(disturbed, place)["leader"] == "30\n"


def test_stop_after_the_supervisor_died_stops_and_starts_nothing(place):
    for spot in (True, False):
        for kill in (kill_supervisor, kill_machine):
            kept = {"CheckpointConfig": {"S3Uri": f"file://{place}/c-{kill.__name__}-{spot}"}}
            if not spot:
                kept |= {"StoppingCondition": {"MaxRuntimeInSeconds": 200}}
            name = start(place, STEPS, Environment={"LAST": "999"}, EnableManagedSpotTraining=spot, **kept, **TWO)
            wait_for(name, "step=4")
            kill(name)
            jobs.stop(name)
            value = jobs.wait(name, 60).to_json()
            assert value["TrainingJobStatus"] == "Stopped", (kill, value)
            assert len(value["Estiba"]["Attempts"]) == 1, (kill, log_of(name))
            assert containers_of(name) == []
            step = int(content(open_store(kept["CheckpointConfig"]["S3Uri"]), place)["algo-1.step"])
            assert step >= 4
            if kill is kill_supervisor:
                assert f"[algo-1] term at {step}" in log_of(name)


def test_containers_that_were_removed_leave_what_they_wrote(place):
    name = start(place, STEPS, Environment={"LAST": "15", "GATE": "8"}, **TWO)
    wait_for(name, "step=3")
    kill_supervisor(name)
    time.sleep(1)
    for container in containers_of(name):
        container.remove(force=True)
    reached = int((host_folder(name, "algo-2") / "algo-2.step").read_text())
    assert jobs.resume(name)
    open_gate(name)
    assert jobs.wait(name, 60).status == "Completed", log_of(name)
    starts = [int(line.split()[-1]) for line in log_of(name) if "[algo-2] from " in line]
    assert starts == [0, reached]


ODD = r"""
cd /opt/ml/checkpoints
printf x > "$(printf 'caf\351.bin')"
mkfifo pipe
echo weights > zz-model
mkdir -p step-1; echo one > step-1/model; ln -s /opt/ml/checkpoints/step-1 latest; ln -s /etc/hostname outside
echo model > /opt/ml/model/model
sleep 1
"""


def test_odd_files_do_not_keep_a_job_from_its_end(place, address):
    name = start(place, ODD, CheckpointConfig={"S3Uri": f"{address}/odd"})
    value = jobs.wait(name, 60).to_json()
    assert value["TrainingJobStatus"] == "Completed", value
    found = content(open_store(f"{address}/odd"), place)
    odd = os.fsdecode(b"caf\xe9.bin")
    assert found.pop(odd, "x") == "x"
    assert found == {"zz-model": "weights\n", "step-1/model": "one\n", "latest/model": "one\n"}
    log = "\n".join(log_of(name))
    assert log.count("pipe: neither a file nor a folder") == 1, log
    assert log.count("outside: a link to nothing here (/etc/hostname)") == 1
    message = value["SecondaryStatusTransitions"][-1]["StatusMessage"]
    if address.startswith("s3://"):
        assert r"'caf\udce9.bin'" in message
        assert jobs.status(name).unsynced in message
        assert (host_folder(name, "algo-1") / odd).read_text() == "x", "the only copy stays"
    else:
        assert "checkpoints" not in message
    assert jobs.download(name, place / "got")["model"] == 1


PRIVATE = """
cd /opt/ml/checkpoints
umask 077
echo secret > a-private; mkdir -p closed/deep; echo deep > closed/deep/file
umask 022
echo open > zz-open
trap 'exit 143' TERM
while true; do sleep 0.1; done
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes an ordinary user of group docker, which needs root")
def test_private_files_of_root_are_synced_for_an_ordinary_user(monkeypatch):
    socket = Path(docker.from_env().api.base_url.removeprefix("http+docker://") or "/var/run/docker.sock")
    socket = socket if socket.is_socket() else Path("/var/run/docker.sock")
    group = socket.stat().st_gid
    with tempfile.TemporaryDirectory() as folder:
        tmp = Path(folder)
        (tmp / "job.json").write_text(json.dumps(sync_request(tmp, PRIVATE)))
        tmp.chmod(0o777)
        user = ["setpriv", "--reuid=65534", "--regid=65534", f"--groups={group}"]
        environment = {**os.environ, "ESTIBA_STATE": f"{tmp}/state", "HOME": str(tmp)}
        environment["PYTHONPATH"] = os.pathsep.join(sys.path)

        def call(python: str, *words: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [*user, python, *words], env=environment, capture_output=True, text=True, cwd=tmp, check=False
            )

        # The user may not reach an interpreter in root's home.
        again = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', 'import typer, docker']))"
        pythons = [one for one in (sys.executable, "/usr/bin/python3") if call(one, "-c", again).returncode == 0]
        if not pythons:
            pytest.skip(f"an ordinary user cannot run {sys.executable}")

        def run(*words: str) -> None:
            done = call(pythons[0], "-m", "estiba_launch.cli.app", *words)
            assert done.returncode == 0, done.stdout + done.stderr

        monkeypatch.setenv("ESTIBA_STATE", f"{tmp}/state")
        run("run", "job.json", "--target", "local", "--yes", "--detach", "--sync-every-s", "0.2")
        [name] = state.job_names()
        try:
            store, until = tmp / "checkpoints", time.monotonic() + 40
            want = ["a-private", "closed", "zz-open"]
            while not (store / "closed/deep/file").exists() or sorted(os.listdir(store)) != want:
                assert time.monotonic() < until, (log_of(name), os.listdir(store))
                time.sleep(0.1)
            assert (store / "a-private").read_text() == "secret\n"
            assert (store / "closed/deep/file").read_text() == "deep\n"
            # A kill without notice loses nothing of them.
            run("interrupt", name, "--no-notice")
            wait_for(name, "attempt 2 on")
        finally:
            run("stop", name)
            assert jobs.wait(name, 60).status == "Stopped", log_of(name)
        assert (store / "a-private").stat().st_uid == 65534
