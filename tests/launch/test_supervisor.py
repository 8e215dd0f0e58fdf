"""The supervisor of a local job without Docker: its engine is a fake whose containers end at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import pytest
from botocore.endpoint import Endpoint
from botocore.exceptions import ReadTimeoutError
from moto import mock_aws

from estiba_launch.errors import HostError, LaunchError
from estiba_launch.jobs import artifacts, control
from estiba_launch.jobs.directory import REQUEST, create, write_json
from estiba_launch.jobs.logs import LOG
from estiba_launch.jobs.options import SubmitOptions
from estiba_launch.jobs.record import Record
from estiba_launch.jobs.sync import CheckpointSync
from estiba_launch.targets import operations, registry
from estiba_launch.targets.docker_command import Container
from estiba_launch.targets.local import interruptible, supervisor
from estiba_launch.targets.local.engine import End, Engine
from estiba_launch.targets.local.supervisor import Supervisor
from estiba_launch.targets.local.target import LocalTarget
from estiba_launch.targets.registry import parse


class FakeEngine(Engine):
    """Containers that print one line and end with 0."""

    def __init__(self) -> None:
        super().__init__()
        self.started: list[str] = []

    def ensure_image(self, image: str, report: Callable[[str], None] = lambda _: None) -> None: ...

    def network(self, *_: Any, **__: Any) -> dict[str, str]:
        return {}

    def start(self, container: Container) -> str:
        self.started.append(container.host.name)
        return container.name

    def end(self, container_id: str) -> End | None:  # noqa: ARG002
        return End(exit_code=0, out_of_memory=False)

    def logs(self, container_id: str, since: float | None) -> Iterator[bytes]:  # noqa: ARG002
        yield b"2026-01-01T00:00:00.000000001Z hello\n"

    def attach(self, container_id: str) -> Iterator[bytes]:  # noqa: ARG002
        yield from ()

    def stop(self, container_ids: list[str], grace_s: int) -> None: ...

    def kill(self, container_ids: list[str]) -> None: ...

    def remove(self, container_ids: list[str]) -> None: ...

    def remove_network(self, job: str) -> None: ...

    def containers(self, job: str, attempt: int) -> dict[str, str]:  # noqa: ARG002
        return {}

    def own_files(self, folder: Path, image: str) -> None: ...

    def give_files(self, folder: Path, image: str) -> None: ...


class Desk:
    """One job and its supervisor."""

    def __init__(self, tmp_path: Path, good: dict[str, Any]) -> None:
        self.engine = FakeEngine()
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "a").write_text("x")
        good["InputDataConfig"][0]["DataSource"]["S3DataSource"]["S3Uri"] = f"file://{tmp_path}/data"
        good["OutputDataConfig"]["S3OutputPath"] = f"file://{tmp_path}/out"
        good["CheckpointConfig"] = {"S3Uri": f"file://{tmp_path}/checkpoints"}
        self.request = good
        self.name = good["TrainingJobName"]

    def start(self) -> threading.Thread:
        self.dir = create(self.name)
        Record.create(self.dir, self.request)
        SubmitOptions(stop_grace_s=0).write(self.dir)
        write_json(self.dir / REQUEST, self.request)
        thread = threading.Thread(target=Supervisor(self.dir, self.engine).run, daemon=True)
        thread.start()
        return thread

    def run_until(self, ready: threading.Event) -> None:
        """Start the job, stop it once it is `ready`, and wait for its end."""
        thread = self.start()
        assert ready.wait(20)
        control.request_stop(self.dir, "requested by the user")
        thread.join(20)
        assert not thread.is_alive()

    @property
    def document(self) -> dict[str, Any]:
        return operations.status(self.name).to_json()


@pytest.fixture
def desk(tmp_path, monkeypatch, good):
    monkeypatch.setenv("ESTIBA_STATE", str(tmp_path / "state"))
    return Desk(tmp_path, good)


class Hang:
    """Stands in for a function whose answer never comes."""

    def __init__(self) -> None:
        self.called = threading.Event()

    def __call__(self, *_: Any, **__: Any) -> Any:
        self.called.set()
        threading.Event().wait(60)


@pytest.fixture
def silent_s3(monkeypatch):
    """An S3 endpoint that lists one object and never sends it. The event tells that it was asked for."""
    asked, over = threading.Event(), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if "list-type" not in self.path:
                asked.set()
                over.wait(60)
                return
            body = b"<ListBucketResult><Contents><Key>data/a</Key><Size>1</Size></Contents></ListBucketResult>"
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    yield asked
    over.set()
    server.shutdown()


def test_a_job_runs_from_start_to_end(desk):
    desk.start().join(20)
    assert desk.document["TrainingJobStatus"] == "Completed"
    assert desk.engine.started == ["algo-1"]


def test_a_stop_while_inputs_download_ends_the_job_before_a_container_starts(desk, silent_s3):
    desk.request["InputDataConfig"][0]["DataSource"]["S3DataSource"]["S3Uri"] = "s3://bucket/data"
    desk.run_until(silent_s3)
    assert (desk.document["TrainingJobStatus"], desk.engine.started) == ("Stopped", [])
    assert [one["Status"] for one in desk.document["SecondaryStatusTransitions"]] == [
        "Starting", "Downloading", "Stopping", "Stopped",
    ]  # fmt: skip
    assert "ModelArtifacts" not in desk.document


def test_max_runtime_holds_while_inputs_download(desk, silent_s3):
    desk.request["InputDataConfig"][0]["DataSource"]["S3DataSource"]["S3Uri"] = "s3://bucket/data"
    desk.request["StoppingCondition"] = {"MaxRuntimeInSeconds": 1, "MaxWaitTimeInSeconds": 100}
    desk.start().join(20)
    assert (desk.document["SecondaryStatus"], desk.engine.started) == ("MaxRuntimeExceeded", [])


def test_the_log_says_once_that_s3_does_not_answer_while_checkpoints_are_synced(desk, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    answer = Endpoint._do_get_response
    silent = [ReadTimeoutError(endpoint_url="http://s3")] * 3

    def answer_late(self: Endpoint, *call: Any) -> Any:
        return (None, silent.pop()) if silent else answer(self, *call)

    desk.request["CheckpointConfig"] = {"S3Uri": "s3://bucket/checkpoints"}
    with mock_aws():
        boto3.client("s3").create_bucket(Bucket="bucket")
        monkeypatch.setattr(Endpoint, "_do_get_response", answer_late)
        desk.start().join()
    assert desk.document["TrainingJobStatus"] == "Completed"
    marks = [line for line in (desk.dir / LOG).read_text().splitlines() if "S3 does not answer, trying again" in line]
    assert not silent and len(marks) == 1
    assert "checkpoints: S3 does not answer, trying again: Read timeout on endpoint URL" in marks[0]


@pytest.mark.parametrize("what", ["the image is pulled", "checkpoints are restored"])
def test_a_stop_is_honoured_while(desk, what, monkeypatch):
    hang = Hang()
    if what == "the image is pulled":
        desk.engine.ensure_image = hang
    else:
        monkeypatch.setattr(CheckpointSync, "restore", hang)
    desk.run_until(hang.called)
    assert (desk.document["TrainingJobStatus"], desk.engine.started) == ("Stopped", [])
    assert desk.document["Estiba"]["Attempts"][0]["Outcome"] == "Stopped"


def test_a_stop_ends_the_pause_before_another_try_to_start(desk, monkeypatch):
    """A job that ran before waits for what keeps its next attempt from starting, up to ten minutes."""
    desk.engine.end = lambda _: End(exit_code=137, out_of_memory=False)
    desk.request["RetryStrategy"] = {"MaximumRetryAttempts": 1}
    failed = threading.Event()

    def start(container: Container) -> str:
        if "-2" not in container.name:
            return container.name
        failed.set()
        raise HostError("no room")

    desk.engine.start = start
    monkeypatch.setattr(supervisor.Attempt, "_check", lambda self, _: self.end(supervisor.Outcome.HOST_LOST, "gone"))
    desk.run_until(failed)
    assert desk.document["TrainingJobStatus"] == "Stopped"


def test_a_stop_while_results_upload_ends_the_retries_and_names_where_they_are(desk, monkeypatch):
    failed = threading.Event()

    def refuse(*_: Any) -> str:
        failed.set()
        raise HostError("the store is away")

    monkeypatch.setattr(artifacts, "upload", refuse)
    desk.run_until(failed)
    assert desk.document["TrainingJobStatus"] == "Failed"
    reason = desk.document["FailureReason"]
    assert "model not uploaded, it stays in" in reason
    assert Path(reason.split("stays in ")[1].split(":")[0]).is_dir()


def test_a_stop_while_results_upload_keeps_them_and_the_job_ends_stopped(desk, monkeypatch):
    uploading, stopped, upload = threading.Event(), threading.Event(), artifacts.upload

    def slow(*words: Any) -> str:
        uploading.set()
        assert stopped.wait(20)
        return upload(*words)

    monkeypatch.setattr(artifacts, "upload", slow)
    thread = desk.start()
    assert uploading.wait(20)
    control.request_stop(desk.dir, "requested by the user")
    stopped.set()
    thread.join(20)
    assert desk.document["TrainingJobStatus"] == "Stopped"
    assert Path(desk.document["ModelArtifacts"]["S3ModelArtifacts"].removeprefix("file://")).is_file()


def test_a_preparation_that_ends_just_after_the_wait_is_no_timeout(monkeypatch):
    class Late(Future):
        def result(self, timeout=None):
            value = super().result()
            if timeout is not None:
                raise TimeoutError
            return value

    monkeypatch.setattr(interruptible, "Future", Late)
    assert interruptible.run_unless(lambda: None, lambda: 7) == 7


@pytest.mark.parametrize(
    ("address", "refused"),
    [("ck", True), ("ck/", True), ("ck/run1", True), ("", True), ("ck2", False), ("other", False)],
)
def test_jobs_whose_checkpoint_addresses_overlap_do_not_run_at_once(address, refused, tmp_path, monkeypatch):
    monkeypatch.setenv("ESTIBA_STATE", str(tmp_path / "state"))
    base = f"file://{tmp_path}/store"
    folder = create("running")
    write_json(folder / REQUEST, {"CheckpointConfig": {"S3Uri": f"{base}/ck"}})
    monkeypatch.setattr(control, "supervised", lambda _: True)
    monkeypatch.setattr(LocalTarget, "poll", lambda *_: SimpleNamespace(is_terminal=False))
    target = registry.target_of(parse("local"))
    request = {"CheckpointConfig": {"S3Uri": f"{base}/{address}"}}
    if refused:
        with pytest.raises(LaunchError, match="running is still running with these checkpoints"):
            target._refuse_shared_checkpoints(request)
    else:
        target._refuse_shared_checkpoints(request)
