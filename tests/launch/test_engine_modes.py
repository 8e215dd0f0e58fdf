"""Engines whose root is not the machine's: userns-remap and rootless Docker, started beside this machine's engine."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import docker
import pytest

from estiba_launch.targets.local.owners import Owners
from estiba_launch.targets.ssh.script import ME, USERS

IMAGE = os.environ.get("ESTIBA_TEST_IMAGE", "estiba/base:local")
USER = 1
"""An ordinary user with a name, whom no test of this machine's engine uses."""

PLAIN = {"SecurityOptions": ["name=seccomp,profile=builtin"], "DockerRootDir": "/var/lib/docker"}
REMAPPED = {
    "SecurityOptions": ["name=seccomp,profile=builtin", "name=userns"],
    "DockerRootDir": "/var/lib/docker/231072.231073",
}
ROOTLESS = {
    "SecurityOptions": ["name=seccomp,profile=builtin", "name=rootless", "name=cgroupns"],
    "DockerRootDir": "/srv/u/docker",
}


@pytest.mark.parametrize(
    ("info", "container_root", "user"),
    [
        (PLAIN, None, "1000:100"),
        (REMAPPED, "231072:231073", "1000:100"),
        (ROOTLESS, None, "0:0"),
        ({}, None, "1000:100"),
        ({**PLAIN, "DockerRootDir": "/data/1.2"}, None, "1000:100"),
    ],
)
def test_docker_info_says_who_root_of_a_container_is(info, container_root, user):
    owners = Owners.of(info)
    assert (owners.container_root, owners.user(1000, 100)) == (container_root, user)


@pytest.mark.parametrize(
    ("info", "want"),
    [
        (PLAIN, "me=$(id -u):$(id -g) root= userns="),
        (REMAPPED, "me=$(id -u):$(id -g) root=231072:231073 userns=--userns host"),
        (ROOTLESS, "me=0:0 root= userns="),
    ],
)
def test_the_shell_of_a_remote_host_knows_it_too(info, want, tmp_path):
    fake = tmp_path / "docker"
    fake.write_text(f"#!/bin/sh\necho '[{' '.join(info['SecurityOptions'])}] {info['DockerRootDir']}'\n")
    fake.chmod(0o755)
    text = f'set -eu\nPATH={tmp_path}:$PATH\n{USERS}\n{ME}\necho "me=$me root=$root userns=$userns"; echo "{want}"'
    done = subprocess.run(["sh", "-c", text], capture_output=True, text=True, check=True)
    seen, wanted = done.stdout.splitlines()
    assert seen == wanted


# ---- real engines


@dataclass
class EngineMode:
    url: str
    user: int
    """An ordinary user who may use it."""


def _start(words: list[str], socket: Path, log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as file:
        process = subprocess.Popen(words, stdout=file, stderr=file, start_new_session=True)
    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        done = subprocess.run(["docker", "-H", f"unix://{socket}", "info"], capture_output=True, check=False)
        if done.returncode == 0 and b"Server Version" in done.stdout:
            return process
        time.sleep(0.5)
    _stop(process)
    pytest.skip(f"this engine cannot start here: {log.read_text(errors='replace')[-400:]}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _load(url: str) -> None:
    save = subprocess.Popen(["docker", "save", IMAGE], stdout=subprocess.PIPE)
    subprocess.run(["docker", "-H", url, "load"], stdin=save.stdout, check=True, capture_output=True)
    assert save.wait() == 0


def _needs(*tools: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("an engine of its own needs root")
    for tool in tools:
        if not shutil.which(tool):
            pytest.skip(f"no {tool}")
    try:
        docker.from_env(timeout=10).images.get(IMAGE)
    except Exception as error:
        pytest.skip(f"no image {IMAGE} ({error})")


def _engine(folder: Path, script: str, user: int) -> Iterator[EngineMode]:
    """An engine that `script` starts below `folder`, in a mount namespace where /etc/subuid gives `user` a range."""
    (folder / "subid").write_text(f"{pwd.getpwuid(user).pw_name}:331072:65536\n")
    folder.chmod(0o755)
    prepare = f"for id in subuid subgid; do touch /etc/$id; mount --bind {folder}/subid /etc/$id; done\n"
    words = ["unshare", "--mount", "sh", "-ec", prepare + script]
    socket = folder / "run" / "sock"
    process = _start(words, socket, folder / "log")
    try:
        _load(f"unix://{socket}")
        socket.chmod(0o666)
        yield EngineMode(f"unix://{socket}", user)
    finally:
        _stop(process)
        shutil.rmtree(folder, ignore_errors=True)


DOCKERD = (
    "dockerd --data-root {0}/data --exec-root {0}/run/exec --pidfile {0}/run/pid --host unix://{0}/run/sock "
    "--bridge none --iptables=false --ip-masq=false"
)


@pytest.fixture(scope="module")
def remapped() -> Iterator[EngineMode]:
    _needs("dockerd", "setpriv", "unshare", "ip")
    folder = Path(tempfile.mkdtemp(prefix="estiba-userns-"))
    (folder / "run").mkdir()
    # In a network of its own: in this machine's, `--bridge none` would remove the other engine's docker0.
    alone = f"exec unshare --net sh -c 'ip link set lo up; exec {DOCKERD.format(folder)} --userns-remap={USER}:{USER}'"
    yield from _engine(folder, alone, USER)


@pytest.fixture(scope="module")
def rootless() -> Iterator[EngineMode]:
    _needs("dockerd", "setpriv", "unshare", "rootlesskit", "slirp4netns", "newuidmap")
    folder = Path(tempfile.mkdtemp(prefix="estiba-rootless-"))
    (folder / "run").mkdir(mode=0o711)
    for path in (folder, folder / "run"):
        os.chown(path, USER, USER)
    # Where only root may open the machine's, the engine gets a device of its own.
    tun = f"mknod {folder}/tun c 10 200; chmod 666 {folder}/tun; mount --bind {folder}/tun /dev/net/tun\n"
    user = f"setpriv --reuid={USER} --regid={USER} --clear-groups env HOME={folder} XDG_RUNTIME_DIR={folder}/run"
    kit = "rootlesskit --net=slirp4netns --mtu=65520 --disable-host-loopback --copy-up=/etc --copy-up=/run"
    inner = f"rm -rf /run/docker /run/containerd /run/xtables.lock; exec {DOCKERD.format(folder)} --rootless"
    script = f"{tun}exec {user} {kit} --propagation=rslave --state-dir={folder}/state sh -c '{inner}'"
    yield from _engine(folder, script, USER)


WRITES = """
set -e
umask 077
echo weights > /opt/ml/model/weights
cd /opt/ml/checkpoints
echo secret > private
mkdir closed; echo deep > closed/file
umask 022
echo open > zz-open
chown 1000:1000 zz-open
echo rows > /opt/ml/output/data/rows
sleep 4
"""


def _job(folder: Path, name: str) -> None:
    (folder / "code").mkdir()
    (folder / "code" / "run.sh").write_text(WRITES)
    source = {"S3DataType": "S3Prefix", "S3Uri": f"file://{folder}/code"}
    request = {
        "TrainingJobName": name,
        "AlgorithmSpecification": {
            "TrainingImage": IMAGE,
            "TrainingInputMode": "File",
            "ContainerEntrypoint": ["sh", "/opt/ml/input/data/code/run.sh"],
        },
        "InputDataConfig": [{"ChannelName": "code", "DataSource": {"S3DataSource": source}}],
        "OutputDataConfig": {"S3OutputPath": f"file://{folder}/out"},
        "ResourceConfig": {"InstanceType": "ml.g4dn.xlarge", "InstanceCount": 1, "VolumeSizeInGB": 1},
        "StoppingCondition": {"MaxRuntimeInSeconds": 100},
        "CheckpointConfig": {"S3Uri": f"file://{folder}/checkpoints"},
    }
    (folder / "job.json").write_text(json.dumps(request))


def check_job(mode: EngineMode, uid: int) -> None:
    """A job of user `uid` writes everywhere it may, and all of it arrives as that user's."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _job(folder, f"modes-{os.getpid()}-{uid}")
        for path in (folder, *folder.rglob("*")):
            os.chown(path, uid, uid)
        environment = {**os.environ, "ESTIBA_STATE": f"{folder}/state", "HOME": name, "DOCKER_HOST": mode.url}
        environment["PYTHONPATH"] = os.pathsep.join(sys.path)
        user = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"] if uid else []
        python = sys.executable if not uid else next(filter(Path.exists, [Path("/usr/bin/python3")]), sys.executable)
        words = [
            "-m",
            "estiba_launch.cli.app",
            "run",
            "job.json",
            "--target",
            "local",
            "--yes",
            "--sync-every-s",
            "0.2",
        ]
        done = subprocess.run(
            [*user, str(python), *words], env=environment, capture_output=True, text=True, cwd=folder, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        found = {str(path.relative_to(folder)) for path in (folder / "checkpoints").rglob("*") if path.is_file()}
        assert found == {"checkpoints/private", "checkpoints/closed/file", "checkpoints/zz-open"}
        assert (folder / "checkpoints/private").read_text() == "secret\n"
        assert {path.stat().st_uid for path in (folder / "checkpoints").rglob("*")} == {uid}
        assert "not synced" not in done.stdout + done.stderr, done.stdout + done.stderr
        assert "stay root's" not in done.stdout + done.stderr
        assert sorted(path.name for path in (folder / "out").rglob("*.tar.gz")) == ["model.tar.gz", "output.tar.gz"]
        left = [path for path in (folder / "state/jobs").rglob("*") if path.stat().st_uid != uid]
        assert left == [], "nothing that the user cannot remove"


@pytest.mark.docker
@pytest.mark.slow
@pytest.mark.parametrize("ordinary", [False, True])
def test_a_job_runs_under_userns_remap(remapped, ordinary):
    check_job(remapped, remapped.user if ordinary else 0)


@pytest.mark.docker
@pytest.mark.slow
def test_a_job_runs_on_a_rootless_engine(rootless):
    check_job(rootless, rootless.user)
