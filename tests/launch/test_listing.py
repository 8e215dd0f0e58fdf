"""`list` of many jobs: AWS is asked once per account, a remote host once, and nothing is written."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import EndpointConnectionError
from botocore.stub import ANY, Stubber

from estiba_launch.jobs import directory
from estiba_launch.jobs.directory import REQUEST, TARGET, write_json
from estiba_launch.jobs.record import Record
from estiba_launch.targets import operations
from estiba_launch.targets.sagemaker import client
from estiba_launch.targets.sagemaker.target import PAGE, record_job
from fake_ssh import FakeSsh

COUNT = 500
HOST = "ssh://user@203.0.113.7"
NO_TIME = '{"TrainingJobName": "bad", "TrainingJobStatus": "InProgress"}'
NULL_EXTRA = '{"TrainingJobName": "bad", "TrainingJobStatus": "Failed", "Estiba": null}'
WRONG_EXTRA = '{"TrainingJobName": "bad", "TrainingJobStatus": "Failed", "Estiba": {"Attempts": [1]}}'


@pytest.fixture(autouse=True)
def own_state(tmp_path, monkeypatch):
    monkeypatch.setenv("ESTIBA_STATE", str(tmp_path / "state"))


def request_of(name: str) -> dict[str, Any]:
    return {
        "TrainingJobName": name,
        "AlgorithmSpecification": {"TrainingImage": "image", "TrainingInputMode": "File"},
        "OutputDataConfig": {"S3OutputPath": "s3://bucket/out"},
        "ResourceConfig": {"InstanceType": "ml.g4dn.xlarge", "InstanceCount": 1, "VolumeSizeInGB": 1},
    }


def record(name: str, target: str | None = None) -> Path:
    folder = directory.create(name)
    request = request_of(name)
    Record.create(folder, request).begin_attempt(["algo-1"])
    if target:
        write_json(folder / TARGET, {"target": target})
    write_json(folder / REQUEST, request)
    return folder


def files_below(path: Path) -> dict[Path, tuple[int, int]]:
    return {one: (one.stat().st_mtime_ns, one.stat().st_size) for one in path.rglob("*") if one.is_file()}


class Account:
    """A stubbed account that counts ListTrainingJobs and refuses every other call."""

    def __init__(self, region: str) -> None:
        config = Config(retries={"total_max_attempts": 1})
        made = {
            name: boto3.client(
                name, region_name=region, config=config, aws_access_key_id="x", aws_secret_access_key="x"
            )
            for name in ("sagemaker", "logs", "iam")
        }
        self.clients = client.Clients(region=region, **made)
        self.stub = Stubber(self.clients.sagemaker)
        self.stub.activate()

    def page(self, names: list[str], status: str, *, token: str | None = None, more: str | None = None) -> None:
        now = datetime.datetime.now(datetime.UTC)
        found = [
            {"TrainingJobName": name, "TrainingJobArn": "arn", "TrainingJobStatus": status, "CreationTime": now}
            for name in names
        ]
        expected = {
            "SortBy": "CreationTime",
            "SortOrder": "Descending",
            "CreationTimeAfter": ANY,
            "MaxResults": PAGE,
            **({"NextToken": token} if token else {}),
        }
        answer = {"TrainingJobSummaries": found, **({"NextToken": more} if more else {})}
        self.stub.add_response("list_training_jobs", answer, expected)


@pytest.fixture
def account(monkeypatch) -> Account:
    one = Account("us-east-1")
    monkeypatch.setattr(client, "connect", lambda _=None: one.clients)
    return one


def test_a_list_of_500_local_jobs_names_them_all_oldest_first(monkeypatch):
    names = [f"job-{number:03}" for number in range(COUNT)]
    for name in names:
        record(name)
    assert [one.name for one in operations.list_jobs()] == names


def test_a_remote_host_is_asked_once_for_500_jobs(tmp_path, monkeypatch):
    ssh = FakeSsh(tmp_path, monkeypatch)
    ssh.tool("docker", "#!/bin/sh\nexit 1\n")
    names = [f"job-{number:03}" for number in range(COUNT)]
    for name in names:
        record(name, HOST)
    work = ssh.home / "estiba/jobs/job-007"
    work.mkdir(parents=True)
    (work / "end").write_text("/job-007 exited 0 false 2026-10-01T12:00:00.1Z 2026-10-01T12:01:00.1Z\n")
    before = files_below(tmp_path / "state")
    listed = operations.list_jobs()
    assert ssh.calls == ["sh"]
    assert [one.name for one in listed] == names
    assert [one.name for one in listed if one.status == "Completed"] == ["job-007"]
    assert listed[7].training_s == 60
    assert files_below(tmp_path / "state") == before


def test_two_hosts_are_asked_once_each(tmp_path, monkeypatch):
    ssh = FakeSsh(tmp_path, monkeypatch)
    ssh.tool("docker", "#!/bin/sh\nexit 1\n")
    for number in range(10):
        record(f"job-{number}", HOST if number % 2 else "ssh://user@203.0.113.8")
    assert len(operations.list_jobs()) == 10
    assert ssh.calls == ["sh", "sh"]


def test_a_host_that_does_not_answer_leaves_what_was_last_known(tmp_path, monkeypatch):
    monkeypatch.setenv("ESTIBA_SSH", "false")
    record("job-1", HOST)
    (found,) = operations.list_jobs()
    assert found.secondary_status == "Starting"
    assert found.unreachable and "cannot be reached" in found.unreachable


def test_a_machine_without_an_ssh_client_lists_what_was_last_known_of_remote_jobs(monkeypatch):
    monkeypatch.setenv("ESTIBA_SSH", "/nonexistent/ssh")
    record("here")
    record("there", HOST)
    here, there = operations.list_jobs()
    assert here.unreachable is None
    assert there.unreachable == "/nonexistent/ssh: not found; install the OpenSSH client"


def test_aws_is_asked_by_pages_of_100_for_500_running_jobs(account, tmp_path):
    names = [f"job-{number:03}" for number in range(COUNT)]
    for name in names:
        record_job(name, request_of(name), "us-east-1", "arn")
    pages = [names[start : start + PAGE] for start in range(0, COUNT, PAGE)]
    for number, page in enumerate(pages):
        last = number == len(pages) - 1
        account.page(
            page, "InProgress", token=f"t{number}" if number else None, more=None if last else f"t{number + 1}"
        )
    before = files_below(tmp_path / "state")
    listed = operations.list_jobs()
    account.stub.assert_no_pending_responses()
    assert [one.name for one in listed] == names
    assert {one.status for one in listed} == {"InProgress"}
    assert files_below(tmp_path / "state") == before


def test_aws_is_asked_once_when_few_of_500_jobs_are_running(account):
    for number in range(COUNT):
        folder = record_job(f"job-{number:03}", request_of(f"job-{number:03}"), "us-east-1", "arn")
        if number % 100:
            done = {"TrainingJobStatus": "Completed", "SecondaryStatus": "Completed", "CreationTime": "2026"}
            write_json(folder / "describe.json", {**request_of(folder.name), **done})
    # The listing ends as soon as every running job was found, so the next page is not asked for.
    account.page([f"job-{number:03}" for number in range(0, COUNT, 100)], "Failed", more="next")
    listed = operations.list_jobs()
    account.stub.assert_no_pending_responses()
    assert [one.name for one in listed if one.status == "Failed"] == [f"job-{n:03}" for n in range(0, COUNT, 100)]
    assert sum(one.status == "Completed" for one in listed) == COUNT - 5


def test_aws_is_not_asked_when_every_job_has_ended(account):
    folder = record_job("job-1", request_of("job-1"), "us-east-1", "arn")
    done = {"TrainingJobStatus": "Stopped", "SecondaryStatus": "Stopped", "CreationTime": "2026"}
    write_json(folder / "describe.json", {**request_of("job-1"), **done})
    assert [one.status for one in operations.list_jobs()] == ["Stopped"]


def test_each_region_is_asked_once(monkeypatch):
    accounts = {region: Account(region) for region in ("us-east-1", "eu-west-1")}
    monkeypatch.setattr(client, "connect", lambda region=None: accounts[region].clients)
    for number in range(6):
        region = ("us-east-1", "eu-west-1")[number % 2]
        record_job(f"job-{number}", request_of(f"job-{number}"), region, "arn")
    for number, account in enumerate(accounts.values()):
        account.page([f"job-{index}" for index in range(number, 6, 2)], "InProgress")
    assert len(operations.list_jobs()) == 6
    for account in accounts.values():
        account.stub.assert_no_pending_responses()


def test_an_aws_that_does_not_answer_leaves_what_was_last_known(account, monkeypatch):
    record_job("job-1", request_of("job-1"), "us-east-1", "arn")

    def unreachable(**_: object) -> None:
        raise EndpointConnectionError(endpoint_url="https://x")

    monkeypatch.setattr(account.clients.sagemaker, "list_training_jobs", unreachable)
    (found,) = operations.list_jobs()
    assert found.status == "InProgress"
    assert found.unreachable and "cannot be reached" in found.unreachable


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("describe.json", "{", "describe.json: broken"),
        ("describe.json", "", "describe.json: broken"),
        ("describe.json", "[]", "describe.json: not a job's record; remove"),
        ("describe.json", None, "describe.json: not a job's record; remove"),
        ("describe.json", '{"TrainingJobName": "good", "TrainingJobStatus": "Failed"}', "its record is that of good"),
        ("describe.json", NULL_EXTRA, "describe.json: not a job's record; remove"),
        ("describe.json", WRONG_EXTRA, "its record is damaged (TypeError: "),
        (TARGET, "{}", "its record is damaged (KeyError: 'target')"),
        (TARGET, "[]", "its record is damaged (TypeError: "),
        (TARGET, '{"target": "moon"}', "--target 'moon': unknown"),
    ],
)
def test_one_record_that_cannot_be_read_hides_no_other_job(file, text, message):
    record("good")
    folder = record("bad")
    (folder / file).unlink(missing_ok=True)
    if text is not None:
        (folder / file).write_text(text)
    only_good_is_listed(message)


def only_good_is_listed(message: str) -> None:
    warnings: list[str] = []
    assert [one.name for one in operations.list_jobs(warnings.append)] == ["good"]
    (warning,) = warnings
    assert warning.startswith("warning: bad: ") and message in warning


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("describe.json", None, "describe.json: not a job's record; remove"),
        ("describe.json", "{}", "describe.json: not a job's record; remove"),
        ("describe.json", NO_TIME, "its record is damaged (ValueError: Invalid isoformat string"),
        (TARGET, '{"target": "sagemaker"}', "its record is damaged (KeyError: 'region')"),
    ],
)
def test_one_bad_record_of_sagemaker_hides_no_other_job(file, text, message, account):
    for name in ("good", "bad"):
        record_job(name, request_of(name), "us-east-1", "arn")
    account.page(["good"], "InProgress")
    path = directory.job_dir("bad") / file
    path.unlink()
    if text is not None:
        path.write_text(text)
    only_good_is_listed(message)
    account.stub.assert_no_pending_responses()


def test_one_record_that_this_user_may_not_read_hides_no_other_job(monkeypatch):
    record("good")
    closed = record("bad") / "describe.json"
    real = Path.read_text

    def read_text(path: Path, *rest: Any) -> str:
        if path == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *rest)

    # Root, who may run this test, reads every file.
    monkeypatch.setattr(Path, "read_text", read_text)
    only_good_is_listed(f"Permission denied: '{closed}'); correct its permissions")
