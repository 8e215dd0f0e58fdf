"""The Python API and `estiba launch`: the same request as a job file, sources packed the same way every time."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import estiba_launch
from estiba_launch import api, jobfile, source
from estiba_launch.cli import app
from estiba_launch.errors import InvalidJob, LaunchError
from estiba_launch.target import Target

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
  ContainerEntrypoint: [sh, -c, 'exec python -m estiba.entry "$@"', sh]
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
    "container_entrypoint": ["sh", "-c", 'exec python -m estiba.entry "$@"', "sh"],
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
def test_every_argument_gives_the_request_of_the_equal_job_file(tmp_path, target):
    (tmp_path / "job.yaml").write_text(EVERYTHING)
    where = Target.parse(target)
    written = jobfile.load(tmp_path / "job.yaml", where, {}, {})
    assert api.prepare(where, api.build_request(**SAME)).request == written.request


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
    where = Target.parse("sagemaker")
    assert api.prepare(where, request).request == jobfile.load(EMBED, where, values, {}).request


def test_the_typed_arguments_are_those_of_the_request():
    assert set(api.Wanted.__annotations__) == set(inspect.signature(api.build_request).parameters)
    assert all(one.kind is one.KEYWORD_ONLY for one in inspect.signature(api.launch_training_job).parameters.values()
               if one.kind is not one.VAR_KEYWORD)  # fmt: skip
    assert estiba_launch.launch_training_job is api.launch_training_job


def test_wrong_arguments_are_refused_like_a_wrong_file_with_everything_at_once():
    wrong = {**SAME, "instance_type": "ml.bogus.1x", "max_wait_s": 60, "keep_alive_s": 60, "job_name": "a b"}
    with pytest.raises(InvalidJob) as caught:
        estiba_launch.launch_training_job(target="sagemaker", **wrong)
    fields = {problem.field for problem in caught.value.problems}
    assert {"TrainingJobName", "ResourceConfig.InstanceType", "StoppingCondition.MaxWaitTimeInSeconds"} <= fields
    assert any("KeepAlive" in field for field in fields)
    assert "launch_training_job()" in str(caught.value)


def test_spot_without_checkpoints_is_refused_with_the_arithmetic():
    with pytest.raises(InvalidJob, match="CheckpointConfig"):
        api.prepare(Target.parse("local"), api.build_request(image_uri="x", output_path="file://o", use_spot=True))


@pytest.mark.parametrize(("value", "says"), [(None, "None is no value"), ({1, 2}, "JSON")])
def test_a_hyperparameter_that_is_no_value_is_refused_by_name(value, says):
    with pytest.raises(LaunchError, match=rf"hyperparameters\['x'\].*{says}"):
        api.build_request(image_uri="x", output_path="file://o", hyperparameters={"x": value})


def test_names_without_a_given_one_are_unique_and_allowed():
    names = {api.unique_name("registry.example/estiba/embed_x:1.0@sha256:00") for _ in range(3)}
    assert all(name.startswith("embed-x-2") for name in names)


# ---- sources


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


def test_the_same_files_pack_to_the_same_bytes_whenever_and_whoever(folder):
    first = source.archive(folder)
    os.utime(folder / "train.py", (1, 1))
    (folder / "train.py").chmod(0o600)
    assert source.archive(folder) == first
    place = source.pack(folder)
    assert source.pack(folder) == place
    with tarfile.open(place / "code.tar.gz") as tar:
        modes = {entry.name: entry.mode for entry in tar}
        assert modes == {"deep/run.sh": 0o755, "requirements.txt": 0o644, "train.py": 0o644}
        assert {(entry.uid, entry.gid, entry.mtime) for entry in tar} == {(0, 0, 0)}
    (folder / "train.py").write_text("print('mundo')\n")
    assert source.pack(folder) != place


def test_a_source_that_cannot_be_packed_is_refused(folder, tmp_path):
    with pytest.raises(LaunchError, match="no such folder"):
        source.archive(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(LaunchError, match="holds no files"):
        source.archive(tmp_path / "empty")
    (folder / "out").symlink_to("/etc/hostname")
    with pytest.raises(LaunchError, match="leads out"):
        source.archive(folder)


def test_a_source_with_an_entry_point_becomes_script_mode(folder):
    request = api.build_request(
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


def test_an_entry_point_that_is_not_in_the_source_is_refused(folder):
    for entry, says in (("nothing.py", "not in"), (None, "--entry-point")):
        with pytest.raises(LaunchError, match=says):
            api.build_request(image_uri="i", output_path="file://o", source_dir=folder, entry_point=entry)


def test_for_s3_the_source_is_uploaded_beside_the_output(folder, monkeypatch):
    put = {}

    class Store:
        def __init__(self, uri: str) -> None:
            self.uri = uri

        def put(self, path: Path, key: str) -> None:
            put[f"{self.uri}/{key}"] = path.read_bytes()

    monkeypatch.setattr(api, "open_store", Store)
    request = api.build_request(
        image_uri="i", output_path="s3://bucket/out/", job_name="j-1", source_dir=folder, entry_point="train.py"
    )
    assert request["InputDataConfig"][0]["DataSource"]["S3DataSource"]["S3Uri"] == "s3://bucket/out/j-1/source"
    assert put == {"s3://bucket/out/j-1/source/code.tar.gz": source.archive(folder)}


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
    assert request["CheckpointConfig"]["S3Uri"] == "s3://bucket/output/brain-1/checkpoints"
    assert request["ProfilerConfig"] == {"DisableProfiler": True}
    assert "DebugHookConfig" not in request


def test_the_guides_launcher_by_its_name_is_the_same_request():
    words = [
        "--image", IMAGE, "--role", ROLE, "--s3-bucket", "my-bucket", "--s3-data-prefix", "data/hdf5",
        "--batch-size", "48", "--config-file", "rnn_args.yaml", "--instance-type", "ml.g5.2xlarge",
        "--job-name", "b", "--request",
    ]  # fmt: skip
    script = Path(__file__).parents[2] / "images/brain-to-text/launch_sagemaker_job.py"
    done = subprocess.run([sys.executable, str(script), *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads(call("launch", "--target", "sagemaker", *words).stdout)


def test_a_printed_request_is_a_job_file(tmp_path):
    result = call("launch", "--image", "estiba/embed:local", "--request", "--channel", "dataset=file:///srv/data")
    assert result.exit_code == 0, result.stderr
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(json.loads(result.stdout)))
    assert jobfile.load(path, Target.parse("local"), {}, {}).request == json.loads(result.stdout)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--image", "i", "--channel", "dataset"), "NAME=VALUE"),
        (("--image", "i", "--target", "sagemaker"), "--s3-bucket"),
        (("--image", "i", "--source-dir", "nowhere", "--entry-point", "x.py"), "no such folder"),
        (("--image", "i", "--max-wait-s", "1", "--request"), "MaxWaitTimeInSeconds"),
        ((), "--image"),
    ],
)
def test_wrong_flags_exit_2_with_a_message(words, says):
    result = call("launch", *words)
    assert result.exit_code == 2
    assert says in result.stderr
    assert "Traceback" not in result.stderr
