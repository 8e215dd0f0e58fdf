"""The brain-to-text guide's commands and Python calls, word for word."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from estiba_launch import sdk
from estiba_launch.request.jobfile import InvalidJob
from estiba_launch.targets import operations
from estiba_launch.targets.sagemaker import role

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "images/brain-to-text/launch_sagemaker_job.py"
ROLE = "arn:aws:iam::210987654321:role/Estiba"
IMAGE = "210987654321.dkr.ecr.us-east-1.amazonaws.com/estiba/brain-to-text:1"
GUIDE = "--s3-bucket bucket --s3-data-prefix data/hdf5_data_diphone_encoded --config-file rnn_args.yaml".split()
OUTPUTS = "s3://bucket/sagemaker-outputs"
NAME = r"brain-to-text-\d{4}-\d\d-\d\d-\d\d-\d\d-\d\d"


@pytest.fixture(autouse=True)
def notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of a guide user, with the image and the role set."""
    for name in ("ESTIBA_TARGET", "ESTIBA_ENV_FILE", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("IMAGE", IMAGE)
    monkeypatch.setenv("ROLE_ARN", ROLE)
    monkeypatch.setenv("ESTIBA_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "launch"))
    place = tmp_path / "notebook"
    place.mkdir()
    monkeypatch.chdir(place)
    return place


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, stdin=subprocess.DEVNULL, check=False)


def request_of(*words: str) -> dict[str, Any]:
    done = run(*words, "--request")
    assert done.returncode == 0, done.stderr
    request: dict[str, Any] = json.loads(done.stdout)
    return request


@pytest.fixture
def launcher() -> Any:
    spec = importlib.util.spec_from_file_location("launch_sagemaker_job", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_config_file_of_this_machine_is_sent_and_wins_over_the_images_preset(notebook: Path) -> None:
    (notebook / "rnn_args.yaml").write_text("num_training_batches: 7\n")
    request = request_of(*GUIDE)
    assert request["HyperParameters"]["config-file"] == "rnn_args.yaml"
    (channel,) = [one for one in request["InputDataConfig"] if one["ChannelName"] == "config"]
    uri = channel["DataSource"]["S3DataSource"]["S3Uri"]
    assert re.fullmatch(r"s3://bucket/sagemaker-outputs/inputs/[0-9a-f]{32}", uri)
    (notebook / "deep").mkdir()
    (notebook / "rnn_args.yaml").rename(notebook / "deep/mine.yaml")
    request = request_of("--s3-bucket", "bucket", "--config-file", f"{notebook}/deep/mine.yaml")
    assert request["HyperParameters"]["config-file"] == "mine.yaml", "the container has the file, not the path"
    assert [one["ChannelName"] for one in request["InputDataConfig"]] == ["config"]


def test_without_one_the_images_preset_is_used_and_said_so_and_any_other_name_is_refused() -> None:
    done = run(*GUIDE, "--request")
    assert "there is no rnn_args.yaml here, so the job uses the image's own" in done.stderr
    assert "InputDataConfig" not in json.loads(done.stdout)
    for name in ("rnn_argz.yaml", "configs/rnn_args.yaml"):
        done = run("--s3-bucket", "bucket", "--config-file", name, "--request")
        assert done.returncode != 0 and f"--config-file {name}: no such file here" in done.stderr
        assert "Traceback" not in done.stderr
    request = request_of("--s3-bucket", "bucket", "--config-file", "s3://bucket/settings/mine.yaml")
    assert request["HyperParameters"]["config-file"] == "s3://bucket/settings/mine.yaml"


def test_the_images_presets_are_those_that_the_launcher_knows(launcher: Any) -> None:
    presets = ROOT / "images/brain-to-text/brain_to_text/presets"
    assert sorted(launcher.CONFIG_FILES_OF_IMAGE) == sorted(path.name for path in presets.glob("*.yaml"))


def test_a_bucket_and_a_batch_size_are_enough() -> None:
    request = request_of("--s3-bucket", "bucket", "--batch-size", "32")
    assert request["HyperParameters"] == {
        "s3-bucket": "bucket", "s3-data-prefix": "data/hdf5_data_diphone_encoded", "batch-size": "32",
        "config-file": "rnn_args_diphone_sagemaker.yaml",
    }  # fmt: skip
    assert request["ResourceConfig"]["InstanceType"] == "ml.g4dn.xlarge"
    assert request["StoppingCondition"]["MaxRuntimeInSeconds"] == 432_000
    assert re.fullmatch(NAME, request["TrainingJobName"])


def test_without_data_nothing_is_built_that_only_the_rented_instance_would_refuse(launcher: Any) -> None:
    done = run("--batch-size", "32", "--request")
    assert done.returncode != 0 and not done.stdout and "no data; pass --s3-bucket BUCKET" in done.stderr
    with pytest.raises(SystemExit, match="no data; pass"):
        launcher.launch_training_job(batch_size=32)
    request = request_of("--channel", "dataset=s3://bucket/day", "--output-uri", "s3://bucket/out", "--batch-size=32")
    assert [one["ChannelName"] for one in request["InputDataConfig"]] == ["dataset"]


def test_output_is_where_the_guide_looks_for_it_and_checkpoints_are_where_the_next_run_does() -> None:
    words = (*GUIDE, "--num-training-batches", "150000", "--batch-size", "48", "--job-name", "my-diphone-training")
    request = request_of(*words)
    assert request["TrainingJobName"] == "my-diphone-training"
    assert request["OutputDataConfig"]["S3OutputPath"] == "s3://bucket/sagemaker-outputs"
    place = request["CheckpointConfig"]["S3Uri"]
    assert request_of(*words)["CheckpointConfig"]["S3Uri"] == place
    assert not place.startswith("s3://bucket/sagemaker-outputs/my-diphone-training/"), "the guide downloads this"
    assert request_of(*words, "-p", "seed=2")["CheckpointConfig"]["S3Uri"] != place


def test_the_place_of_checkpoints_holds_no_time_and_follows_the_content_of_the_config_file(notebook: Path) -> None:
    places = []
    for text in ("seed: 1\n", "seed: 1\n", "seed: 2\n"):
        (notebook / "rnn_args.yaml").write_text(text)
        places.append(request_of(*GUIDE)["CheckpointConfig"]["S3Uri"])
    assert places[0] == places[1] != places[2]
    assert all(re.fullmatch(rf"{OUTPUTS}/checkpoints/brain-to-text-[0-9a-f]{{8}}", one) for one in places)


def test_the_launcher_prints_the_plan_and_the_price_and_starts_without_a_terminal() -> None:
    """The engine is missing here, which only the start notices."""
    done = run("--target", "local", *GUIDE)
    assert "pass --yes" not in done.stderr
    assert "docker run --detach" in done.stderr and "no bill from AWS" in done.stderr
    assert "no docker engine" in done.stderr
    done = run("--target", "local", *GUIDE, "--ask")
    assert "stdin is not a terminal to ask on; pass --yes to start" in done.stderr


def test_without_a_role_one_sentence_says_what_to_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ROLE_ARN")
    done = run(*GUIDE, "--request")
    assert done.returncode == 2
    assert "RoleArn: required and missing; pass --role NAME or its ARN, or set ROLE_ARN" in done.stderr


def test_in_a_notebook_its_execution_role_is_used(
    tmp_path: Path, launcher: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ROLE_ARN")
    monkeypatch.setattr(role, "NOTEBOOK_METADATA", tmp_path / "resource-metadata.json")
    monkeypatch.setattr(operations, "start", lambda *_: None)
    with pytest.raises(InvalidJob, match="RoleArn"):
        launcher.launch_training_job(s3_bucket="bucket")
    arn = "arn:aws:iam::210987654321:role/service-role/AmazonSageMaker-ExecutionRole-1"
    (tmp_path / "resource-metadata.json").write_text(json.dumps({"ResourceName": "n", "ExecutionRoleArn": arn}))
    assert launcher.launch_training_job(s3_bucket="bucket").request["RoleArn"] == arn


def test_the_guides_python_starts_the_job_and_its_fit_waits(launcher: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr(operations, "start", lambda submission, _: started.append(submission))
    monkeypatch.setattr(sdk.operations, "log_lines", lambda name, **_: iter([f"log of {name}"]))

    class Status:
        status = "Completed"

        def to_json(self) -> dict[str, Any]:
            return {}

    monkeypatch.setattr(sdk.operations, "wait", lambda *_: Status())
    launch_training_job = launcher.launch_training_job
    estimator = launch_training_job(
        s3_bucket='bucket', s3_data_prefix='data/hdf5_data_diphone_encoded', instance_type='ml.g4dn.xlarge',
        config_file='rnn_args.yaml', num_training_batches=150000, batch_size=48,
    )  # fmt: skip
    estimator.fit(wait=True)
    (submission,) = started
    words = (*GUIDE, "--instance-type", "ml.g4dn.xlarge", "--num-training-batches", "150000", "--batch-size", "48")
    by_command = request_of(*words)
    assert {**submission.request, "TrainingJobName": ""} == {**by_command, "TrainingJobName": ""}
    assert str(submission.target) == "sagemaker"


def test_estiba_target_chooses_where_commands_and_python_calls_run(
    launcher: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ESTIBA_TARGET", "local")
    started: list[Any] = []
    monkeypatch.setattr(operations, "start", lambda submission, _: started.append(submission))
    launcher.launch_training_job(s3_bucket="bucket")
    sdk.Estimator("estiba/embed:local").fit(wait=False, logs=False)
    assert [str(one.target) for one in started] == ["local", "local"]
    assert "RoleArn" not in request_of(*GUIDE)
    monkeypatch.setenv("ESTIBA_TARGET", "sagemaker")
    assert request_of(*GUIDE)["RoleArn"] == ROLE


def test_the_log_streams_of_a_job_have_the_prefix_that_the_guide_follows() -> None:
    """`aws logs tail /aws/sagemaker/TrainingJobs --log-stream-name-prefix my-diphone-training`."""
    request = request_of(*GUIDE, "--job-name", "my-diphone-training")
    assert f"{request['TrainingJobName']}/algo-1-1700000000".startswith("my-diphone-training")
    assert request_of(*GUIDE)["TrainingJobName"].startswith("brain-to-text-2")
