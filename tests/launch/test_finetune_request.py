"""The fine-tuning document's request on the local host, and a user's own finetune.py in the same image."""

from __future__ import annotations

import json
import os
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import estiba_launch
import finetune_request
from estiba_launch.jobs import control
from estiba_launch.jobs import directory as state
from estiba_launch.jobs.options import SubmitOptions
from estiba_launch.request import jobfile
from estiba_launch.request.options import HostOptions
from estiba_launch.targets import operations as jobs
from estiba_launch.targets import registry
from s3server import S3Server, s3_server

pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.timeout(560)]

ROOT = Path(__file__).parents[2]
FINETUNE = ROOT / "images/finetune"
IMAGE = os.environ.get("ESTIBA_TEST_FINETUNE_IMAGE", "estiba/finetune:local")
MODEL_FILES = {"config.json", "model.safetensors", "tokenizer.json", "report.md", "results.json"}
SURVEY = (
    "Year,Industry_aggregation_NZSIOC,Industry_code_NZSIOC,Industry_name_NZSIOC,Units,Variable_code,Variable_name,"
    "Variable_category,Value,Industry_code_ANZSIC06\n"
)
ROW = (
    '{year},Level 1,99999,All industries,{units},H{code:02},{name},Financial performance,"{value}",'
    "ANZSIC06 divisions A-S\n"
)
OWN = """
import argparse, os
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

parser = argparse.ArgumentParser()
parser.add_argument("--base_model")
parser.add_argument("--learning_rate", type=float)
given = parser.parse_args()
rows = load_dataset("json", data_files=os.environ["SM_CHANNEL_TRAINING"] + "/rows.jsonl", split="train")
settings = SFTConfig(output_dir="/tmp/out", max_steps=3, per_device_train_batch_size=2, max_length=64, use_cpu=True,
                     learning_rate=given.learning_rate, save_strategy="no", report_to=[], bf16=False)
trainer = SFTTrainer(model=given.base_model, train_dataset=rows, args=settings)
print(f"steps={trainer.train().global_step}", flush=True)
trainer.save_model(os.environ["SM_MODEL_DIR"])
"""


def docker(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["docker", *words], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def image() -> str:
    if docker("image", "inspect", IMAGE).returncode:
        pytest.skip(f"no image {IMAGE}; run `make build/finetune BASE=local`")
    return IMAGE


@pytest.fixture(scope="module")
def model(image: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two small layers with random weights, made inside the image."""
    folder = tmp_path_factory.mktemp("model")
    folder.chmod(0o777)
    code = "import pathlib, tiny_model; tiny_model.build(pathlib.Path('/made/model'))"
    words = ["run", "--rm", "--network", "none", "--env", "PYTHONPATH=/opt/estiba:/tests", "--entrypoint", "python"]
    words += ["--volume", f"{ROOT}/tests/images/finetune:/tests:ro", "--volume", f"{folder}:/made"]
    made = docker(*words, image, "-c", code)
    assert made.returncode == 0, made.stderr[-2000:]
    return folder / "model"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("ESTIBA_STATE", str(tmp_path / "state"))
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts/finetune.py").write_text((FINETUNE / "finetune.py").read_text())
    (tmp_path / "scripts/requirements.txt").write_text("# The image has everything.\n")
    yield tmp_path
    for name in state.job_names():
        if control.supervised(state.job_dir(name)):
            control.request_stop(state.job_dir(name), "the test has ended")
            jobs.wait(name, 30)


@pytest.fixture
def s3(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """A server that this machine and containers reach at one address, in `place`/env for the latter."""
    network = f"estiba-test-s3-{os.getpid()}"
    assert docker("network", "create", network).returncode == 0
    try:
        shown = docker("network", "inspect", network, "--format", "{{(index .IPAM.Config 0).Gateway}}")
        with s3_server(host=shown.stdout.strip()) as server:
            server.make_bucket("estiba")
            environ = {**server.environ, "NO_PROXY": f"127.0.0.1,localhost,{server.host}"}
            for name, value in environ.items():
                monkeypatch.setenv(name, value)
            (place / "env").write_text("".join(f"{name}={value}\n" for name, value in environ.items()))
            yield server
    finally:
        docker("network", "rm", network)


def write_survey(path: Path, rows: int = 40) -> Path:
    """Rows as the survey has them: thousands in quotes, and S or C for what is suppressed."""
    units = ("Dollars (millions)", "Percentage")
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        SURVEY
        + "".join(
            ROW.format(
                year=2010 + i % 14, units=units[i % 2], code=i % 2, name=("Total income", "Return on equity")[i % 2],
                value=("757,504", "S", "C", "12")[i % 4],
            )
            for i in range(rows)
        )
    )  # fmt: skip
    return path


def put(server: S3Server, folder: Path, prefix: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            server.client().upload_file(str(path), "estiba", f"{prefix}/{path.relative_to(folder).as_posix()}")


def run(path: Path, place: Path, env_file: Path | None = None) -> dict[str, Any]:
    """Run a job file here and return its status, with the log under `log`."""
    job = jobfile.load(path, registry.parse("local"), {}, {})
    host = HostOptions(env_file=str(env_file) if env_file else None)
    jobs.start(jobs.prepare(job, SubmitOptions(host=host, sync_every_s=0.5)))
    status = jobs.wait(job.name, 500).to_json()
    return {**status, "log": "\n".join(jobs.log_lines(job.name, follow=False))}


@pytest.mark.parametrize("form", ["prefix", "file", "archive"])
def test_the_request_of_the_fine_tuning_document_runs_here(form, image, model, place, s3):
    scripts = place / "scripts"
    if form == "archive":
        with tarfile.open(place / "sourcedir.tar.gz", "w:gz") as archive:
            for path in scripts.iterdir():
                archive.add(path, path.name)
        s3.client().upload_file(str(place / "sourcedir.tar.gz"), "estiba", "code/sourcedir.tar.gz")
    put(s3, scripts, "scripts")
    put(s3, model, "base")
    put(s3, write_survey(place / "data/survey.csv").parent, "data")
    code = {"prefix": "scripts", "file": "scripts/finetune.py", "archive": "code/sourcedir.tar.gz"}[form]
    path = finetune_request.write(
        place / "job.yaml", IMAGE=image, DATA="s3://estiba/data/survey.csv", SCRIPTS=f"s3://estiba/{code}",
        OUT="s3://estiba/out", base_model="s3://estiba/base",
    )  # fmt: skip
    status = run(path, place, place / "env")
    assert status["TrainingJobStatus"] == "Completed", status["log"]
    assert "application/jsonlines" in status["log"], "a wrong content type is told"
    assert "learning-rate 0.001 is high" in status["log"]
    stored = status["ModelArtifacts"]["S3ModelArtifacts"]
    assert stored.startswith("s3://estiba/out/")
    into = place / "got"
    jobs.download(status["TrainingJobName"], into)
    assert {path.name for path in (into / "model").iterdir()} >= MODEL_FILES
    assert (into / "model/adapter/adapter_model.safetensors").is_file()
    assert json.loads((into / "model/results.json").read_text())


def test_requirements_that_cannot_be_installed_fail_in_the_words_of_pip(image, place):
    (place / "scripts/requirements.txt").write_text("no-such-package-of-estiba==9\n")
    write_survey(place / "data/survey.csv")
    path = finetune_request.write(
        place / "job.yaml", IMAGE=image, DATA=f"file://{place}/data", SCRIPTS=f"file://{place}/scripts",
        OUT=f"file://{place}/out",
    )  # fmt: skip
    (place / "env").write_text("PIP_INDEX_URL=http://127.0.0.1:9/\nPIP_RETRIES=0\n")
    status = run(path, place, place / "env")
    assert status["TrainingJobStatus"] == "Failed"
    assert "ERROR: No matching distribution found for no-such-package-of-estiba==9" in status["FailureReason"]


def test_a_users_own_finetune_py_trains_with_trl(image, model, place):
    (place / "scripts/finetune.py").write_text(OWN)
    (place / "data").mkdir()
    rows = [{"text": f"El barco {number} zarpa al alba."} for number in range(8)]
    (place / "data/rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = estiba_launch.launch_training_job(
        image_uri=image, output_path=f"file://{place}/out", source_dir=place / "scripts", entry_point="finetune.py",
        channels={"training": f"file://{place}/data", "model": f"file://{model}"},
        hyperparameters={"base_model": "/opt/ml/input/data/model", "learning_rate": 0.001},
        options=SubmitOptions(sync_every_s=0.5),
    )  # fmt: skip
    status = job.wait(500)
    assert status["TrainingJobStatus"] == "Completed", "\n".join(job.logs())
    assert "steps=3" in list(job.logs())
    job.fetch(place / "got")
    assert {path.name for path in (place / "got/model").iterdir()} >= {"config.json", "model.safetensors"}


@pytest.mark.parametrize("user", [(), ("--user", "1234:1234")], ids=["root", "user"])
@pytest.mark.parametrize("where", ["image", "checkout", "script mode"])
def test_finetune_py_starts_the_image_s_program_wherever_it_lies(where, user, image, place):
    """Only that program knows the name that was meant."""
    words = ["run", "--rm", "--network", "none", *user]
    program = ["python", "finetune.py", "--learning_rat", "1"]
    if where == "checkout":
        words += ["--volume", f"{FINETUNE}:/checkout:ro", "--workdir", "/checkout", "--env", "PYTHONPATH=/opt/estiba"]
    if where == "script mode":
        for folder in ("config", "data"):
            (place / "ml/input" / folder).mkdir(parents=True)
        (place / "ml/input/config/hyperparameters.json").write_text('{"learning_rat": "1"}')
        for folder in (place / "ml", *(place / "ml").rglob("*")):
            folder.chmod(0o777)
        words += ["--volume", f"{place}/ml:/opt/ml", "--volume", f"{place}/scripts:/scripts:ro"]
        words += ["--env", "SAGEMAKER_PROGRAM=finetune.py", "--env", "SAGEMAKER_SUBMIT_DIRECTORY=/scripts"]
        program = ["train"]
    done = docker(*words, image, *program)
    said = done.stdout + done.stderr
    assert done.returncode == 2, said
    if where == "script mode":
        assert (place / "ml/output/failure").read_text().startswith("unknown hyperparameter 'learning_rat'")
    assert "learning-rat" in said.replace("_", "-") and "learning-rate" in said.replace("_", "-")
