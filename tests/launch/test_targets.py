"""The contract of every target in the registry, and of one that can only print."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from estiba_launch.cli.app import app
from estiba_launch.errors import HostError, LaunchError
from estiba_launch.jobs import directory
from estiba_launch.jobs.control import Fault
from estiba_launch.jobs.options import SubmitOptions
from estiba_launch.jobs.record import Record
from estiba_launch.request import jobfile
from estiba_launch.request.jobfile import JobFile
from estiba_launch.request.options import HostOptions
from estiba_launch.targets import operations, registry
from estiba_launch.targets.base import Capability, ListFilters, Submission, Target
from estiba_launch.targets.docker_command import STOP_S

EMBED = str(Path(__file__).parents[2] / "images/embed/job.yaml")
TOKEN = "hf_" + "abcdefghijklmnopqrstuvwxyz12345678"


class PrintOnly(Target):
    """The smallest target: it makes a batch file that another tool submits."""

    kind = "print-only"
    capabilities = frozenset()

    def prepare(self, job: JobFile, options: SubmitOptions) -> Submission:
        script = (
            f"#!/bin/sh\n#SBATCH --job-name={job.name}\nsrun {job.request['AlgorithmSpecification']['TrainingImage']}\n"
        )
        return Submission(job=job, options=options, script=script)


@pytest.fixture(autouse=True)
def print_only_is_registered(tmp_path, monkeypatch):
    monkeypatch.setitem(registry.TARGETS, "print-only", registry.Entry(f"{__name__}:PrintOnly"))
    monkeypatch.setenv("ESTIBA_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.chdir(tmp_path)


@pytest.fixture(params=[*registry.TARGETS, "print-only"])
def target(request) -> Target:
    kind = request.param
    text = f"{kind}://user@127.0.0.1:9" if registry.TARGETS[kind].has_host else kind
    return registry.target_of(text)


def job_for(target: Target, request: dict[str, Any]) -> JobFile:
    return jobfile.check(Path("job.yaml"), request, target.address)


def files_below(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_target_is_what_the_registry_calls_it(target):
    assert registry.TARGETS[target.kind].on_aws == target.address.on_aws
    assert registry.parse(str(target)) == target.address
    assert target.capabilities <= frozenset(Capability)


def test_prepare_is_pure_and_deterministic(target, good, tmp_path, monkeypatch):
    def forbidden(*words: Any, **more: Any) -> Any:
        raise AssertionError("prepare asks another program or machine")

    job = job_for(target, good)
    monkeypatch.setattr(socket, "create_connection", forbidden)
    monkeypatch.setattr(socket.socket, "connect", forbidden)
    monkeypatch.setattr(subprocess, "Popen", forbidden)
    before = files_below(tmp_path)
    first, second = (operations.prepare(job, SubmitOptions()) for _ in range(2))
    assert first == second
    assert first.render() == second.render()
    assert first.to_json() == second.to_json()
    assert files_below(tmp_path) == before


def test_a_submission_shows_the_job_it_was_made_of(target, good):
    submission = operations.prepare(job_for(target, good))
    assert (submission.name, submission.target) == ("embed-1", target.address)
    for word in ("embed-1", good["AlgorithmSpecification"]["TrainingImage"]):
        assert word in submission.render()
    assert submission.to_json()["request"]["TrainingJobName"] == "embed-1"


def test_a_script_parses_and_carries_the_whole_request(target, good):
    good["Environment"] = {"COLOUR": "blue and white"}
    submission = operations.prepare(job_for(target, good))
    if submission.script is None or target.kind == "print-only":
        pytest.skip(f"{target} sends a request, no script")
    subprocess.run(["sh", "-n"], input=submission.script, text=True, check=True)
    for name, value in good["HyperParameters"].items():
        assert json.dumps(name) in submission.script and value in submission.script
    assert "COLOUR=blue and white" in submission.script
    assert all(f"input/data/{channel['ChannelName']}" in submission.script for channel in good["InputDataConfig"])
    assert "/opt/ml/checkpoints" in submission.script
    assert str(STOP_S) in submission.script


def test_a_submission_shows_no_secret_of_the_env_file(target, good, tmp_path):
    (tmp_path / "tokens.env").write_text(f"HF_TOKEN={TOKEN}\n")
    options = SubmitOptions(host=HostOptions(env_file=str(tmp_path / "tokens.env")))
    submission = operations.prepare(job_for(target, good), options)
    assert TOKEN not in submission.render()
    assert TOKEN not in str(submission.to_json())


CALLS: dict[Capability, Callable[[Target, Submission], Any]] = {
    Capability.SUBMIT: lambda target, submission: target.submit(submission, report=print),
    Capability.POLL: lambda target, _: target.poll("job"),
    Capability.LIST: lambda target, _: list(target.list(ListFilters(names=["job"]))),
    Capability.LIST_ACCOUNT: lambda target, _: target.find("job"),
    Capability.LOGS: lambda target, _: list(target.logs("job")),
    Capability.STOP: lambda target, _: target.stop("job", "asked for"),
    Capability.INTERRUPT: lambda target, _: target.interrupt("job", Fault()),
    Capability.RESUME: lambda target, _: target.resume("job"),
    Capability.DOWNLOAD: lambda target, _: target.download("job", Path("into")),
}


def test_a_capability_that_a_target_lacks_is_refused_by_name(target, good):
    submission = operations.prepare(job_for(target, good))
    for capability in CALLS.keys() - target.capabilities:
        with pytest.raises(LaunchError, match=rf"{re.escape(str(target))}: .*cannot {capability}"):
            CALLS[capability](target, submission)
        with pytest.raises(LaunchError, match=f"cannot {capability}"):
            target.require(capability)


def test_every_capability_with_a_method_has_a_call_here():
    assert set(CALLS) == set(Capability) - {Capability.COST}


def test_a_poll_writes_nothing(target, good, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)  # Retries need no pauses here.
    if not target.can(Capability.POLL):
        pytest.skip(f"{target} cannot {Capability.POLL}")
    folder = recorded(target, good)
    before = files_below(tmp_path)
    try:
        assert target.poll("embed-1").name == "embed-1"
    except HostError:
        pass  # Nothing answers at this address.
    assert files_below(tmp_path) == before
    assert folder.is_dir()


def recorded(target: Target, request: dict[str, Any]) -> Path:
    """A job directory as `submit` leaves it."""
    folder = directory.create("embed-1")
    directory.write_json(folder / directory.TARGET, {"target": str(target), "region": "us-east-1", "user_id": "0:0"})
    SubmitOptions().write(folder)
    Record.create(folder, request)
    directory.write_json(folder / directory.REQUEST, request)
    return folder


def call(*words: str) -> Any:
    return CliRunner().invoke(app, list(words))


def test_a_print_only_target_is_planned_and_not_run():
    planned = call("plan", EMBED, "--target", "print-only")
    assert planned.exit_code == 0, planned.stderr
    assert "#SBATCH --job-name=embed-" in planned.stdout
    refused = call("run", EMBED, "--target", "print-only")
    assert refused.exit_code == 2
    assert "print-only: this target cannot start jobs" in refused.stderr
    drilled = call("drill", EMBED, "--target", "print-only")
    assert drilled.exit_code == 2
    assert "cannot interrupt jobs" in drilled.stderr


def test_importing_the_registry_imports_no_target() -> None:
    code = "import sys, estiba_launch.targets.registry; print([m for m in sys.modules if m.endswith('.target')])"
    package = Path(__file__).parents[2] / "launch"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(package)}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
