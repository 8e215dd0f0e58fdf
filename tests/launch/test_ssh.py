"""The ssh target against a real sshd on this machine, with keys of its own; the box shares this machine's engine."""

from __future__ import annotations

import getpass
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docker
import pytest
from typer.testing import CliRunner

from estiba_launch import jobfile, state
from estiba_launch.cli import app
from estiba_launch.errors import HostError, LaunchError
from estiba_launch.scripts import HostOptions
from estiba_launch.ssh import jobs, ship
from estiba_launch.ssh.box import Box, BoxGone
from estiba_launch.target import Target

IMAGE = os.environ.get("ESTIBA_TEST_IMAGE", "estiba/base:local")
SSHD = shutil.which("sshd") or "/usr/sbin/sshd"


def _why_not() -> str | None:
    if not Path(SSHD).exists():
        return "no sshd; apt install openssh-server"
    for tool in ("ssh", "ssh-keygen", "rsync"):
        if not shutil.which(tool):
            return f"no {tool}; apt install openssh-client rsync"
    if os.getuid() != 0 and not Path("/run/sshd").exists():
        return "sshd wants /run/sshd, which only root can make"
    try:
        docker.from_env(timeout=10).images.get(IMAGE)
    except docker.errors.ImageNotFound:
        return f"no image {IMAGE}; run `make base`"
    except Exception as error:
        return f"no docker engine ({error}); run `make engine`"
    return None


WHY_NOT = _why_not()
pytestmark = [pytest.mark.docker, pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))]


@dataclass
class Server:
    """A running sshd, and how to get in."""

    port: int
    folder: Path
    home: Path
    """The box's home directory: apart from the tester's own."""
    process: subprocess.Popen[bytes] | None = None

    @property
    def target(self) -> str:
        return f"ssh://{getpass.getuser()}@127.0.0.1:{self.port}"

    def start(self) -> None:
        self.process = subprocess.Popen(
            [SSHD, "-D", "-e", "-f", str(self.folder / "sshd_config")], stderr=subprocess.DEVNULL
        )
        until = time.monotonic() + 10
        while time.monotonic() < until:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                time.sleep(0.05)
        raise AssertionError("sshd does not listen")

    def stop(self) -> None:
        if self.process:
            self.process.terminate()
            self.process.wait(10)


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("sshd")
    home = folder / "home"
    home.mkdir()
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
    shutil.copy(folder / "user.pub", folder / "authorized_keys")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    Path("/run/sshd").mkdir(exist_ok=True)
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/authorized_keys\n"
        "StrictModes no\nPasswordAuthentication no\nUsePAM no\nPermitRootLogin yes\n"
        f"PidFile {folder}/pid\n"
        # Each command gets a home of its own, so that nothing is written into the tester's.
        f'ForceCommand export HOME={home}; cd {home}; exec sh -c "$SSH_ORIGINAL_COMMAND"\n'
    )
    public = (folder / "host.pub").read_text()
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {public}")
    one = Server(port=port, folder=folder, home=home)
    one.start()
    yield one
    one.stop()


@pytest.fixture
def box(server: Server, tmp_path, monkeypatch) -> Iterator[Server]:
    """The server, with this test's own state and ssh settings; nothing of its jobs is left behind."""
    words = [
        "ssh",
        "-F",
        "none",
        "-i",
        str(server.folder / "user"),
        "-o",
        f"UserKnownHostsFile={server.folder}/known_hosts",
    ]
    monkeypatch.setenv("ESTIBA_SSH", shlex.join([*words, "-o", "StrictHostKeyChecking=yes"]))
    monkeypatch.setenv("ESTIBA_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    yield server
    client = docker.from_env()
    for container in client.containers.list(all=True, filters={"name": prefix(tmp_path)}):
        container.remove(force=True)
    for network in client.networks.list(names=[prefix(tmp_path)]):
        network.remove()
    subprocess.run(
        [*shlex.split(os.environ["ESTIBA_SSH"]), "-p", str(server.port), *_exit(server)],
        check=False,
        capture_output=True,
    )


def prefix(tmp_path: Path) -> str:
    """What the names of one test's jobs begin with."""
    return "t-" + tmp_path.name[-20:].replace("_", "-").strip("-")


def _exit(server: Server) -> list[str]:
    words = Box(Target.parse(server.target)).words()
    return [*words[words.index("-o") :], "-O", "exit", "127.0.0.1"]


class Work:
    """One test's job: a shell script that comes through a channel."""

    def __init__(self, tmp_path: Path, server: Server) -> None:
        self.tmp, self.server, self.count = tmp_path, server, 0
        for name in ("data/sub", "code", "checkpoints"):
            (tmp_path / name).mkdir(parents=True)
        (tmp_path / "data/a.txt").write_text("hola\n")
        (tmp_path / "data/sub/b c.txt").write_text("mundo\n")

    def request(self, script: str, **changes: Any) -> dict[str, Any]:
        self.count += 1
        (self.tmp / "code/run.sh").write_text(script)

        def channel(name: str, **more: Any) -> dict[str, Any]:
            source = {"S3DataType": "S3Prefix", "S3Uri": f"file://{self.tmp}/{name}", **more}
            return {"ChannelName": name, "DataSource": {"S3DataSource": source}}

        return {
            "TrainingJobName": f"{prefix(self.tmp)}-{self.count}-{os.getpid()}",
            "AlgorithmSpecification": {
                "TrainingImage": IMAGE,
                "TrainingInputMode": "File",
                "ContainerEntrypoint": ["sh", "/opt/ml/input/data/code/run.sh"],
                "MetricDefinitions": [{"Name": "loss", "Regex": "loss=([0-9.]+)"}],
            },
            "HyperParameters": {"model": "it's $HOME"},
            "Environment": {"COLOUR": "blue green"},
            "InputDataConfig": [channel("code"), channel("data", S3DataDistributionType="ShardedByS3Key")],
            "OutputDataConfig": {"S3OutputPath": f"file://{self.tmp}/out"},
            "ResourceConfig": {"InstanceType": "ml.g4dn.xlarge", "InstanceCount": 1, "VolumeSizeInGB": 1},
            "StoppingCondition": {"MaxRuntimeInSeconds": 60, "MaxWaitTimeInSeconds": 100},
            "EnableManagedSpotTraining": True,
            "CheckpointConfig": {"S3Uri": f"file://{self.tmp}/checkpoints"},
            **changes,
        }

    def start(self, script: str, options: HostOptions | None = None, **changes: Any) -> str:
        job = jobfile.check(self.tmp / "job.yaml", self.request(script, **changes), Target.parse(self.server.target))
        self.said: list[str] = []
        return jobs.start(job, options or HostOptions(gpus="all", gpus_if_any=True), self.said.append).name

    def run(self, script: str, **changes: Any) -> dict[str, Any]:
        name = self.start(script, **changes)
        jobs.wait(name, 60)
        lines = list(jobs.log_lines(name, follow=False))
        return {**jobs.describe(name), "log": lines}

    def wait_for(self, name: str, text: str) -> None:
        until = time.monotonic() + 30
        while time.monotonic() < until:
            if any(text in line for line in jobs.log_lines(name, follow=False)):
                return
            time.sleep(0.2)
        raise AssertionError(text)


@pytest.fixture
def work(box: Server, tmp_path) -> Work:
    return Work(tmp_path, box)


def test_a_job_sees_its_contract_and_its_files_come_back(work, box, tmp_path):
    (tmp_path / "checkpoints/old").write_text("5")
    value = work.run(
        "cd /opt/ml; cat input/config/hyperparameters.json; cat input/data/data/a.txt 'input/data/data/sub/b c.txt'\n"
        "echo colour=$COLOUR host=$(hostname) job=$TRAINING_JOB_NAME old=$(cat checkpoints/old) loss=0.25\n"
        "touch input/data/data/x 2>/dev/null || echo read-only; echo 6 > checkpoints/new\n"
        "mkdir -p model/deep; echo weights > model/deep/w; echo result > output/data/r\n"
        "umask 077; echo s > output/data/s\n"
    )
    name = value["TrainingJobName"]
    log = "\n".join(value["log"])
    assert value["TrainingJobStatus"] == "Completed", (value, log)
    assert "it's $HOME" in log and "hola" in log and "mundo" in log
    assert f"colour=blue green host=algo-1 job={name} old=5" in log
    assert "read-only" in log
    assert [(m["MetricName"], m["Value"]) for m in value["FinalMetricDataList"]] == [("loss", 0.25)]
    assert jobs.fetch(name, tmp_path / "got") == {"model": 1, "output": 2}
    assert (tmp_path / "got/model/deep/w").read_text() == "weights\n"
    assert (tmp_path / "got/output/s").read_text() == "s\n"
    assert (tmp_path / "checkpoints/new").read_text() == "6\n"
    assert (state.job_dir(name) / "job.log").read_text().splitlines() == value["log"]


def test_the_command_runs_follows_and_fetches_with_the_same_line_as_elsewhere(work, box, tmp_path):
    request = work.request("echo uno; sleep 1; echo dos; echo out > /opt/ml/output/data/o")
    name = request["TrainingJobName"]
    (tmp_path / "job.yaml").write_text(json.dumps(request))
    done = CliRunner().invoke(app, ["run", "job.yaml", "--target", box.target, "--yes"])
    assert done.exit_code == 0, done.stderr
    assert done.stdout.splitlines() == ["uno", "dos"]
    assert f"estiba fetch {name}" in done.stderr
    assert "Completed" in CliRunner().invoke(app, ["status", name]).stdout
    assert name in CliRunner().invoke(app, ["list"]).stdout
    assert CliRunner().invoke(app, ["logs", name]).stdout.splitlines() == ["uno", "dos"]
    assert CliRunner().invoke(app, ["fetch", name, "--into", "got"]).exit_code == 0
    assert (tmp_path / "got/output/o").read_text() == "out\n"


def test_a_job_that_fails_says_why_and_exits_1(work, box, tmp_path):
    request = work.request("echo 'no column texto' > /opt/ml/output/failure; exit 3")
    (tmp_path / "job.yaml").write_text(json.dumps(request))
    done = CliRunner().invoke(app, ["run", "job.yaml", "--target", box.target, "--yes"])
    assert done.exit_code == 1, done.stderr
    assert "no column texto" in done.stderr


def test_stop_sends_term_and_what_the_job_saves_then_is_there(work, tmp_path):
    name = work.start(
        "trap 'echo saved > /opt/ml/model/m; echo bye; exit 0' TERM; echo up; while :; do sleep 0.1; done"
    )
    work.wait_for(name, "up")
    jobs.stop(name)
    value = jobs.wait(name, 30)
    assert (value["TrainingJobStatus"], value["SecondaryStatus"]) == ("Stopped", "Stopped")
    assert "bye" in list(jobs.log_lines(name, follow=False))
    jobs.fetch(name, tmp_path / "got")
    assert (tmp_path / "got/model/m").read_text() == "saved\n"
    with pytest.raises(LaunchError, match="over already"):
        jobs.stop(name)


def test_the_box_itself_ends_a_job_at_its_time_limit(work):
    value = work.run(
        "trap 'exit 0' TERM; while :; do sleep 0.1; done",
        StoppingCondition={"MaxRuntimeInSeconds": 3, "MaxWaitTimeInSeconds": 9},
    )
    assert (value["TrainingJobStatus"], value["SecondaryStatus"]) == ("Stopped", "MaxRuntimeExceeded")


def test_hosts_of_one_box_find_each_other_and_get_their_share(work, tmp_path):
    value = work.run(
        "until getent hosts algo-2 >/dev/null; do sleep 0.1; done\n"
        "echo $(hostname) sees $(getent hosts algo-2 | wc -l) and $(find /opt/ml/input/data/data -type f)\n"
        "echo $(hostname) > /opt/ml/model/$(hostname); echo $(hostname) > /opt/ml/model/both",
        ResourceConfig={"InstanceType": "ml.g4dn.xlarge", "InstanceCount": 2, "VolumeSizeInGB": 1},
    )
    assert value["TrainingJobStatus"] == "Completed", value
    log = sorted(value["log"])
    assert log == [
        "[algo-1] algo-1 sees 1 and /opt/ml/input/data/data/a.txt",
        "[algo-2] algo-2 sees 1 and /opt/ml/input/data/data/sub/b c.txt",
    ]
    assert jobs.fetch(value["TrainingJobName"], tmp_path / "got")["model"] == 3
    assert (tmp_path / "got/model/both").read_text() == "algo-1\n"


def test_a_second_job_sends_only_what_changed_and_the_first_keeps_its_own(work, box):
    first = work.run("cat /opt/ml/input/data/data/a.txt")
    (work.tmp / "data/a.txt").write_text("otra\n")
    second = work.run("cat /opt/ml/input/data/data/a.txt")
    assert (first["log"], second["log"]) == (["hola"], ["otra"])
    files = [box.home / "estiba/jobs" / v["TrainingJobName"] / "data/data" for v in (first, second)]
    assert (files[0] / "a.txt").read_text() == "hola\n"
    unchanged = [(folder / "sub/b c.txt").stat().st_ino for folder in files]
    assert unchanged[0] == unchanged[1]


def test_secrets_reach_the_container_and_stay_nowhere_on_the_box(work, box, tmp_path):
    secret = "s3cr3t-value-of-a-token"
    (tmp_path / "token.env").write_text(f"HUB_TOKEN={secret}\n")
    name = work.start(
        '[ -n "$HUB_TOKEN" ] && echo length=${#HUB_TOKEN}', HostOptions(env_file=str(tmp_path / "token.env"))
    )
    value = jobs.wait(name, 60)
    assert list(jobs.log_lines(name, follow=False)) == [f"length={len(secret)}"], value
    for path in [*box.home.rglob("*"), *state.job_dir(name).rglob("*")]:
        if path.is_file():
            assert secret not in path.read_bytes().decode("utf-8", "replace"), path
    # Docker keeps the environment with the container, so the container is gone.
    assert docker.from_env().containers.list(all=True, filters={"name": name}) == []


def test_an_s3_job_without_credentials_is_refused_before_anything_is_sent(work, box, monkeypatch):
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "none")
    monkeypatch.setenv("AWS_CONFIG_FILE", "none")
    with pytest.raises(LaunchError, match="no AWS credentials"):
        work.start("true", CheckpointConfig={"S3Uri": "s3://bucket/checkpoints"})
    assert state.job_names() == []


def test_an_image_is_streamed_only_when_the_box_has_another(box, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(ship, "stream", lambda *words: said.append(f"streamed {words[1]}"))
    there = Box(Target.parse(box.target))
    ship.image(there, IMAGE, said.append)
    assert said == [f"{IMAGE}: on the box already"]
    monkeypatch.setattr(ship, "remote_image", lambda *_: {"Id": "sha256:other", "RootFS": {"Layers": ["x"]}})
    ship.image(there, IMAGE, said.append)
    assert said[-1] == f"streamed {IMAGE}"


def test_a_streamed_image_arrives_whole(box, tmp_path):
    (tmp_path / "hello").write_bytes(os.urandom(3_000_000))
    client = docker.from_env()
    name = f"estiba-test/stream:{os.getpid()}"
    packed = subprocess.run(["tar", "-C", str(tmp_path), "-c", "hello"], capture_output=True, check=True).stdout
    client.api.import_image_from_data(packed, repository=name.partition(":")[0], tag=name.partition(":")[2])
    expected = client.images.get(name).id
    there, said = Box(Target.parse(box.target)), []
    try:
        archive = subprocess.run(["docker", "save", name], capture_output=True, check=True).stdout

        # The two ends share one engine, so the image is removed and `docker save` gives what it gave before.
        (tmp_path / "image.tar").write_bytes(archive)
        client.images.remove(name)
        fake = tmp_path / "bin/docker"
        fake.parent.mkdir()
        fake.write_text(f"#!/bin/sh\nexec cat {tmp_path}/image.tar\n")
        fake.chmod(0o755)
        old = os.environ["PATH"]
        os.environ["PATH"] = f"{fake.parent}:{old}"
        try:
            ship.stream(there, name, len(archive), said.append)
        finally:
            os.environ["PATH"] = old
        assert client.images.get(name).id == expected
        assert "sending 3 MB" in said[0]
    finally:
        client.images.remove(name)


def test_a_box_that_is_not_there_or_unknown_is_named_with_what_to_try(box, monkeypatch, server):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(BoxGone, match=r"cannot be reached.*refused.*gets in without a question"):
            Box(Target.parse(f"ssh://127.0.0.1:{free.getsockname()[1]}")).run("true")
    monkeypatch.setenv("ESTIBA_SSH", f"ssh -F none -i {server.folder}/user -o UserKnownHostsFile=/dev/null")
    with pytest.raises(BoxGone, match=r"compare the host key"):
        Box(Target.parse(box.target)).run("true")


def test_a_broken_connection_costs_no_line_of_the_log(work, box, server):
    name = work.start("for i in 1 2 3 4 5 6 7 8; do echo line $i; sleep 0.5; done")
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(jobs.log_lines(name, follow=True)))
    reader.start()
    time.sleep(1.5)
    # Every connection to the box dies, and for a second no new one is taken.
    server.stop()
    for pid in _sshd_children(server):
        os.kill(pid, signal.SIGKILL)
    time.sleep(1)
    server.start()
    reader.join(60)
    assert [line for line in lines if line.startswith("line ")] == [f"line {i}" for i in range(1, 9)]
    assert jobs.wait(name, 30)["TrainingJobStatus"] == "Completed"


def _sshd_children(server: Server) -> list[int]:
    """Processes that serve connections to this sshd, found by the local port of their sockets."""
    listed = subprocess.run(
        ["ss", "-Htnp", f"sport = :{server.port}"], capture_output=True, text=True, check=True
    ).stdout
    return sorted({int(part.split(",")[0]) for line in listed.splitlines() for part in line.split("pid=")[1:]})


def test_ctrl_c_leaves_the_job_running_and_says_how_to_stop_it(work, box, tmp_path):
    request = work.request("echo up; sleep 4; echo end")
    (tmp_path / "job.yaml").write_text(json.dumps(request))
    words = [sys.executable, "-m", "estiba_launch.cli", "run", "job.yaml", "--target", box.target, "--yes"]
    env = {**os.environ, "PYTHONPATH": str(Path(jobfile.__file__).parents[1])}
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True
    )
    assert process.stdout
    first = process.stdout.readline()
    assert first == "up\n", process.communicate(timeout=20)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 4, said
    assert f"estiba stop {request['TrainingJobName']}" in said and "Traceback" not in said
    assert jobs.wait(request["TrainingJobName"], 30)["TrainingJobStatus"] == "Completed"


def test_a_gpu_that_is_asked_for_and_not_there_is_refused():
    found = ship.Found(docker=True, gpu=False, gpu_in_docker=False, rsync=True, user_id="0:0", free_bytes=1)
    assert jobs.with_gpus(HostOptions(gpus="all", gpus_if_any=True), found, lambda _: None).gpus is None
    with pytest.raises(LaunchError, match="no GPU"):
        jobs.with_gpus(HostOptions(gpus="1"), found, lambda _: None)


def test_bootstrap_pipes_the_engine_script_to_a_box_without_docker(box, server, monkeypatch):
    """The script itself is tested elsewhere; here a box without docker gets it, and its words are told."""
    assert ship.engine_script().startswith("#!/usr/bin/env bash")
    monkeypatch.setattr(ship, "engine_script", lambda: 'echo "engine: installing for $1"; touch "$HOME/bootstrapped"\n')
    real = ship.look

    def look(box: Box) -> ship.Found:
        found = real(box)
        return ship.Found(**{**vars(found), "docker": (server.home / "bootstrapped").exists()})

    monkeypatch.setattr(ship, "look", look)
    said: list[str] = []
    assert ship.bootstrap(Box(Target.parse(box.target)), said.append, needs_rsync=True).docker
    assert any("installing for engine" in line for line in said)
    monkeypatch.setattr(ship, "engine_script", lambda: "echo 'engine: no sudo'; exit 1\n")
    (server.home / "bootstrapped").unlink()
    with pytest.raises(HostError, match="no sudo"):
        ship.bootstrap(Box(Target.parse(box.target)), said.append, needs_rsync=True)


def test_the_box_itself_moves_s3_data_and_checkpoints(work, box, monkeypatch):
    pytest.importorskip("ministack", reason="the S3 test server is not installed: run `make env`")
    from s3server import s3_server

    gateway = docker.from_env().networks.get("bridge").attrs["IPAM"]["Config"][0]["Gateway"]
    with s3_server(host=gateway) as s3:
        s3.make_bucket("estiba")
        client = s3.client()
        for key, body in (
            ("in/a.txt", b"hola\n"),
            ("in/deep/b.txt", b"mundo\n"),
            ("ck/old", b"5\n"),
            ("ck/gone", b"x"),
        ):
            client.put_object(Bucket="estiba", Key=key, Body=body)
        for name, value in s3.environ.items():
            monkeypatch.setenv(name, value)
        request = work.request(
            "cat /opt/ml/input/data/far/a.txt /opt/ml/input/data/far/deep/b.txt /opt/ml/checkpoints/old\n"
            '[ -n "$AWS_SECRET_ACCESS_KEY" ] && echo has-login\n'
            "echo 6 > /opt/ml/checkpoints/new; rm /opt/ml/checkpoints/gone; sleep 1",
            CheckpointConfig={"S3Uri": "s3://estiba/ck"},
        )
        source = {"S3DataType": "S3Prefix", "S3Uri": "s3://estiba/in"}
        request["InputDataConfig"].append({"ChannelName": "far", "DataSource": {"S3DataSource": source}})
        job = jobfile.check(work.tmp / "job.yaml", request, Target.parse(box.target))
        said: list[str] = []
        name = jobs.start(job, HostOptions(), said.append).name
        value = jobs.wait(name, 90)
        assert value["TrainingJobStatus"] == "Completed", value
        assert list(jobs.log_lines(name, follow=False)) == ["hola", "mundo", "5", "has-login"]
        keys = [entry["Key"] for entry in client.list_objects_v2(Bucket="estiba", Prefix="ck/")["Contents"]]
        assert keys == ["ck/new", "ck/old"]
        secret = s3.environ["AWS_SECRET_ACCESS_KEY"]
        for path in box.home.rglob("*"):
            assert not path.is_file() or secret not in path.read_bytes().decode("utf-8", "replace"), path
        assert docker.from_env().containers.list(all=True, filters={"name": name}) == []
