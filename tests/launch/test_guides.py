"""The original guides' ways to bring code, on the local host: `sh -c` that unpacks code.tar.gz, and script mode."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import estiba_launch
from estiba_launch import state
from estiba_launch.localhost import control, jobs
from estiba_launch.localhost.control import LocalOptions

pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.timeout(300)]

TRAIN = """
import json, os, pathlib, sys
told = {"argv": sys.argv[1:], "cwd": os.getcwd(), "program": os.environ.get("SAGEMAKER_PROGRAM")}
pathlib.Path("/opt/ml/model/told.json").write_text(json.dumps(told))
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
            control.order_stop(state.job_dir(name), "the test is over")
            jobs.wait(name, 30)


def told(job: estiba_launch.Job, into: Path) -> dict:
    job.fetch(into)
    return json.loads((into / "model/told.json").read_text())


def test_an_entrypoint_that_unpacks_code_from_its_channel_and_passes_flags_runs_as_the_original_did(place, embed_image):
    job = estiba_launch.launch_training_job(
        image_uri=embed_image,
        output_path=f"file://{place}/out",
        source_dir=place / "src",
        container_entrypoint=["sh", "-c", UNPACK, "sh"],
        container_arguments=FLAGS,
        options=LocalOptions(sync_every_s=0.5),
    )
    assert job.wait(200)["TrainingJobStatus"] == "Completed", list(job.logs())
    assert "helper says hola" in list(job.logs())
    assert told(job, place / "got") == {"argv": FLAGS, "cwd": "/opt/ml/code", "program": None}
    assert "SAGEMAKER_PROGRAM" not in job.request.get("Environment", {})


def test_a_source_directory_runs_in_script_mode_with_hyperparameters_as_flags(place, embed_image):
    job = estiba_launch.launch_training_job(
        image_uri=embed_image,
        output_path=f"file://{place}/out",
        source_dir=place / "src",
        entry_point="train_model_sagemaker.py",
        hyperparameters={"s3-bucket": "b", "num-training-batches": 10},
        options=LocalOptions(sync_every_s=0.5),
    )
    value = job.wait(200)
    assert value["TrainingJobStatus"] == "Completed", list(job.logs())
    seen = told(job, place / "got")
    assert seen["program"] == "train_model_sagemaker.py"
    assert sorted(zip(seen["argv"][::2], seen["argv"][1::2], strict=True)) == [
        ("--num-training-batches", "10"),
        ("--s3-bucket", "b"),
    ]
