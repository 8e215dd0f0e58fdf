"""Several processes at one job: locks, records that never go back, and a terminal status that comes last."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
from pathlib import Path
from typing import IO, Any

import pytest

from estiba_launch.errors import HostError, LaunchError
from estiba_launch.jobs import control, directory, lock
from estiba_launch.jobs.directory import REQUEST, TARGET, write_json
from estiba_launch.jobs.logs import LOG
from estiba_launch.jobs.options import SubmitOptions
from estiba_launch.jobs.record import RECORD, Record, enter, keep_status, recorded_document
from estiba_launch.jobs.status import JobStatus
from estiba_launch.targets import operations, registry
from estiba_launch.targets.local.outcome import Outcome, Result
from estiba_launch.targets.local.supervisor import Supervisor
from estiba_launch.targets.sagemaker.target import record_job
from fake_ssh import FakeSsh

HOST = "ssh://user@203.0.113.7"
END = "/job exited 0 false 2026-10-01T12:00:00.100000000Z 2026-10-01T12:01:00.100000000Z\n"
PROCESSES = multiprocessing.get_context("spawn")


@pytest.fixture(autouse=True)
def own_state(tmp_path, monkeypatch):
    monkeypatch.setenv("ESTIBA_STATE", str(tmp_path / "state"))


@pytest.fixture
def folder(tmp_path) -> Path:
    """The directory of a job on a remote host."""
    request = {
        "TrainingJobName": "job",
        "AlgorithmSpecification": {
            "TrainingImage": "image",
            "MetricDefinitions": [{"Name": "n", "Regex": "n=([0-9]+)"}],
        },
        "OutputDataConfig": {"S3OutputPath": f"file://{tmp_path}/out"},
        "ResourceConfig": {"InstanceType": "ml.g4dn.xlarge", "InstanceCount": 1, "VolumeSizeInGB": 1},
    }
    made = directory.create("job")
    Record.create(made, request).begin_attempt(["algo-1"])
    write_json(made / TARGET, {"target": HOST})
    write_json(made / REQUEST, request)
    return made


# ---- locks


def hold_until_told(path: str, held: Any, told: Any) -> None:
    with lock.locked(Path(path)):
        held.set()
        told.wait(20)


def count_up(path: str, times: int) -> None:
    for _ in range(times):
        with lock.locked(Path(path + ".lock")):
            number = int(Path(path).read_text())
            Path(path).write_text(str(number + 1))


def test_a_lock_of_another_process_is_seen_and_freed_when_it_is_killed(tmp_path):
    path = tmp_path / "lock"
    held, told = PROCESSES.Event(), PROCESSES.Event()
    process = PROCESSES.Process(target=hold_until_told, args=(str(path), held, told))
    process.start()
    assert held.wait(20)
    assert lock.is_locked(path)
    assert lock.try_lock(path) is None
    process.kill()
    process.join()
    assert not lock.is_locked(path)
    taken = lock.try_lock(path)
    assert taken is not None
    taken.close()


def test_processes_that_change_one_file_under_a_lock_lose_no_change(tmp_path):
    path = tmp_path / "count"
    path.write_text("0")
    processes = [PROCESSES.Process(target=count_up, args=(str(path), 200)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert path.read_text() == "600"


def probe(path: str, told: Any) -> None:
    while not told.is_set():
        lock.is_locked(Path(path))


def test_a_process_that_looks_whether_a_job_is_supervised_never_keeps_a_supervisor_out(tmp_path):
    path = tmp_path / "lock"
    path.touch()
    told = PROCESSES.Event()
    prober = PROCESSES.Process(target=probe, args=(str(path), told))
    prober.start()
    try:
        for _ in range(300):
            taken = lock.try_lock(path)
            assert taken is not None
            taken.close()
    finally:
        told.set()
        prober.join()


# ---- records


def at(folder: Path, *statuses: str) -> JobStatus:
    """What a process polled that saw the job enter these statuses."""
    document = copy.deepcopy(recorded_document(folder))
    for status in statuses:
        enter(document, status, status)
    return JobStatus.from_json(document)


def test_an_older_observation_never_replaces_a_newer_one(folder):
    early = at(folder, "Training")
    late = at(folder, "Training", "Stopping")
    end = at(folder, "Training", "Completed")
    keep_status(late)
    keep_status(early)
    assert json.loads((folder / RECORD).read_text())["SecondaryStatus"] == "Stopping"
    keep_status(end)
    keep_status(late)
    assert json.loads((folder / RECORD).read_text())["TrainingJobStatus"] == "Completed"


def keep_all(statuses: list[JobStatus]) -> None:
    for status in statuses:
        keep_status(status)


def test_processes_that_poll_one_job_at_once_leave_the_newest_record(folder):
    running = [at(folder, *["Training"] * number) for number in range(40)]
    end = at(folder, *["Training"] * 40, "Completed")
    processes = [
        PROCESSES.Process(target=keep_all, args=(statuses,))
        for statuses in (running, [*running, end], list(reversed(running)))
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    document = json.loads((folder / RECORD).read_text())
    assert document["TrainingJobStatus"] == "Completed"
    assert len(document["SecondaryStatusTransitions"]) == 42


def test_what_is_true_at_one_moment_only_is_not_recorded(folder):
    document = at(folder, "Training").to_json()
    document["Estiba"].update(Supervised=False, Unreachable="no route")
    keep_status(JobStatus.from_json(document))
    extra = json.loads((folder / RECORD).read_text())["Estiba"]
    assert set(extra) == {"Attempts"}


def test_the_directory_of_a_job_that_an_earlier_version_started_is_read(folder):
    """Its files as version 0.x wrote them: fewer options, the user's id beside the target."""
    host = {"gpus": None, "gpus_if_any": True, "shm_size": "8g", "memory": None, "cpus": None, "encoding": "plain"}
    old = {"host": {**host, "env_file": None}, "copy_inputs": False, "sync_every_s": 5.0, "stop_grace_s": 120}
    write_json(folder / "options.json", {**old, "capacity_wait_s": 0.0, "keep_hosts": True, "environment": {"A": "1"}})
    write_json(folder / TARGET, {"target": HOST, "user_id": "1000:1000", "usd_per_h": 2.5})
    write_json(folder / "interrupt.json", {"notice": False, "grace_s": 5, "host": None, "at_write": True})
    options = SubmitOptions.read(folder)
    assert (options.keep_hosts, options.environment, options.region) == (True, {"A": "1"}, None)
    fault = control.take_fault(folder)
    assert fault is not None and fault.at_write and not fault.notice
    assert control.take_fault(folder) is None
    assert registry.target_of_job("job").recorded("job").usd_per_h == 2.5


# ---- a terminal status comes last


def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSsh:
    """A host on which the job has ended; it printed a metric."""
    ssh = FakeSsh(tmp_path, monkeypatch)
    ssh.tool("docker", "#!/bin/sh\nexit 1\n")
    work = ssh.home / "estiba/jobs/job"
    work.mkdir(parents=True)
    (work / "end").write_text(END)
    (work / "job.log").write_text("2026-10-01T12:00:30.100000000Z n=7\n2026-10-01T12:00:31.100000000Z bye\n")
    return ssh


def test_an_ended_remote_job_is_recorded_after_its_log_and_metrics(folder, tmp_path, monkeypatch):
    remote(tmp_path, monkeypatch)
    seen: list[tuple[list[str], dict[str, float]]] = []
    real = operations.keep_status

    def spy(status: JobStatus) -> None:
        seen.append(((folder / LOG).read_text().splitlines(), dict(status.metrics)))
        real(status)

    monkeypatch.setattr(operations, "keep_status", spy)
    status = operations.status("job")
    assert status.status == "Completed"
    assert seen == [(["n=7", "bye"], {"n": 7.0})]
    assert json.loads((folder / RECORD).read_text())["FinalMetricDataList"][0]["Value"] == 7.0


def test_an_ended_remote_job_whose_log_cannot_be_read_is_not_recorded_yet(folder, tmp_path, monkeypatch):
    remote(tmp_path, monkeypatch)

    def unreachable(*_: object) -> None:
        raise HostError("the host went away")

    monkeypatch.setattr("estiba_launch.targets.ssh.target.SshTarget.copy_log", unreachable)
    assert operations.status("job").unreachable == "the host went away"
    assert json.loads((folder / RECORD).read_text())["TrainingJobStatus"] == "InProgress"


@pytest.mark.parametrize("watcher", ["status", "logs"])
def test_a_watcher_of_an_ended_remote_job_waits_for_the_process_that_copies_its_last_lines(
    folder, tmp_path, monkeypatch, watcher
):
    remote(tmp_path, monkeypatch)
    real = control.hold
    asked: list[str] = []

    def hold(folder: Path) -> IO[str] | None:
        asked.append((folder / LOG).read_text() if (folder / LOG).exists() else "")
        return real(folder) if len(asked) > 2 else None

    monkeypatch.setattr(control, "hold", hold)
    if watcher == "status":
        assert operations.status("job").is_terminal
        assert (folder / LOG).read_text() == "n=7\nbye\n"
    else:
        monkeypatch.setattr("estiba_launch.targets.ssh.target.SshTarget.finalize", lambda _, status: status)
        assert list(operations.log_lines("job", follow=True)) == ["n=7", "bye"]


class NoEngine:
    def remove_network(self, job: str) -> None:
        pass


@pytest.mark.parametrize(
    ("result", "status", "line"),
    [
        (Result(outcome=Outcome.COMPLETED), "Completed", "Completed: Completed"),
        (Result(outcome=Outcome.MAX_WAIT), "Stopped", "Stopped: MaxWaitTimeExceeded"),
        (Result(outcome=Outcome.FAILED, reason="no column"), "Failed", "Failed: no column"),
        (Result(outcome=Outcome.HOST_LOST, reason="gone"), "Failed", "Failed: InternalServerError: gone"),
        (HostError("disk full"), "Failed", "failed: disk full"),
        (ValueError("bug"), "Failed", "failed: InternalServerError: ValueError: bug"),
    ],
)
def test_a_supervisor_enters_the_terminal_status_after_the_last_line_and_the_clean_up(
    folder, monkeypatch, result, status, line
):
    (folder / "scratch").mkdir()
    supervisor = Supervisor(folder, NoEngine())
    order: list[str] = []

    def attempts() -> Result:
        if isinstance(result, Exception):
            raise result
        return result

    real_save = Record.save

    def save(self: Record) -> None:
        if self.status in ("Completed", "Stopped", "Failed"):
            order.append(f"terminal, log ends with {(folder / LOG).read_text().splitlines()[-1].split(' · ')[0]}")
        real_save(self)

    real_clear = Supervisor._clean_up

    def clean_up(self: Supervisor, files_are_safe: bool) -> None:
        real_clear(self, files_are_safe)
        order.append("clean")

    monkeypatch.setattr(supervisor, "_attempts", attempts)
    monkeypatch.setattr(Record, "save", save)
    monkeypatch.setattr(Supervisor, "_clean_up", clean_up)
    supervisor.run()
    assert order[0] == "clean"
    assert len(order) == 2 and order[1].startswith(f"terminal, log ends with --- {line}")
    assert Record.load(folder).status == status


@pytest.mark.parametrize("kind", ["ssh", "sagemaker"])
def test_a_start_on_a_full_disk_is_named_and_leaves_the_name_free(kind, monkeypatch, tmp_path, good):
    monkeypatch.setenv("ESTIBA_STATE", str(tmp_path / "state"))
    full = OSError(28, "No space left on device")

    def record() -> None:
        if kind == "ssh":
            registry.target_of("ssh://user@host")._record(good, SubmitOptions())  # type: ignore[attr-defined]
        else:
            record_job(good["TrainingJobName"], good, "us-east-1", "arn")

    with monkeypatch.context() as disk:
        disk.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(full))
        with pytest.raises(LaunchError, match="No space left on device; make room, or point ESTIBA_STATE"):
            record()
    record()
    assert directory.job_names() == [good["TrainingJobName"]]


def test_a_directory_that_a_killed_start_left_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("ESTIBA_STATE", str(tmp_path / "state"))
    folder = directory.create("cut")
    message = f"cut: a job of this name is being started, or its start was interrupted; .* remove {folder}"
    with pytest.raises(LaunchError, match=message):
        directory.refuse_known("cut")
