"""Jobs from Python: `launch_training_job(...)` starts one and returns a handle.

    from estiba_launch import launch_training_job

    job = launch_training_job(
        image_uri="estiba/embed:local",
        hyperparameters={"model": "/opt/ml/input/data/model"},
        channels={"dataset": "file://data", "model": "file://model"},
        output_path="file://runs",
        checkpoint_s3_uri="file://runs/checkpoints",
        use_spot=True,
    )
    job.wait()

The arguments become the CreateTrainingJob request that a job file holds, and are checked by the same rules.
"""

from __future__ import annotations

import copy
import datetime
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Required, TypedDict, Unpack

from . import backends, jobfile, source
from .errors import JobFailed, LaunchError
from .jobfile import JobFile
from .localhost.control import LocalOptions
from .localhost.store import open_store
from .target import SAGEMAKER_ONLY, Target

SOURCE = Path("launch_training_job()")
"""Stands where messages name the job file."""
PROGRAM, SUBMIT_DIRECTORY = "SAGEMAKER_PROGRAM", "SAGEMAKER_SUBMIT_DIRECTORY"


@dataclass(frozen=True, kw_only=True)
class Channel:
    """One input channel, where an address alone does not say enough."""

    uri: str
    """`s3://...`, or `file://...` for targets other than SageMaker."""
    content_type: str | None = None
    input_mode: str | None = None
    """File or FastFile; None takes the job's."""
    sharded: bool = False
    """Each host gets about 1/n of the objects (ShardedByS3Key)."""


@dataclass(frozen=True)
class Job:
    """A job that was started."""

    name: str
    target: Target
    request: Mapping[str, Any]
    """The CreateTrainingJob request."""

    def status(self) -> dict[str, Any]:
        """The job as DescribeTrainingJob tells it."""
        return dict(self._jobs.describe(self.name))

    def wait(self, timeout_s: float | None = None) -> dict[str, Any]:
        """Until it is over. Returns its status; raises JobFailed when it ended in Failed, LaunchError on a timeout."""
        value = dict(self._jobs.wait(self.name, timeout_s))
        if value["TrainingJobStatus"] == "Failed":
            raise JobFailed(f"{self.name}: {value.get('FailureReason', 'failed')}; see `estiba logs {self.name}`")
        return value

    def logs(self, *, follow: bool = False) -> Iterator[str]:
        """Lines of its log, attempts marked; with `follow` until it is over."""
        yield from self._jobs.log_lines(self.name, follow=follow)

    def stop(self) -> None:
        """TERM, then KILL after 120 s; returns at once. Raises LaunchError when it is over already."""
        self._jobs.stop(self.name)

    def fetch(self, into: str | Path) -> dict[str, int]:
        """Model and output, unpacked into `into`/model and `into`/output: number of files of each."""
        return dict(self._jobs.fetch(self.name, Path(into)))

    @property
    def _jobs(self) -> backends.Backend:
        return backends.of(self.name)


class Wanted(TypedDict, total=False):
    """The arguments of `build_request`, for callers that hand them on."""

    image_uri: Required[str]
    output_path: Required[str]
    role: str | None
    job_name: str | None
    base_job_name: str | None
    instance_type: str
    instance_count: int
    volume_size_gb: int
    keep_alive_s: int | None
    hyperparameters: Mapping[str, object] | None
    environment: Mapping[str, str] | None
    channels: Mapping[str, str | Channel] | None
    input_mode: str
    compress_output: bool
    use_spot: bool
    max_run_s: int
    max_wait_s: int | None
    max_retries: int | None
    checkpoint_s3_uri: str | None
    checkpoint_local_path: str | None
    source_dir: str | Path | None
    entry_point: str | None
    container_entrypoint: Sequence[str] | None
    container_arguments: Sequence[str] | None
    metric_definitions: Mapping[str, str] | Sequence[Mapping[str, str]] | None
    subnets: Sequence[str] | None
    security_group_ids: Sequence[str] | None
    enable_network_isolation: bool
    encrypt_inter_container_traffic: bool
    disable_profiler: bool
    tags: Mapping[str, str] | None


def launch_training_job(
    *,
    target: str = "local",
    region: str | None = None,
    options: LocalOptions | None = None,
    wait: bool = False,
    say: Callable[[str], None] = lambda _: None,
    **wanted: Unpack[Wanted],
) -> Job:
    """Start a training job and return its handle; with `wait`, when it is over.

    `target` is `local`, `sagemaker` or `ssh://user@host[:port]`; `region` is for SageMaker (default: AWS's own
    configuration); `options` are the local host's; the rest is `build_request`'s. On SageMaker `role` may be a name.
    Raises InvalidJob with every problem at once, LaunchError when it cannot be started, and with `wait` JobFailed.
    """
    where = Target.parse(target)
    role = wanted.get("role")
    if where.is_sagemaker and role:
        wanted["role"] = role_arn(role, region)
    job = start(prepare(where, build_request(**wanted)), options, say, region)
    if wait:
        job.wait()
    return job


def role_arn(role: str, region: str | None) -> str:
    """A role's ARN, asking AWS where only its name is given. Raises LaunchError."""
    if role.startswith("arn:"):
        return role
    from .sagemaker.role import arn_of

    return arn_of(role, region)


def start(
    job: JobFile,
    options: LocalOptions | None = None,
    say: Callable[[str], None] = lambda _: None,
    region: str | None = None,
) -> Job:
    """Start a checked job on its target. Raises LaunchError when it cannot be started."""
    chosen = options or LocalOptions()
    # Imported when needed: boto3 alone takes half a second.
    if job.target.kind == "sagemaker":
        from .sagemaker import jobs as sagemaker_jobs

        sagemaker_jobs.start(job, region, say)
    elif job.target.kind == "ssh":
        from .ssh import jobs as ssh_jobs

        ssh_jobs.start(job, chosen.host, say)
    else:
        from .localhost import jobs as local_jobs

        local_jobs.start(job, chosen, say)
    return Job(job.name, job.target, job.request)


def prepare(target: Target, request: Mapping[str, Any]) -> JobFile:
    """Check a request as a job file's is checked. Raises InvalidJob."""
    kept = {name: part for name, part in request.items() if target.is_sagemaker or name not in SAGEMAKER_ONLY}
    return jobfile.check(SOURCE, kept, target)


def build_request(
    *,
    image_uri: str,
    output_path: str,
    role: str | None = None,
    job_name: str | None = None,
    base_job_name: str | None = None,
    instance_type: str = "ml.g4dn.xlarge",
    instance_count: int = 1,
    volume_size_gb: int = 30,
    keep_alive_s: int | None = None,
    hyperparameters: Mapping[str, object] | None = None,
    environment: Mapping[str, str] | None = None,
    channels: Mapping[str, str | Channel] | None = None,
    input_mode: str = "File",
    compress_output: bool = True,
    use_spot: bool = False,
    max_run_s: int = 86_400,
    max_wait_s: int | None = None,
    max_retries: int | None = None,
    checkpoint_s3_uri: str | None = None,
    checkpoint_local_path: str | None = "/opt/ml/checkpoints",
    source_dir: str | Path | None = None,
    entry_point: str | None = None,
    container_entrypoint: Sequence[str] | None = None,
    container_arguments: Sequence[str] | None = None,
    metric_definitions: Mapping[str, str] | Sequence[Mapping[str, str]] | None = None,
    subnets: Sequence[str] | None = None,
    security_group_ids: Sequence[str] | None = None,
    enable_network_isolation: bool = False,
    encrypt_inter_container_traffic: bool = False,
    disable_profiler: bool = True,
    tags: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The CreateTrainingJob request of these arguments; nothing is checked yet.

    image_uri, role, instance_*, volume_size_gb: as in the API. keep_alive_s holds a warm pool (not with spot).
    job_name: exact; else base_job_name (or the image's name) with the time. hyperparameters: text goes as it is,
    true/false in lower case, lists and mappings as JSON. channels: name -> address, or a Channel.
    use_spot: managed spot; max_wait_s defaults to three times max_run_s. metric_definitions: name -> regex, or the
    API's list. disable_profiler writes ProfilerConfig.DisableProfiler; the debugger is off as no hook is configured.

    source_dir is packed into code.tar.gz and becomes the channel `code` (on SageMaker it is uploaded beside the
    output). With entry_point the image's script mode runs it: SAGEMAKER_PROGRAM, SAGEMAKER_SUBMIT_DIRECTORY and, if
    there is a requirements.txt, SAGEMAKER_REQUIREMENTS, and the hyperparameters of the first two, which AWS's toolkit
    wants; the other hyperparameters become its flags.
    Without, container_entrypoint does as it likes with /opt/ml/input/data/code/code.tar.gz.
    """
    name = job_name or unique_name(base_job_name or image_uri)
    algorithm: dict[str, Any] = {"TrainingImage": image_uri, "TrainingInputMode": input_mode}
    if metric_definitions:
        algorithm["MetricDefinitions"] = _metrics(metric_definitions)
    if container_entrypoint:
        algorithm["ContainerEntrypoint"] = list(container_entrypoint)
    if container_arguments:
        algorithm["ContainerArguments"] = list(container_arguments)
    variables = dict(environment or {})
    parameters = {key: text_of(key, value) for key, value in (hyperparameters or {}).items()}
    inputs = dict(channels or {})
    if source_dir is not None:
        folder = Path(source_dir).expanduser()
        if source.CHANNEL in inputs:
            raise LaunchError(f"channels: `{source.CHANNEL}` is where source_dir goes; rename the channel or drop one")
        if entry_point is not None or container_entrypoint is None:
            variables |= script_mode(folder, entry_point)
            # The toolkit takes the folder from here alone; sagemaker_* never become flags.
            parameters |= {name.lower(): variables[name] for name in (PROGRAM, SUBMIT_DIRECTORY)}
        inputs[source.CHANNEL] = stage(folder, output_path, name)
    elif entry_point is not None:
        variables.setdefault(PROGRAM, entry_point)
    request: dict[str, Any] = {"TrainingJobName": name}
    if role is not None:
        request["RoleArn"] = role
    request["AlgorithmSpecification"] = algorithm
    if parameters:
        request["HyperParameters"] = parameters
    if variables:
        request["Environment"] = variables
    if inputs:
        request["InputDataConfig"] = [_channel(key, value) for key, value in inputs.items()]
    request["OutputDataConfig"] = {
        "S3OutputPath": output_path,
        **({} if compress_output else {"CompressionType": "NONE"}),
    }
    resources: dict[str, Any] = {
        "InstanceType": instance_type, "InstanceCount": instance_count, "VolumeSizeInGB": volume_size_gb,
    }  # fmt: skip
    if keep_alive_s is not None:
        resources["KeepAlivePeriodInSeconds"] = keep_alive_s
    request["ResourceConfig"] = resources
    stopping = {"MaxRuntimeInSeconds": max_run_s}
    if use_spot:
        request["EnableManagedSpotTraining"] = True
        stopping["MaxWaitTimeInSeconds"] = 3 * max_run_s if max_wait_s is None else max_wait_s
    elif max_wait_s is not None:
        stopping["MaxWaitTimeInSeconds"] = max_wait_s
    request["StoppingCondition"] = stopping
    if checkpoint_s3_uri is not None:
        local = {"LocalPath": checkpoint_local_path} if checkpoint_local_path else {}
        request["CheckpointConfig"] = {"S3Uri": checkpoint_s3_uri, **local}
    if max_retries is not None:
        request["RetryStrategy"] = {"MaximumRetryAttempts": max_retries}
    if subnets or security_group_ids:
        request["VpcConfig"] = {"SecurityGroupIds": list(security_group_ids or []), "Subnets": list(subnets or [])}
    if enable_network_isolation:
        request["EnableNetworkIsolation"] = True
    if encrypt_inter_container_traffic:
        request["EnableInterContainerTrafficEncryption"] = True
    if disable_profiler:
        request["ProfilerConfig"] = {"DisableProfiler": True}
    if tags:
        request["Tags"] = [{"Key": key, "Value": value} for key, value in tags.items()]
    return copy.deepcopy(request)


def script_mode(folder: Path, entry_point: str | None) -> dict[str, str]:
    """The environment by which an image runs `entry_point` of the packed `folder`. Raises LaunchError."""
    variables = {
        PROGRAM: source.program(folder, entry_point),
        SUBMIT_DIRECTORY: source.SUBMIT_DIRECTORY,
    }
    if (folder / "requirements.txt").is_file():
        variables["SAGEMAKER_REQUIREMENTS"] = "requirements.txt"
    return variables


def stage(folder: Path, output_path: str, name: str) -> str:
    """Pack `folder` and return the address of the directory with code.tar.gz, uploaded if the output is on S3."""
    place = source.pack(folder)
    if not output_path.startswith("s3://"):
        return f"file://{place}"
    address = f"{output_path.rstrip('/')}/{name}/source"
    open_store(address).put(place / source.ARCHIVE, source.ARCHIVE)
    return address


def unique_name(base: str) -> str:
    """`estiba/embed:local` -> embed-20260927-123005-123: a base with the time, as the API allows it."""
    stem = base.rpartition("/")[2].partition("@")[0].partition(":")[0]
    stem = re.sub(r"[^A-Za-z0-9]+", "-", stem).strip("-")[:40] or "job"
    now = datetime.datetime.now(datetime.UTC)
    return f"{stem}-{now:%Y%m%d-%H%M%S}-{now.microsecond // 1000:03d}"


def text_of(name: str, value: object) -> str:
    """A hyperparameter as the text that the API takes. Raises LaunchError for None."""
    if value is None:
        raise LaunchError(f"hyperparameters[{name!r}]: None is no value; leave it out")
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Path):
        return str(value)
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise LaunchError(f"hyperparameters[{name!r}]: {error}; give text, a number, or what JSON can hold") from None


def _metrics(given: Mapping[str, str] | Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    if isinstance(given, Mapping):
        return [{"Name": name, "Regex": regex} for name, regex in given.items()]
    return [dict(one) for one in given]


def _channel(name: str, given: str | Channel) -> dict[str, Any]:
    channel = given if isinstance(given, Channel) else Channel(uri=given)
    where: dict[str, Any] = {"S3DataType": "S3Prefix", "S3Uri": channel.uri}
    if channel.sharded:
        where["S3DataDistributionType"] = "ShardedByS3Key"
    out: dict[str, Any] = {"ChannelName": name, "DataSource": {"S3DataSource": where}}
    if channel.content_type:
        out["ContentType"] = channel.content_type
    if channel.input_mode:
        out["InputMode"] = channel.input_mode
    return out
