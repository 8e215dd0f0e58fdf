"""Job files: text stays text, variables are filled in, and every undefined one is reported at once."""

from __future__ import annotations

import datetime
import json
import shlex
import subprocess
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from estiba_launch.errors import InvalidJob, LaunchError
from estiba_launch.request import variables
from estiba_launch.request.address import TargetAddress
from estiba_launch.request.contract import Host, file_path
from estiba_launch.request.jobfile import load, read_tree
from estiba_launch.request.options import HostOptions, read_options
from estiba_launch.request.variables import ENV_LINES, Undefined, parse_settings, read_container_env, read_env_file
from estiba_launch.targets import registry
from estiba_launch.targets.docker_command import Container
from estiba_launch.targets.local.engine import Engine

NOW = datetime.datetime(2026, 9, 27, 12, 30, 5, 7, tzinfo=datetime.UTC)
LOCAL = registry.parse("local")
SAGEMAKER = registry.parse("sagemaker")
# Eight names for eight names for ... : 8^8 values from ten lines.
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 8)}]\n" for i in range(1, 9)
)
# The same with merge keys, which the YAML library expands before anything can be counted.
LAYERS = [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 10)]
MERGE_BOMB = "a0: &a0 {k: v}\n" + "".join(LAYERS)


@pytest.fixture
def write(tmp_path, monkeypatch, good):
    """write(changes, text=None) writes a job file in an empty current directory."""
    monkeypatch.chdir(tmp_path)

    def put(changes: dict | None = None, text: str | None = None) -> Path:
        path = tmp_path / "embed" / "job.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text if text is not None else yaml.safe_dump({**good, **(changes or {})}))
        return path

    return put


def expand(text: str, **values: str) -> tuple[str, list[Undefined]]:
    undefined: list[Undefined] = []
    return variables.expand(text, values, undefined), undefined


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
def test_a_variable_that_cannot_be_filled_in_is_reported(text):
    assert len(expand(text, A="1", EMPTY="")[1]) == 1


def test_nested_defaults_are_bounded():
    _, undefined = expand("${NO:-" * 5000 + "}" * 5000)
    assert "default" in (undefined[0].message or "")
    assert expand("${NO:-" * 40 + "deep" + "}" * 40) == ("deep", [])


@given(st.text(st.sampled_from("${}:-?AB1"), max_size=20))
def test_the_expansion_never_raises(text):
    expand(text, A="1")


@given(st.text().filter(lambda value: "${" not in value))
def test_text_without_variables_is_untouched(text):
    assert expand(text) == (text, [])


def test_a_value_is_not_expanded_again():
    assert expand("${A}", A="${B}", B="no") == ("${B}", [])


def test_set_overrides_the_environment_which_overrides_env_files(write, tmp_path):
    path = write({"HyperParameters": {"a": "${A}", "b": "${B}", "c": "${C}", "d": "${D}"}})
    (path.parent / ".env").write_text("A=beside\nB=beside\nC=beside\nexport D='be side' # note\n")
    (tmp_path / ".env").write_text("A=here\nB=here\nC=here\n")
    job = load(path, LOCAL, {"A": "set"}, {"A": "environment", "B": "environment"})
    assert job.request["HyperParameters"] == {"a": "set", "b": "environment", "c": "here", "d": "be side"}


def test_all_undefined_variables_are_reported_at_once(write):
    path = write({"HyperParameters": {"a": "${ONE}", "b": "${TWO:?the second}", "c": "${THREE}${FOUR}"}})
    with pytest.raises(InvalidJob) as error:
        load(path, LOCAL, {}, {})
    text = str(error.value)
    assert all(name in text for name in ("ONE", "TWO", "THREE", "FOUR", "the second", "HyperParameters.c"))
    assert len(error.value.problems) == 4


def test_numbers_keep_their_text_from_the_file(write, good):
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


def test_a_variable_can_be_a_number_or_a_flag(write):
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


def test_a_wrong_value_names_its_variable(write, good):
    good["OutputDataConfig"]["S3OutputPath"] = "${OUT:-file://out}"
    with pytest.raises(InvalidJob, match=r"file://out.*from \$\{OUT:-file://out\}"):
        load(write(), SAGEMAKER, {}, {})


def test_a_job_without_a_name_is_named_after_its_folder_and_the_time(write, good):
    del good["TrainingJobName"]
    assert load(write(), LOCAL, {}, {}, NOW).name == "embed-20260927-123005-000007"


@pytest.mark.parametrize("named", [{}, {"TrainingJobName": "${JOB_NAME:-embed-${ESTIBA_TIMESTAMP}}"}])
def test_unnamed_jobs_of_one_second_have_different_names(named, write, good):
    del good["TrainingJobName"]
    moments = [NOW.replace(microsecond=one) for one in (0, 1, 999_999)]
    names = [load(write(named), LOCAL, {}, {}, moment).name for moment in moments]
    assert names == sorted(set(names)) and len(names) == 3


def test_the_longest_generated_name_is_valid(write, good, tmp_path):
    del good["TrainingJobName"]
    path = write().parent.rename(tmp_path / ("a-very-long-folder-name" * 5)) / "job.yaml"
    assert len(load(path, SAGEMAKER, {}, {}, NOW).name) == 63


def test_the_job_name_can_be_used_in_the_rest_of_the_file(write):
    checkpoints = {"S3Uri": "s3://bucket/${TRAINING_JOB_NAME}/checkpoints"}
    job = load(
        write({"TrainingJobName": "e-${ESTIBA_TIMESTAMP}", "CheckpointConfig": checkpoints}),
        LOCAL, {}, {"TRAINING_JOB_NAME": "stale"}, NOW,
    )  # fmt: skip
    assert job.request["CheckpointConfig"]["S3Uri"] == "s3://bucket/e-20260927-123005-000007/checkpoints"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: !!python/object/apply:os.system ['true']", "not plain YAML"),
        ("a: 1\na: 2", "'a' appears twice"),
        ("a: [", "not plain YAML"),
        ("- a", "not a CreateTrainingJob request"),
        ("", "not a CreateTrainingJob request"),
        ("? [a]\n: b", "plain text"),
        ("a: &a [*a]", "contains it"),
        (BOMB, "holds more than"),
        (MERGE_BOMB, "holds more than"),
        ("a: " + "[" * 1000, "nested deeper than"),
        ("{a: " * 200_000, "nested deeper than"),
        ("- " * 400_000, "nested deeper than"),
        ("a:\n" + "- x\n" * 200_000, "holds more than"),
        ("a: &a {<<: *a}", "contains it"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_plain_yaml_is_refused(text, message, write):
    with pytest.raises(LaunchError, match=message):
        read_tree(write(text=text))


def test_a_missing_file_is_refused_with_its_path(tmp_path):
    with pytest.raises(LaunchError, match=r"nowhere\.yaml"):
        read_tree(tmp_path / "nowhere.yaml")


def test_settings_that_are_not_assignments_are_refused():
    with pytest.raises(LaunchError, match="NAME=VALUE"):
        parse_settings(["IMAGE"])


def env_file(text: str | bytes, path: Path) -> tuple[dict[str, str], list[str]]:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    notes: list[str] = []
    return read_env_file(path, notes), notes


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_an_env_file_from_a_windows_editor_is_read(encoding, tmp_path):
    text = "IMAGE=estiba/embed:local\r\nN=2\r\n".encode(encoding)
    assert env_file(text, tmp_path / ".env") == ({"IMAGE": "estiba/embed:local", "N": "2"}, [])


def test_dashed_names_and_multi_line_values_are_read(tmp_path):
    text = "my-name=1\nPEM=\"first\nsecond\"\n\nA='$B' # kept as it is\n"
    assert env_file(text, tmp_path / ".env") == ({"my-name": "1", "PEM": "first\nsecond", "A": "$B"}, [])


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (b"OK=1\nhunter2\nLAST=3\n", 2),
        (b"OK=1\n=hunter2\nLAST=3\n", 2),
        (b"OK=1\nA='hunter2\nLAST=3\n", 2),
        (b'OK=1\nA="hunter2" x\nLAST=3\n', 2),
        (b"OK=1\nA=hunter2 \xf1\nLAST=3\n", 2),
        (b"OK='1'\n\n\nB hunter2\nLAST=3\n", 4),
    ],
)
def test_an_invalid_env_file_line_is_reported_without_its_text_and_the_others_are_read(text, line, tmp_path):
    values, notes = env_file(text, tmp_path / ".env")
    assert values == {"OK": "1", "LAST": "3"}
    assert [note.partition(": ignored")[0] for note in notes] == [f"{tmp_path}/.env:{line}"]
    assert "hunter2" not in notes[0]


def test_an_env_file_that_is_a_folder_or_too_large_is_ignored_with_a_note(tmp_path):
    (tmp_path / ".env").mkdir()
    notes: list[str] = []
    assert read_env_file(tmp_path / ".env", notes) == {}
    assert env_file("A=1\n" + "#" * (1 << 20), tmp_path / "large")[0] == {}
    assert "directory" in notes[0]


def test_a_job_loads_despite_an_invalid_env_file_line_and_has_a_note(write, tmp_path):
    path = write({"HyperParameters": {"a": "${A}"}})
    (tmp_path / ".env").write_text("A=1\nhunter2\n")
    job = load(path, LOCAL, {}, {})
    assert job.request["HyperParameters"] == {"a": "1"}
    assert job.notes == (".env:2: ignored, not NAME=VALUE; write one per line, comments start with #",)


CONTAINER_ENV = b"""\xef\xbb\xbfA=1\r
# a comment\r
\r
  export TOKEN="hf x" # the note
my-name=3
JSON='{"a": 1}'
C = x#y # z\x20\x20
EMPTY=
NONE=""
F=a=b="c"
A=2
\tG=ta\tb\x20
N=\xc3\xb1
I="it's"
J=$HOME `x` \\n"""
CONTAINER_VALUES = {
    "A": "2", "TOKEN": "hf x", "my-name": "3", "JSON": '{"a": 1}', "C": "x#y", "EMPTY": "", "NONE": "", "F": 'a=b="c"',
    "G": "ta\tb", "N": "ñ", "I": "it's", "J": "$HOME `x` \\n",
}  # fmt: skip


def test_a_container_env_file_is_read_the_same_here_and_in_a_printed_script(tmp_path):
    path = tmp_path / "my env"
    path.write_bytes(CONTAINER_ENV)
    assert read_container_env(path) == CONTAINER_VALUES
    words = ["sh", "-c", f'{ENV_LINES}\nenv_lines "$1"', "sh", str(path)]
    lines = subprocess.run(words, capture_output=True, check=True).stdout.decode().splitlines()
    assert dict(line.split("=", 1) for line in lines if line) == CONTAINER_VALUES


@pytest.mark.docker
def test_docker_reads_the_lines_of_a_printed_script_as_estiba_does(tmp_path, embed_image):
    (tmp_path / "env").write_bytes(CONTAINER_ENV)
    code = "import json, os; print(json.dumps(dict(os.environ)))"
    run = ["docker", "run", "--rm", "--network=none", "--env-file=/dev/stdin", "--entrypoint=python", embed_image]
    words = ["sh", "-c", f"{ENV_LINES}\nenv_lines {tmp_path}/env | {shlex.join([*run, '-c', code])}"]
    environment = json.loads(subprocess.run(words, capture_output=True, check=True).stdout)
    assert {name: environment.get(name) for name in CONTAINER_VALUES} == CONTAINER_VALUES


@pytest.mark.parametrize(
    "text", ["A=1\nhunter2\n", "A=1\nB='hunter2\nx'\n", 'A=1\nB="hunter2" x\n', "A=1\nB C=hunter2\n", "A=1\n=hunter2\n"]
)
def test_an_invalid_container_env_file_line_is_refused_without_showing_it(text, tmp_path):
    (tmp_path / "env").write_text(text)
    with pytest.raises(LaunchError, match=r"--env-file .*env:2: ") as error:
        read_options(env_file=str(tmp_path / "env"))
    assert "hunter2" not in str(error.value)


def test_the_requests_environment_overrides_the_env_file(tmp_path, monkeypatch):
    (tmp_path / "env").write_text("A=file\nB=file\n")
    host = Host(name="algo-1", instance_type="ml.m5.xlarge", group="g")
    options = HostOptions(env_file=str(tmp_path / "env"))
    container = Container(
        name="c", host=host, image="i", entrypoint=None, arguments=[], environment={"A": "request"}, mounts=[],
        network="n", addresses={}, options=options,
    )  # fmt: skip
    engine = Engine()
    monkeypatch.setattr(engine, "_client", MagicMock())
    engine.start(container)
    environment = engine.client.api.create_container.call_args.kwargs["environment"]
    assert environment == {"A": "request", "B": "file"}


@pytest.mark.parametrize(
    "text", ["loca", "ssh://", "ssh://-oProxyCommand=x", "ssh://a:b@host", "ssh://u@h:port", "ssh://u@h:0", "http://h"]
)
def test_an_invalid_target_is_refused(text):
    with pytest.raises(LaunchError, match="--target"):
        registry.parse(text)


def test_an_ssh_target_is_parsed():
    assert registry.parse("ssh://root@10.0.0.1:2222") == TargetAddress("ssh", "root", "10.0.0.1", 2222)
    assert str(registry.parse("ssh://box")) == "ssh://box"


@pytest.mark.parametrize("text", ["ssh://u@[2001:db8::1]:2222", "ssh://[::1]", "ssh://u@host:2222", "local", "k8s"])
def test_the_text_of_a_target_names_the_same_target(text):
    address = registry.parse(text)
    assert registry.parse(str(address)) == address
    assert str(address) == text


TAGGED = ["!!int abc", "!!bool abc", "!!float abc", "!!timestamp abc"]


@pytest.mark.parametrize("value", TAGGED)
def test_a_value_with_a_tag_is_text_like_any_other(value, write):
    assert read_tree(write(text=f"a: {value}\nb: !!int 5\n")) == {"a": "abc", "b": "5"}


@pytest.mark.parametrize("text", ["a: !!binary aGk=", "a: !!set {b}", "!!int 5: a", "a: !!map b", 'a: "\\UFFFFFFFF"'])
def test_a_tag_without_meaning_in_a_request_is_refused(text, write):
    with pytest.raises(LaunchError, match="not plain YAML"):
        read_tree(write(text=text))


def test_a_name_that_yaml_reads_as_null_stays_text(write):
    assert read_tree(write(text="{null: 5, ~: 6}")) == {"null": "5", "~": "6"}


def test_a_variable_in_a_name_is_refused(write):
    path = write({"HyperParameters": {"${NAME}": "5"}})
    with pytest.raises(InvalidJob, match=r"HyperParameters\.\$\{NAME\}: variables are filled in only in values"):
        load(path, LOCAL, {"NAME": "lr"}, {})


@pytest.mark.parametrize("indent", [None, 2, "\t"])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_any_json_is_read_as_its_yaml_is(indent, ascii_only, write):
    tree = {"emoji": "😀", "line": "a\x85b", "lr": 1e-4, "n": [1, True, None, "x"], "d": {"yes": False, "<<": "k"}}
    text = json.dumps(tree, indent=indent, ensure_ascii=ascii_only)
    read = {"emoji": "😀", "line": "a\x85b", "lr": "0.0001", "n": ["1", "true", None, "x"]}
    assert read_tree(write(text=text)) == {**read, "d": {"yes": "false", "<<": "k"}}


def test_a_json_number_keeps_its_text(write):
    assert read_tree(write(text='{\n\t"a": 0.10, "b": 1e-4, "c": 10000000000000000000}')) == {
        "a": "0.10", "b": "1e-4", "c": "10000000000000000000",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": {"b": 1,\t"b": 2}}', "'b' appears twice"),
        ('{"a": ' * 1000 + "1" + "}" * 1000, "nested deeper than"),
        (json.dumps({"a": ["x"] * 30_000}), "holds more than"),
        ("[1]", "not a CreateTrainingJob request"),
    ],
)
def test_json_has_the_limits_of_yaml(text, message, write):
    with pytest.raises(LaunchError, match=message):
        read_tree(write(text=text))


@pytest.mark.parametrize("uri", ["file://~no-such-user/x", "file:///tmp/" + "x" * 300])
def test_a_path_that_no_disk_can_hold_is_refused(uri):
    with pytest.raises(LaunchError, match=r"file://.*path"):
        file_path(uri)


def test_the_role_comes_from_role_arn_where_the_file_names_none(write, good):
    del good["RoleArn"]
    role = "arn:aws:iam::210987654321:role/Other"
    assert load(write(), SAGEMAKER, {"ROLE_ARN": role}, {}).request["RoleArn"] == role
    with pytest.raises(InvalidJob, match="RoleArn: required and missing; pass --role"):
        load(write(), SAGEMAKER, {}, {})
