"""What the launch tests share: one good request to break, and the folder of golden files."""

from __future__ import annotations

import copy
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from estiba_launch.errors import Problem
from estiba_launch.jobfile import InvalidJob, JobFile, check
from estiba_launch.target import Target

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


@pytest.fixture
def good() -> dict[str, Any]:
    return copy.deepcopy(GOOD)


@pytest.fixture
def problems_of() -> Callable[..., tuple[Problem, ...]]:
    """problems_of(request, target="sagemaker") -> every problem; empty when the request is accepted."""

    def find(request: dict[str, Any], target: str = "sagemaker") -> tuple[Problem, ...]:
        try:
            accepted = check(Path("job.yaml"), request, Target.parse(target))
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
