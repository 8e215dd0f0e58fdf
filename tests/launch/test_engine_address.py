"""Local jobs run on the engine that `docker` uses, and say early what that engine cannot give."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from estiba_launch.doctor import machine
from estiba_launch.errors import LaunchError
from estiba_launch.jobs import directory
from estiba_launch.request.options import HostOptions, gpus_here, read_options
from estiba_launch.targets.local import target
from estiba_launch.targets.local.engine import Engine, EngineGone
from estiba_launch.targets.local.engine_address import current, pinned


@pytest.fixture(autouse=True)
def docker_config(tmp_path, monkeypatch):
    for name in ("DOCKER_HOST", "DOCKER_CONTEXT", "DOCKER_TLS_VERIFY", "DOCKER_CERT_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    monkeypatch.setenv("ESTIBA_STATE", str(tmp_path / "state"))
    return tmp_path / "docker"


def add_context(config: Path, name: str, url: str) -> None:
    tag = hashlib.sha256(name.encode()).hexdigest()
    folder = config / "contexts/meta" / tag
    folder.mkdir(parents=True)
    endpoints = {"docker": {"Host": url, "SkipTLSVerify": False}}
    (folder / "meta.json").write_text(json.dumps({"Name": name, "Metadata": {}, "Endpoints": endpoints}))


CHOICES = list(itertools.product(["unix:///host.sock", ""], ["", "one", "default"], [None, "two", "default"]))


@pytest.mark.skipif(not shutil.which("docker"), reason="compares with the docker command")
@pytest.mark.parametrize(("host", "context", "config"), CHOICES)
def test_the_engine_is_the_one_of_the_docker_command(host, context, config, docker_config, monkeypatch):
    for name in ("one", "two"):
        add_context(docker_config, name, f"unix:///{name}.sock")
    if config:
        (docker_config / "config.json").write_text(json.dumps({"currentContext": config}))
    monkeypatch.setenv("DOCKER_HOST", host)
    monkeypatch.setenv("DOCKER_CONTEXT", context)
    words = ["docker", "context", "inspect", "--format", "{{.Endpoints.docker.Host}}"]
    shown = subprocess.run(words, capture_output=True, text=True, check=True, env=dict(os.environ)).stdout.strip()
    assert current().url == shown


def test_an_engine_that_does_not_answer_is_named_with_who_chose_it(docker_config, monkeypatch):
    add_context(docker_config, "one", "unix:///nowhere/one.sock")
    (docker_config / "config.json").write_text('{"currentContext": "one"}')
    with pytest.raises(EngineGone, match=r"no docker engine at unix:///nowhere/one\.sock \(context one\)"):
        Engine().ping()


def test_a_context_that_does_not_exist_is_refused_and_not_replaced_by_another_engine(monkeypatch):
    monkeypatch.setenv("DOCKER_CONTEXT", "gone")
    with pytest.raises(LaunchError, match=r"docker context 'gone': not found.*docker context ls"):
        Engine().ping()
    (check,) = machine.docker()
    assert check.status == "fail" and "'gone'" in check.seen and "docker context ls" in check.remedy


def test_an_engine_behind_ssh_is_refused_with_the_target_for_it(docker_config, monkeypatch):
    add_context(docker_config, "far", "ssh://user@203.0.113.7")
    monkeypatch.setenv("DOCKER_CONTEXT", "far")
    with pytest.raises(LaunchError, match=r"--target ssh://user@203\.0\.113\.7"):
        Engine().ping()


def test_doctor_names_the_engine_and_who_chose_it(docker_config, monkeypatch):
    add_context(docker_config, "mine", "unix:///nowhere/mine.sock")
    monkeypatch.setenv("DOCKER_CONTEXT", "mine")
    (check,) = machine.docker()
    assert check.status == "fail" and "unix:///nowhere/mine.sock (context mine)" in check.seen


def test_a_later_supervisor_of_a_job_asks_the_engine_that_started_it(docker_config, tmp_path, monkeypatch):
    add_context(docker_config, "then", "unix:///then.sock")
    monkeypatch.setenv("DOCKER_CONTEXT", "then")
    folder = tmp_path / "state/jobs/job"
    folder.mkdir(parents=True)
    directory.write_json(folder / directory.TARGET, {"target": "local", "engine": pinned()})
    monkeypatch.setenv("DOCKER_CONTEXT", "default")
    monkeypatch.setenv("DOCKER_TLS_VERIFY", "1")
    started: list[dict[str, str]] = []
    monkeypatch.setattr(target.subprocess, "Popen", lambda *_, env, **_more: started.append(env))
    target.supervise(folder)
    assert current(started[0]).url == "unix:///then.sock" and "DOCKER_TLS_VERIFY" not in started[0]


def driver(folder: Path, monkeypatch: pytest.MonkeyPatch, gpus: int | None) -> None:
    """An nvidia-smi that lists this many GPUs, or fails."""
    folder.mkdir(exist_ok=True)
    lines = "\n".join(f"echo 'GPU {index}: NVIDIA T4 (UUID: GPU-{index})'" for index in range(gpus or 0))
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{lines}\nexit {9 if gpus is None else 0}\n")
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


class Client:
    def __init__(self, runtimes: dict[str, Any], devices: list[dict[str, str]]) -> None:
        self._info = {"Runtimes": runtimes, "DiscoveredDevices": devices}

    def info(self) -> dict[str, Any]:
        return self._info


def engine_with(*runtimes: str, devices: tuple[str, ...] = ()) -> Engine:
    engine = Engine()
    engine._client = Client({one: {} for one in runtimes}, [{"ID": one} for one in devices])  # type: ignore[assignment]
    return engine


@pytest.mark.parametrize(
    ("gpus", "there", "runtimes", "says"),
    [
        ("1", 0, ("runc",), r"--gpus 1: this machine has no GPU.*leave the flag out"),
        ("all", None, ("runc", "nvidia"), r"--gpus all: this machine has no GPU"),
        ("4", 2, ("runc", "nvidia"), r"--gpus 4: this machine has 2; pass --gpus 2 or less"),
        ("1", 2, ("runc",), r"--gpus 1: docker cannot give.*make engine.*--gpus none"),
    ],
)
def test_gpus_that_cannot_be_had_are_refused_before_the_start(gpus, there, runtimes, says, tmp_path, monkeypatch):
    driver(tmp_path / "bin", monkeypatch, there)
    with pytest.raises(LaunchError, match=says):
        engine_with(*runtimes).check_gpus(HostOptions(gpus=gpus))


def test_gpus_that_are_there_are_given(tmp_path, monkeypatch):
    driver(tmp_path / "bin", monkeypatch, 2)
    for gpus in (None, "all", "2"):
        engine_with("runc", "nvidia").check_gpus(HostOptions(gpus=gpus))
    engine_with("runc", devices=("nvidia.com/gpu=0",)).check_gpus(HostOptions(gpus="1"))
    assert read_options().gpus == "all"


@pytest.mark.parametrize("there", [0, None])
def test_auto_is_no_gpu_where_the_driver_lists_none(there, tmp_path, monkeypatch):
    driver(tmp_path / "bin", monkeypatch, there)
    assert gpus_here() == 0 and read_options().gpus is None
