"""What the launch tests share: one good request to break, and the folder of golden files."""

from __future__ import annotations

import copy
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto import mock_aws

from estiba_launch.errors import Problem
from estiba_launch.jobs.store import Store, open_store
from estiba_launch.request.jobfile import InvalidJob, JobFile, check
from estiba_launch.targets import registry
from estiba_launch.targets.ssh import bootstrap, provision
from estiba_launch.targets.ssh.connection import RemoteHost
from remote_host import ClientTools, RemoteMachine, lacks_client_tools, skip_without_engine
from ssh_job import IMAGE, Work, prefix

GOOD: dict[str, Any] = {
    "TrainingJobName": "embed-1",
    "RoleArn": "arn:aws:iam::210987654321:role/Estiba",
    "AlgorithmSpecification": {
        "TrainingImage": "210987654321.dkr.ecr.us-east-1.amazonaws.com/estiba/embed:1",
        "TrainingInputMode": "File",
        "MetricDefinitions": [{"Name": "rows", "Regex": "rows=([0-9]+)"}],
    },
    "InputDataConfig": [
        {
            "ChannelName": "dataset",
            "ContentType": "application/x-parquet",
            "DataSource": {"S3DataSource": {"S3DataType": "S3Prefix", "S3Uri": "s3://bucket/data"}},
        }
    ],
    "OutputDataConfig": {"S3OutputPath": "s3://bucket/out"},
    "ResourceConfig": {"InstanceType": "ml.g4dn.xlarge", "InstanceCount": 1, "VolumeSizeInGB": 30},
    "StoppingCondition": {"MaxRuntimeInSeconds": 3600, "MaxWaitTimeInSeconds": 10800},
    "EnableManagedSpotTraining": True,
    "CheckpointConfig": {"S3Uri": "s3://bucket/checkpoints", "LocalPath": "/opt/ml/checkpoints"},
    "HyperParameters": {"model": "BAAI/bge-m3", "text-column": "texto"},
    "Environment": {"HF_HUB_OFFLINE": "1"},
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write tests/launch/golden anew")


@pytest.fixture(autouse=True)
def _no_engine_by_chance(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A test that needs no engine sees none, so that it ends the same on a machine that has one."""
    if request.node.get_closest_marker("docker") is None:
        monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/no-engine.sock")


@pytest.fixture
def good() -> dict[str, Any]:
    return copy.deepcopy(GOOD)


@pytest.fixture
def problems_of() -> Callable[..., tuple[Problem, ...]]:
    """problems_of(request, target="sagemaker") -> every problem; empty when the request is accepted."""

    def find(request: dict[str, Any], target: str = "sagemaker") -> tuple[Problem, ...]:
        try:
            accepted = check(Path("job.yaml"), request, registry.parse(target))
        except InvalidJob as error:
            return error.problems
        assert isinstance(accepted, JobFile)
        return ()

    return find


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """golden(name, text) compares text with tests/launch/golden/<name>; --update-golden writes it."""

    def compare(name: str, text: str) -> None:
        path = Path(__file__).parent / "golden" / name
        if request.config.getoption("--update-golden", default=False):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, "utf-8")
            return
        assert path.exists(), f"{path} is missing; run pytest tests/launch --update-golden and read the diff"
        assert text == path.read_text("utf-8"), "differs; if that is meant, run with --update-golden and read the diff"

    return compare


@pytest.fixture(params=["file", "s3"])
def store(request, tmp_path, monkeypatch) -> Iterator[Store]:
    if request.param == "file":
        yield open_store(f"file://{tmp_path}/store")
        return
    for name, value in {
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_CA_BUNDLE", raising=False)
    with mock_aws():
        boto3.client("s3").create_bucket(Bucket="bucket")
        yield open_store("s3://bucket/some/prefix")


@pytest.fixture
def local(tmp_path) -> Path:
    (tmp_path / "local" / "deep").mkdir(parents=True)
    (tmp_path / "local" / "a").write_text("a")
    (tmp_path / "local" / "deep" / "b").write_text("bb")
    return tmp_path / "local"


EMBED_IMAGE = os.environ.get("ESTIBA_TEST_EMBED_IMAGE", "estiba/embed:local")


@pytest.fixture(scope="session")
def embed_image() -> str:
    """The embed image; the tests that need it are skipped where it is not."""
    import docker

    try:
        docker.from_env(timeout=10).images.get(EMBED_IMAGE)
    except docker.errors.ImageNotFound:
        pytest.skip(f"no image {EMBED_IMAGE}; run `make build/embed BASE=local`")
    except Exception as error:
        pytest.skip(f"no docker engine ({error}); run `make engine`")
    return EMBED_IMAGE


@pytest.fixture(scope="session")
def tiny_model(embed_image: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a real model of one layer, made inside the embed image."""
    folder = tmp_path_factory.mktemp("tiny")
    folder.chmod(0o777)
    tests = Path(__file__).parents[1] / "images" / "embed"
    code = "import pathlib, tiny_model; tiny_model.build(pathlib.Path('/made/model'))"
    words = ["docker", "run", "--rm", "--network", "none", "--env", "PYTHONPATH=/tests", "--env", "HF_HUB_OFFLINE=1"]
    words += ["--volume", f"{tests}:/tests:ro", "--volume", f"{folder}:/made", "--entrypoint", "python"]
    made = subprocess.run([*words, embed_image, "-c", code], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr[-2000:]
    return folder / "model"


def dumps(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On a machine without ssh and rsync their tests need an engine, and the time to build an image."""
    if not lacks_client_tools():
        return
    for item in items:
        if "ssh_client" in getattr(item, "fixturenames", ()) and item.get_closest_marker("docker") is None:
            item.add_marker(pytest.mark.docker)
            item.add_marker(pytest.mark.timeout(600))


@pytest.fixture(scope="session")
def ssh_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """`ssh` and `rsync` on the PATH, out of a container where this machine lacks them."""
    if not lacks_client_tools():
        yield
        return
    skip_without_engine()
    folder = tmp_path_factory.mktemp("client")
    tools = ClientTools(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        yield
    tools.remove()


@pytest.fixture(scope="session")
def bare_machine(ssh_client: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RemoteMachine]:
    """A rented machine with sshd and sudo, on which `machine` may have installed an engine."""
    skip_without_engine()
    machine = RemoteMachine(tmp_path_factory.mktemp("machine"))
    with pytest.MonkeyPatch.context() as patch:
        try:
            machine.start()
            patch.setenv("ESTIBA_SSH", machine.ssh)
            yield machine
            RemoteHost(registry.parse(machine.target)).disconnect()
        finally:
            machine.remove()


@pytest.fixture(scope="session")
def machine(bare_machine: RemoteMachine) -> RemoteMachine:
    """The machine after `estiba run` has installed what it needs, beside unattended upgrades, and sent the image."""
    log = bare_machine.bootstrap_log
    upgrade = bare_machine.hold_package_lock()

    def report(line: str) -> None:
        log.append(line)
        print(line)
        if "holds the package lock" in line:
            upgrade.terminate()

    host = RemoteHost(registry.parse(bare_machine.target))
    try:
        bootstrap.bootstrap(host, report, needs_rsync=True)
    finally:
        upgrade.kill()
    provision.image(host, IMAGE, log.append)
    return bare_machine


@pytest.fixture
def remote(machine: RemoteMachine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RemoteMachine]:
    """The machine, with this test's own state; nothing of its jobs is left behind."""
    monkeypatch.setenv("ESTIBA_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    yield machine
    name = prefix(tmp_path)
    machine.sh(f"docker ps --all --quiet --filter name={name} | xargs --no-run-if-empty docker rm --force")
    machine.sh("docker network prune --force; rm -rf ~user/estiba/jobs ~user/estiba/last-*")


@pytest.fixture
def work(remote: RemoteMachine, tmp_path: Path) -> Work:
    return Work(tmp_path, remote)


@pytest.fixture
def no_account(tmp_path, monkeypatch):
    """A state folder of its own, and no AWS credentials from anywhere."""
    monkeypatch.setenv("ESTIBA_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
