"""The SageMaker target: moto for the calls it keeps, botocore's Stubber for sequences it cannot play."""

from __future__ import annotations

import datetime
import io
import json
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import boto3
import botocore.session
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError
from botocore.stub import Stubber
from moto import mock_aws
from typer.testing import CliRunner

from estiba_launch.cli.app import app
from estiba_launch.errors import AwsUnavailable, HostError, LaunchError
from estiba_launch.jobs import archive
from estiba_launch.jobs import directory as state
from estiba_launch.request import jobfile, prices
from estiba_launch.targets import operations as jobs
from estiba_launch.targets import registry
from estiba_launch.targets.sagemaker import client, console, logs, role
from estiba_launch.targets.sagemaker.target import SageMakerTarget, record_job

GOLDEN = Path(__file__).parent / "golden"
EMBED = Path(__file__).parents[2] / "images/embed/job.yaml"
T0 = datetime.datetime(2026, 10, 1, 12, 0, tzinfo=datetime.UTC)
VALUES = {
    "JOB_NAME": "embed-golden",
    "IMAGE": "210987654321.dkr.ecr.us-east-1.amazonaws.com/estiba/embed:1",
    "ROLE_ARN": "arn:aws:iam::210987654321:role/Estiba",
    "DATASET_URI": "s3://bucket/data",
    "MODEL_URI": "s3://bucket/model",
    "OUTPUT_URI": "s3://bucket/out",
    "CHECKPOINT_URI": "s3://bucket/checkpoints",
}
TRUST = {
    "Version": "2012-10-17",
    "Statement": [{"Effect": "Allow", "Principal": {"Service": "sagemaker.amazonaws.com"}, "Action": "sts:AssumeRole"}],
}


@pytest.fixture(autouse=True)
def own_place(tmp_path, monkeypatch):
    monkeypatch.setenv("ESTIBA_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_SESSION_TOKEN", *VALUES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(SageMakerTarget, "poll_interval_s", 0.0)
    monkeypatch.setattr(logs, "SETTLE_S", 0.0)


def words(values: dict[str, str]) -> list[str]:
    return [word for name, value in values.items() for word in ("--set", f"{name}={value}")]


def call(*args: str) -> Any:
    return CliRunner().invoke(app, list(args))


class Aws:
    """Stubbed clients; what is queued must be asked for in that order, and nothing else."""

    def __init__(self, monkeypatch) -> None:
        config = Config(retries={"total_max_attempts": 1})
        self.clients = client.Clients(
            region="us-east-1",
            **{
                name: boto3.client(name, region_name="us-east-1", config=config)
                for name in ("sagemaker", "logs", "iam")
            },
        )
        self.sagemaker, self.logs = Stubber(self.clients.sagemaker), Stubber(self.clients.logs)
        for stub in (self.sagemaker, self.logs):
            stub.activate()
        monkeypatch.setattr(client, "connect", lambda _=None: self.clients)

    def describe(self, *statuses: str, **more: Any) -> None:
        """Queue one answer of DescribeTrainingJob that has gone through `statuses`."""
        last = statuses[-1]
        over = last in ("Completed", "Failed", "Stopped", "MaxRuntimeExceeded", "MaxWaitTimeExceeded")
        main = {"MaxRuntimeExceeded": "Stopped", "MaxWaitTimeExceeded": "Stopped"}.get(last, last)
        transitions = [
            {"Status": status, "StartTime": T0 + datetime.timedelta(minutes=index), "StatusMessage": f"{status} now"}
            for index, status in enumerate(statuses)
        ]
        answer = {
            "TrainingJobName": "job-1",
            "TrainingJobArn": "arn:aws:sagemaker:us-east-1:210987654321:training-job/job-1",
            "TrainingJobStatus": main if over else "Stopping" if last == "Stopping" else "InProgress",
            "SecondaryStatus": last,
            "SecondaryStatusTransitions": transitions,
            "AlgorithmSpecification": {
                "TrainingInputMode": "File",
                "MetricDefinitions": [{"Name": "loss", "Regex": "loss=([0-9.]+)"}],
            },
            "ModelArtifacts": {"S3ModelArtifacts": "s3://bucket/out/job-1/output/model.tar.gz"},
            "OutputDataConfig": {"S3OutputPath": "s3://bucket/out"},
            "ResourceConfig": {"InstanceType": "ml.g4dn.xlarge", "InstanceCount": 1, "VolumeSizeInGB": 30},
            "StoppingCondition": {"MaxRuntimeInSeconds": 3600},
            "CreationTime": T0,
            **more,
        }
        self.sagemaker.add_response("describe_training_job", answer, {"TrainingJobName": "job-1"})

    def streams(self, *names: str) -> None:
        found = [{"logStreamName": f"job-1/{name}"} for name in names]
        self.logs.add_response(
            "describe_log_streams",
            {"logStreams": found},
            {"logGroupName": logs.GROUP, "logStreamNamePrefix": "job-1/"},
        )

    def events(self, stream: str, token: str | None, next_token: str, *texts: str, at: int = 0) -> None:
        expected = {"logGroupName": logs.GROUP, "logStreamName": f"job-1/{stream}", "startFromHead": True}
        if token:
            expected["nextToken"] = token
        found = [{"timestamp": at + index, "message": text, "ingestionTime": 1} for index, text in enumerate(texts)]
        self.logs.add_response(
            "get_log_events", {"events": found, "nextForwardToken": next_token, "nextBackwardToken": "b"}, expected
        )

    def check(self) -> None:
        self.sagemaker.assert_no_pending_responses()
        self.logs.assert_no_pending_responses()


@pytest.fixture
def aws(monkeypatch) -> Aws:
    return Aws(monkeypatch)


@pytest.fixture
def job(aws: Aws) -> str:
    record_job(
        "job-1",
        {
            "TrainingJobName": "job-1",
            "ResourceConfig": {"InstanceType": "ml.g4dn.xlarge", "InstanceCount": 1},
            "OutputDataConfig": {"S3OutputPath": "s3://bucket/out"},
        },
        "us-east-1",
        "arn:aws:sagemaker:us-east-1:210987654321:training-job/job-1",
    )
    return "job-1"


@pytest.fixture
def moto() -> Iterator[None]:
    with mock_aws():
        boto3.client("s3").create_bucket(Bucket="bucket")
        yield


# ---- the console


@pytest.mark.parametrize(
    ("region", "host"),
    [
        ("eu-west-1", "eu-west-1.console.aws.amazon.com"),
        ("cn-north-1", "cn-north-1.console.amazonaws.cn"),
        ("us-gov-west-1", "us-gov-west-1.console.amazonaws-us-gov.com"),
        ("eu-nowhere-9", "eu-nowhere-9.console.aws.amazon.com"),
    ],
)
def test_the_console_is_that_of_the_regions_partition(region, host):
    found = console.links("job-1", region, "s3://bucket/out put/")
    assert {urlsplit(url).netloc for url in found.values()} == {host}
    assert all(parse_qs(urlsplit(url).query)["region"] == [region] for url in found.values())
    assert parse_qs(urlsplit(found["output"]).query)["prefix"] == ["out put/job-1/"]
    fragment = unquote(unquote(urlsplit(found["logs"]).fragment.replace("$", "%")))
    assert fragment == f"logsV2:log-groups/log-group/{logs.GROUP}?logStreamNameFilter=job-1/"


def test_a_partition_without_a_public_console_has_no_links():
    assert console.links("job-1", "us-iso-east-1", "s3://bucket/out") == {}


def test_status_shows_the_links_of_the_region_that_runs_the_job(aws, job):
    aws.describe("Training")
    aws.describe("Training")
    shown = call("status", job)
    assert "  logs      https://us-east-1.console.aws.amazon.com/cloudwatch/home?region=us-east-1#" in shown.stdout
    assert jobs.status(job).links["job"].endswith("#/jobs/job-1")
    (state.job_dir(job) / state.TARGET).write_text('{"target": "sagemaker", "region": "cn-north-1"}')
    aws.describe("Training")
    assert "https://cn-north-1.console.amazonaws.cn/s3/buckets/bucket?" in call("status", job).stdout


# ---- starting


def test_the_request_that_is_sent_is_the_golden_one_of_the_job_file(aws):
    golden = json.loads((GOLDEN / "embed.sagemaker.json").read_text())
    arn = "arn:aws:sagemaker:us-east-1:210987654321:training-job/embed-golden"
    # Stubber refuses a call whose parameters are not exactly these.
    aws.sagemaker.add_response("create_training_job", {"TrainingJobArn": arn}, golden)
    loaded = jobfile.load(EMBED, registry.parse("sagemaker"), VALUES, {})
    said: list[str] = []
    jobs.start(jobs.prepare(loaded), said.append)
    aws.check()
    base = "https://us-east-1.console.aws.amazon.com"
    group = "$252Faws$252Fsagemaker$252FTrainingJobs$3FlogStreamNameFilter$3Dembed-golden$252F"
    assert said == [
        f"{arn}: accepted",
        f"  job       {base}/sagemaker/home?region=us-east-1#/jobs/embed-golden",
        f"  logs      {base}/cloudwatch/home?region=us-east-1#logsV2:log-groups/log-group/{group}",
        f"  output    {base}/s3/buckets/bucket?region=us-east-1&prefix=out/embed-golden/",
    ]
    assert state.read_json(state.job_dir("embed-golden") / "request.json") == golden


def test_run_status_list_cost_and_fetch_against_moto(moto, tmp_path):
    done = call("run", str(EMBED), "--target", "sagemaker", "--yes", *words(VALUES))
    assert done.exit_code == 0, done.stderr + done.stdout
    assert "estiba fetch embed-golden" in done.stderr
    assert "--- Starting: " in done.stdout
    listed = boto3.client("sagemaker").list_training_jobs()["TrainingJobSummaries"]
    assert [one["TrainingJobName"] for one in listed] == ["embed-golden"]
    value = json.loads(call("status", "--json").stdout)
    assert value["Estiba"]["Target"] == "sagemaker"
    assert "sagemaker" in call("list").stdout
    assert "embed-golden" in call("list", "--target", "sagemaker").stdout
    put_archive(value["ModelArtifacts"]["S3ModelArtifacts"], {"weights/w.bin": b"123"})
    assert call("fetch", "--into", "got").exit_code == 0
    assert (tmp_path / "got/weights/w.bin").exists() is False
    assert (tmp_path / "got/model/weights/w.bin").read_bytes() == b"123"
    assert "USD" in call("cost").stdout


def test_a_job_started_elsewhere_can_be_known_here(moto, tmp_path):
    request = json.loads((GOLDEN / "embed.sagemaker.json").read_text())
    boto3.client("sagemaker").create_training_job(**request)
    assert call("status", "embed-golden").exit_code == 2
    assert call("status", "embed-golden", "--target", "sagemaker").exit_code == 0
    assert call("status", "embed-golden").exit_code == 0


def test_a_job_that_a_full_disk_leaves_unrecorded_is_said_to_run_and_can_be_recorded(moto):
    start = ("run", str(EMBED), "--target", "sagemaker", "--yes", "--detach", *words(VALUES))
    with pytest.MonkeyPatch.context() as disk:
        disk.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        failed = call(*start)
    assert failed.exit_code == 2
    assert "No space left on device; make room" in failed.stderr
    found = re.search(r"(arn:aws:sagemaker:\S+) was started and is running; `estiba (.*)` records it", failed.stderr)
    assert found, failed.stderr
    assert found[1].endswith("training-job/embed-golden")
    assert state.job_names() == []
    assert call(*found[2].split()).exit_code == 0
    assert state.job_names() == ["embed-golden"]


def test_a_role_is_given_by_name_or_arn(moto, monkeypatch):
    # moto's account is one of AWS's documentation, which a job file must not name.
    monkeypatch.setattr("estiba_launch.request.validation.rules.PLACEHOLDER_ACCOUNTS", ())
    made = boto3.client("iam").create_role(RoleName="Estiba", AssumeRolePolicyDocument=json.dumps(TRUST))["Role"]["Arn"]
    assert role.arn_of("Estiba") == made
    assert role.arn_of("arn:aws:iam::1:role/x") == "arn:aws:iam::1:role/x"
    with pytest.raises(LaunchError, match="no such role"):
        role.arn_of("Nobody")
    done = call("run", str(EMBED), "--target", "sagemaker", "--yes", "-d", *words({**VALUES, "ROLE_ARN": "Estiba"}))
    assert done.exit_code == 0, done.stderr
    assert boto3.client("sagemaker").describe_training_job(TrainingJobName="embed-golden")["RoleArn"] == made
    values = {**VALUES, "JOB_NAME": "embed-2"}
    del values["ROLE_ARN"]
    done = call("run", str(EMBED), "--target", "sagemaker", "--yes", "-d", "--role", "Estiba", *words(values))
    assert done.exit_code == 0, done.stderr


def test_a_role_that_sagemaker_may_not_assume_is_refused(moto):
    other = json.loads(json.dumps(TRUST).replace("sagemaker", "lambda"))
    boto3.client("iam").create_role(RoleName="Lambda", AssumeRolePolicyDocument=json.dumps(other))
    with pytest.raises(LaunchError, match="may not assume"):
        role.arn_of("Lambda")


def test_a_job_over_budget_is_refused_with_3_and_nothing_is_sent(aws):
    done = call("run", str(EMBED), "--target", "sagemaker", "--yes", "--max-cost", "0.5", *words(VALUES))
    assert done.exit_code == 3
    assert "--max-cost 0.50" in done.stderr
    aws.check()


def refusal(code: str, message: str = "told so") -> ClientError:
    return ClientError({"Error": {"Code": code, "Message": message}}, "CreateTrainingJob")


@pytest.mark.parametrize(
    ("error", "wanted", "kind"),
    [
        (refusal("AccessDeniedException", "not authorized"), "iam:PassRole", AwsUnavailable),
        (refusal("ResourceLimitExceeded", "limit is 0 Instances"), "Service Quotas", AwsUnavailable),
        (refusal("ExpiredTokenException"), "log in again", AwsUnavailable),
        (refusal("ThrottlingException", "Rate exceeded"), "throttling", AwsUnavailable),
        (refusal("ResourceInUse", "exists"), "ESTIBA_TIMESTAMP", LaunchError),
        (refusal("ValidationException", "bad image"), "bad image", LaunchError),
        (NoCredentialsError(), "aws configure", AwsUnavailable),
        (EndpointConnectionError(endpoint_url="https://x"), "cannot be reached", AwsUnavailable),
        (refusal("InternalFailure"), "health.aws", HostError),
    ],
)
def test_each_refusal_says_why_and_what_to_do(error, wanted, kind):
    with pytest.raises(kind, match=wanted) as found, client.explained("job-1 in us-east-1", "start"):
        raise error
    assert str(found.value).startswith("job-1 in us-east-1: ")


def test_a_refusal_names_the_same_file_on_this_machine(aws):
    aws.sagemaker.add_client_error("create_training_job", "AccessDeniedException", "User: x is not authorized")
    done = call("run", str(EMBED), "--target", "sagemaker", "--yes", *words(VALUES))
    assert done.exit_code == 1
    assert "sagemaker:CreateTrainingJob" in done.stderr
    assert f"estiba run {EMBED} --target local" in done.stderr
    assert "Traceback" not in done.stderr
    assert state.job_names() == []


def test_fallback_runs_the_file_here_and_says_so_loudly(aws, monkeypatch):
    started = []

    def submit(self, submission, *, report):
        started.append(submission)
        raise LaunchError("far enough")

    monkeypatch.setattr("estiba_launch.targets.local.target.LocalTarget.submit", submit)
    aws.sagemaker.add_client_error("create_training_job", "ResourceLimitExceeded", "limit is 0")
    done = call("run", str(EMBED), "--target", "sagemaker", "--yes", "--fallback", "local", *words(VALUES))
    assert "NOT ON AWS" in done.stderr
    assert started[0].target == registry.parse("local")
    assert "far enough" in done.stderr


def test_no_network_is_said_within_seconds_and_leaves_no_job(monkeypatch):
    real = client.connect

    def connect(region: str | None = None) -> client.Clients:
        made = real(region)
        config = Config(connect_timeout=1, retries={"total_max_attempts": 1})
        return client.Clients(
            **{
                **vars(made),
                "sagemaker": boto3.client("sagemaker", endpoint_url="http://127.0.0.1:9", config=config),
            }
        )

    monkeypatch.setattr(client, "connect", connect)
    done = call("run", str(EMBED), "--target", "sagemaker", "--yes", *words(VALUES))
    assert done.exit_code == 1
    assert "cannot be reached" in done.stderr
    assert state.job_names() == []


def test_a_request_that_was_throttled_is_sent_again(monkeypatch):
    """The retries are botocore's own: here only that they are on, for every client."""
    for one in (client.connect().sagemaker, client.connect().logs, client.connect().iam):
        assert one.meta.config.retries == {"mode": "adaptive", "total_max_attempts": 8}
    answers = iter([(400, b'{"__type": "ThrottlingException", "message": "Rate exceeded"}'), (200, b"{}")])
    aws = client.connect()
    monkeypatch.setattr("time.sleep", lambda _: None)
    seen = []

    def send(request, **_):
        from botocore.awsrequest import AWSResponse

        status, body = next(answers)
        seen.append(status)
        response = AWSResponse(request.url, status, {}, io.BytesIO(body))
        response._content = body
        return response

    aws.sagemaker.meta.events.register("before-send.sagemaker.*", send)
    aws.sagemaker.stop_training_job(TrainingJobName="x")
    assert seen == [400, 200]


# ---- following


def test_new_streams_after_a_spot_restart_are_followed_and_attempts_marked(aws, job):
    aws.describe("Starting", "Downloading")
    aws.logs.add_client_error("describe_log_streams", "ResourceNotFoundException")
    aws.describe("Starting", "Downloading", "Training")
    aws.streams("algo-1-1700000000")
    aws.events("algo-1-1700000000", None, "f/1", "step 1", "loss=0.5")
    aws.events("algo-1-1700000000", "f/1", "f/1")
    aws.describe("Starting", "Downloading", "Training", "Interrupted")
    aws.streams("algo-1-1700000000")
    aws.events("algo-1-1700000000", "f/1", "f/2", "step 2")
    aws.events("algo-1-1700000000", "f/2", "f/2")
    aws.describe("Starting", "Downloading", "Training", "Interrupted", "Restarting", "Training")
    aws.streams("algo-1-1700000000", "algo-1-1700009000")
    aws.events("algo-1-1700000000", "f/2", "f/2")
    aws.events("algo-1-1700009000", None, "g/1", "resumed at 2", "loss=0.25", at=10)
    aws.events("algo-1-1700009000", "g/1", "g/1")
    everything = ("Starting", "Downloading", "Training", "Interrupted", "Restarting", "Training", "Uploading")
    aws.describe(*everything, "Completed", TrainingTimeInSeconds=1000, BillableTimeInSeconds=300)
    aws.streams("algo-1-1700000000", "algo-1-1700009000")
    aws.events("algo-1-1700000000", "f/2", "f/2")
    aws.events("algo-1-1700009000", "g/1", "g/2", "last line", at=20)
    aws.events("algo-1-1700009000", "g/2", "g/2")
    lines = list(jobs.log_lines(job, follow=True))
    aws.check()
    assert [line for line in lines if not line.startswith("---")] == [
        "step 1",
        "loss=0.5",
        "step 2",
        "resumed at 2",
        "loss=0.25",
        "last line",
    ]
    marks = [line.split(" · ")[0].removeprefix("--- ") for line in lines if line.startswith("---")]
    assert [mark.split(":")[0].split(" (")[0] for mark in marks] == [
        "Starting",
        "Downloading",
        "Training",
        "attempt 1",
        "Interrupted",
        "Restarting",
        "Training",
        "attempt 2",
        "Uploading",
        "Completed",
    ]
    assert (state.job_dir(job) / "job.log").read_text().splitlines() == lines
    value = registry.target_of_job(job).recorded(job).to_json()
    assert [(a["Number"], a["Outcome"]) for a in value["Estiba"]["Attempts"]] == [(1, "Interrupted"), (2, "Completed")]


def test_a_follower_that_died_takes_its_unnoted_lines_back_and_loses_none(aws, job):
    aws.describe("Starting", "Training")
    aws.streams("algo-1-1")
    aws.events("algo-1-1", None, "f/1", "one")
    aws.events("algo-1-1", "f/1", "f/1")
    assert "one" in list(jobs.log_lines(job, follow=False))
    with (state.job_dir(job) / "job.log").open("a") as log:
        log.write("two\n")  # written, and killed before its place was noted
    aws.describe("Starting", "Training")
    aws.streams("algo-1-1")
    aws.events("algo-1-1", "f/1", "f/2", "two", "three")
    aws.events("algo-1-1", "f/2", "f/2")
    lines = [line for line in jobs.log_lines(job, follow=False) if not line.startswith("---")]
    assert lines == ["one", "two", "three"]
    aws.check()


def test_hosts_are_told_apart_and_streams_come_over_several_pages(aws, job):
    config = {"InstanceType": "ml.g4dn.xlarge", "InstanceCount": 2, "VolumeSizeInGB": 1}
    aws.describe("Starting", "Training", ResourceConfig=config)
    where = {"logGroupName": logs.GROUP, "logStreamNamePrefix": "job-1/"}
    aws.logs.add_response(
        "describe_log_streams", {"logStreams": [{"logStreamName": "job-1/algo-2-5"}], "nextToken": "p2"}, where
    )
    aws.logs.add_response(
        "describe_log_streams", {"logStreams": [{"logStreamName": "job-1/algo-1-5"}]}, {**where, "nextToken": "p2"}
    )
    aws.events("algo-1-5", None, "f/1", "first", at=1)
    aws.events("algo-1-5", "f/1", "f/1")
    aws.events("algo-2-5", None, "g/1", "second", at=2)
    aws.events("algo-2-5", "g/1", "g/1")
    lines = [line for line in jobs.log_lines(job, follow=False) if not line.startswith("---")]
    assert lines == ["[algo-1] first", "[algo-2] second"]


def test_statuses_go_on_without_the_right_to_read_logs(aws, job):
    aws.describe("Starting", "Training")
    aws.logs.add_client_error("describe_log_streams", "AccessDeniedException", "no logs for you")
    aws.describe("Starting", "Training", "Failed", FailureReason="AlgorithmError: x", BillableTimeInSeconds=1)
    aws.logs.add_client_error("describe_log_streams", "AccessDeniedException", "no logs for you")
    text = "\n".join(jobs.log_lines(job, follow=True))
    assert text.count("logs:GetLogEvents") == 1
    assert "--- Failed: Failed now" in text


def test_a_network_that_is_away_for_a_while_is_waited_for(aws, job, monkeypatch):
    aws.describe("Starting", "Training")
    aws.describe("Starting", "Training", "Completed", BillableTimeInSeconds=5)
    answers = iter([None, EndpointConnectionError(endpoint_url="https://x"), refusal("ThrottlingException"), None])
    real = aws.clients.sagemaker.describe_training_job

    def describe(**words):
        error = next(answers)
        if error:
            raise error
        return real(**words)

    monkeypatch.setattr(aws.clients.sagemaker, "describe_training_job", describe)
    assert jobs.wait(job).status == "Completed"


def test_a_login_that_ends_meanwhile_is_not_waited_for_and_status_tells_what_was_known(aws, job):
    aws.describe("Starting", "Training")
    assert jobs.status(job).secondary_status == "Training"
    aws.sagemaker.add_client_error("describe_training_job", "ExpiredTokenException", "expired")
    with pytest.raises(AwsUnavailable, match="log in again"):
        jobs.wait(job)
    aws.sagemaker.add_client_error("describe_training_job", "ExpiredTokenException", "expired")
    done = call("status", job)
    assert "Training" in done.stdout and "last known" in done.stdout


def test_waiting_has_no_limit_of_six_hours(aws, job, monkeypatch):
    clock = iter(range(0, 10**9, 3600))
    monkeypatch.setattr(jobs.time, "monotonic", lambda: float(next(clock)))
    for _ in range(40):
        aws.describe("Starting", "Training")
    aws.describe("Starting", "Training", "Completed", BillableTimeInSeconds=5)
    assert jobs.wait(job).status == "Completed"
    aws.check()


@pytest.mark.parametrize(
    ("last", "exit_code"), [("Completed", 0), ("Failed", 1), ("Stopped", 4), ("MaxWaitTimeExceeded", 4)]
)
def test_run_exits_as_the_job_ended(aws, last, exit_code):
    aws.sagemaker.add_response("create_training_job", {"TrainingJobArn": "arn:" + "a" * 30}, None)
    why = {"FailureReason": "AlgorithmError: no column"} if last == "Failed" else {}
    for _ in range(2):
        aws.describe("Starting", last, BillableTimeInSeconds=5, **why)
    aws.streams()
    done = call("run", str(EMBED), "--target", "sagemaker", "--yes", *words({**VALUES, "JOB_NAME": "job-1"}))
    assert done.exit_code == exit_code, done.stderr + done.stdout
    assert (last == "Failed") == ("no column" in done.stderr)


def test_stop_is_sent_once_and_a_job_that_is_over_is_left_alone(aws, job):
    aws.describe("Starting", "Training")
    aws.sagemaker.add_response("stop_training_job", {}, {"TrainingJobName": "job-1"})
    jobs.stop(job)
    aws.describe("Starting", "Training", "Stopping")
    jobs.stop(job)
    aws.describe("Starting", "Training", "Stopping", "Stopped", BillableTimeInSeconds=5)
    with pytest.raises(LaunchError, match="already ended"):
        jobs.stop(job)
    aws.check()


def test_the_bill_is_billable_time_and_the_saving_is_shown(aws, job):
    aws.describe("Starting", "Completed", TrainingTimeInSeconds=3600, BillableTimeInSeconds=1080)
    cost = jobs.cost(job, prices.load())
    document = cost.to_json()
    assert document["usd"] == pytest.approx(0.7364 * 0.3)
    assert document["spot_saving"] == pytest.approx(0.7)
    assert "70% less than on-demand" in cost.render()


# ---- fetching


def tar_of(files: dict[str, bytes], *more: tarfile.TarInfo) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for member in more:
            tar.addfile(member)
    return out.getvalue()


def put_archive(address: str, files: dict[str, bytes]) -> None:
    bucket, _, key = address.removeprefix("s3://").partition("/")
    boto3.client("s3").put_object(Bucket=bucket, Key=key, Body=tar_of(files))


def special(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    return member


def finished(**changes: Any) -> str:
    record_job("job-1", {"TrainingJobName": "job-1"}, "us-east-1", "arn:x")
    value = {
        "TrainingJobName": "job-1",
        "TrainingJobStatus": "Completed",
        "SecondaryStatus": "Completed",
        "BillableTimeInSeconds": 1,
        "OutputDataConfig": {"S3OutputPath": "s3://bucket/out"},
        **changes,
    }
    state.write_json(state.job_dir("job-1") / "describe.json", value)
    return "job-1"


def test_model_and_output_are_fetched_unpacked_and_again_over_the_old(moto, tmp_path):
    name = finished(ModelArtifacts={"S3ModelArtifacts": "s3://bucket/out/job-1/output/model.tar.gz"})
    put_archive("s3://bucket/out/job-1/output/model.tar.gz", {"a/b": b"1", "c": b"2"})
    put_archive("s3://bucket/out/job-1/output/output.tar.gz", {"r": b"3"})
    assert jobs.download(name, tmp_path / "got") == {"model": 2, "output": 1}
    put_archive("s3://bucket/out/job-1/output/model.tar.gz", {"a/b": b"new", "c": b"2"})
    assert jobs.download(name, tmp_path / "got")["model"] == 2
    assert (tmp_path / "got/model/a/b").read_bytes() == b"new"
    assert sorted(p.name for p in (tmp_path / "got/model").iterdir()) == ["a", "c"]


def test_uncompressed_results_are_fetched_as_they_are(moto, tmp_path):
    name = finished(
        OutputDataConfig={"S3OutputPath": "s3://bucket/out", "CompressionType": "NONE"},
        ModelArtifacts={"S3ModelArtifacts": "s3://bucket/out/job-1/output/model/"},
    )
    for key in ("model/w/1", "model/w/", "data/r"):
        boto3.client("s3").put_object(Bucket="bucket", Key=f"out/job-1/output/{key}", Body=b"x")
    assert jobs.download(name, tmp_path / "got") == {"model": 1, "output": 1}
    assert (tmp_path / "got/model/w/1").read_bytes() == b"x"


def test_a_job_that_left_nothing_says_so(moto, tmp_path):
    name = finished(TrainingJobStatus="Failed", FailureReason="AlgorithmError: x")
    with pytest.raises(LaunchError, match=r"left nothing.*AlgorithmError"):
        jobs.download(name, tmp_path / "got")


@pytest.mark.parametrize(
    "content",
    [
        tar_of({"ok": b"1", "/etc/evil": b"2"}),
        tar_of({"ok": b"1", "../evil": b"2"}),
        tar_of({"ok": b"1"}, special("link", tarfile.SYMTYPE, "/etc/passwd")),
        tar_of({"ok": b"1"}, special("a/link", tarfile.SYMTYPE, "../../x")),
        tar_of({"ok": b"1"}, special("hard", tarfile.LNKTYPE, "../x")),
        tar_of({"ok": b"1"}, special("device", tarfile.CHRTYPE)),
        tar_of({"ok": b"1"}, special("fifo", tarfile.FIFOTYPE)),
        tar_of({"ok": b"x" * 10_000})[:60],
    ],
    ids=["absolute", "dots", "absolute-link", "link-out", "hard-link-out", "device", "fifo", "cut"],
)
def test_an_archive_that_would_do_harm_is_refused_whole(tmp_path, content):
    path = tmp_path / "model.tar.gz"
    path.write_bytes(content)
    with pytest.raises(HostError, match=r"model\.tar\.gz"):
        archive.unpack(path, tmp_path / "into")
    assert list((tmp_path / "into").iterdir()) == []
    assert not (tmp_path / "evil").exists()


def test_links_within_an_archive_stay_links(tmp_path):
    path = tmp_path / "model.tar.gz"
    path.write_bytes(tar_of({"a/real": b"1"}, special("b", tarfile.SYMTYPE, "a/real")))
    assert archive.unpack(path, tmp_path / "into") == 2
    assert (tmp_path / "into/b").is_symlink()
    assert (tmp_path / "into/b").read_bytes() == b"1"


def test_every_permission_named_is_an_action_of_the_service():
    """A typing error in an action would send a person to their administrator for nothing."""
    session = botocore.session.get_session()
    for entry in [one for group in client.PERMISSIONS.values() for one in group]:
        service, _, action = entry.split(" ")[0].partition(":")
        if (service, action) in {("iam", "PassRole"), ("s3", "ListBucket")}:
            continue  # permissions without a call of that name
        assert action in session.get_service_model(service).operation_names
