"""Environment ESTIBA_STAGE_<CHANNEL> of a request: the channel is there before the script or the workload starts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from estiba.errors import ConfigError
from estiba.platform.staged_channels import channel_environment, staged_channels
from s3server import S3Server

SHOW = """
import os, pathlib
folder = pathlib.Path(os.environ["SM_CHANNEL_MODEL"])
print(folder, {path.name: path.read_text() for path in folder.iterdir()})
"""


@pytest.fixture
def model(s3: S3Server, s3_url: str, s3_client: Any) -> str:
    s3_client.put_object(Bucket="estiba", Key=f"{s3_url[12:]}/weights", Body=b"1234")
    return s3_url


def environment(s3: S3Server, **more: str) -> dict[str, str]:
    return {**s3.environ, **more}


def test_a_channel_is_there_before_a_command_starts(place: Any, s3: S3Server, model: str) -> None:
    script = place.script(SHOW)
    done = place.run(place.entry(sys.executable, script, env=environment(s3, ESTIBA_STAGE_MODEL=model)), 60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode() == f"{place.root}/input/data/model {{'weights': '1234'}}\n"


def test_a_channel_is_there_before_a_users_script_starts(place: Any, s3: S3Server, model: str) -> None:
    code = place.root / "input/data/code"
    code.mkdir(parents=True)
    (code / "show.py").write_text(SHOW)
    variables = {"SAGEMAKER_PROGRAM": "show.py", "SAGEMAKER_SUBMIT_DIRECTORY": str(code), "ESTIBA_STAGE_MODEL": model}
    done = place.run(place.entry("train", env=environment(s3, **variables)), 60)
    assert done.returncode == 0, done.stderr
    assert f"{place.root}/input/data/model {{'weights': '1234'}}" in done.stdout.decode()


def test_a_workloads_settings_are_not_disturbed(place: Any, s3: S3Server, model: str) -> None:
    variables = {"ESTIBA_STAGE_MODEL": model, "ESTIBA_STAGING_PORT": "7800", "ESTIBA_STAGING_TOKEN": "x"}
    done = place.run(place.entry(env=environment(s3, **variables)), 60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["mode"] == "report"


def test_a_source_that_is_not_there_ends_the_job_with_that_reason(place: Any, s3: S3Server, s3_url: str) -> None:
    done = place.run(place.entry("true", env=environment(s3, ESTIBA_STAGE_MODEL=s3_url)), 60)
    assert done.returncode == 2
    assert place.failure_text() == f"{s3_url}: nothing there to stage; check the bucket and the prefix\n"


def test_a_stop_while_a_channel_is_staged_ends_the_job_as_stopped(place: Any, until: Any, tmp_path: Path) -> None:
    """The endpoint accepts connections and never answers."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(30)
        environ = {
            "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{silent.getsockname()[1]}",
            "AWS_ACCESS_KEY_ID": "x",
            "AWS_SECRET_ACCESS_KEY": "x",
            "ESTIBA_STAGE_MODEL": "s3://bucket/model",
        }
        process = place.entry("touch", str(tmp_path / "started"), env=environ)
        silent.accept()
        process.terminate()
        done = place.run(process, 60)
    assert done.returncode == 143
    assert "stopped by SIGTERM" in place.failure_text()
    assert not (tmp_path / "started").exists()


def test_a_channel_that_the_platform_fills_too_is_refused(place: Any, s3: S3Server, model: str) -> None:
    config = place.root / "input/config"
    config.mkdir(parents=True)
    (config / "inputdataconfig.json").write_text('{"model": {"TrainingInputMode": "File"}}')
    done = place.run(place.entry("true", env=environment(s3, ESTIBA_STAGE_MODEL=model)), 60)
    assert done.returncode == 2
    assert "InputDataConfig has a channel 'model' too" in place.failure_text()


def test_names_in_capitals_mean_small_letters_and_others_are_kept() -> None:
    environ = {"ESTIBA_STAGE_MODEL": "s3://a", "ESTIBA_STAGE_train_A": "s3://b", "ESTIBA_STAGE_EMPTY": ""}
    assert staged_channels(environ) == {"model": "s3://a", "train_A": "s3://b"}
    assert channel_environment({**environ, "ESTIBA_ROOT": "/r"})["SM_CHANNEL_TRAIN_A"] == "/r/input/data/train_A"
    with pytest.raises(ConfigError, match="staged twice"):
        staged_channels({"ESTIBA_STAGE_MODEL": "s3://a", "ESTIBA_STAGE_model": "s3://b"})
    with pytest.raises(ConfigError, match="no channel name"):
        staged_channels({"ESTIBA_STAGE_": "s3://a"})
