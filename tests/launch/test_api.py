"""The Python API and `estiba launch`: the same request as a job file, reproducible source archives."""

from __future__ import annotations

import json
import os
import re
import tarfile
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from estiba_launch.cli.app import app
from estiba_launch.errors import InvalidJob, LaunchError
from estiba_launch.request import build as api
from estiba_launch.request import jobfile, source
from estiba_launch.request.address import TargetAddress
from estiba_launch.request.arguments import Arguments
from estiba_launch.targets import registry

ROOT = Path(__file__).parents[2]
EMBED = ROOT / "images/embed/job.yaml"
ROLE = "arn:aws:iam::210987654321:role/Estiba"
IMAGE = "210987654321.dkr.ecr.us-east-1.amazonaws.com/estiba/embed:1"

EVERYTHING = f"""
TrainingJobName: everything-1
RoleArn: {ROLE}
AlgorithmSpecification:
  TrainingImage: {IMAGE}
  TrainingInputMode: FastFile
  MetricDefinitions:
    - {{Name: loss, Regex: 'loss=([0-9.]+)'}}
  ContainerEntrypoint: [sh, -c, 'exec python -m estiba.platform.entry "$@"', sh]
  ContainerArguments: [--batch-size, '8']
HyperParameters: {{model: BAAI/bge-m3, lr: 1e-05, steps: 3, n-tokens: true, layers: '[1, 2]'}}
Environment: {{HF_HUB_OFFLINE: '1'}}
InputDataConfig:
  - ChannelName: dataset
    DataSource:
      S3DataSource: {{S3DataType: S3Prefix, S3Uri: s3://bucket/data, S3DataDistributionType: ShardedByS3Key}}
    ContentType: application/x-parquet
    InputMode: File
  - ChannelName: model
    DataSource: {{S3DataSource: {{S3DataType: S3Prefix, S3Uri: s3://bucket/model}}}}
OutputDataConfig: {{S3OutputPath: s3://bucket/out, CompressionType: NONE}}
ResourceConfig: {{InstanceType: ml.g5.2xlarge, InstanceCount: 2, VolumeSizeInGB: 100}}
StoppingCondition: {{MaxRuntimeInSeconds: 7200, MaxWaitTimeInSeconds: 10000}}
EnableManagedSpotTraining: true
CheckpointConfig: {{S3Uri: s3://bucket/checkpoints, LocalPath: /opt/ml/checkpoints}}
RetryStrategy: {{MaximumRetryAttempts: 2}}
VpcConfig: {{SecurityGroupIds: [sg-12345678], Subnets: [subnet-12345678]}}
EnableNetworkIsolation: true
EnableInterContainerTrafficEncryption: true
ProfilerConfig: {{DisableProfiler: true}}
Tags:
  - {{Key: team, Value: estiba}}
"""

SAME = {
    "image_uri": IMAGE,
    "output_path": "s3://bucket/out",
    "role": ROLE,
    "job_name": "everything-1",
    "instance_type": "ml.g5.2xlarge",
    "instance_count": 2,
    "volume_size_gb": 100,
    "hyperparameters": {"model": "BAAI/bge-m3", "lr": 1e-5, "steps": 3, "n-tokens": True, "layers": [1, 2]},
    "environment": {"HF_HUB_OFFLINE": "1"},
    "channels": {
        "dataset": api.Channel(
            uri="s3://bucket/data", content_type="application/x-parquet", input_mode="File", sharded=True
        ),
        "model": "s3://bucket/model",
    },
    "input_mode": "FastFile",
    "compress_output": False,
    "use_spot": True,
    "max_run_s": 7200,
    "max_wait_s": 10_000,
    "max_retries": 2,
    "checkpoint_s3_uri": "s3://bucket/checkpoints",
    "container_entrypoint": ["sh", "-c", 'exec python -m estiba.platform.entry "$@"', "sh"],
    "container_arguments": ["--batch-size", "8"],
    "metric_definitions": {"loss": "loss=([0-9.]+)"},
    "subnets": ["subnet-12345678"],
    "security_group_ids": ["sg-12345678"],
    "enable_network_isolation": True,
    "encrypt_inter_container_traffic": True,
    "tags": {"team": "estiba"},
}


@pytest.fixture(autouse=True)
def own_place(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("ESTIBA_STATE", str(tmp_path / "state"))
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION", "ROLE_ARN", "IMAGE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("target", ["sagemaker", "local", "ssh://user@203.0.113.7"])
def test_arguments_give_the_same_request_as_a_job_file(tmp_path, target):
    (tmp_path / "job.yaml").write_text(EVERYTHING)
    where = registry.parse(target)
    written = jobfile.load(tmp_path / "job.yaml", where, {}, {})
    assert api.check_request(where, api.build_request(**SAME)).request == written.request


def test_the_request_of_embed_can_be_built_without_its_file():
    request = api.build_request(
        image_uri=IMAGE,
        output_path="s3://bucket/out",
        role=ROLE,
        job_name="embed-golden",
        hyperparameters={"model": "/opt/ml/input/data/model", "text-column": "texto"},
        channels={
            "dataset": api.Channel(uri="s3://bucket/data", content_type="application/x-parquet"),
            "model": "s3://bucket/model",
        },
        use_spot=True,
        max_run_s=3600,
        checkpoint_s3_uri="s3://bucket/checkpoints",
        metric_definitions={
            "rows_per_s": "rows_per_s=([0-9.eE+-]+)",
            "tokens_per_s": "tokens_per_s=([0-9.eE+-]+)",
        },
        disable_profiler=False,
    )
    values = {
        "JOB_NAME": "embed-golden", "IMAGE": IMAGE, "ROLE_ARN": ROLE, "DATASET_URI": "s3://bucket/data",
        "MODEL_URI": "s3://bucket/model", "OUTPUT_URI": "s3://bucket/out", "CHECKPOINT_URI": "s3://bucket/checkpoints",
    }  # fmt: skip
    where = registry.parse("sagemaker")
    assert api.check_request(where, request).request == jobfile.load(EMBED, where, values, {}).request


def test_every_argument_changes_the_request():
    """None is accepted and ignored."""
    plain = {"image_uri": IMAGE, "output_path": "file://o", "job_name": "j", "checkpoint_s3_uri": "file://c"}
    source = {"source_dir": str(Path(__file__).parent / "sdks"), "entry_point": "v2.py"}
    settings: dict[str, tuple[dict, object]] = {
        "image_uri": ({}, "i"), "role": ({}, ROLE), "job_name": ({}, "k"), "instance_type": ({}, "ml.m5.xlarge"),
        "base_job_name": ({"job_name": None}, "another"),
        "instance_groups": ({}, [{"InstanceGroupName": "g", "InstanceType": "ml.m5.xlarge", "InstanceCount": 1}]),
        "instance_count": ({}, 2), "volume_size_gb": ({}, 31), "volume_kms_key": ({}, "k"), "keep_alive_s": ({}, 60),
        "output_path": ({}, "file://p"), "output_kms_key": ({}, "k"), "compress_output": ({}, False),
        "hyperparameters": ({}, {"a": 1}), "environment": ({}, {"A": "1"}), "channels": ({}, {"d": "file://d"}),
        "input_mode": ({}, "FastFile"), "model_uri": ({}, "file://m"),
        "model_channel_name": ({"model_uri": "file://m"}, "base"), "use_spot": ({}, True), "max_run_s": ({}, 60),
        "max_wait_s": ({}, 60), "max_retries": ({}, 1), "checkpoint_s3_uri": ({}, "file://e"),
        "checkpoint_local_path": ({}, "/opt/ml/checkpoints/x"),
        "source_dir": ({"entry_point": "v2.py"}, source["source_dir"]),
        "entry_point": (source, "v3.py"), "dependencies": (source, [__file__]), "code_location": (source, "s3://b/c"),
        "container_entrypoint": ({}, ["sh"]), "container_arguments": ({}, ["x"]),
        "distribution": ({}, {"torch_distributed": {"enabled": True}}), "metric_definitions": ({}, {"a": "(.)"}),
        "enable_sagemaker_metrics": ({}, True), "subnets": ({}, ["s"]), "security_group_ids": ({}, ["s"]),
        "enable_network_isolation": ({}, True), "encrypt_inter_container_traffic": ({}, True),
        "disable_profiler": ({}, False), "tags": ({}, {"a": "b"}), "s3_bucket": ({}, "b"), "s3_data_prefix": ({}, "p"),
        "config_file": ({}, "c"), "num_training_batches": ({}, 1), "batch_size": ({}, 1),
        "training_repository_access_mode": ({}, "Vpc"), "training_repository_credentials_provider_arn": ({}, "a"),
        "enable_infra_check": ({}, True), "enable_remote_debug": ({}, True), "enable_session_tag_chaining": ({}, True),
        "training_plan": ({}, "a"), "instance_placement_config": ({}, {"EnableMultipleJobs": True}),
        "experiment_config": ({}, {"ExperimentName": "e"}),
    }  # fmt: skip
    assert settings.keys() == Arguments.__annotations__.keys()
    for name, (others, value) in settings.items():
        before = api.build_request(**{**plain, **others})
        after = api.build_request(**{**plain, **others, name: value})
        assert before != after, name
    named = api.build_request(**{**plain, "job_name": None, "base_job_name": "another"}).body["TrainingJobName"]
    assert named.startswith("another-2")


def test_wrong_arguments_are_refused_all_at_once_like_a_wrong_file():
    wrong = {**SAME, "instance_type": "ml.bogus.1x", "max_wait_s": 60, "keep_alive_s": 60, "job_name": "a b"}
    with pytest.raises(InvalidJob) as caught:
        api.build_job(registry.parse("sagemaker"), **wrong)
    fields = {problem.field for problem in caught.value.problems}
    assert {"TrainingJobName", "ResourceConfig.InstanceType", "StoppingCondition.MaxWaitTimeInSeconds"} <= fields
    assert any("KeepAlive" in field for field in fields)
    assert "launch_training_job()" in str(caught.value)


def test_false_and_empty_values_are_left_out_but_zero_is_kept():
    plain = api.build_request(image_uri="x", output_path="file://o", job_name="j")
    empty = {"subnets": [], "security_group_ids": (), "container_entrypoint": [], "enable_network_isolation": False}
    assert api.build_request(image_uri="x", output_path="file://o", job_name="j", **empty) == plain
    zero = api.build_request(image_uri="x", output_path="file://o", keep_alive_s=0)
    assert zero.body["ResourceConfig"]["KeepAlivePeriodInSeconds"] == 0


def test_spot_without_checkpoints_is_refused_with_the_expected_loss():
    with pytest.raises(InvalidJob, match="CheckpointConfig"):
        api.build_job(registry.parse("local"), image_uri="x", output_path="file://o", use_spot=True)


@pytest.mark.parametrize(("value", "message"), [(None, "None is not a value"), ({1, 2}, "JSON")])
def test_a_hyperparameter_that_is_not_a_value_is_refused_by_name(value, message):
    with pytest.raises(LaunchError, match=rf"hyperparameters\['x'\].*{message}"):
        api.build_request(image_uri="x", output_path="file://o", hyperparameters={"x": value})


def test_generated_names_are_unique_and_valid():
    names = {api.unique_name("registry.example/estiba/embed_x:1.0@sha256:00") for _ in range(50)}
    assert len(names) == 50
    assert all(re.fullmatch(r"embed-x-\d{4}(-\d\d){5}(-\d+)?", name) for name in names)
    assert all(len(api.unique_name("x" * 80)) <= 63 for _ in range(20))


def test_a_suffix_marks_only_a_name_that_is_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("ESTIBA_STATE", str(tmp_path))
    assert api.free_name("brain-to-text-2026-11-28-10-30-00") == "brain-to-text-2026-11-28-10-30-00"
    (tmp_path / "jobs" / "brain-to-text-2026-11-28-10-30-00").mkdir(parents=True)
    assert api.free_name("brain-to-text-2026-11-28-10-30-00") == "brain-to-text-2026-11-28-10-30-00-2"


# ---- sources


def packed(folder: Path) -> bytes:
    return source.archive(source.collect(folder))


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "src"
    (place / "deep").mkdir(parents=True)
    (place / "train.py").write_text("print('hola')\n")
    (place / "requirements.txt").write_text("")
    (place / "deep" / "run.sh").write_text("#!/bin/sh\n")
    (place / "deep" / "run.sh").chmod(0o755)
    for unwanted in (".git/HEAD", "__pycache__/train.pyc", ".env", "deep/x.pyc"):
        (place / unwanted).parent.mkdir(exist_ok=True)
        (place / unwanted).write_text("SECRET=1")
    return place


def test_the_same_files_always_pack_to_the_same_bytes(folder):
    first = packed(folder)
    os.utime(folder / "train.py", (1, 1))
    (folder / "train.py").chmod(0o600)
    assert packed(folder) == first
    place = source.pack(source.collect(folder))
    assert source.pack(source.collect(folder)) == place
    with tarfile.open(place) as tar:
        modes = {entry.name: entry.mode for entry in tar}
        assert modes == {"deep/run.sh": 0o755, "requirements.txt": 0o644, "train.py": 0o644}
        assert {(entry.uid, entry.gid, entry.mtime) for entry in tar} == {(0, 0, 0)}
    (folder / "train.py").write_text("print('mundo')\n")
    assert source.pack(source.collect(folder)) != place


def test_dependencies_are_packed_beside_the_program(folder, tmp_path):
    (tmp_path / "common").mkdir()
    (tmp_path / "common" / "tools.py").write_text("")
    (tmp_path / "one.py").write_text("")
    files = source.collect(folder, [tmp_path / "common", tmp_path / "one.py"])
    assert {"common/tools.py", "one.py", "train.py"} <= set(files)
    with pytest.raises(LaunchError, match="nowhere: no such folder or file"):
        source.collect(folder, ["nowhere"])


def test_a_source_that_cannot_be_packed_is_refused(folder, tmp_path):
    with pytest.raises(LaunchError, match="no such folder"):
        source.collect(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(LaunchError, match="contains no files"):
        source.collect(tmp_path / "empty")


@pytest.mark.parametrize(
    ("name", "target", "message"),
    [
        ("out", "/etc/hostname", "points outside"),
        ("deep/up", "../../elsewhere", "points outside"),
        ("gone", "nothing", r"gone: a link to nothing, which does not exist"),
        ("self", "self", "self: a link to self, which does not exist"),
        ("deep/around", "..", r"around: a link to \.\., which contains it"),
    ],
)
def test_a_link_out_of_the_source_or_to_nothing_or_in_a_loop_is_refused(name, target, message, folder):
    (folder / name).symlink_to(target)
    with pytest.raises(LaunchError, match=message):
        source.collect(folder)


def test_links_inside_a_source_are_packed_as_their_targets(folder):
    (folder / "again").symlink_to("deep")
    (folder / "main.py").symlink_to("train.py")
    (folder / ".#train.py").symlink_to("somebody@machine.1234")
    files = source.collect(folder)
    assert {"again/run.sh", "deep/run.sh", "main.py"} <= set(files)
    assert files["main.py"].read_bytes() == (folder / "train.py").read_bytes()
    assert ".#train.py" not in files


def test_a_source_with_an_entry_point_uses_script_mode(folder):
    request, uploads = api.build_request(
        image_uri="i", output_path="file://o", source_dir=folder, entry_point="train.py", hyperparameters={"epochs": 3}
    )
    assert request["Environment"] == {
        "SAGEMAKER_PROGRAM": "train.py",
        "SAGEMAKER_SUBMIT_DIRECTORY": "/opt/ml/input/data/code/code.tar.gz",
        "SAGEMAKER_REQUIREMENTS": "requirements.txt",
    }
    assert request["HyperParameters"] == {
        "epochs": "3",
        "sagemaker_program": "train.py",
        "sagemaker_submit_directory": "/opt/ml/input/data/code/code.tar.gz",
    }
    (channel,) = request["InputDataConfig"]
    uri = channel["DataSource"]["S3DataSource"]["S3Uri"]
    assert channel["ChannelName"] == "code"
    assert Path(uri.removeprefix("file://"), "code.tar.gz").is_file()
    assert uploads == ()


def test_a_single_program_is_packed_with_its_dependencies(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "helper.py").write_text("")
    request, _ = api.build_request(
        image_uri="i", output_path="file://o", entry_point="deep/run.sh", dependencies=["helper.py"]
    )
    assert request["Environment"]["SAGEMAKER_PROGRAM"] == "run.sh"
    place = request["InputDataConfig"][0]["DataSource"]["S3DataSource"]["S3Uri"].removeprefix("file://")
    with tarfile.open(f"{place}/code.tar.gz") as tar:
        assert tar.getnames() == ["helper.py", "run.sh"]


def test_a_program_in_the_image_and_a_source_on_s3_are_not_packed():
    request, _ = api.build_request(image_uri="i", output_path="file://o", entry_point="in_the_image.py")
    assert request["Environment"] == {"SAGEMAKER_PROGRAM": "in_the_image.py"}
    assert "InputDataConfig" not in request
    address = "s3://bucket/code/sourcedir.tar.gz"
    request, _ = api.build_request(image_uri="i", output_path="file://o", entry_point="t.py", source_dir=address)
    assert request["Environment"] == {"SAGEMAKER_PROGRAM": "t.py", "SAGEMAKER_SUBMIT_DIRECTORY": address}
    assert request["HyperParameters"]["sagemaker_submit_directory"] == address


def test_an_entry_point_that_is_not_in_the_source_is_refused(folder):
    for entry, message in (("nothing.py", "not in"), (None, "--entry-point")):
        with pytest.raises(LaunchError, match=message):
            api.build_request(image_uri="i", output_path="file://o", source_dir=folder, entry_point=entry)


def test_with_s3_output_the_source_is_uploaded_beside_it(folder):
    (request, (upload,)) = api.build_request(
        image_uri="i", output_path="s3://bucket/out/", job_name="j-1", source_dir=folder, entry_point="train.py"
    )
    assert request["InputDataConfig"][0]["DataSource"]["S3DataSource"]["S3Uri"] == "s3://bucket/out/j-1/source"
    assert upload.address == "s3://bucket/out/j-1/source"
    assert (upload.file.name, upload.file.read_bytes()) == ("code.tar.gz", packed(folder))


def test_a_code_location_receives_the_source(folder):
    job = api.build_job(
        TargetAddress("local"), image_uri="i", source_dir=folder, entry_point="train.py", job_name="j",
        code_location="s3://code/here",
    )  # fmt: skip
    assert [upload.address for upload in job.uploads] == ["s3://code/here/j/source"]
    assert job.request["OutputDataConfig"]["S3OutputPath"] == "file://runs"


# ---- estiba launch


def call(*words: str):
    return CliRunner().invoke(app, list(words))


def test_the_original_launchers_flags_become_hyperparameters_of_these_names():
    result = call(
        "launch", "--image", IMAGE, "--role", ROLE, "--target", "sagemaker", "--request", "--job-name", "brain-1",
        "--s3-bucket", "bucket", "--s3-data-prefix", "hdf5", "--config-file", "rnn_args.yaml",
        "--instance-type", "ml.p3.2xlarge", "--num-training-batches", "1000", "--batch-size", "64", "-p", "lr=1e-4",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    request = json.loads(result.stdout)
    assert request["TrainingJobName"] == "brain-1"
    assert request["HyperParameters"] == {
        "s3-bucket": "bucket", "s3-data-prefix": "hdf5", "config-file": "rnn_args.yaml",
        "num-training-batches": "1000", "batch-size": "64", "lr": "1e-4",
    }  # fmt: skip
    assert request["ResourceConfig"]["InstanceType"] == "ml.p3.2xlarge"
    assert request["OutputDataConfig"]["S3OutputPath"] == "s3://bucket/output"
    assert re.fullmatch(r"s3://bucket/output/checkpoints/brain-1-[0-9a-f]{8}", request["CheckpointConfig"]["S3Uri"])
    assert request["ProfilerConfig"] == {"DisableProfiler": True}
    assert "DebugHookConfig" not in request


def test_a_printed_request_is_a_job_file(tmp_path):
    result = call("launch", "--image", "estiba/embed:local", "--request", "--channel", "dataset=file:///srv/data")
    assert result.exit_code == 0, result.stderr
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(json.loads(result.stdout)))
    assert jobfile.load(path, registry.parse("local"), {}, {}).request == json.loads(result.stdout)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--image", "i", "--channel", "dataset"), "NAME=VALUE"),
        (("--image", "i", "--target", "sagemaker"), "--s3-bucket"),
        (("--image", "i", "--source-dir", "nowhere", "--entry-point", "x.py"), "no such folder"),
        (("--image", "i", "--max-wait-s", "1", "--request"), "MaxWaitTimeInSeconds"),
        ((), "--image"),
    ],
)
def test_wrong_flags_exit_2_with_a_message(words, message):
    result = call("launch", *words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
