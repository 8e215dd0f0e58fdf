"""Shared fixtures of the job layer's tests: a clean environment, one S3 server, another user, a stub workload."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from s3server import S3Server, s3_server
from shared.script_hosts import Hosts

SHARED = Path(__file__).resolve().parents[2] / "shared"
NOBODY = 65534
FOREIGN = ("AWS_", "ESTIBA_", "SM_", "SAGEMAKER_", "TRAINING_JOB_")
"""Variables that the job layer reads; each test starts without them."""

STUB = '''
"""A workload whose behaviour is chosen by --mode."""
import json, os, sys, threading, time
from estiba.config import Config
from estiba.errors import ConfigError, DataError
from estiba.platform.workload import run

class StubConfig(Config):
    mode: str = "report"
    text_column: str = "texto"
    batch_size: int = 0

def work(config, job, stop):
    match config.mode:
        case "report":
            print(json.dumps({**config.model_dump(), "root": str(job.root), "name": job.name}))
        case "config-error":
            raise ConfigError("--mode is 'config-error': that cannot be; choose another")
        case "data-error":
            raise DataError("a.parquet: no column 'texto'; pass --text-column NAME")
        case "crash":
            raise ValueError("the third step went wrong")
        case "chained-crash":
            try:
                {}["absent"]
            except KeyError as error:
                raise RuntimeError("the lookup went wrong") from error
        case "memory":
            raise MemoryError
        case "abort":
            os.abort()
        case "kill-myself":
            os.kill(os.getpid(), 9)
        case "stuck-thread":
            threading.Thread(target=time.sleep, args=(600,)).start()
        case "odd-name":
            print(os.fsdecode(b"caf\\xe9.parquet"))
            raise DataError(os.fsdecode(b"caf\\xe9.parquet") + ": is not parquet")
        case "many-lines":
            print("line\\n" * 100_000)
        case "wait":
            print("ready", flush=True)
            while not stop.wait(10):
                pass
            raise stop.interrupted("3 steps are saved")
        case "finish":
            print("ready", flush=True)
            stop.wait(10)

if __name__ == "__main__":
    run(StubConfig, work)
'''


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(FOREIGN) and name != "AWS_CA_BUNDLE":
            monkeypatch.delenv(name)
    monkeypatch.delenv("CURRENT_HOST", raising=False)
    # No test uses this machine's own AWS account by accident.
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


# --- object storage ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def s3_process() -> Iterator[S3Server]:
    """One server in memory for all tests that do not stop it, with the bucket `estiba`."""
    with s3_server(persist=False) as server:
        server.make_bucket("estiba")
        yield server


@pytest.fixture(scope="session")
def s3_client(s3_process: S3Server) -> Any:
    """An independent boto3 client; created once, since that is slow."""
    return s3_process.client()


@pytest.fixture
def s3(s3_process: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The server, with this process's environment pointing to it."""
    for name, value in s3_process.environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_ALLOW_HTTP")  # the store must detect by itself that the endpoint is plain http
    return s3_process


@pytest.fixture
def s3_url(s3: S3Server) -> str:
    """A prefix for this test alone."""
    return f"s3://estiba/{uuid.uuid4().hex}"


# --- processes -----------------------------------------------------------------------------------------------------


@pytest.fixture
def as_nobody() -> Callable[[Callable[[], Any]], Any]:
    """Run a function in a child process as user nobody; returns what it returns, raises what it raises."""
    if os.getuid() != 0:
        pytest.skip("only root can become another user")

    def run(function: Callable[[], Any]) -> Any:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            try:
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
                answer: tuple[bool, Any] = (True, function())
            except BaseException as error:
                error.add_note(traceback.format_exc())
                answer = (False, error)
            os.write(writing, pickle.dumps(answer))
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading, "rb") as file:
            succeeded, value = pickle.loads(file.read())
        os.waitpid(child, 0)
        if not succeeded:
            raise value
        return value

    return run


@pytest.fixture
def open_dir() -> Iterator[Path]:
    """A directory that other users can enter, unlike pytest's own."""
    path = Path("/tmp") / f"estiba-{uuid.uuid4().hex}"
    path.mkdir(mode=0o755)
    path.chmod(0o755)
    yield path
    subprocess.run(["rm", "-rf", path], check=True)


class Place:
    """One job's root, a stub workload, and ways to run things there."""

    def __init__(self, folder: Path, bytecode: Path) -> None:
        """`bytecode` keeps what Python compiles: hundreds of short processes import the same few modules."""
        self.folder = folder
        self.root = folder / "ml"
        self.failure = self.root / "output/failure"
        (folder / "packages/stub").mkdir(parents=True)
        (folder / "packages/stub/__init__.py").touch()
        (folder / "packages/stub/__main__.py").write_text(STUB)
        self.environ = {
            **{
                name: value
                for name, value in os.environ.items()
                if not name.startswith(FOREIGN) and name != "PYTHONDONTWRITEBYTECODE"
            },
            "PYTHONPATH": f"{SHARED}:{folder / 'packages'}",
            "PYTHONPYCACHEPREFIX": str(bytecode),
            "ESTIBA_ROOT": str(self.root),
            "ESTIBA_WORKLOAD": "stub",
        }
        self._started: list[subprocess.Popen[bytes]] = []

    def hyperparameters(self, **values: str) -> None:
        path = self.root / "input/config/hyperparameters.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))

    def script(self, text: str, name: str = "x.py") -> Path:
        path = self.folder / name
        path.write_text(textwrap.dedent(text))
        return path

    def start(self, *command: str | Path, env: Mapping[str, str | None] | None = None, **options: Any) -> Any:
        """Start a process in this root; it and its descendants are killed after the test."""
        environ = {name: value for name, value in {**self.environ, **(env or {})}.items() if value is not None}
        settings: dict[str, Any] = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "cwd": self.folder,
            "env": environ,
            **options,
        }
        process = subprocess.Popen([str(item) for item in command], **settings)
        self._started.append(process)
        return process

    def entry(self, *arguments: str | Path, env: Mapping[str, str | None] | None = None, **options: Any) -> Any:
        """PID 1's program, started with a container's arguments."""
        return self.start(sys.executable, "-m", "estiba.platform.entry", *arguments, env=env, **options)

    def run(self, process: Any, timeout_s: float = 20) -> subprocess.CompletedProcess[bytes]:
        """Wait for the process to end."""
        out, err = process.communicate(timeout=timeout_s)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def failure_text(self) -> str:
        return self.failure.read_text() if self.failure.exists() else "(no failure file)"

    def end(self) -> None:
        """Kill remaining processes, grandchildren included: they all have this root in their environment."""
        mark = f"ESTIBA_ROOT={self.root}".encode()
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                try:
                    if mark in (folder / "environ").read_bytes().split(b"\0"):
                        os.kill(int(folder.name), signal.SIGKILL)
                except OSError:
                    continue
        for process in self._started:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    stream.close()


@pytest.fixture(scope="session")
def bytecode(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bytecode")


@pytest.fixture
def place(tmp_path: Path, bytecode: Path) -> Iterator[Place]:
    found = Place(tmp_path, bytecode)
    yield found
    found.end()


@pytest.fixture
def hosts(tmp_path: Path, bytecode: Path) -> Iterator[Callable[..., Hosts]]:
    """hosts("127.0.0.1", "127.0.0.2"): the hosts of one script job; localhost alone by default."""
    made: list[Hosts] = []

    def make(*names: str) -> Hosts:
        made.append(Hosts(tmp_path / f"job-{len(made)}", bytecode, names or ["localhost"]))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def until() -> Callable[[Callable[[], Any]], Any]:
    """Wait until a condition is true; returns its value. Fails after ten seconds."""

    def wait(condition: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            if found := condition():
                return found
            time.sleep(0.01)
        raise AssertionError("waited ten seconds in vain")

    return wait
