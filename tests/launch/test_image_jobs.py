"""Each image's job file, with the values that its comments ask for and nothing else; and where a result goes then."""

from __future__ import annotations

import datetime
import io
import json
import re
from pathlib import Path
from typing import Any

import boto3
import botocore.session
import pytest
from botocore.response import StreamingBody
from botocore.stub import Stubber
from typer.testing import CliRunner

from estiba_launch.cli.app import app
from estiba_launch.request import jobfile
from estiba_launch.targets import registry

ROOT = Path(__file__).parents[2]
JOBS = sorted(ROOT.glob("images/*/job.yaml"))
ACCOUNT = "210987654321"
T0 = datetime.datetime(2026, 10, 1, tzinfo=datetime.UTC)


def plan(job: Path, *words: str) -> Any:
    return CliRunner().invoke(app, ["plan", str(job), *words])


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    for name in ("IMAGE", "ROLE_ARN", "DATASET_URI", "TRAINING_URI", "BASE_MODEL_URI", "OUTPUT_URI", "CHECKPOINT_URI"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("job", JOBS, ids=lambda path: path.parent.name)
def test_a_job_file_is_valid_here_by_its_defaults(job):
    """Whether the data is there already is another question: `make train` makes it."""
    assert jobfile.load(job, registry.parse("local"), {}, {}).request["TrainingJobName"].startswith(job.parent.name)
    said = plan(job, "--target", "local")
    assert "Traceback" not in said.stderr
    problems = [line for line in said.stderr.splitlines() if "not ready for --target local" in line]
    assert all("nothing at file://" in line for line in problems), said.stderr
    assert f"estiba/{job.parent.name}:local" in said.stdout


@pytest.mark.parametrize("job", JOBS, ids=lambda path: path.parent.name)
def test_a_job_file_is_a_sagemaker_request_once_role_image_and_addresses_are_given(job):
    refused = plan(job, "--target", "sagemaker")
    assert refused.exit_code == 2 and "ROLE_ARN" in refused.stderr
    values = {
        "ROLE_ARN": f"arn:aws:iam::{ACCOUNT}:role/Estiba",
        "IMAGE": f"{ACCOUNT}.dkr.ecr.us-east-1.amazonaws.com/estiba/{job.parent.name}:1",
    }
    values |= {name: f"s3://bucket/{name.lower()}" for name in re.findall(r"\$\{(\w+_URI)", job.read_text())}
    said = plan(job, "--target", "sagemaker", *(word for pair in values.items() for word in ("--set", "=".join(pair))))
    assert said.exit_code == 0, said.stderr
    request = json.loads(said.stdout)
    assert "file://" not in said.stdout
    names = {channel["ChannelName"] for channel in request["InputDataConfig"]}
    assert names and request["CheckpointConfig"]["LocalPath"] == "/opt/ml/checkpoints"


def test_the_job_file_of_finetune_holds_what_the_fine_tuning_document_asks_for():
    request = jobfile.load(ROOT / "images/finetune/job.yaml", registry.parse("local"), {}, {}).request
    assert request["AlgorithmSpecification"]["EnableSageMakerMetricsTimeSeries"] is True
    assert [channel["ChannelName"] for channel in request["InputDataConfig"]] == ["training", "model"]
    values = request["HyperParameters"]
    assert (values["batch_size"], values["epochs"], values["max_sequence_length"]) == ("4", "3", "2048")


def test_the_deployment_on_the_page_of_finetune_asks_for_what_sagemaker_takes(monkeypatch):
    """The snippet runs as it stands, against the service models of SageMaker and its runtime."""
    made: dict[str, Any] = {}

    def client(name: str) -> Any:
        if name not in made:
            made[name] = session.create_client(name, region_name="us-east-1", **key)
        return made[name]

    session = botocore.session.Session()
    key = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing"}
    with Stubber(client("sagemaker")) as control, Stubber(client("sagemaker-runtime")) as runtime:
        arn = "arn:aws:sagemaker:us-east-1:210987654321"
        control.add_response("create_model", {"ModelArn": f"{arn}:model/survey"})
        control.add_response("create_endpoint_config", {"EndpointConfigArn": f"{arn}:endpoint-config/survey"})
        control.add_response("create_endpoint", {"EndpointArn": f"{arn}:endpoint/survey"})
        ready = {"EndpointName": "survey", "EndpointArn": f"{arn}:endpoint/survey", "EndpointStatus": "InService"}
        control.add_response("describe_endpoint", {**ready, "CreationTime": T0, "LastModifiedTime": T0})
        control.add_response("delete_endpoint", {})
        runtime.add_response("invoke_endpoint", {"Body": StreamingBody(io.BytesIO(b"[]"), 2)})
        monkeypatch.setattr(boto3, "client", client)
        page = (ROOT / "docs/finetune.md").read_text().partition("## 5. Deploy")[2]
        exec("\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)), {})  # noqa: S102 - our own page
        control.assert_no_pending_responses()
        runtime.assert_no_pending_responses()
