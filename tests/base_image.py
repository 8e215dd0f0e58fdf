"""Small shell jobs in the base image, for tests of the launcher, and why they cannot run where it is missing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import docker
import pytest

IMAGE = os.environ.get("ESTIBA_TEST_IMAGE", "estiba/base:local")


def _why_not() -> str | None:
    try:
        docker.from_env(timeout=10).images.get(IMAGE)
    except docker.errors.ImageNotFound:
        return f"no image {IMAGE}; run `make build/base BASE=local`"
    except Exception as error:
        return f"no docker engine ({error}); run `make engine`"
    return None


WHY_NOT = _why_not()
NEEDS_BASE_IMAGE = [pytest.mark.docker, pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))]
"""For `pytestmark`."""


def request_of(folder: Path, script: str, **changes: Any) -> dict[str, Any]:
    """Return a spot request that runs a script of the shell, with input, output and checkpoints in `folder`."""
    code = folder / "code"
    code.mkdir(exist_ok=True)
    path = code / "run.sh"
    if not path.exists() or path.read_text() != script:  # a rewritten file would be another input
        path.write_text(script)
    return {
        "AlgorithmSpecification": {
            "TrainingImage": IMAGE,
            "TrainingInputMode": "File",
            "ContainerEntrypoint": ["sh", "/opt/ml/input/data/code/run.sh"],
        },
        "InputDataConfig": [
            {
                "ChannelName": "code",
                "DataSource": {"S3DataSource": {"S3DataType": "S3Prefix", "S3Uri": f"file://{code}"}},
            }
        ],
        "OutputDataConfig": {"S3OutputPath": f"file://{folder}/out"},
        "ResourceConfig": {"InstanceType": "ml.g4dn.xlarge", "InstanceCount": 1, "VolumeSizeInGB": 1},
        "StoppingCondition": {"MaxRuntimeInSeconds": 100, "MaxWaitTimeInSeconds": 200},
        "EnableManagedSpotTraining": True,
        "CheckpointConfig": {"S3Uri": f"file://{folder}/checkpoints"},
        **changes,
    }
