"""The local host against real containers: every job is a shell script given through a channel, in the base image."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import docker
import pytest

from base_image import IMAGE, NEEDS_BASE_IMAGE
from estiba_launch.errors import LaunchError
from estiba_launch.jobs import control
from estiba_launch.jobs import directory as state
from estiba_launch.jobs.control import Fault
from estiba_launch.jobs.options import SubmitOptions
from estiba_launch.request import jobfile
from estiba_launch.request.options import HostOptions
from estiba_launch.targets import operations as jobs
from estiba_launch.targets import registry
from estiba_launch.targets.local.engine import Engine

pytestmark = NEEDS_BASE_IMAGE

Run = Callable[..., dict[str, Any]]


class Place:
    """One test's own state, data, output and checkpoints."""

    def __init__(self, tmp_path: Path) -> None:
        self.tmp = tmp_path
        self.count = 0
        for name in ("data", "out", "checkpoints", "code"):
            (tmp_path / name).mkdir()
        (tmp_path / "data" / "a.txt").write_text("hola\n")
        (tmp_path / "data" / "sub").mkdir()
        (tmp_path / "data" / "sub" / "b.txt").write_text("mundo\n")

    def request(self, script: str, **changes: Any) -> dict[str, Any]:
        self.count += 1
        (self.tmp / "code" / "run.sh").write_text(script)

        def channel(name: str, **more: Any) -> dict[str, Any]:
            source = {"S3DataType": "S3Prefix", "S3Uri": f"file://{self.tmp}/{name}"}
            return {"ChannelName": name, "DataSource": {"S3DataSource": source}, **more}

        return {
            "TrainingJobName": f"t{self.count}-{self.tmp.name.replace('_', '-')[-30:]}-{os.getpid()}",
            "AlgorithmSpecification": {
                "TrainingImage": IMAGE,
                "TrainingInputMode": "File",
                "ContainerEntrypoint": ["sh", "/opt/ml/input/data/code/run.sh"],
                "MetricDefinitions": [{"Name": "loss", "Regex": "loss=([0-9.]+)"}],
            },
            "HyperParameters": {"model": "m", "n": "3"},
            "Environment": {"COLOUR": "blue green"},
            "InputDataConfig": [channel("code"), channel("data", ContentType="text/plain")],
            "OutputDataConfig": {"S3OutputPath": f"file://{self.tmp}/out"},
            "ResourceConfig": {"InstanceType": "ml.g4dn.xlarge", "InstanceCount": 1, "VolumeSizeInGB": 1},
            "StoppingCondition": {"MaxRuntimeInSeconds": 60, "MaxWaitTimeInSeconds": 100},
            "EnableManagedSpotTraining": True,
            "CheckpointConfig": {"S3Uri": f"file://{self.tmp}/checkpoints"},
            **changes,
        }

    def start(self, script: str, *, options: dict[str, Any] | None = None, **changes: Any) -> str:
        request = self.request(script, **changes)
        job = jobfile.check(self.tmp / "job.yaml", request, registry.parse("local"))
        settings = {"sync_every_s": 0.2, "stop_grace_s": 5, **(options or {})}
        jobs.start(jobs.prepare(job, SubmitOptions(**settings)))
        return job.name

    def run(self, script: str, **changes: Any) -> dict[str, Any]:
        name = self.start(script, **changes)
        value = jobs.wait(name, 90).to_json()
        value["log"] = list(jobs.log_lines(name, follow=False))
        return value

    def wait_for(self, name: str, text: str, timeout_s: float = 30) -> None:
        """Until the job has printed `text`."""
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            if any(text in line for line in jobs.log_lines(name, follow=False)):
                return
            time.sleep(0.1)
        raise AssertionError(f"{text!r} not in {list(jobs.log_lines(name, follow=False))}")


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("ESTIBA_STATE", str(tmp_path / "state"))
    yield Place(tmp_path)
    client = docker.from_env()
    for wire in list(Wire.cut_now):
        wire.mend()
    for name in state.job_names():
        if control.supervised(state.job_dir(name)):
            control.request_stop(state.job_dir(name), "the test is over")
            jobs.wait(name, 30)
        assert client.containers.list(all=True, filters={"label": f"estiba.job={name}"}) == []
        assert client.networks.list(names=[f"estiba-{name}"]) == []


def statuses(value: dict[str, Any]) -> list[str]:
    return [entry["Status"] for entry in value["SecondaryStatusTransitions"]]


SHOW = """
cd /opt/ml
cat input/config/hyperparameters.json | tr -d '\\n'; echo
cat input/config/inputdataconfig.json | tr -d '\\n'; echo
cat input/config/checkpointconfig.json | tr -d '\\n'; echo
cat input/data/data/a.txt input/data/data/sub/b.txt
echo "colour=$COLOUR name=$TRAINING_JOB_NAME argument=$1 host=$(hostname)"
touch input/data/data/new 2>/dev/null && echo writable || echo read-only
df -k /dev/shm | tail -1
echo "loss=0.50"; echo "loss=0.25"
echo weights > model/w.bin; mkdir model/deep; echo d > model/deep/d.bin
echo rows > output/data/rows.txt
"""


def test_a_job_sees_the_contract_and_leaves_model_and_output(place):
    value = place.run(SHOW, options={"host": HostOptions(shm_size="512m")})
    assert value["TrainingJobStatus"] == "Completed", value["log"]
    text = "\n".join(value["log"])
    assert '"model": "m"' in text
    assert '"ContentType": "text/plain"' in text
    assert '"LocalPath": "/opt/ml/checkpoints"' in text
    assert "hola\nmundo" in text
    assert f"colour=blue green name={value['TrainingJobName']} argument=train host=algo-1" in text
    assert "read-only" in text
    assert " 524288 " in text
    assert statuses(value) == ["Starting", "Downloading", "Training", "Uploading", "Completed"]
    assert value["FinalMetricDataList"][0]["MetricName"] == "loss"
    assert value["FinalMetricDataList"][0]["Value"] == 0.25
    assert value["ModelArtifacts"]["S3ModelArtifacts"].endswith(f"/{value['TrainingJobName']}/output/model.tar.gz")
    with tarfile.open(value["ModelArtifacts"]["S3ModelArtifacts"].removeprefix("file://")) as tar:
        assert sorted(tar.getnames()) == ["deep/d.bin", "w.bin"]
    assert jobs.download(value["TrainingJobName"], place.tmp / "got") == {"model": 2, "output": 1}
    assert (place.tmp / "got/output/rows.txt").read_text() == "rows\n"
    assert 0 <= value["BillableTimeInSeconds"] <= value["TrainingTimeInSeconds"] < 60


def by_hand(submission: Any, work: Path) -> subprocess.Popen[str]:
    """The printed script, started as a person does."""
    process = subprocess.Popen(["sh"], stdin=subprocess.PIPE, env={**os.environ, "WORK": str(work)}, text=True)
    assert process.stdin
    process.stdin.write(submission.render())
    process.stdin.close()
    return process


def channel_at(name: str, uri: str, **source: str) -> dict[str, Any]:
    place = {"S3DataType": "S3Prefix", "S3Uri": uri, **source}
    return {"ChannelName": name, "DataSource": {"S3DataSource": place}}


LISTS = """
find -L /opt/ml/input/data -type f | LC_ALL=C sort > /opt/ml/output/data/files
touch /opt/ml/output/data/up
while [ ! -e /opt/ml/output/data/end ]; do sleep 0.1; done
"""


@pytest.mark.parametrize(
    ("count", "options"),
    [
        (1, {"host": HostOptions(shm_size="512m", memory="256m", cpus=0.5)}),
        (2, {"environment": {"EXTRA": "a b"}}),
        (2, {"copy_inputs": True}),
    ],
)
def test_the_printed_command_starts_the_containers_that_run_starts(count, options, place, tmp_path):
    """Compare what docker keeps of both, but for the place of their folders, and what the containers see."""
    data = tmp_path / "my: data, all"
    for name in ("folder/a.txt", "folder/b/c.txt", "folder/d.txt", "one.csv", "one.csv.old", "tr-1", "train/x"):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_text(name)
    request = place.request(
        LISTS,
        ResourceConfig={"InstanceType": "ml.g4dn.xlarge", "InstanceCount": count, "VolumeSizeInGB": 1},
        EnableNetworkIsolation=count > 1,
    )
    request["InputDataConfig"] += [
        channel_at("folder", f"file://{data}/folder"),
        channel_at("one", f"file://{data}/one.csv"),
        channel_at("start", f"file://{data}/tr"),
        channel_at("share", f"file://{data}/folder", S3DataDistributionType="ShardedByS3Key"),
    ]
    loaded = jobfile.check(place.tmp / "job.yaml", request, registry.parse("local"))
    submission = jobs.prepare(loaded, SubmitOptions(**options))
    name, hosts = submission.name, [f"algo-{number}" for number in range(1, count + 1)]
    jobs.start(submission)
    by_run = [_inspected(state.jobs_root() / name / "attempts/1", name, host) for host in hosts]
    jobs.wait(name, 60)
    work = tmp_path / "by hand"
    process = by_hand(submission, work)
    found = [_inspected(work, name, host) for host in hosts]
    assert process.wait(60) == 0
    assert found == by_run
    assert by_run[0]["files"] == found[0]["files"] and "one/one.csv" in by_run[0]["files"]
    assert "start/train/x" in by_run[0]["files"] and "one.csv.old" not in by_run[0]["files"]
    shares = [file for one in by_run for file in one["files"].splitlines() if "/share/" in file]
    assert len(shares) == len(set(shares)) == 3
    if memory := submission.options.host.memory:
        assert memory == "256m" and by_run[0]["HostConfig"]["MemorySwap"] == 256 << 20
    assert docker.from_env().containers.list(all=True, filters={"label": f"estiba.job={name}"}) == []
    assert docker.from_env().networks.list(names=[f"estiba-{name}"]) == []


def test_a_script_that_was_killed_is_no_obstacle_to_the_next_run(place, tmp_path):
    cluster = {"InstanceType": "ml.g4dn.xlarge", "InstanceCount": 2, "VolumeSizeInGB": 1}
    request = place.request(LISTS, ResourceConfig=cluster)
    submission = jobs.prepare(jobfile.check(place.tmp / "job.yaml", request, registry.parse("local")))
    work, hosts = tmp_path / "work", ["algo-1", "algo-2"]
    containers = [f"estiba-{submission.name}-{host}-1" for host in hosts]
    first = by_hand(submission, work)
    for host in hosts:
        _wait_for(work / host / "output/data/up")
    first.kill()
    first.wait()
    again = by_hand(submission, work)
    assert again.wait(60) == 1
    client = docker.from_env()
    assert [client.containers.get(container).status for container in containers] == ["running"] * 2
    for host, container in zip(hosts, containers, strict=True):
        client.containers.get(container).kill()
        (work / host / "output/data/up").unlink()
    third = by_hand(submission, work)
    for host in hosts:
        _wait_for(work / host / "output/data/up")
        (work / host / "output/data/end").touch()
    assert third.wait(60) == 0
    assert client.containers.list(all=True, filters={"label": f"estiba.job={submission.name}"}) == []
    assert client.networks.list(names=[f"estiba-{submission.name}"]) == []


def _wait_for(path: Path) -> None:
    until = time.monotonic() + 60
    while not path.exists() and time.monotonic() < until:
        time.sleep(0.1)
    assert path.exists()


def _inspected(work: Path, name: str, host: str) -> dict[str, Any]:
    """What docker knows of a host's container, and the files it saw; then the host is told to end."""
    output = work / host / "output/data"
    _wait_for(output / "up")
    files = (output / "files").read_text()
    seen = docker.from_env().api.inspect_container(f"estiba-{name}-{host}-1")
    (output / "end").touch()
    # An option that is not given is null in one client's request and empty in the other's.
    settings = {key: None if value in ([], {}) else value for key, value in seen["HostConfig"].items()}
    settings["Mounts"] = [{**mount, "Source": Path(mount["Source"]).name} for mount in settings["Mounts"]]
    # Docker chooses the range anew.
    settings["ExtraHosts"] = [one.rpartition(".")[2] for one in settings["ExtraHosts"] or []]
    config = {**seen["Config"], "Env": sorted(seen["Config"]["Env"])}
    networks = seen["NetworkSettings"]["Networks"]
    fixed = {
        name: (one["IPAMConfig"] or {}).get("IPv4Address", "").rpartition(".")[2] for name, one in networks.items()
    }
    return {"HostConfig": settings, "Config": config, "Networks": fixed, "files": files}


HOST_LEFT = """
if [ "$(hostname)" = algo-1 ]; then exit 0; fi
sleep 3
python3 - <<PY
import socket
try:
    socket.create_connection(("algo-1", 9), 5)
except socket.gaierror as error:
    raise SystemExit(f"algo-1 has no name any more: {error}")
except OSError as error:
    print("algo-1 still has a name:", socket.gethostbyname("algo-1") != "", type(error).__name__)
PY
"""


@pytest.mark.parametrize("isolated", [True, False])
def test_a_host_that_has_finished_keeps_its_name_for_its_peers(isolated, place):
    cluster = {"InstanceType": "ml.g4dn.xlarge", "InstanceCount": 2, "VolumeSizeInGB": 1}
    value = place.run(HOST_LEFT, ResourceConfig=cluster, EnableNetworkIsolation=isolated)
    assert value["TrainingJobStatus"] == "Completed", value["log"]
    assert any("algo-1 still has a name: True" in line for line in value["log"])


def test_whoever_sees_the_terminal_status_finds_everything_in_place(place):
    name = place.start("echo loss=0.5; echo last; echo w > /opt/ml/model/w; sleep 1", options={"sync_every_s": 0.2})
    while not (status := jobs.status(name)).is_terminal:
        time.sleep(0.005)
    folder = state.job_dir(name)
    lines = (folder / "job.log").read_text().splitlines()
    assert "last" in lines and lines[-1].startswith("--- Completed: Completed")
    assert status.metrics == {"loss": 0.5}
    assert status.model_uri and Path(status.model_uri.removeprefix("file://")).is_file()
    assert not (folder / "scratch").exists() and not (folder / "inputs").exists()
    assert [path.name for path in (folder / "attempts/1").iterdir()] == ["algo-1.log"]
    assert docker.from_env().containers.list(all=True, filters={"label": f"estiba.job={name}"}) == []


def test_hyperparameters_can_come_encoded_as_sdk_v2_does(place):
    value = place.run(SHOW, options={"host": HostOptions(encoding="json")})
    assert '"model": "\\"m\\"", "n": "3"' in "\n".join(value["log"])


def test_copied_inputs_are_writable_and_leave_the_source_alone(place):
    value = place.run(SHOW, options={"copy_inputs": True})
    assert "writable" in value["log"]
    assert not (place.tmp / "data" / "new").exists()


@pytest.mark.parametrize("options", [{}, {"copy_inputs": True}], ids=["mounted", "copied"])
def test_links_in_an_input_are_followed_and_links_in_a_model_arrive_or_are_named(options, place, tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "sha").write_text("weights\n")
    (tmp_path / "data" / "model.bin").symlink_to("../blobs/sha")
    (tmp_path / "data" / "again").symlink_to(tmp_path / "data" / "sub")
    name = place.start(
        "cd /opt/ml/input/data/data; cat model.bin again/b.txt\n"
        "cd /opt/ml/model; mkdir step-2; echo two > step-2/w; ln -s step-2 latest; ln -s /opt/ml/model/step-2/w last\n"
        "ln -s /opt/ml/input/data/data/model.bin base; echo x > /tmp/x; ln -s /tmp/x gone; ln -s /etc/hostname host\n",
        options=options,
    )
    jobs.wait(name, 90)
    lines = list(jobs.log_lines(name, follow=False))
    assert [line for line in lines if not line.startswith("---")] == ["weights", "mundo"]
    jobs.download(name, tmp_path / "got")
    model = tmp_path / "got" / "model"
    assert {path.name: path.read_text() for path in (model / "latest/w", model / "last", model / "base")} == {
        "w": "two\n", "last": "two\n", "base": "weights\n",
    }  # fmt: skip
    assert not (model / "gone").exists() and not (model / "host").exists()
    assert any("model: gone is a link to /tmp/x, which is not there; not stored" in line for line in lines)
    assert any("model: host is a link to /etc/hostname, which is not there; not stored" in line for line in lines)


def test_output_without_compression_is_stored_as_files(place):
    out = {"S3OutputPath": f"file://{place.tmp}/out", "CompressionType": "NONE"}
    value = place.run(SHOW, OutputDataConfig=out)
    base = place.tmp / "out" / value["TrainingJobName"] / "output"
    assert (base / "model/deep/d.bin").read_text() == "d\n"
    assert (base / "data/rows.txt").read_text() == "rows\n"
    assert jobs.download(value["TrainingJobName"], place.tmp / "got") == {"model": 2, "output": 1}


def test_a_failed_job_tells_the_first_1024_characters_of_its_failure_file(place):
    script = "exec > /opt/ml/output/failure; printf 'cause first\\n'; head -c 3000 /dev/zero | tr '\\0' x; exit 3"
    value = place.run(script)
    assert value["TrainingJobStatus"] == "Failed"
    assert value["FailureReason"].startswith("cause first\nxxx")
    assert len(value["FailureReason"]) == 1024
    assert value["Estiba"]["Attempts"][0]["ExitCodes"] == {"algo-1": 3}
    assert "ModelArtifacts" not in value


def test_a_failed_job_without_a_failure_file_tells_its_exit_code(place):
    value = place.run("exit 7")
    assert value["FailureReason"].startswith("AlgorithmError: exit code 7")


def test_a_job_over_its_memory_limit_says_so(place):
    script = "python -c 'x = bytearray(200 << 20)'"
    value = place.run(script, options={"host": HostOptions(memory="64m")})
    assert value["TrainingJobStatus"] == "Failed"
    assert "memory" in value["FailureReason"] or "137" in value["FailureReason"]


STEPS = """
# One step at a time, the last one kept in the checkpoint directory; TERM saves and leaves. A first attempt gets no
# further than step GATE: what a test does to it must not depend on who is faster.
cd /opt/ml/checkpoints
step=$(cat step 2>/dev/null || echo 0)
[ $step = 0 ] || GATE=
echo "from $step, output=$(ls /opt/ml/output/data | wc -l) model=$(ls /opt/ml/model | wc -l) tmp=$(ls /tmp | wc -l)"
trap 'echo "term at $step"; echo $step > step; exit 143' TERM
touch /tmp/mine /opt/ml/output/data/mine-$step /opt/ml/model/mine-$step
while [ $step -lt ${LAST:-20} ]; do
  while [ "$step" = "$GATE" ]; do sleep 0.1; done
  step=$((step + 1)); echo $step > step.new; mv step.new step; touch at-$step; rm -f at-$((step - 1))
  echo "step=$step"; sleep 0.2
done
"""
HELD: dict[str, Any] = {"Environment": {"GATE": "10"}}


def test_an_interruption_goes_on_from_the_checkpoint_on_a_new_host(place):
    name = place.start(STEPS, **HELD)
    place.wait_for(name, "step=4")
    jobs.interrupt(name, Fault(grace_s=5, capacity_wait_s=1.0))
    value = jobs.wait(name, 60).to_json()
    log = list(jobs.log_lines(name, follow=False))
    assert value["TrainingJobStatus"] == "Completed", log
    assert log.count("from 0, output=0 model=0 tmp=0") == 1
    (resumed,) = [line for line in log if line.startswith("from ") and not line.startswith("from 0")]
    assert int(resumed.split()[1].rstrip(",")) >= 4
    assert resumed.endswith("output=0 model=0 tmp=0")
    saved = next(line for line in log if line.startswith("term at")).split()[-1]
    assert resumed.startswith(f"from {saved},")
    assert statuses(value) == [
        "Starting", "Downloading", "Training", "Interrupted", "Restarting", "Downloading", "Training", "Uploading",
        "Completed",
    ]  # fmt: skip
    assert [entry["Outcome"] for entry in value["Estiba"]["Attempts"]] == ["Interrupted", "Completed"]
    assert value["Estiba"]["Attempts"][0]["ExitCodes"] == {"algo-1": 143}
    assert sum("attempt 2 on algo-1" in line for line in log) == 1
    # Deletes were carried out: of all at-* files only the last is left.
    assert sorted(path.name for path in (place.tmp / "checkpoints").iterdir()) == ["at-20", "step"]


def test_a_kill_without_notice_keeps_only_what_was_synced(place):
    name = place.start(STEPS, options={"sync_every_s": 1.0, "stop_grace_s": 5}, **HELD)
    place.wait_for(name, "step=8")
    jobs.interrupt(name, Fault(notice=False))
    value = jobs.wait(name, 60).to_json()
    log = list(jobs.log_lines(name, follow=False))
    assert value["TrainingJobStatus"] == "Completed", log
    assert not [line for line in log if line.startswith("term at")]
    resumed = int(
        next(line for line in log if line.startswith("from ") and "from 0" not in line).split()[1].rstrip(",")
    )
    assert resumed > 0
    assert value["Estiba"]["Attempts"][0]["ExitCodes"] == {"algo-1": 137}


def test_without_spot_a_lost_host_is_the_end(place):
    changes = {"EnableManagedSpotTraining": False, "StoppingCondition": {"MaxRuntimeInSeconds": 60}}
    name = place.start(STEPS, **HELD, **changes)
    place.wait_for(name, "step=2")
    jobs.interrupt(name, Fault(notice=False))
    value = jobs.wait(name, 60).to_json()
    assert value["TrainingJobStatus"] == "Failed"
    assert "host was lost" in value["FailureReason"]


def test_stop_is_term_and_keeps_the_model(place):
    name = place.start(STEPS, **HELD)
    place.wait_for(name, "step=2")
    jobs.stop(name)
    value = jobs.wait(name, 30).to_json()
    log = list(jobs.log_lines(name, follow=False))
    assert value["TrainingJobStatus"] == "Stopped"
    assert any(line.startswith("term at") for line in log)
    assert statuses(value)[-3:] == ["Stopping", "Uploading", "Stopped"]
    assert "ModelArtifacts" in value
    with pytest.raises(LaunchError, match="has already ended"):
        jobs.stop(name)


def test_a_job_that_ignores_term_is_killed_after_the_grace(place):
    name = place.start("trap '' TERM; echo ready; while true; do sleep 0.1; done", options={"stop_grace_s": 1})
    place.wait_for(name, "ready")
    started = time.monotonic()
    jobs.stop(name)
    value = jobs.wait(name, 30).to_json()
    assert value["TrainingJobStatus"] == "Stopped"
    assert value["Estiba"]["Attempts"][0]["ExitCodes"] == {"algo-1": 137}
    assert 1 <= time.monotonic() - started < 15


def test_max_runtime_stops_the_job_and_is_shared_by_its_attempts(place):
    name = place.start(STEPS, StoppingCondition={"MaxRuntimeInSeconds": 5, "MaxWaitTimeInSeconds": 100},
                       Environment={"LAST": "1000"})  # fmt: skip
    place.wait_for(name, "step=8")
    jobs.interrupt(name, Fault(grace_s=5))
    value = jobs.wait(name, 60).to_json()
    assert value["SecondaryStatus"] == "MaxRuntimeExceeded"
    assert value["TrainingJobStatus"] == "Stopped"
    assert len(value["Estiba"]["Attempts"]) == 2
    assert 5 <= value["TrainingTimeInSeconds"] <= 9


def test_max_wait_counts_the_waiting_for_capacity(place):
    name = place.start(STEPS, StoppingCondition={"MaxRuntimeInSeconds": 4, "MaxWaitTimeInSeconds": 6},
                       Environment={"LAST": "1000"})  # fmt: skip
    place.wait_for(name, "step=2")
    jobs.interrupt(name, Fault(grace_s=5, capacity_wait_s=600))
    value = jobs.wait(name, 30).to_json()
    assert value["SecondaryStatus"] == "MaxWaitTimeExceeded"


FAILS_LATE = "echo step=3; sleep 4; exit 5"

CLUSTER = """
python - <<'PY'
import json, socket, time
config = json.load(open("/opt/ml/input/config/resourceconfig.json"))
assert config["network_interface_name"] in [name for _, name in socket.if_nameindex()], socket.if_nameindex()
me, hosts = config["current_host"], config["hosts"]
server = socket.create_server(("0.0.0.0", 5000))
for peer in hosts:
    for _ in range(100):
        try:
            socket.create_connection((peer, 5000), 1).close()
            break
        except OSError:
            time.sleep(0.1)
    else:
        raise SystemExit(f"{me}: no {peer}")
import os
print(me, "of", hosts, "sees all; share:", sorted(os.listdir("/opt/ml/input/data/data")), flush=True)
open(f"/opt/ml/checkpoints/rank-{me}", "w").write(me)
open(f"/opt/ml/model/{me}.bin", "w").write(me)
time.sleep(1)
PY
"""


def test_hosts_of_a_cluster_reach_each_other_by_name_and_share_the_data(place):
    for number in range(5):
        (place.tmp / "data" / f"part-{number}").write_text("x")
    request_changes = {
        "ResourceConfig": {"InstanceType": "ml.g4dn.xlarge", "InstanceCount": 2, "VolumeSizeInGB": 1},
        "EnableNetworkIsolation": True,
    }
    request = place.request("", **request_changes)
    channels = request["InputDataConfig"]
    channels[1]["DataSource"]["S3DataSource"]["S3DataDistributionType"] = "ShardedByS3Key"
    value = place.run(CLUSTER, **request_changes, InputDataConfig=channels)
    text = "\n".join(value["log"])
    assert value["TrainingJobStatus"] == "Completed", text
    assert "[algo-1] algo-1 of ['algo-1', 'algo-2'] sees all; share: ['a.txt', 'part-1', 'part-3', 'sub']" in text
    assert "[algo-2] algo-2 of ['algo-1', 'algo-2'] sees all; share: ['part-0', 'part-2', 'part-4']" in text
    assert sorted(path.name for path in (place.tmp / "checkpoints").iterdir()) == ["rank-algo-1", "rank-algo-2"]
    assert jobs.download(value["TrainingJobName"], place.tmp / "got")["model"] == 2


def test_one_failing_host_ends_the_others(place):
    script = """
    if [ "$(hostname)" = algo-2 ]; then echo "no GPU" > /opt/ml/output/failure; exit 1; fi
    trap "exit 143" TERM; while true; do sleep 0.1; done
    """
    resources = {"InstanceType": "ml.g4dn.xlarge", "InstanceCount": 2, "VolumeSizeInGB": 1}
    value = place.run(script, ResourceConfig=resources)
    assert value["FailureReason"] == "no GPU"
    assert value["Estiba"]["Attempts"][0]["ExitCodes"] == {"algo-1": 143, "algo-2": 1}


@pytest.mark.parametrize("isolated", [True, False])
def test_only_an_isolated_job_has_no_way_out(place, isolated):
    # The second column of a route is its destination; 00000000 is the default route.
    script = """getent hosts algo-1 > /dev/null && echo "finds itself"; cut -f2 /proc/net/route | tail -n +2"""
    value = place.run(script, EnableNetworkIsolation=isolated)
    assert "finds itself" in value["log"]
    assert ("00000000" in value["log"]) is not isolated


def test_a_supervisor_that_is_killed_leaves_a_job_that_says_so_and_can_be_taken_over(place):
    name = place.start(STEPS, Environment={"LAST": "40"})
    place.wait_for(name, "step=3")
    os.kill(int((state.job_dir(name) / control.LOCK).read_text()), signal.SIGKILL)
    until = time.monotonic() + 5
    while control.supervised(state.job_dir(name)) and time.monotonic() < until:
        time.sleep(0.05)
    assert jobs.status(name).is_orphaned
    time.sleep(1)
    assert jobs.resume(name)
    value = jobs.wait(name, 60).to_json()
    log = list(jobs.log_lines(name, follow=False))
    assert value["TrainingJobStatus"] == "Completed", log
    # The container never noticed: one attempt, every line once.
    assert len(value["Estiba"]["Attempts"]) == 1
    assert [line for line in log if line.startswith("step=")] == [f"step={n}" for n in range(1, 41)]
    assert sorted(path.name for path in (place.tmp / "checkpoints").iterdir()) == ["at-40", "step"]


def test_a_machine_that_restarts_is_an_interruption_and_a_failure_meanwhile_is_a_failure(place):
    for script, outcomes in ((STEPS, ["HostLost", "Completed"]), (FAILS_LATE, ["Failed"])):
        changes = {"CheckpointConfig": {"S3Uri": f"file://{place.tmp}/c-{len(outcomes)}"}}
        name = place.start(script, **HELD, **changes)
        place.wait_for(name, "step=3")
        os.kill(int((state.job_dir(name) / control.LOCK).read_text()), signal.SIGKILL)
        container = running(name, 1)
        if script is STEPS:
            container.kill()
        container.wait()
        assert jobs.status(name).is_orphaned
        assert jobs.resume(name)
        value = jobs.wait(name, 60).to_json()
        assert [entry["Outcome"] for entry in value["Estiba"]["Attempts"]] == outcomes, value


def test_a_store_that_is_away_at_the_end_is_waited_for(place):
    store = place.tmp / "checkpoints"
    name = place.start(STEPS, Environment={"LAST": "15"}, options={"sync_every_s": 0.2})
    place.wait_for(name, "step=2")
    away = place.tmp / "away"
    store.rename(away)
    # A file where the directory was: nothing can be written there, whoever one is.
    store.write_text("")
    place.wait_for(name, "last sync of algo-1 failed")
    store.unlink()
    away.rename(store)
    value = jobs.wait(name, 60).to_json()
    assert value["TrainingJobStatus"] == "Completed"
    assert (store / "step").read_text() == "15\n"


class Wire:
    """A socket to the engine that can be cut and mended, as if the daemon died and came back."""

    cut_now: ClassVar[list[Wire]] = []
    """A test that fails may leave one behind."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.open: list[socket.socket] = []
        self.listener: socket.socket | None = None
        self.mend()

    def mend(self) -> None:
        if self in Wire.cut_now:
            Wire.cut_now.remove(self)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(self.path))
        self.listener.listen(64)
        threading.Thread(target=self._accept, args=(self.listener,), daemon=True).start()

    def cut(self) -> None:
        Wire.cut_now.append(self)
        assert self.listener is not None
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.path.unlink()
        for one in self.open:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        self.open.clear()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.socket(socket.AF_UNIX)
                far.connect("/var/run/docker.sock")
                self.open += [near, far]
                for a, b in ((near, far), (far, near)):
                    threading.Thread(target=self._copy, args=(a, b), daemon=True).start()

    @staticmethod
    def _copy(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


def running(name: str, attempt: int) -> Any:
    """The container of one attempt, once it runs."""
    labels = [f"estiba.job={name}", f"estiba.attempt={attempt}"]
    for _ in range(150):
        found = docker.from_env().containers.list(filters={"label": labels})
        if found:
            return found[0]
        time.sleep(0.2)
    raise AssertionError(f"attempt {attempt} of {name} did not start")


@pytest.fixture
def wire():
    if "DOCKER_HOST" in os.environ or not Path("/var/run/docker.sock").is_socket():
        pytest.skip("the engine is not at /var/run/docker.sock, so its connection cannot be cut here")
    # Socket paths are limited to 108 bytes, and pytest's are long.
    folder = Path(tempfile.mkdtemp(prefix="estiba-"))
    wire = Wire(folder / "docker.sock")
    yield wire
    # Torn down after `place`, whose jobs still talk through it.
    shutil.rmtree(folder)


def test_a_job_runs_on_the_engine_of_the_docker_context_that_started_it(wire, place, monkeypatch, tmp_path):
    config = tmp_path / "docker"
    folder = config / "contexts/meta" / hashlib.sha256(b"wired").hexdigest()
    folder.mkdir(parents=True)
    endpoints = {"docker": {"Host": f"unix://{wire.path}"}}
    (folder / "meta.json").write_text(json.dumps({"Name": "wired", "Metadata": {}, "Endpoints": endpoints}))
    with monkeypatch.context() as chosen:
        chosen.setenv("DOCKER_CONFIG", str(config))
        chosen.setenv("DOCKER_CONTEXT", "wired")
        name = place.start(STEPS, Environment={"LAST": "20"})
    place.wait_for(name, "step=2")
    # The supervisor that takes over is started where another context is the current one.
    os.kill(int((state.job_dir(name) / control.LOCK).read_text()), signal.SIGKILL)
    until = time.monotonic() + 5
    while control.supervised(state.job_dir(name)) and time.monotonic() < until:
        time.sleep(0.05)
    wire.open.clear()
    assert jobs.resume(name)
    assert jobs.wait(name, 60).status == "Completed"
    assert wire.open


def test_an_engine_that_goes_away_and_comes_back_costs_nothing(wire, place, monkeypatch):
    monkeypatch.setenv("DOCKER_HOST", f"unix://{wire.path}")
    name = place.start(STEPS, Environment={"LAST": "30"})
    monkeypatch.delenv("DOCKER_HOST")
    place.wait_for(name, "step=4")
    wire.cut()
    place.wait_for(name, "no docker engine")
    time.sleep(2)
    assert jobs.status(name).to_json()["SecondaryStatus"] == "Training"
    wire.mend()
    value = jobs.wait(name, 60).to_json()
    log = list(jobs.log_lines(name, follow=False))
    assert value["TrainingJobStatus"] == "Completed", log
    assert len(value["Estiba"]["Attempts"]) == 1
    assert [line for line in log if line.startswith("step=")] == [f"step={n}" for n in range(1, 31)]


def test_an_engine_that_takes_the_containers_with_it_is_an_interruption(wire, place, monkeypatch):
    monkeypatch.setenv("DOCKER_HOST", f"unix://{wire.path}")
    name = place.start(STEPS, **HELD)
    monkeypatch.delenv("DOCKER_HOST")
    place.wait_for(name, "step=5")
    wire.cut()
    place.wait_for(name, "no docker engine")
    running(name, 1).kill()
    wire.mend()
    value = jobs.wait(name, 60).to_json()
    log = list(jobs.log_lines(name, follow=False))
    assert value["TrainingJobStatus"] == "Completed", log
    assert [entry["Outcome"] for entry in value["Estiba"]["Attempts"]] == ["HostLost", "Completed"]
    resumed = [line for line in log if line.startswith("from ")][1]
    assert int(resumed.split()[1].rstrip(",")) >= 5


def test_a_host_error_is_retried_as_often_as_the_retry_strategy_says(wire, place, monkeypatch):
    monkeypatch.setenv("DOCKER_HOST", f"unix://{wire.path}")
    changes = {
        "EnableManagedSpotTraining": False,
        "StoppingCondition": {"MaxRuntimeInSeconds": 60},
        "RetryStrategy": {"MaximumRetryAttempts": 1},
    }
    name = place.start(STEPS, Environment={"LAST": "1000"}, **changes)
    monkeypatch.delenv("DOCKER_HOST")
    for attempt in (1, 2):
        container = running(name, attempt)
        # Past the start, which a cut would also count as lost, but without a container to kill.
        place.wait_for(name, "step=1")
        wire.cut()
        time.sleep(1)
        container.kill()
        wire.mend()
    value = jobs.wait(name, 60).to_json()
    assert [entry["Outcome"] for entry in value["Estiba"]["Attempts"]] == ["HostLost", "HostLost"]
    assert value["FailureReason"].startswith("InternalServerError: the docker engine died")


def test_the_log_can_be_followed_from_another_process_until_the_end(place):
    name = place.start("for i in 1 2 3; do echo line $i; sleep 0.3; done; printf 'no newline'")
    lines = list(jobs.log_lines(name, follow=True))
    assert [line for line in lines if line.startswith(("line", "no"))] == ["line 1", "line 2", "line 3", "no newline"]
    assert lines[0].startswith("--- attempt 1 on algo-1")
    assert lines[-1].startswith("--- Completed")


def test_what_cannot_start_is_refused_before_anything_is_kept(place):
    image = {"TrainingImage": "estiba/nowhere:1", "TrainingInputMode": "File"}
    source = {"S3DataSource": {"S3DataType": "S3Prefix", "S3Uri": "file:///nowhere/x"}}
    for changes, says in (
        ({"AlgorithmSpecification": image}, "make build"),
        ({"InputDataConfig": [{"ChannelName": "x", "DataSource": source}]}, "nothing at file:///nowhere/x"),
    ):
        with pytest.raises(LaunchError, match=says):
            place.start("true", **changes)
    assert state.job_names() == []


def test_a_second_job_of_the_same_name_is_refused(place):
    name = place.start("true")
    jobs.wait(name, 60)
    with pytest.raises(LaunchError, match="known already"):
        place.start("true", TrainingJobName=name)


def test_an_entrypoint_that_does_not_exist_fails_the_job_with_its_name(place):
    spec = {"TrainingImage": IMAGE, "TrainingInputMode": "File", "ContainerEntrypoint": ["/no/such/program"]}
    value = place.run("", AlgorithmSpecification=spec)
    assert value["TrainingJobStatus"] == "Failed"
    assert value["FailureReason"].startswith("ClientError")
    assert "/no/such/program" in value["FailureReason"]


def test_files_of_root_can_be_handed_over(place, tmp_path):
    folder = tmp_path / "owned"
    folder.mkdir()
    (folder / "f").write_text("x")
    Engine().change_owner(folder, IMAGE, "12345:12345")
    assert (folder / "f").stat().st_uid == 12345


def test_tokens_from_an_env_file_reach_the_container_and_are_never_stored(place):
    secret = "hf_" + "not" * 8
    (place.tmp / "tokens").write_text(f"HF_TOKEN='{secret}'\n")
    value = place.run('echo "length ${#HF_TOKEN}"', options={"host": HostOptions(env_file=str(place.tmp / "tokens"))})
    assert f"length {len(secret)}" in value["log"]
    found = subprocess.run(
        ["grep", "-rl", secret, str(place.tmp / "state")], capture_output=True, text=True, check=False
    )
    assert found.stdout == ""
    assert secret not in json.dumps(value)


def test_two_jobs_run_beside_each_other(place):
    names = [
        place.start(STEPS, Environment={"LAST": "5"}, CheckpointConfig={"S3Uri": f"file://{place.tmp}/c{n}"})
        for n in (1, 2)
    ]
    threads = [threading.Thread(target=jobs.wait, args=(name, 60)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {jobs.status(name).to_json()["TrainingJobStatus"] for name in names} == {"Completed"}


def estiba(*words: str, **settings: Any) -> subprocess.Popen[str]:
    """The command as a process of its own, off a terminal."""
    package = Path(jobs.__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": str(package)}
    return subprocess.Popen(
        [sys.executable, "-m", "estiba_launch.cli.app", *words],
        env=env, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **settings,
    )  # fmt: skip


def write_job(place: Place, script: str, **changes: Any) -> str:
    path = place.tmp / "job.yaml"
    path.write_text(json.dumps(place.request(script, **changes)))
    return str(path)


def test_run_follows_to_the_end_and_says_what_comes_next(place):
    process = estiba("run", write_job(place, SHOW), "--yes", "--shm-size", "1g")
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "hola" in out
    assert "Completed" in err
    (name,) = state.job_names()
    assert f"estiba fetch {name}" in err
    listed, _ = estiba("list").communicate()
    assert listed.split()[:2] == [name, "Completed"]
    shown, _ = estiba("status", "--json").communicate()
    assert json.loads(shown)["SecondaryStatusTransitions"][-1]["Status"] == "Completed"
    got, _ = estiba("fetch", "--into", str(place.tmp / "got"), "--json").communicate()
    assert json.loads(got)["model"]["files"] == 2
    cost, _ = estiba("cost", "--json").communicate()
    assert json.loads(cost)["sagemaker_usd"] == pytest.approx(json.loads(cost)["billable_s"] * 0.7364 / 3600)


def test_run_of_a_failing_job_exits_1_with_its_reason(place):
    process = estiba("run", write_job(place, "exit 9"), "--yes")
    _, err = process.communicate()
    assert process.returncode == 1
    assert "AlgorithmError" in err


def test_run_asks_and_off_a_terminal_refuses(place):
    process = estiba("run", write_job(place, "true"))
    _, err = process.communicate()
    assert process.returncode == 2
    assert "--yes" in err
    assert state.job_names() == []


def test_ctrl_c_leaves_the_job_running_and_says_how_to_stop_it(place):
    process = estiba("run", write_job(place, STEPS, Environment={"LAST": "200"}), "--yes")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step=3"):
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 4, err
    (name,) = state.job_names()
    assert f"estiba stop {name}" in err
    assert not jobs.status(name).is_terminal
    stopped = estiba("stop", "--wait")
    _, err = stopped.communicate()
    assert stopped.returncode == 0
    assert "Stopped" in err
    assert jobs.status(name).to_json()["TrainingJobStatus"] == "Stopped"
    again = estiba("stop", name)
    again.communicate()
    assert again.returncode == 2


def test_interrupt_and_logs_work_from_another_process(place):
    process = estiba("run", write_job(place, STEPS, **HELD), "--yes", "--detach", "--sync-every-s", "0.2")
    out, _ = process.communicate()
    name = out.strip()
    place.wait_for(name, "step=3")
    estiba("interrupt", name, "--grace-s", "5").communicate()
    followed, _ = estiba("logs", "-f").communicate()
    assert "spot interruption of all hosts" in followed
    assert "attempt 2 on algo-1" in followed
    assert "step=20" in followed


@pytest.mark.parametrize("signals", [(signal.SIGTERM,), (signal.SIGINT,) * 5])
def test_a_term_or_several_signals_leave_the_job_running_and_end_with_4(place, signals):
    process = estiba("run", write_job(place, STEPS, Environment={"LAST": "200"}), "--yes")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step=3"):
            break
    for signum in signals:
        process.send_signal(signum)
    _, err = process.communicate()
    (name,) = state.job_names()
    assert process.returncode == 4, err
    assert "Traceback" not in err
    if len(signals) == 1:
        assert f"{name}: still running\n  estiba logs -f {name}\n  estiba stop {name}" in err
    assert not jobs.status(name).is_terminal


def test_a_run_whose_reader_leaves_says_that_the_job_goes_on(place):
    process = estiba("run", write_job(place, STEPS, Environment={"LAST": "200"}), "--yes")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert (process.wait(timeout=30), "still running" in process.stderr.read()) == (4, True)


def test_a_line_that_the_engine_cuts_is_whole_and_a_progress_bar_is_seen_before_its_newline(place):
    script = """
    head -c 40000 /dev/zero | tr '\\0' x; echo
    echo after
    trap 'echo; exit 0' TERM
    for i in $(seq 600); do printf '\\r%d of 600' $i; sleep 0.1; done
    """
    name = place.start(script)
    place.wait_for(name, " of 600")
    lines = list(jobs.log_lines(name, follow=False))
    assert [line for line in lines if not line.startswith("---")][:2] == ["x" * 40000, "after"]
    jobs.stop(name)
    assert jobs.wait(name, 60).status == "Stopped"
    last = [line for line in jobs.log_lines(name, follow=False) if " of 600" in line][-1]
    assert "\r" not in last
