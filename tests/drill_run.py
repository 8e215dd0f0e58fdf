"""A drill of a small job in the base image, through the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import pytest

from base_image import request_of
from estiba_launch.jobs import control, directory
from estiba_launch.targets import operations


class DrillRun:
    """One test's job file and state."""

    def __init__(self, tmp_path: Path) -> None:
        self.tmp = tmp_path
        self.state = tmp_path / "state"
        (tmp_path / "code").mkdir(exist_ok=True)

    def write(self, script: str, **changes: Any) -> str:
        path = self.tmp / "job.yaml"
        path.write_text(json.dumps(request_of(self.tmp, script, **changes)))
        return str(path)

    def drill(self, script: str, *words: str, request: dict[str, Any] | None = None) -> tuple[int, dict[str, Any], str]:
        """(exit code, document, stderr)."""
        package = Path(__file__).parents[1] / "launch"
        process = subprocess.run(
            [sys.executable, "-m", "estiba_launch.cli.app", "drill", self.write(script, **(request or {})),
             "--json", "--sync-every-s", "0.3", "--grace-s", "5", "--gpus", "none", *words],
            env={**os.environ, "PYTHONPATH": str(package), "ESTIBA_STATE": str(self.state)},
            text=True, capture_output=True, timeout=300, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert "Traceback" not in process.stderr
        return process.returncode, json.loads(process.stdout or "{}"), process.stderr


def drills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DrillRun]:
    """The body of a fixture: what the drills of a test left is stopped and must be gone."""
    monkeypatch.setenv("ESTIBA_STATE", str(tmp_path / "state"))
    yield DrillRun(tmp_path)
    client = docker.from_env()
    for name in directory.job_names():
        if control.supervised(directory.job_dir(name)):
            operations.stop(name, "the test has ended")
            operations.wait(name, 30)
        assert client.containers.list(all=True, filters={"label": f"estiba.job={name}"}) == []
