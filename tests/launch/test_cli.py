"""The command: data on stdout, the rest on stderr, exit codes, and the generated page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from estiba_launch import docs
from estiba_launch.cli import app

ROOT = Path(__file__).parents[2]
EMBED = str(ROOT / "images/embed/job.yaml")


@pytest.fixture(autouse=True)
def own_place(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("ESTIBA_STATE", str(tmp_path / "state"))
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION", "ROLE_ARN", "IMAGE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def call(*words: str):
    return CliRunner().invoke(app, list(words))


def test_plan_json_is_one_document_on_stdout():
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


def test_plan_without_a_target_shows_the_one_that_is_ready():
    result = call("plan", EMBED)
    assert result.exit_code == 0
    assert "not ready for --target sagemaker" in result.stderr
    assert "docker run" in result.stdout


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


def test_prices_lists_the_table_and_as_json():
    assert "ml.g4dn.xlarge" in call("prices", "--only", "g4dn").stdout
    document = json.loads(call("prices", "--only", "g5.xlarge", "--json").stdout)
    assert [entry["name"] for entry in document] == ["ml.g5.xlarge"]


def test_doctor_says_what_to_do_about_an_engine_that_is_not_there(monkeypatch):
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere/docker.sock")
    result = call("doctor", "--offline", "--json")
    assert result.exit_code == 1
    by_name = {check["name"]: check for check in json.loads(result.stdout)}
    assert by_name["docker"]["status"] == "fail"
    assert "make engine" in by_name["docker"]["remedy"]


def test_the_page_of_commands_is_up_to_date():
    page = (ROOT / "docs/cli.md").read_text("utf-8")
    assert page == docs.text(), "run: python -m estiba_launch.docs > docs/cli.md"
