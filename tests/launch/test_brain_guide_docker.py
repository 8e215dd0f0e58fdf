"""The brain-to-text guide on this machine: its commands and Python, word for word, with ESTIBA_TARGET=local."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from estiba_launch.jobs import control
from estiba_launch.jobs import directory as state
from estiba_launch.targets import operations as jobs
from s3server import S3Server, s3_server

pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.timeout(560)]

ROOT = Path(__file__).parents[2]
IMAGE = os.environ.get("ESTIBA_TEST_BRAIN_IMAGE", "estiba/brain-to-text:local")
BUCKET = "guide-bucket"
PREFIX = "data/hdf5_data_diphone_encoded"
RNN_ARGS = """
model: {n_input_features: 12, n_units: 16, n_layers: 2, n_classes: 1681, rnn_dropout: 0.4}
dataset: {batch_size: 8, n_classes: 1681, days_per_batch: 2, dataset_dir: /ignored, num_dataloader_workers: 1}
output_dir: /opt/ml/output
checkpoint_dir: /opt/ml/model/checkpoint
num_training_batches: 6
lr_warmup_steps: 2
batches_per_val_step: 3
use_amp: true
"""
WITH_ALL_FLAGS = f"""
python launch_sagemaker_job.py --s3-bucket {BUCKET} --s3-data-prefix {PREFIX} --config-file rnn_args.yaml \\
    --instance-type ml.g4dn.2xlarge --num-training-batches 150000 --batch-size 48 --job-name my-diphone-training
"""
PYTHON = f"""
from launch_sagemaker_job import launch_training_job
estimator = launch_training_job(s3_bucket='{BUCKET}', s3_data_prefix='{PREFIX}', instance_type='ml.g4dn.xlarge',
                                config_file='rnn_args.yaml', num_training_batches=150000, batch_size=48)
estimator.fit(wait=True)
"""
DOWNLOAD = f"""
aws s3 sync s3://{BUCKET}/sagemaker-outputs/NAME ./results/ && cd results && tar -xzf output/model.tar.gz
"""


def docker(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["docker", *words], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def aws(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of PyPI's `aws`, in an environment of its own: it pins a botocore that is not the launcher's."""
    folder = tmp_path_factory.mktemp("aws")
    venv.create(folder, with_pip=True)
    words = [folder / "bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "awscli>=1.44,<2"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"awscli cannot be installed here: {done.stderr[-300:]}")
    return folder / "bin"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A server that this machine and containers reach at one address, with three sessions of diphones."""
    if docker("image", "inspect", IMAGE).returncode:
        pytest.skip(f"no image {IMAGE}; run `make build/brain-to-text BASE=local`")
    folder = tmp_path_factory.mktemp("recordings")
    folder.chmod(0o777)
    generate = "generate --out /made/data --sessions 3 --trials 8 --features 12 --longest-words 2 --labels diphone"
    words = ["run", "--rm", "--network", "none", "--volume", f"{folder}:/made", IMAGE, "brain-to-text"]
    made = docker(*words, *generate.split())
    assert made.returncode == 0, made.stderr[-2000:]
    network = f"estiba-test-guide-{os.getpid()}"
    assert docker("network", "create", network).returncode == 0
    try:
        shown = docker("network", "inspect", network, "--format", "{{(index .IPAM.Config 0).Gateway}}")
        with s3_server(host=shown.stdout.strip()) as server:
            server.make_bucket(BUCKET)
            for path in (folder / "data").rglob("*.hdf5"):
                key = f"{PREFIX}/{path.relative_to(folder / 'data').as_posix()}"
                server.client().upload_file(str(path), BUCKET, key)
            yield server
    finally:
        docker("network", "rm", network)


@pytest.fixture
def notebook(server: S3Server, aws: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The guide's folder: the launcher, and an edited rnn_args.yaml beside it."""
    environ = {**server.environ, "NO_PROXY": f"127.0.0.1,localhost,{server.host}"}
    (tmp_path / "env").write_text("".join(f"{name}={value}\n" for name, value in environ.items()))
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (programs / "python").chmod(0o755)
    for name, value in {
        **environ,
        "ESTIBA_TARGET": "local",
        "ESTIBA_ENV_FILE": str(tmp_path / "env"),
        "ESTIBA_STATE": str(tmp_path / "state"),
        "IMAGE": IMAGE,
        "PYTHONPATH": str(ROOT / "launch"),
        "PATH": os.pathsep.join([str(programs), str(aws), os.environ["PATH"]]),
    }.items():
        monkeypatch.setenv(name, value)
    place = tmp_path / "notebook"
    place.mkdir()
    (place / "launch_sagemaker_job.py").write_text((ROOT / "images/brain-to-text/launch_sagemaker_job.py").read_text())
    (place / "rnn_args.yaml").write_text(RNN_ARGS)
    yield place
    for name in state.job_names():
        if control.supervised(state.job_dir(name)):
            control.request_stop(state.job_dir(name), "the test has ended")
            jobs.wait(name, 60)


def shell(text: str, notebook: Path) -> subprocess.CompletedProcess[str]:
    words = ["bash", "-c", text]
    return subprocess.run(words, cwd=notebook, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)


def checkpoints_of(server: S3Server) -> Callable[[], list[str]]:
    def manifests() -> list[str]:
        found = server.client().list_objects_v2(Bucket=BUCKET, Prefix="sagemaker-outputs/checkpoints/")
        return [one["Key"] for one in found.get("Contents", []) if one["Key"].endswith("manifest.json")]

    return manifests


def stop_after_a_checkpoint(command: str, notebook: Path, server: S3Server) -> tuple[str, str]:
    """Run until a new checkpoint is on S3, stop the job, and return its name and the command's output."""
    manifests = checkpoints_of(server)
    before = manifests()
    known = set(state.job_names())
    running = subprocess.Popen(
        ["bash", "-c", command], cwd=notebook, text=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    while manifests() == before:
        assert running.poll() is None, running.communicate()[0]
        time.sleep(0.5)
    (name,) = set(state.job_names()) - known
    jobs.stop(name)
    output = running.communicate(timeout=200)[0]
    assert jobs.wait(name, 100).status == "Stopped", output
    return name, output


def test_the_shortest_command_trains_and_the_guides_lines_bring_the_decoder(notebook: Path, server: S3Server) -> None:
    done = shell(f"python launch_sagemaker_job.py --s3-bucket {BUCKET} --batch-size 32", notebook)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "input/data/config/rnn_args.yaml, SHA-256" in done.stdout, "the file of this machine was used"
    (name,) = state.job_names()
    got = shell(DOWNLOAD.replace("NAME", name), notebook)
    assert got.returncode == 0, got.stderr
    assert (notebook / "results/checkpoint/best_checkpoint").is_file()
    assert (notebook / "results/checkpoint/args.yaml").is_file()


def test_the_command_with_all_flags_resumes_when_it_is_run_again(notebook: Path, server: S3Server) -> None:
    name, _ = stop_after_a_checkpoint(WITH_ALL_FLAGS, notebook, server)
    assert name == "my-diphone-training"
    again, output = stop_after_a_checkpoint(WITH_ALL_FLAGS, notebook, server)
    assert again == "my-diphone-training-2" and "a job named my-diphone-training is known already" in output
    assert "resuming at step" in output


def test_the_guides_python_runs_until_it_is_stopped(notebook: Path, server: S3Server) -> None:
    (notebook / "call.py").write_text(PYTHON)
    name, output = stop_after_a_checkpoint("python call.py", notebook, server)
    assert name.startswith("brain-to-text-2") and "step=" in output
