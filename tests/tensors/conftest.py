"""Shared fixtures of the tensor tests, which need torch, so they run inside an image (`scripts/test.sh tensors`)."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("estiba") is None:  # outside the image: from the checkout
    checkout = Path(__file__).resolve().parents[2]
    sys.path[:0] = [str(checkout / "shared"), str(checkout / "tests")]
if importlib.util.find_spec("torch") is None:
    collect_ignore_glob = ["test_*.py"]  # nothing here can be imported without it
else:
    import torch

    from estiba.checkpoint.manager import CheckpointManager

    torch.set_num_threads(1)

from s3server import S3Server, s3_server

FOREIGN = ("AWS_", "ESTIBA_", "SM_", "SAGEMAKER_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_")


def pytest_report_header() -> str | None:
    return None if importlib.util.find_spec("torch") else "tensors: no torch here, so none of these tests can run"


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(FOREIGN) and name != "AWS_CA_BUNDLE":
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture(scope="session")
def s3_process() -> Iterator[S3Server]:
    with s3_server(persist=False) as server:
        server.make_bucket("estiba")
        yield server


@pytest.fixture
def s3(s3_process: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """A server that this process's environment points to."""
    for name, value in s3_process.environ.items():
        monkeypatch.setenv(name, value)
    return s3_process


@pytest.fixture
def s3_url(s3: S3Server) -> str:
    """A prefix for this test alone."""
    return f"s3://estiba/{uuid.uuid4().hex}"


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[..., CheckpointManager]]:
    """`CheckpointManager` in `tmp_path/checkpoints`, closed after the test whatever it did."""
    made: list[CheckpointManager] = []

    def make(folder: Path | None = None, **how: Any) -> CheckpointManager:
        made.append(CheckpointManager(folder or tmp_path / "checkpoints", **how))
        return made[-1]

    yield make
    for checkpoints in made:
        checkpoints.close(timeout_s=10)


class Toys:
    """Toy workloads as processes, forked from one that has imported everything (`zygote`)."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tensors.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
                "OMP_NUM_THREADS": "1",
            },
        )
        self._count = 0
        self._alive: set[int] = set()

    def _ask(self, **command: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, folder: Path, *words: str, env: Mapping[str, str] | None = None) -> Started:
        """`toy.py FOLDER WORDS`."""
        self._count += 1
        logs = [self._log / f"toy-{self._count}.{stream}" for stream in ("out", "err")]
        for log in logs:
            log.touch()
        environ = {name: value for name, value in os.environ.items() if name.startswith("AWS_")} | dict(env or {})
        pid = self._ask(words=[str(folder), *words], logs=[str(log) for log in logs], environ=environ)
        self._alive.add(pid)
        return Started(pid, *logs)

    def end(self, toy: Started) -> tuple[int, str, str]:
        """Wait for its end: exit status (negative for a signal), standard output, standard error."""
        code = self._ask(wait=toy.pid)
        self._alive.discard(toy.pid)
        return code, toy.out.read_text(), toy.err.read_text()

    def clear(self) -> None:
        for pid in self._alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            self._ask(wait=pid)
        self._alive.clear()

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


@dataclass(frozen=True)
class Started:
    """A toy that runs, and where its output goes."""

    pid: int
    out: Path
    err: Path


@pytest.fixture(scope="session")
def all_toys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Toys]:
    found = Toys(tmp_path_factory.mktemp("toys"))
    yield found
    found.close()


@pytest.fixture
def toys(all_toys: Toys) -> Iterator[Toys]:
    """Start toy workloads as processes; remaining ones are killed after the test."""
    yield all_toys
    all_toys.clear()


@pytest.fixture
def until() -> Callable[[Callable[[], Any]], Any]:
    """Wait until a condition is true; returns its value. Fails after twenty seconds."""

    def wait(condition: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            if found := condition():
                return found
            time.sleep(0.01)
        raise AssertionError("waited twenty seconds in vain")

    return wait
