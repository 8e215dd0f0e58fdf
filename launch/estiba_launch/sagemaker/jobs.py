"""SageMaker jobs: create, look, stop, follow, fetch. What was last known is on this machine's disk."""

from __future__ import annotations

import datetime
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import contract, shapes, state
from ..errors import AwsUnavailable, HostError, LaunchError
from ..jobfile import JobFile
from ..localhost import control
from ..localhost.logs import LOG, Metrics
from ..localhost.output import location
from ..localhost.record import RECORD, TERMINAL
from . import client
from .archive import unpack
from .client import Clients, explain, explained
from .logs import Follower

TARGET = "target.json"
METRICS = "metrics.json"
LOOK_S = 10.0
SETTLE_S = 15.0
"""CloudWatch brings the last lines of a job some seconds after its end."""


@dataclass(frozen=True, kw_only=True)
class Started:
    """A job that AWS has accepted."""

    name: str
    directory: Path


def start(job: JobFile, region: str | None = None, say: Callable[[str], None] = lambda _: None) -> Started:
    """CreateTrainingJob with the request of the job file, unchanged. Raises LaunchError, AwsUnavailable."""
    aws = client.connect(region)
    directory = state.jobs_root() / job.name
    if directory.exists():
        raise LaunchError(
            f"{job.name}: a job of this name is known already ({directory}); pass --set JOB_NAME=ANOTHER, or leave the "
            "time in TrainingJobName (${ESTIBA_TIMESTAMP})"
        )
    with explained(f"{job.name} in {aws.region}", "start"):
        arn = aws.sagemaker.create_training_job(**job.request)["TrainingJobArn"]
    say(f"{arn}: accepted")
    remember(job.name, job.request, aws.region, arn)
    return Started(name=job.name, directory=directory)


def remember(name: str, request: dict[str, Any], region: str, arn: str) -> Path:
    """Note a job, so that every command knows it from any terminal."""
    directory = state.jobs_root() / name
    directory.mkdir(parents=True, exist_ok=True)
    state.write_json(directory / TARGET, {"target": "sagemaker", "region": region})
    now = datetime.datetime.now(datetime.UTC)
    value = {
        **request,
        "TrainingJobArn": arn,
        "TrainingJobStatus": "InProgress",
        "SecondaryStatus": "Starting",
        "CreationTime": plain(now),
        "SecondaryStatusTransitions": [],
    }
    state.write_json(directory / RECORD, value)
    state.write_json(directory / control.REQUEST, request)
    return directory


def region_of(directory: Path) -> str:
    return str(state.read_json(directory / TARGET)["region"])


def plain(value: Any) -> Any:
    """A boto3 answer as JSON has it: times as text, no response metadata."""
    if isinstance(value, datetime.datetime):
        return value.astimezone(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items() if name != "ResponseMetadata"}
    if isinstance(value, list):
        return [plain(part) for part in value]
    return value


def ask(name: str, aws: Clients) -> dict[str, Any]:
    """DescribeTrainingJob, kept on disk. Raises AwsUnavailable, LaunchError."""
    with explained(f"{name} in {aws.region}", "look"):
        value: dict[str, Any] = plain(aws.sagemaker.describe_training_job(TrainingJobName=name))
    state.write_json(state.job_dir(name) / RECORD, value)
    return value


def attempts_of(value: dict[str, Any]) -> list[dict[str, Any]]:
    """The attempts that the secondary statuses tell of: each begins with a start and ends with an interruption."""
    attempts: list[dict[str, Any]] = []
    for one in value.get("SecondaryStatusTransitions", []):
        begins = one["Status"] in ("Starting", "Restarting", "Downloading", "Training")
        if begins and (not attempts or "Outcome" in attempts[-1]):
            attempts.append({"Number": len(attempts) + 1, "StartTime": one["StartTime"]})
        if attempts and one["Status"] in ("Interrupted", *TERMINAL, "MaxRuntimeExceeded", "MaxWaitTimeExceeded"):
            attempts[-1].setdefault("Outcome", one["Status"])
            attempts[-1].setdefault("EndTime", one.get("StartTime"))
    return attempts


def describe(name: str) -> dict[str, Any]:
    """The job as AWS tells it; under `Estiba`, its attempts. AWS is asked until the job is over.

    When AWS cannot be asked, what was known last is told, with the reason under `Estiba.Unreachable`.
    """
    directory = state.job_dir(name)
    value: dict[str, Any] = state.read_json(directory / RECORD, {})
    unreachable = None
    if not is_over(value) or "BillableTimeInSeconds" not in value:
        try:
            value = ask(name, client.connect(region_of(directory)))
        except HostError as error:
            unreachable = str(error)
    return dressed(name, value, unreachable)


def dressed(name: str, value: dict[str, Any], unreachable: str | None = None) -> dict[str, Any]:
    """A described job with what Estiba adds; not stored."""
    directory = state.job_dir(name)
    extra: dict[str, Any] = {
        "Attempts": attempts_of(value),
        "Supervised": True,
        "Directory": str(directory),
        "Target": "sagemaker",
        "Region": region_of(directory),
    }
    if unreachable:
        extra["Unreachable"] = unreachable
    if is_over(value) and value["TrainingJobStatus"] != "Failed":
        extra["OutputArtifacts"] = location(value, "output")
    return {**value, "Estiba": extra}


def is_over(value: dict[str, Any]) -> bool:
    return value["TrainingJobStatus"] in TERMINAL


def wait(name: str, timeout_s: float | None = None) -> dict[str, Any]:
    """Until the job is over, however many days that takes. Raises LaunchError after `timeout_s`, AwsUnavailable.

    A network that is away is waited for; a login that AWS refuses is not.
    """
    aws = client.connect(region_of(state.job_dir(name)))
    started = time.monotonic()
    away = 0
    while True:
        try:
            value = ask(name, aws)
            away = 0
            if is_over(value):
                return dressed(name, value)
        except HostError as error:
            away += 1
            if not passing(error) or away > 60:
                raise
        if timeout_s is not None and time.monotonic() - started > timeout_s:
            raise LaunchError(f"{name}: not over after {timeout_s:g} s; see `estiba status {name}`")
        pause()


def passing(error: HostError) -> bool:
    """Whether asking again may help."""
    text = str(error)
    return "cannot be reached" in text or "throttling" in text or not isinstance(error, AwsUnavailable)


def pause() -> None:
    # Not in step with other followers of the account.
    time.sleep(LOOK_S * random.uniform(0.7, 1.3))


def stop(name: str, reason: str = "asked for") -> None:  # noqa: ARG001
    """StopTrainingJob: TERM, then KILL after 120 s; returns at once. Raises LaunchError when the job is over."""
    aws = client.connect(region_of(state.job_dir(name)))
    value = ask(name, aws)
    if is_over(value):
        raise LaunchError(f"{name}: is over already ({value['TrainingJobStatus']}); nothing to stop")
    if value["TrainingJobStatus"] != "Stopping":
        with explained(name, "stop"):
            aws.sagemaker.stop_training_job(TrainingJobName=name)


# ---- the log


def log_lines(name: str, *, follow: bool) -> Iterator[str]:
    """The whole log, statuses and attempts marked; it is kept in a file. With `follow` until the job is over."""
    directory = state.job_dir(name)
    aws = client.connect(region_of(directory))
    path = directory / LOG
    position, rest = 0, ""
    while True:
        lock = control.hold(directory)
        if lock is None:
            # Another terminal copies; its file is ours.
            done = not follow or is_over(state.read_json(directory / RECORD, {}))
        else:
            with lock:
                done = copy(name, aws, directory, settle=follow) or not follow
        if path.exists():
            with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
                # A follower that died may have left lines that were taken back.
                position = min(position, path.stat().st_size)
                file.seek(position)
                rest += file.read()
                position = file.tell()
            *lines, rest = rest.split("\n")
            yield from lines
        if done:
            if rest:
                yield rest
            return
        pause()


def copy(name: str, aws: Clients, directory: Path, *, settle: bool) -> bool:
    """Copy what is new into the log's file; True when the job is over and the log is whole."""

    def keep(latest: dict[str, tuple[float, float]]) -> None:
        found = [{"MetricName": name, "Value": value, "Timestamp": at} for name, (value, at) in latest.items()]
        state.write_json(directory / METRICS, found)

    value = state.read_json(directory / RECORD)
    away = None
    try:
        value = ask(name, aws)
    except HostError as error:
        if not passing(error):
            raise
        away = str(error)
    metrics = Metrics(value.get("AlgorithmSpecification", {}).get("MetricDefinitions", []), keep)
    follower = Follower(directory, name, len(contract.hosts(value)) > 1, aws.logs, metrics)
    if away:
        follower.mark(f"away {int(time.time() // 3600)}", f"{away}; trying again")
        return False
    over = is_over(value)
    # The end is marked after the last lines, which come late.
    if not over:
        follower.transitions(value)
    try:
        follower.pull()
        quiet_since = time.monotonic()
        while over and settle and time.monotonic() - quiet_since < SETTLE_S:
            time.sleep(min(2.0, SETTLE_S))
            if follower.pull():
                quiet_since = time.monotonic()
    except Exception as error:
        told = explain("log", error, "logs")
        follower.mark("log refused", f"the log cannot be read: {told}")
    if over:
        follower.transitions(value)
    metrics.flush()
    return over


# ---- what it left


def fetch(name: str, into: Path) -> dict[str, int]:
    """Model and output of a finished job, unpacked below `into`: number of files of each. Raises LaunchError."""
    value = describe(name)
    if not is_over(value):
        raise LaunchError(
            f"{name}: still {value['SecondaryStatus']}; wait for it (`estiba logs -f {name}`) or stop it first"
        )
    aws = client.connect(region_of(state.job_dir(name)))
    found: dict[str, int] = {}
    model = value.get("ModelArtifacts", {}).get("S3ModelArtifacts")
    for what, address in (("model", model), ("output", location(value, "output"))):
        if address:
            count = bring(address, into / what, aws)
            if count is not None:
                found[what] = count
    if not found:
        raise LaunchError(f"{name}: left nothing ({value.get('FailureReason', value['TrainingJobStatus'])})")
    return found


def bring(address: str, into: Path, aws: Clients) -> int | None:
    """One archive, or a prefix of plain files, into a folder: number of files, None when there is nothing.

    Raises HostError for an archive that would write elsewhere, AwsUnavailable.
    """
    bucket, _, key = address.removeprefix("s3://").partition("/")
    with explained(address, "fetch"):
        if key.endswith(".tar.gz"):
            listed = aws.s3.list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1).get("Contents", [])
            if not listed or listed[0]["Key"] != key:
                return None
            into.mkdir(parents=True, exist_ok=True)
            archive = into / f".{key.rpartition('/')[2]}"
            try:
                aws.s3.download_file(bucket, key, str(archive))
                return unpack(archive, into)
            finally:
                archive.unlink(missing_ok=True)
        prefix = key.rstrip("/") + "/"
        count = 0
        for page in aws.s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
            for entry in page.get("Contents", []):
                relative = entry["Key"][len(prefix) :]
                if not relative or relative.endswith("/"):
                    continue
                place = into / relative
                if not place.resolve().is_relative_to(into.resolve()):
                    raise HostError(f"s3://{bucket}/{entry['Key']}: leads out of {into}; not fetched")
                place.parent.mkdir(parents=True, exist_ok=True)
                aws.s3.download_file(bucket, entry["Key"], str(place))
                count += 1
        return count or None


# ---- the account's jobs


def account_jobs(region: str | None, limit: int = 50) -> list[dict[str, Any]]:
    """ListTrainingJobs: the account's latest jobs, newest first, whoever started them. Raises AwsUnavailable."""
    aws = client.connect(region)
    found: list[dict[str, Any]] = []
    with explained(f"jobs in {aws.region}", "look"):
        pages = aws.sagemaker.get_paginator("list_training_jobs").paginate(
            SortBy="CreationTime",
            SortOrder="Descending",
            PaginationConfig={"MaxItems": limit, "PageSize": min(limit, 100)},
        )
        for page in pages:
            found += plain(page["TrainingJobSummaries"])
    return found


def adopt(name: str, region: str | None) -> None:
    """Know a job of the account that was started elsewhere. Raises LaunchError when there is none of that name."""
    aws = client.connect(region)
    with explained(f"{name} in {aws.region}", "look"):
        value = plain(aws.sagemaker.describe_training_job(TrainingJobName=name))
    members = shapes.create_training_job().members
    request = {field: part for field, part in value.items() if field in members}
    directory = remember(name, request, aws.region, value["TrainingJobArn"])
    state.write_json(directory / RECORD, value)
