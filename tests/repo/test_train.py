"""`make train/NAME`: how it ends, and what it leaves running."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

STUB = "#!/bin/sh\nexit 0\n"


@pytest.fixture
def checkout(root: Path, tmp_path: Path) -> Path:
    """A checkout whose programs do nothing. `estiba` ends with $STATUS."""
    names = ["env.sh", "data.sh", "s3.sh", "engine.sh", "help.sh"]
    for name in (*(f"scripts/{name}" for name in names), "bin/docker", ".venv/bin/estiba"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(STUB)
        (tmp_path / name).chmod(0o755)
    (tmp_path / ".venv/bin/estiba").write_text("#!/bin/sh\necho estiba $1\nexit $STATUS\n")
    (tmp_path / "images/brain-to-text").mkdir(parents=True)
    (tmp_path / "images/brain-to-text/job.yaml").touch()
    (tmp_path / "runs/brain-to-text").mkdir(parents=True)
    shutil.copy(root / "Makefile", tmp_path)
    shutil.copy(root / "scripts/train.sh", tmp_path / "scripts")
    return tmp_path


def train(checkout: Path, status: int) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if name not in ("DATASET_URI", "MAKEFLAGS", "IMAGE")}
    environ |= {"PATH": f"{checkout}/bin:{environ['PATH']}", "STATUS": str(status)}
    command = ["make", "--no-print-directory", "train/brain-to-text"]
    return subprocess.run(command, cwd=checkout, env=environ, capture_output=True, text=True, check=False)


def test_a_job_that_was_stopped_does_not_look_failed(checkout: Path) -> None:
    done = train(checkout, 4)
    assert done.returncode == 0
    assert "Error" not in done.stderr
    assert "train: not finished: the job was stopped, or this command was interrupted" in done.stderr


@pytest.mark.parametrize("status", [1, 2, 3])
def test_a_job_that_failed_fails(checkout: Path, status: int) -> None:
    done = train(checkout, status)
    assert done.returncode == 2
    assert f"Error {status}" in done.stderr
    assert "not finished" not in done.stderr


def test_a_server_that_keeps_running_is_announced_with_how_to_stop_it(checkout: Path) -> None:
    done = train(checkout, 0)
    assert done.stdout == "estiba run\n"
    assert "(estiba-s3) keeps running; `bash scripts/s3.sh stop` removes it and its data" in done.stderr
