"""From Python arguments to a job: the CreateTrainingJob request that a job file holds, checked by the same rules."""

from __future__ import annotations

import copy
import datetime
import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Unpack

from estiba_launch.errors import LaunchError
from estiba_launch.paths import state_root
from estiba_launch.request import jobfile, source
from estiba_launch.request.address import TargetAddress
from estiba_launch.request.arguments import MEMBERS, Arguments, Channel, EstimatorArguments, canonical
from estiba_launch.request.contract import SUBMIT_DIRECTORY
from estiba_launch.request.jobfile import AWS_ONLY, JobFile, Upload, slug
from estiba_launch.request.uploads import with_uploads

ORIGIN = Path("launch_training_job()")
"""Shown in messages in place of a job file's path."""
PROGRAM = "SAGEMAKER_PROGRAM"
WORKLOAD_ARGUMENTS = ("s3_bucket", "s3_data_prefix", "config_file", "num_training_batches", "batch_size")
DEFAULTS: dict[str, Any] = {
    "instance_type": "ml.g4dn.xlarge",
    "instance_count": 1,
    "volume_size_gb": 30,
    "max_run_s": 86_400,
    "input_mode": "File",
    "checkpoint_local_path": "/opt/ml/checkpoints",
    "disable_profiler": True,
}


CONFIG_CHANNEL = "config"
MAX_NAME = 63
_names: set[str] = set()
"""Those that this process has generated."""


class Request(NamedTuple):
    """A CreateTrainingJob request that is not checked yet."""

    body: dict[str, Any]
    uploads: tuple[Upload, ...] = ()


def build_job(
    target: TargetAddress,
    *,
    resolve_role: Callable[[str], str] | None = None,
    default_role: Callable[[], str | None] | None = None,
    report: Callable[[str], None] = lambda _: None,
    **passed: Unpack[EstimatorArguments],
) -> JobFile:
    """Build a job from arguments and check it.

    `resolve_role` turns a role's name into its ARN; `default_role` finds the one to use where none is passed.

    Packs the source into a file on this machine and uploads nothing: the job lists what to upload before it starts,
    on AWS including the files of file:// channels.
    Raises InvalidJob with every problem at once, LaunchError for invalid arguments.
    """
    arguments, notes = canonical(passed)
    for note in notes:
        report(note)
    if "image_uri" not in arguments:
        if not os.environ.get("IMAGE"):
            raise LaunchError("image_uri: required, since versions choose no image here; pass it or set IMAGE")
        arguments["image_uri"] = os.environ["IMAGE"]
    role = arguments.get("role") or os.environ.get("ROLE_ARN")
    if not role and target.on_aws and default_role is not None and (role := default_role()):
        report(f"role: not set, so the job runs with this notebook's, {role}")
    if role and target.on_aws:
        arguments["role"] = resolve_role(role) if resolve_role and not role.startswith("arn:") else role
    if "output_path" not in arguments:
        arguments["output_path"] = default_output(target, arguments)
        if target.on_aws:
            report(f"output_path: not set, so results go to {arguments['output_path']}")
    request = build_request(**arguments)
    prefix = arguments.get("code_location") or arguments["output_path"]
    if target.on_aws and prefix.startswith("s3://"):
        body, files = with_uploads(request.body, prefix)
        request = Request(body, request.uploads + files)
    return check_request(target, request)


def check_request(target: TargetAddress, request: Request) -> JobFile:
    """Check a request like a job file. Raises InvalidJob with every problem at once."""
    body = {name: part for name, part in request.body.items() if target.on_aws or name not in AWS_ONLY}
    return jobfile.check(ORIGIN, body, target, uploads=request.uploads)


def default_output(target: TargetAddress, arguments: Arguments) -> str:
    """Where results go by default; on SageMaker the SDK's bucket, named by the role's account and image's region."""
    if not target.on_aws:
        return "file://runs"
    if "s3_bucket" in arguments:
        return f"s3://{arguments['s3_bucket']}/output"
    account = re.match(r"arn:aws[a-z-]*:iam::(\d{12}):", arguments.get("role") or "")
    region = re.match(r"\d{12}\.dkr\.ecr(?:-fips)?\.([a-z0-9-]+)\.", arguments["image_uri"])
    if not account or not region:
        raise LaunchError("output_path: SageMaker needs one; pass s3://BUCKET/PREFIX, or s3_bucket (--s3-bucket)")
    return f"s3://sagemaker-{region.group(1)}-{account.group(1)}"


def build_request(**passed: Unpack[Arguments]) -> Request:
    """Build the request without checking it.

    source_dir is packed into code.tar.gz and becomes the channel `code`. With entry_point the image's script mode runs
    it: SAGEMAKER_PROGRAM, SAGEMAKER_SUBMIT_DIRECTORY and, for a source with requirements.txt, SAGEMAKER_REQUIREMENTS
    are set, and the first two as hyperparameters as well, where AWS's toolkit looks for them; the other hyperparameters
    become the program's flags. Without entry_point, container_entrypoint handles code.tar.gz itself.
    """
    arguments: dict[str, Any] = {**DEFAULTS, **passed}
    groups = [_group(one) for one in arguments.get("instance_groups") or ()]
    if groups:
        for argument in ("instance_type", "instance_count"):
            if argument in passed:
                raise LaunchError(f"{argument}: not together with instance_groups; keep one form")
            del arguments[argument]
    base = arguments.get("base_job_name")
    name = arguments.get("job_name") or (timed_name(base) if base else unique_name(arguments["image_uri"]))
    body: dict[str, Any] = {"TrainingJobName": name}
    for argument, path in MEMBERS.items():
        value = arguments.get(argument)
        # 0 is a value; False and an empty list are the API's defaults.
        if value or (isinstance(value, int) and not isinstance(value, bool)):
            _put(body, path, list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value)
    if groups:
        _put(body, "ResourceConfig.InstanceGroups", groups)
    if not arguments.get("compress_output", True):
        _put(body, "OutputDataConfig.CompressionType", "NONE")
    if arguments.get("use_spot"):
        body["StoppingCondition"].setdefault("MaxWaitTimeInSeconds", 3 * arguments["max_run_s"])
    if arguments.get("checkpoint_s3_uri"):
        _put(body, "CheckpointConfig.S3Uri", arguments["checkpoint_s3_uri"])
        _put(body, "CheckpointConfig.LocalPath", arguments["checkpoint_local_path"])
    if arguments.get("metric_definitions"):
        metrics = _pairs(arguments["metric_definitions"], "Name", "Regex")
        _put(body, "AlgorithmSpecification.MetricDefinitions", metrics)
    if arguments.get("tags"):
        body["Tags"] = _pairs(arguments["tags"], "Key", "Value")
    if body.get("VpcConfig"):
        body["VpcConfig"] = {"SecurityGroupIds": [], "Subnets": [], **body["VpcConfig"]}
    inputs = arguments.get("channels") or {}
    channels = dict(inputs if isinstance(inputs, Mapping) else {"training": inputs})
    if arguments.get("model_uri"):
        channels[arguments.get("model_channel_name", "model")] = arguments["model_uri"]
    parameters = {key: _text(key, value) for key, value in (arguments.get("hyperparameters") or {}).items()}
    if (config := Path(str(arguments.get("config_file") or ""))).is_file():
        if CONFIG_CHANNEL in channels:
            raise LaunchError(f"config_file: {config} is sent as the channel `{CONFIG_CHANNEL}`; rename your channel")
        channels[CONFIG_CHANNEL] = f"file://{config.absolute()}"
        arguments["config_file"] = config.name
    parameters |= {one.replace("_", "-"): _text(one, arguments[one]) for one in WORKLOAD_ARGUMENTS if one in arguments}
    parameters |= _toolkit(
        arguments.get("distribution") or {}, groups[0]["InstanceType"] if groups else arguments["instance_type"]
    )
    environment = dict(arguments.get("environment") or {})
    script, uploads = _source(arguments, name, channels)
    environment |= script
    # The toolkit reads the folder only from the hyperparameters; sagemaker_* never become flags.
    parameters |= {one.lower(): script[one] for one in (PROGRAM, SUBMIT_DIRECTORY) if SUBMIT_DIRECTORY in script}
    data = [_channel(key, value) for key, value in channels.items()]
    blocks = {"HyperParameters": parameters, "Environment": environment, "InputDataConfig": data}
    body |= {block: values for block, values in blocks.items() if values}
    return Request(copy.deepcopy(body), uploads)


def _source(
    arguments: Mapping[str, Any], name: str, channels: dict[str, Any]
) -> tuple[dict[str, str], tuple[Upload, ...]]:
    """(environment for script mode, uploads). A packed source is added to `channels`."""
    folder: str | Path | None = arguments.get("source_dir")
    program: str | None = arguments.get("entry_point")
    if str(folder).startswith("s3://"):
        return {PROGRAM: str(program), SUBMIT_DIRECTORY: str(folder)}, ()
    is_single_file = folder is None and program is not None and Path(program).is_file()
    if folder is None and not is_single_file:
        # The program is in the image.
        return ({PROGRAM: program} if program and PROGRAM not in (arguments.get("environment") or {}) else {}), ()
    if source.CHANNEL in channels:
        raise LaunchError(f"channels: `{source.CHANNEL}` is reserved for source_dir; rename the channel or drop one")
    files = source.collect(folder, arguments.get("dependencies") or (), program)
    script = {}
    if program is not None or arguments.get("container_entrypoint") is None:
        script = {
            PROGRAM: source.check_program(files, Path(program).name if is_single_file and program else program),
            SUBMIT_DIRECTORY: source.PATH_IN_CONTAINER,
        }
        if "requirements.txt" in files:
            script["SAGEMAKER_REQUIREMENTS"] = "requirements.txt"
    packed = source.pack(files)
    prefix = arguments.get("code_location") or arguments["output_path"]
    if not prefix.startswith("s3://"):
        channels[source.CHANNEL] = f"file://{packed.parent}"
        return script, ()
    channels[source.CHANNEL] = f"{prefix.rstrip('/')}/{name}/source"
    return script, (Upload(packed, channels[source.CHANNEL]),)


def _group(group: Any) -> dict[str, Any]:
    """An instance group in the API's form."""
    if isinstance(group, Mapping):
        return dict(group)
    names = {"instance_group_name": "InstanceGroupName", "instance_type": "InstanceType"}
    names["instance_count"] = "InstanceCount"
    try:
        return {member: getattr(group, name) for name, member in names.items()}
    except AttributeError as error:
        raise LaunchError(f"instance_groups: {group!r}: {error}; pass the SDK's InstanceGroup, or mappings") from None


def name_stem(base: str) -> str:
    """`registry/estiba/embed:local` -> embed."""
    return slug(base.rpartition("/")[2].partition("@")[0].partition(":")[0])


def unique_name(base: str) -> str:
    """`estiba/embed:local` -> embed-2026-09-27-12-30-05, a name that the API allows and no job here has."""
    return timed_name(name_stem(base))


def timed_name(base: str) -> str:
    """`Ensayo nº 1` -> Ensayo-no-1-2026-09-27-12-30-05, a name that the API allows and no job here has."""
    name = free_name(f"{slug(base)}-{datetime.datetime.now(datetime.UTC):%Y-%m-%d-%H-%M-%S}", _names)
    _names.add(name)
    return name


def free_name(name: str, others: Collection[str] = ()) -> str:
    """`name`; where a job here or one of `others` has it, with the first suffix that makes it free: -2, -3, ..."""
    free = name
    for number in itertools.count(2):
        if free not in others and not (state_root() / "jobs" / free).exists():
            break
        free = f"{name[: MAX_NAME - 1 - len(str(number))].rstrip('-')}-{number}"
    return free


def default_checkpoints(arguments: Mapping[str, Any], output: str, stem: str) -> str:
    """Where checkpoints go by default: one place for each `stem` and settings.

    It holds no time, so that the same command resumes, and other settings start anew.
    """
    settings = {
        name: value
        for name, value in arguments.items()
        if name in ("hyperparameters", "channels", "entry_point", *WORKLOAD_ARGUMENTS) and value
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    config = Path(str(arguments.get("config_file") or ""))
    if config.is_file():
        digest.update(config.read_bytes())
    return f"{output.rstrip('/')}/checkpoints/{stem}-{digest.hexdigest()[:8]}"


def _put(body: dict[str, Any], path: str, value: Any) -> None:
    *blocks, member = path.split(".")
    for block in blocks:
        body = body.setdefault(block, {})
    body[member] = value


def _text(name: str, value: object) -> str:
    """A hyperparameter as text, as the API requires. Raises LaunchError for None."""
    if value is None:
        raise LaunchError(f"hyperparameters[{name!r}]: None is not a value; leave it out")
    if isinstance(value, str | Path):
        return str(value)
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise LaunchError(f"hyperparameters[{name!r}]: {error}; pass text, a number or a JSON value") from None


def _pairs(entries: Mapping[str, str] | Sequence[Mapping[str, str]], first: str, second: str) -> list[dict[str, str]]:
    if isinstance(entries, Mapping):
        return [{first: key, second: value} for key, value in entries.items()]
    return [dict(entry) for entry in entries]


def _channel(name: str, data: Any) -> dict[str, Any]:
    if hasattr(data, "config"):
        # The SDK's TrainingInput and FileSystemInput hold the API's own form.
        return {"ChannelName": name, **data.config}
    channel = data if isinstance(data, Channel) else Channel(uri=str(data))
    s3_source = {"S3DataType": "S3Prefix", "S3Uri": channel.uri}
    if channel.sharded:
        s3_source["S3DataDistributionType"] = "ShardedByS3Key"
    optional = {"ContentType": channel.content_type, "InputMode": channel.input_mode}
    return {
        "ChannelName": name,
        "DataSource": {"S3DataSource": s3_source},
        **{member: value for member, value in optional.items() if value},
    }


def _toolkit(distribution: Mapping[str, Any], instance_type: str) -> dict[str, str]:
    """The hyperparameters that make AWS's toolkit start several processes, as the SDK writes them."""
    out: dict[str, str] = {}
    for kind, settings in distribution.items():
        if kind not in ("torch_distributed", "pytorchddp", "mpi"):
            raise LaunchError(f"distribution: {kind!r} is not supported; use torch_distributed, pytorchddp or mpi")
        if not settings.get("enabled"):
            continue
        name = "pytorch_ddp" if kind == "pytorchddp" else kind
        out |= {f"sagemaker_{name}_enabled": "true", "sagemaker_instance_type": instance_type}
        if kind == "mpi":
            out["sagemaker_mpi_custom_mpi_options"] = settings.get("custom_mpi_options", "")
            if settings.get("processes_per_host"):
                out["sagemaker_mpi_num_of_processes_per_host"] = str(settings["processes_per_host"])
    return out
