"""Jobs on SageMaker: the request is sent unchanged, and AWS's last answer is recorded on this machine."""

from __future__ import annotations

import datetime
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from estiba_launch.errors import HostError, LaunchError
from estiba_launch.jobs import artifacts, directory
from estiba_launch.jobs.check import Check, Requirements
from estiba_launch.jobs.directory import REQUEST, TARGET, job_dir, read_json, read_target, write_json
from estiba_launch.jobs.logs import METRICS, Metrics
from estiba_launch.jobs.options import SubmitOptions
from estiba_launch.jobs.record import RECORD, new_document, recorded_document
from estiba_launch.jobs.status import TERMINAL, JobStatus
from estiba_launch.request import contract
from estiba_launch.request.jobfile import JobFile
from estiba_launch.request.validation import service_model
from estiba_launch.targets.base import Artifacts, Capability, ListFilters, Report, Submission, Target
from estiba_launch.targets.sagemaker import client, console
from estiba_launch.targets.sagemaker.client import Clients, explained
from estiba_launch.targets.sagemaker.logs import Follower

PAGE = 100
"""Most jobs that ListTrainingJobs returns at once."""
CLOCK_MARGIN = datetime.timedelta(hours=1)
"""How far this machine's clock may be off when jobs are listed by the time of their creation."""


class SageMakerTarget(Target):
    """SageMaker training jobs of one account."""

    kind = "sagemaker"
    capabilities = frozenset(Capability) - {Capability.INTERRUPT, Capability.RESUME}
    poll_interval_s = 10.0

    def prepare(self, job: JobFile, options: SubmitOptions) -> Submission:
        return Submission(job=job, options=options)

    def submit(self, submission: Submission, *, report: Report) -> None:
        aws = client.connect(submission.options.region)
        with explained(f"{submission.name} in {aws.region}", "start"):
            arn = aws.sagemaker.create_training_job(**submission.request)["TrainingJobArn"]
        report(f"{arn}: accepted")
        try:
            record_job(submission.name, submission.request, aws.region, arn)
        except LaunchError as error:
            # The job runs, and is billed.
            record = f"estiba status {submission.name} --target {self} --region {aws.region}"
            raise LaunchError(f"{error}; {arn} was started and is running; `{record}` records it") from error
        for what, url in console.links(submission.name, aws.region, output_path(submission.request)).items():
            report(f"  {what:<9} {url}")

    def recorded(self, name: str, unreachable: str | None = None) -> JobStatus:
        return _status(name, recorded_document(job_dir(name)), unreachable)

    def poll(self, name: str) -> JobStatus:
        known = self.recorded(name)
        if known.is_terminal and known.billable_s is not None:
            return known
        return _status(name, _describe(name, self._connect(name)))

    def list(self, filters: ListFilters) -> Iterator[JobStatus]:
        if filters.account:
            aws = client.connect(filters.region)
            for summary in _summaries(aws, limit=filters.limit):
                yield JobStatus.from_json(summary)
            return
        running: dict[str, list[JobStatus]] = defaultdict(list)
        for name in filters.names:
            known = self.recorded(name)
            if known.is_terminal:
                yield known
            else:
                running[read_target(job_dir(name))["region"]].append(known)
        for region, statuses in running.items():
            yield from self._list_running(region, statuses)

    def _list_running(self, region: str, statuses: Sequence[JobStatus]) -> Iterator[JobStatus]:
        """Status of jobs that had not ended when they were last seen, with one listing for all."""
        names = {status.name for status in statuses}
        first = datetime.datetime.fromisoformat(min(status.creation_time for status in statuses))
        found: dict[str, dict[str, Any]] = {}
        unreachable = None
        try:
            for summary in _summaries(client.connect(region), CreationTimeAfter=first - CLOCK_MARGIN):
                if summary["TrainingJobName"] in names:
                    found[summary["TrainingJobName"]] = summary
                    if len(found) == len(names):
                        break
        except HostError as error:
            unreachable = str(error)
        for status in statuses:
            summary = found.get(status.name, {})
            main = summary.get("TrainingJobStatus", status.status)
            changed = {"SecondaryStatus": main} if main != status.status else {}
            yield _status(status.name, {**status.document, **changed, **summary}, unreachable)

    def copy_log(self, name: str, folder: Path) -> None:
        document = read_json(folder / RECORD)
        aws = self._connect(name)
        metrics = Metrics({"AlgorithmSpecification": {}, **document}, partial(write_json, folder / METRICS))
        follower = Follower(folder, name, len(contract.hosts(document)) > 1, aws.logs, metrics)
        follower.copy(document)
        metrics.flush()

    def stop(self, name: str, reason: str) -> None:  # noqa: ARG002
        with explained(name, "stop"):
            self._connect(name).sagemaker.stop_training_job(TrainingJobName=name)

    def download(self, name: str, into: Path) -> Artifacts:
        document = self.recorded(name).document
        addresses = {
            "model": document.get("ModelArtifacts", {}).get("S3ModelArtifacts"),
            "output": artifacts.location(document, "output"),
        }
        found = {}
        for what, uri in addresses.items():
            try:
                count = artifacts.download(uri, into / what) if uri else None
            except HostError as error:
                if error.__cause__ and client.code_of(error.__cause__):
                    raise client.explain(uri, error.__cause__, "fetch") from error
                raise
            if count is not None:
                found[what] = count
        return found

    def find(self, name: str, region: str | None = None) -> None:
        aws = client.connect(region)
        document = _describe(name, aws)
        members = service_model.create_training_job().members
        request = {field: part for field, part in document.items() if field in members}
        folder = record_job(name, request, aws.region, document["TrainingJobArn"])
        write_json(folder / RECORD, document)

    def default_role(self, region: str | None = None) -> str | None:
        from estiba_launch.targets.sagemaker.role import of_notebook

        return of_notebook(region)

    def resolve_role(self, role: str, region: str | None = None) -> str:
        from estiba_launch.targets.sagemaker.role import arn_of

        return arn_of(role, region)

    def checks(self, needs: Requirements, *, network: bool) -> Iterable[Check]:
        from estiba_launch.targets.sagemaker import ready

        return ready.checks(needs, network=network)

    def _connect(self, name: str) -> Clients:
        return client.connect(str(read_target(job_dir(name))["region"]))


def record_job(name: str, request: Mapping[str, Any], region: str, arn: str) -> Path:
    """Record a job that AWS knows, so that every command knows it from any terminal."""
    with directory.creating(name) as folder:
        write_json(folder / TARGET, {"target": SageMakerTarget.kind, "region": region})
        # AWS reports the statuses that the job went through.
        write_json(folder / RECORD, {**new_document(dict(request), arn), "SecondaryStatusTransitions": []})
        write_json(folder / REQUEST, request)
    return folder


def output_path(request: Mapping[str, Any]) -> str | None:
    return request.get("OutputDataConfig", {}).get("S3OutputPath")  # type: ignore[no-any-return]


def plain(value: Any) -> Any:
    """A boto3 answer as plain JSON: times as text, no response metadata."""
    if isinstance(value, datetime.datetime):
        return value.astimezone(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items() if name != "ResponseMetadata"}
    if isinstance(value, list):
        return [plain(part) for part in value]
    return value


def _describe(name: str, aws: Clients) -> dict[str, Any]:
    with explained(f"{name} in {aws.region}", "look"):
        document: dict[str, Any] = plain(aws.sagemaker.describe_training_job(TrainingJobName=name))
        return {"TrainingJobStatus": document["TrainingJobStatus"], **document}


def _summaries(aws: Clients, *, limit: int | None = None, **filters: Any) -> Iterator[dict[str, Any]]:
    """ListTrainingJobs, newest first."""
    config = {"MaxItems": limit, "PageSize": min(limit or PAGE, PAGE)}
    with explained(f"jobs in {aws.region}", "look"):
        pages = aws.sagemaker.get_paginator("list_training_jobs").paginate(
            SortBy="CreationTime", SortOrder="Descending", PaginationConfig=config, **filters
        )
        for page in pages:
            yield from plain(page["TrainingJobSummaries"])


def _status(name: str, document: Mapping[str, Any], unreachable: str | None = None) -> JobStatus:
    """A document from AWS with Estiba's additions."""
    folder = job_dir(name)
    extra: dict[str, Any] = {
        "Attempts": _attempts(document),
        "Supervised": True,
        "Directory": str(folder),
        "Target": SageMakerTarget.kind,
        "Region": (region := read_target(folder).get("region")),
    }
    if region:
        extra["Links"] = console.links(name, region, output_path(document))
    if unreachable:
        extra["Unreachable"] = unreachable
    if document["TrainingJobStatus"] in ("Completed", "Stopped"):
        extra["OutputArtifacts"] = artifacts.location(document, "output")
    return JobStatus.from_json({**document, "Estiba": extra})


def _attempts(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The attempts behind the secondary statuses: each begins with a start and ends with an interruption."""
    attempts: list[dict[str, Any]] = []
    for one in document.get("SecondaryStatusTransitions", []):
        begins = one["Status"] in ("Starting", "Restarting", "Downloading", "Training")
        if begins and (not attempts or "Outcome" in attempts[-1]):
            attempts.append({"Number": len(attempts) + 1, "StartTime": one["StartTime"]})
        if attempts and one["Status"] in ("Interrupted", *TERMINAL, "MaxRuntimeExceeded", "MaxWaitTimeExceeded"):
            attempts[-1].setdefault("Outcome", one["Status"])
            attempts[-1].setdefault("EndTime", one.get("StartTime"))
    return attempts
