"""How the original guides bring code, on the local host: `sh -c` that unpacks code.tar.gz, and script mode."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import estiba_launch
from estiba_launch.jobs import control
from estiba_launch.jobs import directory as state
from estiba_launch.jobs.options import SubmitOptions
from estiba_launch.request import jobfile
from estiba_launch.targets import operations as jobs
from estiba_launch.targets import registry

pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.timeout(300)]

TRAIN = """
import json, os, pathlib, sys
record = {"argv": sys.argv[1:], "cwd": os.getcwd(), "program": os.environ.get("SAGEMAKER_PROGRAM")}
pathlib.Path("/opt/ml/model/record.json").write_text(json.dumps(record))
import helper
print("helper says", helper.WORD, flush=True)
"""
UNPACK = (
    "mkdir -p /opt/ml/code && tar -xzf /opt/ml/input/data/code/code.tar.gz -C /opt/ml/code && cd /opt/ml/code && "
    'exec python train_model_sagemaker.py "$@"'
)
FLAGS = ["--s3-bucket", "b", "--s3-data-prefix", "hdf5 data", "--config-file", "rnn_args.yaml", "--batch-size", "64"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("ESTIBA_STATE", str(tmp_path / "state"))
    folder = tmp_path / "src"
    folder.mkdir()
    (folder / "train_model_sagemaker.py").write_text(TRAIN)
    (folder / "helper.py").write_text("WORD = 'hola'\n")
    (folder / "requirements.txt").write_text("# nothing beyond the image\n")
    yield tmp_path
    for name in state.job_names():
        if control.supervised(state.job_dir(name)):
            control.request_stop(state.job_dir(name), "the test has ended")
            jobs.wait(name, 30)


def result_of(job: estiba_launch.Job, into: Path) -> dict:
    job.fetch(into)
    return json.loads((into / "model/record.json").read_text())


def test_an_entrypoint_that_unpacks_code_from_its_channel_and_passes_flags_runs_as_the_original_did(place, embed_image):
    job = estiba_launch.launch_training_job(
        image_uri=embed_image,
        output_path=f"file://{place}/out",
        source_dir=place / "src",
        container_entrypoint=["sh", "-c", UNPACK, "sh"],
        container_arguments=FLAGS,
        options=SubmitOptions(sync_every_s=0.5),
    )
    assert job.wait(200)["TrainingJobStatus"] == "Completed", list(job.logs())
    assert "helper says hola" in list(job.logs())
    assert result_of(job, place / "got") == {"argv": FLAGS, "cwd": "/opt/ml/code", "program": None}
    assert "SAGEMAKER_PROGRAM" not in job.request.get("Environment", {})


def test_a_source_directory_runs_in_script_mode_with_hyperparameters_as_flags(place, embed_image):
    job = estiba_launch.launch_training_job(
        image_uri=embed_image,
        output_path=f"file://{place}/out",
        source_dir=place / "src",
        entry_point="train_model_sagemaker.py",
        hyperparameters={"s3-bucket": "b", "num-training-batches": 10},
        options=SubmitOptions(sync_every_s=0.5),
    )
    value = job.wait(200)
    assert value["TrainingJobStatus"] == "Completed", list(job.logs())
    record = result_of(job, place / "got")
    assert record["program"] == "train_model_sagemaker.py"
    assert sorted(zip(record["argv"][::2], record["argv"][1::2], strict=True)) == [
        ("--num-training-batches", "10"),
        ("--s3-bucket", "b"),
    ]


@pytest.mark.parametrize("scripts", ["scripts", "scripts/", "scripts/finetune.py"])
def test_the_request_of_the_fine_tuning_document_runs_its_folder_or_program(scripts, place, embed_image):
    """The dictionary of the document; only bucket, image and type differ."""
    (place / "data").mkdir()
    (place / "data" / "survey.csv").write_text("Year,Value\n2021,7\n")
    (place / "scripts").mkdir()
    (place / "scripts" / "helper.py").write_text("WORD = 'hola'\n")
    (place / "scripts" / "requirements.txt").write_text("# nothing beyond the image\n")
    text = TRAIN.replace("import helper\n", "").replace("helper.WORD", "1") if scripts.endswith(".py") else TRAIN
    (place / "scripts" / "finetune.py").write_text(text)
    code = f"file://{place}/{scripts}"
    request = {
        "HyperParameters": {
            "base_model": "llama-2-7b", "learning_rate": "0.001", "batch_size": "4", "epochs": "3",
            "max_sequence_length": "2048", "optimizer": "adam", "weight_decay": "0.01",
        },
        "AlgorithmSpecification": {
            "TrainingImage": embed_image, "TrainingInputMode": "File", "EnableSageMakerMetricsTimeSeries": True,
        },
        "InputDataConfig": [
            {"ChannelName": "training", "DataSource": {"S3DataSource": {"S3Uri": f"file://{place}/data"}},
             "ContentType": "application/jsonlines"},
            {"ChannelName": "code", "DataSource": {"S3DataSource": {"S3Uri": code}},
             "ContentType": "application/x-python"},
        ],
        "OutputDataConfig": {"S3OutputPath": f"file://{place}/out"},
        "ResourceConfig": {"InstanceType": "ml.g5.2xlarge", "InstanceCount": 1, "VolumeSizeInGB": 30},
        "StoppingCondition": {"MaxRuntimeInSeconds": 10800},
        "Environment": {
            "SAGEMAKER_PROGRAM": "finetune.py", "SAGEMAKER_SUBMIT_DIRECTORY": code,
            "SAGEMAKER_REQUIREMENTS": "requirements.txt",
        },
    }  # fmt: skip
    (place / "job.yaml").write_text(json.dumps(request))
    job = jobfile.load(place / "job.yaml", registry.parse("local"), {}, {})
    jobs.start(jobs.prepare(job, SubmitOptions(sync_every_s=0.5)))
    assert jobs.wait(job.name, 200).status == "Completed", list(jobs.log_lines(job.name, follow=False))
    jobs.download(job.name, place / "got")
    record = json.loads((place / "got/model/record.json").read_text())
    assert record["program"] == "finetune.py"
    assert dict(zip(record["argv"][::2], record["argv"][1::2], strict=True))["--base_model"] == "llama-2-7b"
