"""Job files: text stays text, variables are filled in, and every undefined one is reported at once."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from estiba_launch.errors import InvalidJob, LaunchError
from estiba_launch.jobfile import load, read_tree
from estiba_launch.target import Target
from estiba_launch.variables import Undefined, Variables, parse_settings, read_env_file

NOW = datetime.datetime(2026, 9, 27, 12, 30, 5, tzinfo=datetime.UTC)
LOCAL = Target.parse("local")
SAGEMAKER = Target.parse("sagemaker")
# Eight names for eight names for ... : 8^8 values from ten lines.
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 8)}]\n" for i in range(1, 9)
)


@pytest.fixture
def write(tmp_path, monkeypatch, good):
    """write(changes, text=None) puts a job file down in an empty current directory."""
    monkeypatch.chdir(tmp_path)

    def put(changes: dict | None = None, text: str | None = None) -> Path:
        path = tmp_path / "embed" / "job.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text if text is not None else yaml.safe_dump({**good, **(changes or {})}))
        return path

    return put


def expand(text: str, **values: str) -> tuple[str, list[Undefined]]:
    undefined: list[Undefined] = []
    return Variables([values]).expand(text, undefined), undefined


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("${A}", "1"),
        ("x${A}y${A}z", "x1y1z"),
        ("${NO:-two}", "two"),
        ("${EMPTY:-two}", "two"),
        ("${EMPTY}", ""),
        ("${NO:-a-${A}-b}", "a-1-b"),
        ("${NO:-${NEITHER:-deep}}", "deep"),
        ("${A:?needed}", "1"),
        ("$${A}", "${A}"),
        ("$${NO:-${A}}", "${NO:-${A}}"),
        ("$${A}${A}", "${A}1"),
        ("cost $5, $A, {A}", "cost $5, $A, {A}"),
        ("${NO:-}", ""),
    ],
)
def test_variables_are_filled_in(text, expected):
    assert expand(text, A="1", EMPTY="") == (expected, [])


@pytest.mark.parametrize(
    "text", ["${", "${A", "${A-b}", "${1}", "${}", "${A B}", "${NO}", "${NO:?why}", "${EMPTY:?why}"]
)
def test_what_cannot_be_filled_in_is_reported(text):
    assert len(expand(text, A="1", EMPTY="")[1]) == 1


@given(st.text(st.sampled_from("${}:-?AB1"), max_size=20))
def test_no_text_makes_the_expansion_fail(text):
    expand(text, A="1")


@given(st.text().filter(lambda value: "${" not in value))
def test_text_without_variables_is_untouched(text):
    assert expand(text) == (text, [])


def test_a_value_is_not_expanded_again():
    assert expand("${A}", A="${B}", B="no") == ("${B}", [])


def test_set_wins_over_the_environment_and_that_over_env_files(write, tmp_path):
    path = write({"HyperParameters": {"a": "${A}", "b": "${B}", "c": "${C}", "d": "${D}"}})
    (path.parent / ".env").write_text("A=beside\nB=beside\nC=beside\nexport D='be side' # note\n")
    (tmp_path / ".env").write_text("A=here\nB=here\nC=here\n")
    job = load(path, LOCAL, {"A": "set"}, {"A": "environment", "B": "environment"})
    assert job.request["HyperParameters"] == {"a": "set", "b": "environment", "c": "here", "d": "be side"}
    assert job.variables["C"] == "here"


def test_all_undefined_variables_are_reported_at_once(write):
    path = write({"HyperParameters": {"a": "${ONE}", "b": "${TWO:?the second}", "c": "${THREE}${FOUR}"}})
    with pytest.raises(InvalidJob) as error:
        load(path, LOCAL, {}, {})
    text = str(error.value)
    assert all(name in text for name in ("ONE", "TWO", "THREE", "FOUR", "the second", "HyperParameters.c"))
    assert len(error.value.problems) == 4


def test_numbers_keep_the_text_that_stands_in_the_file(write, good):
    hyper = (
        "{lr: 1e-4, rate: 0.10, pad: 0512, on: on, yes: true, when: 2026-01-01, time: 1:30, big: 10000000000000000000}"
    )
    text = yaml.safe_dump({**good, "HyperParameters": "HERE"}).replace(
        "HyperParameters: HERE", f"HyperParameters: {hyper}"
    )
    job = load(write(text=text), LOCAL, {}, {})
    assert job.request["HyperParameters"] == {
        "lr": "1e-4", "rate": "0.10", "pad": "0512", "on": "on", "yes": "true", "when": "2026-01-01", "time": "1:30",
        "big": "10000000000000000000",
    }  # fmt: skip


def test_variables_may_stand_where_the_api_wants_a_number_or_a_flag(write):
    resources = {"InstanceType": "ml.g4dn.xlarge", "InstanceCount": "${N}", "VolumeSizeInGB": "${GB:-30}"}
    job = load(
        write({"ResourceConfig": resources, "EnableManagedSpotTraining": "${SPOT}"}),
        LOCAL,
        {"N": "2", "SPOT": "true"},
        {},
    )
    assert job.request["ResourceConfig"]["InstanceCount"] == 2
    assert job.request["ResourceConfig"]["VolumeSizeInGB"] == 30
    assert job.request["EnableManagedSpotTraining"] is True


def test_a_local_job_needs_no_role_and_does_not_expand_one(write):
    job = load(write({"RoleArn": "${ROLE_ARN:?your role}"}), LOCAL, {}, {})
    assert "RoleArn" not in job.request
    with pytest.raises(InvalidJob, match="your role"):
        load(write({"RoleArn": "${ROLE_ARN:?your role}"}), SAGEMAKER, {}, {})


def test_a_wrong_value_names_the_variable_it_came_from(write, good):
    good["OutputDataConfig"]["S3OutputPath"] = "${OUT:-file://out}"
    with pytest.raises(InvalidJob, match=r"file://out.*written \$\{OUT:-file://out\}"):
        load(write(), SAGEMAKER, {}, {})


def test_a_job_without_a_name_is_named_after_its_folder_and_the_time(write, good):
    del good["TrainingJobName"]
    assert load(write(), LOCAL, {}, {}, NOW).name == "embed-20260927-123005"


def test_the_job_name_can_be_used_in_the_rest_of_the_file(write):
    checkpoints = {"S3Uri": "s3://bucket/${TRAINING_JOB_NAME}/checkpoints"}
    job = load(
        write({"TrainingJobName": "e-${ESTIBA_TIMESTAMP}", "CheckpointConfig": checkpoints}),
        LOCAL, {}, {"TRAINING_JOB_NAME": "stale"}, NOW,
    )  # fmt: skip
    assert job.request["CheckpointConfig"]["S3Uri"] == "s3://bucket/e-20260927-123005/checkpoints"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: !!python/object/apply:os.system ['true']", "not plain YAML"),
        ("a: 1\na: 2", "'a' is given twice"),
        ("a: [", "not plain YAML"),
        ("- a", "not a CreateTrainingJob request"),
        ("", "not a CreateTrainingJob request"),
        ("? [a]\n: b", "plain text"),
        ("a: &a [*a]", "unfolds|found"),
        (BOMB, "unfolds to more than"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_plain_yaml_is_refused(text, says, write):
    with pytest.raises(LaunchError, match=says):
        read_tree(write(text=text))


def test_a_missing_file_is_refused_with_its_path(tmp_path):
    with pytest.raises(LaunchError, match=r"nowhere\.yaml"):
        read_tree(tmp_path / "nowhere.yaml")


def test_settings_and_env_files_that_are_no_assignments_are_refused_without_showing_them(tmp_path):
    with pytest.raises(LaunchError, match="NAME=VALUE"):
        parse_settings(["IMAGE"])
    (tmp_path / ".env").write_text("OK=1\nhunter2\n")
    with pytest.raises(LaunchError, match=r"\.env:2") as error:
        read_env_file(tmp_path / ".env")
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize(
    "text", ["loca", "ssh://", "ssh://-oProxyCommand=x", "ssh://a:b@host", "ssh://u@h:port", "http://h"]
)
def test_a_target_that_is_none_is_refused(text):
    with pytest.raises(LaunchError, match="--target"):
        Target.parse(text)


def test_an_ssh_target_is_taken_apart():
    assert Target.parse("ssh://root@10.0.0.1:2222") == Target("ssh", "root", "10.0.0.1", 2222)
    assert str(Target.parse("ssh://box")) == "ssh://box"
