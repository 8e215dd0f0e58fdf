"""Secrets are refused by field and never shown."""

from __future__ import annotations

import json

import pytest

from estiba_launch.errors import InvalidJob
from estiba_launch.request.jobfile import load
from estiba_launch.request.secrets import secret_name, secret_value
from estiba_launch.targets import registry

# Put together at run time: a scanner that reads this file must find nothing.
AWS_KEY = "AKIA" + "IOSFODNN7" + "EXAMPLE"
AWS_SECRET = "wJalrXUtnFEMI/K7MDENG" + "/bPxRfiCYEXAMPLEKEY"
HF_TOKEN = "hf_" + "abcdefghijklmnopqrstuvwxyzABCDEFGH"
GITHUB = "ghp_" + "a1B2" * 9
JWT = "eyJhbGciOiJIUzI1NiJ9" + ".eyJzdWIiOiIxMjM0NTY3" + ".SflKxwRJSMeKKF2QT4fw"


@pytest.mark.parametrize("value", [AWS_KEY, AWS_SECRET, HF_TOKEN, GITHUB, JWT, f"https://me:{GITHUB}@host/x.git"])
@pytest.mark.parametrize("block", ["HyperParameters", "Environment"])
def test_a_secret_value_is_refused_and_never_printed(block, value, good, problems_of):
    good[block]["NOTE"] = value
    (problem,) = problems_of(good)
    assert problem.field == f"{block}.NOTE"
    assert value not in str(problem)


@pytest.mark.parametrize("name", ["HF_TOKEN", "db-password", "apiKey", "AWS_SECRET_ACCESS_KEY", "CLIENT_SECRET"])
def test_a_name_that_holds_secrets_is_refused_whatever_its_value(name, good, problems_of):
    good["HyperParameters"][name] = "tr0ub4dor"
    (problem,) = problems_of(good)
    assert problem.field == f"HyperParameters.{name}"
    assert "tr0ub4dor" not in str(problem)


def test_a_secret_that_also_breaks_a_limit_is_still_not_printed(good, problems_of):
    good["Environment"]["WANDB_API_KEY"] = "0123456789abcdef" * 40
    assert all("0123456789abcdef" not in str(problem) for problem in problems_of(good))
    assert [problem.field for problem in problems_of(good)] == ["Environment.WANDB_API_KEY"]


@pytest.mark.parametrize("value", ["9", "a.", "-eyJ0", "ghp_"])
def test_a_very_long_value_is_searched_in_no_time(value):
    # Quadratic patterns took minutes; this test's own time limit would end it.
    assert secret_value(value * (1 << 20)) is None


def test_secrets_in_tags_arguments_and_addresses_are_found(good, problems_of):
    good["Tags"] = [{"Key": "password", "Value": "hunter2"}]
    good["AlgorithmSpecification"]["ContainerArguments"] = ["--token", HF_TOKEN]
    good["OutputDataConfig"]["S3OutputPath"] = f"s3://bucket/{AWS_KEY}"
    problems = problems_of(good)
    assert {problem.field for problem in problems} == {
        "Tags[0].Value",
        "AlgorithmSpecification.ContainerArguments[1]",
        "OutputDataConfig.S3OutputPath",
    }
    text = " ".join(map(str, problems))
    assert not [secret for secret in ("hunter2", HF_TOKEN, AWS_KEY) if secret in text]


@pytest.mark.parametrize(
    "name",
    ["max_tokens", "eos_token", "tokenizer", "token-budget", "pad_token_id", "primary_key", "keys", "mask-token"],
)
def test_names_of_language_modelling_are_no_secrets(name):
    assert not secret_name(name)


def test_a_reference_to_a_secret_is_allowed(good, problems_of):
    good["Environment"]["HF_TOKEN"] = "arn:aws:secretsmanager:us-east-1:210987654321:secret:hf"
    assert problems_of(good) == ()


def test_a_git_commit_is_no_secret(good, problems_of):
    good["HyperParameters"]["revision"] = "5617a9f61b028005a4858fdac845db406aefb181"
    assert problems_of(good) == ()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("DB", "postgres://user:hunter2@${HOST}/db"),
        ("T", "${P}" + HF_TOKEN),
        ("T", "${X:?" + HF_TOKEN + "}"),
        ("T", "${X-" + HF_TOKEN + "}"),
        ("T", "${" + HF_TOKEN + "}"),
        ("PGPASSWORD", "${X-hunter2}"),
    ],
)
def test_a_secret_beside_an_undefined_variable_is_not_printed(name, text, good, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good["Environment"] = {name: text, "OTHER": "${PLAIN}"}
    (tmp_path / "job.yaml").write_text(json.dumps(good))
    with pytest.raises(InvalidJob) as error:
        load(tmp_path / "job.yaml", registry.parse("local"), {}, {})
    shown = str(error.value)
    assert "hunter2" not in shown and HF_TOKEN not in shown
    assert f"Environment.{name} (value hidden)" in shown
    assert "Environment.OTHER = '${PLAIN}': PLAIN is not defined" in shown


def test_a_default_with_a_secret_is_not_printed_when_the_value_is_wrong(good, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good["ResourceConfig"]["InstanceCount"] = "${N:-" + HF_TOKEN + "}"
    (tmp_path / "job.yaml").write_text(json.dumps(good))
    with pytest.raises(InvalidJob, match="InstanceCount = 'many'") as error:
        load(tmp_path / "job.yaml", registry.parse("local"), {"N": "many"}, {})
    assert HF_TOKEN not in str(error.value)


@pytest.mark.parametrize(
    "name", ["MLFLOW_TRACKING_TOKEN", "PGPASSWORD", "KAGGLE_KEY", "DATABRICKS_TOKEN", "DB_PASS", "GH_PAT", "GH_TOKEN"]
)
def test_names_of_common_services_secrets_are_known(name):
    assert secret_name(name)


@pytest.mark.parametrize("name", ["forward_pass", "passes", "pat", "password_length", "single-pass", "sort_key"])
def test_names_that_only_resemble_secrets_are_allowed(name):
    assert not secret_name(name)
