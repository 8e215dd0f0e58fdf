"""The command: data on stdout, messages on stderr, exit codes, and the generated reference."""

from __future__ import annotations

import json
import os
import re
import runpy
from pathlib import Path

import pytest
from typer.testing import CliRunner

from estiba_launch.cli import render
from estiba_launch.cli.app import app
from estiba_launch.errors import AwsUnavailable, HostError
from estiba_launch.jobs import artifacts
from estiba_launch.jobs.status import JobStatus
from estiba_launch.request import jobfile
from estiba_launch.targets import operations, registry
from estiba_launch.targets.ssh.target import SshTarget

ROOT = Path(__file__).parents[2]
EMBED = str(ROOT / "images/embed/job.yaml")


@pytest.fixture(autouse=True)
def own_place(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("ESTIBA_STATE", str(tmp_path / "state"))
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION", "ROLE_ARN", "IMAGE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def demo_data(tmp_path):
    """What the job file of embed reads by default."""
    for name in ("input", "model"):
        (tmp_path / "runs/demo" / name).mkdir(parents=True)
        (tmp_path / "runs/demo" / name / "file").write_text("x")


def call(*words: str):
    return CliRunner().invoke(app, list(words))


def test_plan_json_is_one_document_on_stdout(demo_data):
    result = call("plan", EMBED, "--target", "local", "--json", "--set", "MODEL=x")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["request"]["HyperParameters"]["model"] == "x"
    assert "docker run" in document["script"]


def test_plan_prints_the_script_on_stdout_and_the_price_on_stderr():
    result = call("plan", EMBED, "--target", "local", "--gpus", "none")
    assert result.stdout.startswith("#!/bin/sh")
    assert "no bill from AWS" in result.stderr


def test_plan_for_sagemaker_names_everything_that_is_missing_and_exits_2():
    result = call("plan", EMBED, "--target", "sagemaker")
    assert result.exit_code == 2
    assert result.stdout == ""
    for word in ("ROLE_ARN", "TrainingImage", "S3OutputPath", "CheckpointConfig.S3Uri", "DATASET_URI"):
        assert word in result.stderr
    assert "Traceback" not in result.stderr


def test_plan_without_a_target_notes_what_sagemaker_would_refuse_and_exits_0(demo_data):
    result = call("plan", EMBED)
    assert result.exit_code == 0
    ready, note = result.stderr.splitlines()[-2:]
    assert ready.endswith("ready for --target local")
    assert "note: would be refused on sagemaker (RoleArn, S3OutputPath, S3Uri, TrainingImage);" in note
    assert "`--target sagemaker` shows why" in note
    assert "problem" not in result.stderr and "not ready" not in result.stderr
    assert "docker run" in result.stdout


@pytest.mark.parametrize("words", [(), ("--target", "local"), ("--target", "ssh://user@host")])
def test_plan_names_an_input_that_is_missing_and_exits_2(words, demo_data, tmp_path):
    (tmp_path / "runs/demo/model/file").unlink()
    result = call("plan", EMBED, *words)
    assert result.exit_code == 2
    assert "channel model: nothing at file://runs/demo/model; put the data there" in result.stderr
    assert "channel dataset" not in result.stderr and "ready for --target local" not in result.stderr.replace(
        "not ready", ""
    )
    assert "docker run" in result.stdout


def test_run_refuses_a_missing_input_as_plan_does(monkeypatch):
    monkeypatch.setattr("estiba_launch.targets.local.engine.Engine.ping", lambda _: None)
    result = call("run", EMBED, "--yes")
    assert result.exit_code == 2
    assert "channel dataset: nothing at file://runs/demo/input" in result.stderr


@pytest.mark.parametrize("name", ["OUTPUT_URI", "CHECKPOINT_URI"])
@pytest.mark.parametrize("command", [("plan",), ("run", "--yes")])
@pytest.mark.parametrize("place", ["{0}/file/deep/er", "/proc/self/here", "{0}/" + "n" * 300])
def test_results_that_could_not_be_stored_are_refused_before_hours_of_work(place, command, name, demo_data, tmp_path):
    (tmp_path / "file").write_text("")
    verb, *flags = command
    result = call(verb, EMBED, "--target", "local", "--set", f"{name}=file://{place.format(tmp_path)}", *flags)
    assert result.exit_code in (1, 2)
    field = "OutputDataConfig.S3OutputPath" if name == "OUTPUT_URI" else "CheckpointConfig.S3Uri"
    assert re.search(rf"{re.escape(field)}(: | = ')file://", result.stderr) and "Traceback" not in result.stderr
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("command", [("plan",), ("run", "--yes", "--detach")])
def test_a_remote_job_needs_this_machine_for_its_checkpoints_alone(command, demo_data, tmp_path, monkeypatch):
    started: list[str] = []
    monkeypatch.setattr(SshTarget, "submit", lambda _, submission, **__: started.append(submission.name))
    (tmp_path / "file").write_text("")
    verb, *flags = command
    words = (verb, EMBED, "--target", "ssh://user@203.0.113.7", *flags, "--set")
    result = call(*words, f"OUTPUT_URI=file://{tmp_path}/file/out")
    assert result.exit_code == 0, result.stderr
    assert len(started) == (verb == "run")
    result = call(*words, f"CHECKPOINT_URI=file://{tmp_path}/file/checkpoints")
    assert result.exit_code == 2
    assert f"CheckpointConfig.S3Uri: file://{tmp_path}/file/checkpoints" in result.stderr
    assert len(started) == (verb == "run")


def test_an_input_that_cannot_be_read_is_named(demo_data, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("estiba_launch.jobs.mirror.os.scandir", refuse)
    result = call("plan", EMBED, "--target", "local")
    assert result.exit_code != 0
    assert "file://runs/demo/input: Permission denied" in result.stderr and "Traceback" not in result.stderr


def test_plan_prints_the_submission_to_the_byte():
    result = call("plan", EMBED, "--target", "local", "--gpus", "none", "--set", "JOB_NAME=exact")
    job = jobfile.load(Path(EMBED), registry.parse("local"), {"JOB_NAME": "exact"})
    assert result.stdout == operations.prepare(job).render()


def test_a_setting_that_the_job_file_does_not_use_is_reported_with_the_nearest_name(demo_data):
    result = call("plan", EMBED, "--target", "local", "--set", "MODLE=x", "--set", "MODEL=y")
    assert result.exit_code == 0
    assert f"--set MODLE: {EMBED} does not use ${{MODLE}}; did you mean MODEL?" in result.stderr
    assert "--set MODEL:" not in result.stderr


@pytest.mark.parametrize("command", [("run", EMBED), ("launch", "--image", "i:1", "--no-spot")])
@pytest.mark.parametrize(
    ("words", "exit_code", "message"),
    [
        (("--max-cost", "3"), 2, "the price of ssh://user@host is unknown; pass --usd-per-h"),
        (("--max-cost", "0.01", "--usd-per-h", "2"), 3, "more than --max-cost 0.01"),
        (("--max-cost", "500", "--usd-per-h", "2"), 2, "pass --yes to start"),
    ],
)
def test_max_cost_applies_to_an_ssh_host_whose_price_the_user_passes(command, words, exit_code, message):
    result = call(*command, "--target", "ssh://user@host", *words)
    assert result.exit_code == exit_code
    assert message in result.stderr


@pytest.mark.parametrize(
    "command",
    [
        ("run", EMBED, "--set", "IMAGE=210987654321.dkr.ecr.us-east-1.amazonaws.com/embed:1"),
        ("launch", "--image", "210987654321.dkr.ecr.us-east-1.amazonaws.com/embed:1", "--s3-bucket", "bucket"),
    ],
)
def test_a_fallback_runs_the_job_here_with_a_loud_warning(command, monkeypatch):
    started = []

    def start(submission, report):
        if submission.target.on_aws:
            raise AwsUnavailable("no credentials; run `aws configure`")
        started.append(submission)

    monkeypatch.setattr(operations, "start", start)
    for name in ("DATASET_URI", "MODEL_URI", "OUTPUT_URI", "CHECKPOINT_URI"):
        monkeypatch.setenv(name, f"s3://bucket/{name.lower()}")
    monkeypatch.setenv("ROLE_ARN", "arn:aws:iam::210987654321:role/Train")
    words = (*command, "--target", "sagemaker", "--yes", "--detach")
    result = call(*words, "--fallback", "local")
    assert result.exit_code == 0, result.stderr
    assert "** NOT ON AWS: fallback local" in result.stderr
    assert [str(one.target) for one in started] == ["local"]
    assert result.stdout.strip() == started[0].name
    refused = call(*words)
    assert refused.exit_code == 1
    assert "the same" in refused.stderr
    assert "NOT ON AWS" not in refused.stderr
    assert call(*words, "--fallback", "ssh://user@host").exit_code == 2


def test_a_status_is_summarized_in_a_few_lines():
    document = {
        "TrainingJobName": "job-1",
        "TrainingJobStatus": "Failed",
        "SecondaryStatus": "Failed",
        "FailureReason": "AlgorithmError: exit code 1",
        "CreationTime": "2026-09-27T12:30:05Z",
        "TrainingTimeInSeconds": 90,
        "FinalMetricDataList": [{"MetricName": "loss", "Value": 0.25, "Timestamp": 0}],
        "ModelArtifacts": {"S3ModelArtifacts": "file:///m.tar.gz"},
        "Estiba": {
            "Attempts": [
                {
                    "Number": 1,
                    "StartTime": "12:30",
                    "Hosts": ["algo-1"],
                    "Outcome": "Failed",
                    "ExitCodes": {"algo-1": 1},
                    "RestoredFiles": 3,
                }
            ]
        },
    }
    assert render.summary(JobStatus.from_json(document)).splitlines() == [
        "job-1: Failed (Failed)",
        "  reason    AlgorithmError: exit code 1",
        "  attempt 1 12:30 Failed (exit algo-1 1), restored 3 files",
        "  time      1.5 min",
        "  metric    loss = 0.25",
        "  model     file:///m.tar.gz",
    ]
    running = {**document, "TrainingJobStatus": "InProgress", "SecondaryStatus": "Training"}
    running["Estiba"] = {**document["Estiba"], "Supervised": False}
    row = render.job_row(JobStatus.from_json(running))
    assert row.split() == ["job-1", "Orphaned", "1", "attempts", "2026-09-27T12:30:05Z", "local"]


@pytest.mark.parametrize(
    "words",
    [
        ("plan", "nowhere.yaml"),
        ("plan", EMBED, "--target", "moon"),
        ("plan", EMBED, "--set", "MODEL"),
        ("plan", EMBED, "--target", "local", "--gpus", "two"),
        ("plan", EMBED, "--notice-saves", "3"),
        ("plan",),
        ("plan", EMBED, "--prices", "none.json"),
        ("prices", "refresh", "nowhere"),
    ],
)
def test_invalid_input_exits_2_with_a_message_and_no_traceback(words):
    result = call(*words)
    assert result.exit_code == 2
    assert result.stderr.strip()
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "words",
    [
        ("run", EMBED, "--max-cost", "nan"),
        ("run", EMBED, "--max-cost", "inf"),
        ("run", EMBED, "--max-cost", "-1"),
        ("launch", "--image", "i:1", "--no-spot", "--max-cost", "nan"),
        ("run", EMBED, "--usd-per-h", "inf"),
        ("run", EMBED, "--sync-every-s", "inf"),
        ("interrupt", "--capacity-wait-s", "inf"),
        ("drill", EMBED, "--log-interval-s", "inf"),
    ],
)
def test_a_limit_that_is_no_finite_amount_is_refused_and_nothing_starts(words, demo_data, monkeypatch):
    monkeypatch.setattr(operations, "start", lambda *_: pytest.fail("started"))
    result = call(*words)
    assert result.exit_code == 2
    assert words[-2] in result.stderr


def test_a_job_in_a_pipe_is_refused_since_it_is_read_more_than_once(tmp_path):
    os.mkfifo(tmp_path / "job.yaml")
    result = call("plan", str(tmp_path / "job.yaml"), "--set", "MODEL=x")
    assert result.exit_code == 2
    assert "a pipe or device; write the job to a file" in result.stderr


@pytest.mark.parametrize("words", [("list",), ("status", "--json"), ("resume",)])
def test_a_file_that_cannot_be_used_is_named_without_a_traceback(words, monkeypatch):
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "/state/jobs/a/request.json")

    monkeypatch.setattr("estiba_launch.jobs.directory.job_names", refuse)
    result = call(*words)
    assert result.exit_code == 1
    assert result.stderr == (
        "estiba: /state/jobs/a/request.json: Permission denied; correct the path, its permissions or the space there\n"
    )


@pytest.mark.parametrize(
    ("place", "remedy"),
    [
        ("file", "move away"),
        ("file/deeper", "move away"),
        ("n" * 300, "File name too long; a file's name may have 255"),
    ],
)
def test_results_are_fetched_into_a_folder_and_what_is_none_is_named(place, remedy, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/model.tar.gz").write_bytes(b"")
    (tmp_path / "file").write_text("")
    with pytest.raises(HostError, match=remedy):
        artifacts.download(f"file://{tmp_path}/out/model.tar.gz", tmp_path / place / "model")


def test_prices_prints_a_table_or_json():
    assert "ml.g4dn.xlarge" in call("prices", "--only", "g4dn").stdout
    document = json.loads(call("prices", "--only", "g5.xlarge", "--json").stdout)
    assert [entry["name"] for entry in document] == ["ml.g5.xlarge"]


def test_doctor_has_a_remedy_for_a_missing_engine(monkeypatch):
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere/docker.sock")
    result = call("doctor", "--offline", "--json")
    assert result.exit_code == 1
    by_name = {check["name"]: check for check in json.loads(result.stdout)}
    assert by_name["docker"]["status"] == "fail"
    assert "make engine" in by_name["docker"]["remedy"]


def test_the_cli_reference_is_up_to_date():
    page = (ROOT / "docs/cli.md").read_text("utf-8")
    script = runpy.run_path(str(ROOT / "scripts/cli_reference.py"))
    assert page == script["text"](), "run: python scripts/cli_reference.py"
