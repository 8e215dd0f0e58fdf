"""Local data for a job on SageMaker: uploaded once, under the digest of its content."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.stub import Stubber

import estiba_launch
from estiba_launch.errors import AwsUnavailable, LaunchError
from estiba_launch.request.uploads import plan_upload, stamp_of
from estiba_launch.targets.local.target import LocalTarget
from estiba_launch.targets.sagemaker import client
from s3server import S3Server, s3_server

IMAGES = Path(__file__).parents[2] / "images"
ROLE = "arn:aws:iam::210987654321:role/Estiba"
IMAGE = "210987654321.dkr.ecr.us-east-1.amazonaws.com/estiba/finetune:1"
TABLE = "Year,Units,Value\n2024,Dollars,007\n"


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as running:
        running.make_bucket("estiba")
        yield running


@pytest.fixture
def s3(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    for name, value in server.environ.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL", "IMAGE", "ROLE_ARN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ESTIBA_STATE", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "table.csv").write_text(TABLE)
    for one in server.client().list_objects_v2(Bucket="estiba").get("Contents", []):
        server.client().delete_object(Bucket="estiba", Key=one["Key"])
    return server.client()


@pytest.fixture
def sagemaker(monkeypatch: pytest.MonkeyPatch) -> Stubber:
    """SageMaker with queued responses: each must be requested, and nothing else."""
    service = boto3.client("sagemaker", region_name="us-east-1")
    clients = client.Clients(region="us-east-1", sagemaker=service, logs=None, iam=None)
    monkeypatch.setattr(client, "connect", lambda _=None: clients)
    stub = Stubber(service)
    stub.activate()
    return stub


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(IMAGES / "finetune"))
    from launch_finetune_job import launch_finetune_job

    return launch_finetune_job


def accept(stub: Stubber) -> None:
    arn = "arn:aws:sagemaker:us-east-1:210987654321:training-job/j"
    stub.add_response("create_training_job", {"TrainingJobArn": arn})


def keys(s3: Any) -> list[str]:
    return [one["Key"] for one in s3.list_objects_v2(Bucket="estiba").get("Contents", [])]


def on_sagemaker(launch: Any, **more: Any) -> Any:
    values = {"data": "table.csv", "base_model": "llama-2-7b", "image_uri": IMAGE, "role": ROLE}
    return launch(target="sagemaker", output_path="s3://estiba/out", **{**values, **more})


def address(job: Any, channel: str = "training") -> str:
    (config,) = [one for one in job.request["InputDataConfig"] if one["ChannelName"] == channel]
    uri: str = config["DataSource"]["S3DataSource"]["S3Uri"]
    return uri


def test_a_local_table_is_uploaded_once_under_its_digest(s3, sagemaker, launch, caplog):
    caplog.set_level("INFO", "estiba_launch")
    accept(sagemaker)
    job = on_sagemaker(launch, learning_rate=0.001, epochs=3)
    (key,) = keys(s3)
    assert f"s3://estiba/{key}" == f"{address(job)}/table.csv"
    assert address(job).startswith("s3://estiba/out/inputs/")
    assert s3.get_object(Bucket="estiba", Key=key)["Body"].read().decode() == TABLE
    assert job.request["HyperParameters"] == {"base_model": "llama-2-7b", "learning_rate": "0.001", "epochs": "3"}
    # Other bytes of the same size show whether the file is uploaded again.
    s3.put_object(Bucket="estiba", Key=key, Body=b"x" * len(TABLE))
    accept(sagemaker)
    again = on_sagemaker(launch, job_name="again")
    assert address(again) == address(job)
    assert s3.get_object(Bucket="estiba", Key=key)["Body"].read() == b"x" * len(TABLE)
    assert f"{address(job)}/table.csv: already there" in caplog.text
    # A truncated upload is replaced.
    s3.put_object(Bucket="estiba", Key=key, Body=b"x")
    accept(sagemaker)
    on_sagemaker(launch, job_name="third")
    assert s3.get_object(Bucket="estiba", Key=key)["Body"].read().decode() == TABLE
    sagemaker.assert_no_pending_responses()


def test_different_content_or_names_have_different_addresses(tmp_path):
    one, two = tmp_path / "one.csv", tmp_path / "two.csv"
    one.write_text(TABLE)
    two.write_text(TABLE)
    first, second = (plan_upload(f"file://{path}", "s3://b/out/")[0] for path in (one, two))
    assert first != second
    one.write_text(TABLE.replace("7", "8"))
    assert plan_upload(f"file://{one}", "s3://b/out/")[0] != first
    one.write_text(TABLE)
    assert plan_upload(f"file://{one}", "s3://b/out/")[0] == first


def test_a_model_directory_is_uploaded_with_the_targets_of_its_links(s3, sagemaker, launch, tmp_path):
    """The hub's cache holds links to files outside the model's own directory."""
    model = tmp_path / "model"
    (model / "1_Pooling").mkdir(parents=True)
    (model / "1_Pooling/config.json").write_text("{}")
    (tmp_path / "blob").write_text("weights")
    (model / "model.safetensors").symlink_to(tmp_path / "blob")
    accept(sagemaker)
    job = on_sagemaker(launch, base_model=model)
    assert "base_model" not in job.request.get("HyperParameters", {})
    place = address(job, "model").removeprefix("s3://estiba/")
    assert {key for key in keys(s3) if key.startswith(place)} == {
        f"{place}/1_Pooling/config.json", f"{place}/model.safetensors",
    }  # fmt: skip
    assert s3.get_object(Bucket="estiba", Key=f"{place}/model.safetensors")["Body"].read() == b"weights"


def test_no_job_starts_if_a_file_changes_during_its_upload(s3, sagemaker, launch, tmp_path, monkeypatch):
    """Its address would name the old content."""

    def changed(path: Path) -> tuple[int, int]:
        return stamp_of(path)[0], 1

    monkeypatch.setattr("estiba_launch.jobs.uploads.stamp_of", changed)
    with pytest.raises(LaunchError, match=r"table\.csv: was changed while it was uploaded; start the job again"):
        on_sagemaker(launch)
    assert keys(s3) == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda _: None, "No such file or directory"),
        (lambda place: place.mkdir(), "an empty directory"),
        (lambda place: os.mkfifo(place), "Not a directory"),
        (lambda place: (place.mkdir(), os.mkfifo(place / "pipe")), "pipe: neither a file nor a directory"),
        (lambda place: (place.mkdir(), (place / "gone").symlink_to("nowhere")), "gone: neither a file nor a directory"),
        (lambda place: (place.mkdir(), (place / "up").symlink_to(place)), "up: a link to a directory that contains it"),
        (lambda place: (place.mkdir(), Path(os.fsdecode(bytes(place) + b"/\xff")).touch()), "is not UTF-8"),
    ],
)
def test_data_that_cannot_be_uploaded_is_named(make, message, s3, sagemaker, launch, tmp_path):
    make(tmp_path / "data")
    with pytest.raises(LaunchError, match=message) as error:
        on_sagemaker(launch, data=tmp_path / "data")
    assert str(tmp_path / "data") in str(error.value)


def test_a_local_job_reads_the_table_in_place(s3, launch, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(LocalTarget, "submit", lambda _, submission, **__: started.append(submission))
    job = launch(data="table.csv", base_model="HuggingFaceTB/SmolLM2-135M-Instruct", optimizer="adamw")
    assert str(job.target) == "local"
    assert address(job) == f"file://{tmp_path}/table.csv"
    assert job.request["AlgorithmSpecification"]["TrainingImage"] == "estiba/finetune:local"
    assert started[0].job.uploads == ()
    assert keys(s3) == []


@pytest.mark.parametrize("refused", ["the job", "the upload"])
def test_a_fallback_runs_the_same_request_here_when_aws_refuses(
    refused, s3, sagemaker, launch, tmp_path, monkeypatch, caplog
):
    started = []
    monkeypatch.setattr(LocalTarget, "submit", lambda _, submission, **__: started.append(submission))
    more = {"code_location": "s3://no-such-bucket/x"} if refused == "the upload" else {}
    if refused == "the job":
        for _ in range(2):
            sagemaker.add_client_error("create_training_job", "AccessDeniedException", "not you", 400)
    with pytest.raises(AwsUnavailable):
        on_sagemaker(launch, job_name="one", **more)
    job = on_sagemaker(launch, job_name="two", fallback="local", epochs=1, **more)
    assert str(job.target) == "local" and len(started) == 1
    assert address(job) == f"file://{tmp_path}/table.csv"
    assert job.request["HyperParameters"] == {"base_model": "llama-2-7b", "epochs": "1"}
    assert "** NOT ON AWS: fallback local runs this job on this machine instead **" in caplog.text


def test_the_command_and_the_function_make_the_same_request(s3, sagemaker, launch, tmp_path):
    accept(sagemaker)
    words = [
        "--data", "table.csv", "--base-model", "llama-2-7b", "--epochs", "1", "--batch_size", "8", "-p", "lora_rank=8",
        "--target", "sagemaker", "--image", IMAGE, "--role", ROLE, "--output-uri", "s3://estiba/out", "--job-name", "j",
        "--request",
    ]  # fmt: skip
    script = IMAGES / "finetune/launch_finetune_job.py"
    done = subprocess.run([sys.executable, str(script), *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    checkpoints = shown["CheckpointConfig"]["S3Uri"]
    assert re.fullmatch(r"s3://estiba/out/checkpoints/j-[0-9a-f]{8}", checkpoints)
    job = on_sagemaker(
        launch, job_name="j", epochs=1, batch_size=8, hyperparameters={"lora_rank": 8}, use_spot=True,
        checkpoint_s3_uri=checkpoints,
    )  # fmt: skip
    assert shown == job.request


def test_launch_training_job_uploads_for_sagemaker_too(s3, sagemaker, tmp_path):
    accept(sagemaker)
    job = estiba_launch.launch_training_job(
        target="sagemaker", image_uri=IMAGE, role=ROLE, output_path="s3://estiba/out",
        channels={"dataset": f"file://{tmp_path}/table.csv"},
    )  # fmt: skip
    assert f"{address(job, 'dataset')}/table.csv" in [f"s3://estiba/{key}" for key in keys(s3)]
