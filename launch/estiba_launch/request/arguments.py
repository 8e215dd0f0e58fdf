"""The arguments of a job in Python: our names, the names in the SageMaker SDK's estimators, and their meaning.

Sources: `sagemaker` 2.257, the constructors of `Estimator`, `PyTorch` and `HuggingFace`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypedDict, get_type_hints

from estiba_launch.errors import LaunchError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class Channel:
    """One input channel, where an address alone is not enough."""

    uri: str
    """`s3://...` or `file://...`; for SageMaker such files are uploaded, once while they stay the same."""
    content_type: str | None = None
    input_mode: str | None = None
    """File or FastFile; None means the job's."""
    sharded: bool = False
    """Each host gets about 1/n of the objects (ShardedByS3Key)."""


Channels = Mapping[str, Any] | str
"""Channel name to address, `Channel` or the SDK's `TrainingInput`; an address alone is the channel `training`."""


class Alias(str):
    """Our name for an argument."""


class Ignored(str):
    """Why an argument has no effect."""


class Unsupported(str):
    """What to do instead of passing an argument; only None and False are accepted."""


OWN_VERSIONS = "the image has its own versions"
IMAGE_CONFIG = "AlgorithmSpecification.TrainingImageConfig"


class Arguments(TypedDict, total=False):
    """Every argument by our name; its annotation is the request member that it sets."""

    image_uri: Annotated[str, "AlgorithmSpecification.TrainingImage"]
    """Image to run; default $IMAGE."""
    role: Annotated[str | None, "RoleArn"]
    """Role of the job on SageMaker; default $ROLE_ARN."""
    job_name: str | None
    """Exact name of the job."""
    base_job_name: str | None
    """Prefix of a generated name; default is the image's name."""
    instance_type: Annotated[str, "ResourceConfig.InstanceType"]
    """Default ml.g4dn.xlarge."""
    instance_count: Annotated[int, "ResourceConfig.InstanceCount"]
    instance_groups: Sequence[Any] | None
    """Instead of instance_type and instance_count: the SDK's `InstanceGroup` objects, or the API's mappings."""
    volume_size_gb: Annotated[int, "ResourceConfig.VolumeSizeInGB"]
    """Disk of each host; default 30."""
    volume_kms_key: Annotated[str | None, "ResourceConfig.VolumeKmsKeyId"]
    keep_alive_s: Annotated[int | None, "ResourceConfig.KeepAlivePeriodInSeconds"]
    """Keeps a warm pool after the job; not with spot."""
    output_path: Annotated[str, "OutputDataConfig.S3OutputPath"]
    """Where results go; default file://runs, on SageMaker the SDK's default bucket of the role's account."""
    output_kms_key: Annotated[str | None, "OutputDataConfig.KmsKeyId"]
    compress_output: bool
    hyperparameters: Mapping[str, object] | None
    """Text is passed unchanged, true and false in lower case, lists and mappings as JSON."""
    environment: Mapping[str, str] | None
    channels: Channels | None
    input_mode: Annotated[str, "AlgorithmSpecification.TrainingInputMode"]
    """File, FastFile or Pipe, for channels that set none."""
    model_uri: str | None
    """A trained model that becomes a channel."""
    model_channel_name: str
    use_spot: Annotated[bool, "EnableManagedSpotTraining"]
    max_run_s: Annotated[int, "StoppingCondition.MaxRuntimeInSeconds"]
    """Default one day."""
    max_wait_s: Annotated[int | None, "StoppingCondition.MaxWaitTimeInSeconds"]
    """Waiting plus running; default with spot is three times max_run_s."""
    max_retries: Annotated[int | None, "RetryStrategy.MaximumRetryAttempts"]
    checkpoint_s3_uri: str | None
    checkpoint_local_path: str | None
    """Default /opt/ml/checkpoints."""
    source_dir: str | Path | None
    """Folder packed as code.tar.gz, or s3://.../sourcedir.tar.gz."""
    entry_point: str | None
    """Program in the source, .py or .sh, which the image's script mode runs with the hyperparameters as flags."""
    dependencies: Sequence[str | Path] | None
    """Folders and files packed beside the program."""
    code_location: str | None
    """Prefix that code.tar.gz and files of this machine are uploaded to; default is the output's."""
    container_entrypoint: Annotated[Sequence[str] | None, "AlgorithmSpecification.ContainerEntrypoint"]
    container_arguments: Annotated[Sequence[str] | None, "AlgorithmSpecification.ContainerArguments"]
    training_repository_access_mode: Annotated[str | None, f"{IMAGE_CONFIG}.TrainingRepositoryAccessMode"]
    """Platform (ECR) or Vpc (a registry in the VPC)."""
    training_repository_credentials_provider_arn: Annotated[
        str | None, f"{IMAGE_CONFIG}.TrainingRepositoryAuthConfig.TrainingRepositoryCredentialsProviderArn"
    ]
    """Lambda function that returns the login for a registry in the VPC."""
    distribution: Mapping[str, Any] | None
    """How the toolkit starts processes: torch_distributed, pytorchddp or mpi."""
    metric_definitions: Mapping[str, str] | Sequence[Mapping[str, str]] | None
    """Name to regex, or the API's list."""
    enable_sagemaker_metrics: Annotated[bool | None, "AlgorithmSpecification.EnableSageMakerMetricsTimeSeries"]
    subnets: Annotated[Sequence[str] | None, "VpcConfig.Subnets"]
    security_group_ids: Annotated[Sequence[str] | None, "VpcConfig.SecurityGroupIds"]
    enable_network_isolation: Annotated[bool | None, "EnableNetworkIsolation"]
    encrypt_inter_container_traffic: Annotated[bool | None, "EnableInterContainerTrafficEncryption"]
    disable_profiler: Annotated[bool | None, "ProfilerConfig.DisableProfiler"]
    """Default True."""
    enable_infra_check: Annotated[bool | None, "InfraCheckConfig.EnableInfraCheck"]
    enable_remote_debug: Annotated[bool | None, "RemoteDebugConfig.EnableRemoteDebug"]
    enable_session_tag_chaining: Annotated[bool | None, "SessionChainingConfig.EnableSessionTagChaining"]
    training_plan: Annotated[str | None, "ResourceConfig.TrainingPlanArn"]
    instance_placement_config: Annotated[Mapping[str, Any] | None, "ResourceConfig.InstancePlacementConfig"]
    experiment_config: Annotated[Mapping[str, str] | None, "ExperimentConfig"]
    tags: Mapping[str, str] | Sequence[Mapping[str, str]] | None
    s3_bucket: str | None
    """This and the four others of the guide become hyperparameters with dashed names, as in the brain-to-text guide."""
    s3_data_prefix: str | None
    config_file: str | None
    """A file of this machine, sent as the channel `config`; else a name or address for the workload to find."""
    num_training_batches: int | None
    batch_size: int | None


class EstimatorArguments(Arguments, total=False):
    """Our names, and those of the SDK's estimators."""

    inputs: Annotated[Channels | None, Alias("channels")]
    max_run: Annotated[int, Alias("max_run_s")]
    max_wait: Annotated[int | None, Alias("max_wait_s")]
    max_retry_attempts: Annotated[int | None, Alias("max_retries")]
    use_spot_instances: Annotated[bool, Alias("use_spot")]
    keep_alive_period_in_seconds: Annotated[int | None, Alias("keep_alive_s")]
    volume_size: Annotated[int, Alias("volume_size_gb")]
    container_entry_point: Annotated[Sequence[str] | None, Alias("container_entrypoint")]
    disable_output_compression: bool
    framework_version: Annotated[str | None, Ignored(OWN_VERSIONS)]
    py_version: Annotated[str | None, Ignored(OWN_VERSIONS)]
    transformers_version: Annotated[str | None, Ignored(OWN_VERSIONS)]
    pytorch_version: Annotated[str | None, Ignored(OWN_VERSIONS)]
    tensorflow_version: Annotated[str | None, Ignored(OWN_VERSIONS)]
    container_log_level: Annotated[int | None, Ignored("the image sets its own")]
    sagemaker_session: Annotated[Any, Ignored("the launcher creates its own from AWS's configuration")]
    debugger_hook_config: Annotated[Any, Unsupported("no hook is installed in the images; pass False")]
    profiler_config: Annotated[Any, Unsupported("write ProfilerConfig in a job file")]
    rules: Annotated[Any, Unsupported("write DebugRuleConfigurations in a job file")]
    tensorboard_output_config: Annotated[Any, Unsupported("write TensorBoardOutputConfig in a job file")]
    compiler_config: Annotated[Any, Unsupported("the training compiler is not in the images")]
    git_config: Annotated[Any, Unsupported("clone the repository and pass its folder as source_dir")]
    training_recipe: Annotated[Any, Unsupported("pass the program that it would start as entry_point, with source_dir")]
    recipe_overrides: Annotated[Any, Unsupported("pass settings as hyperparameters, or as config_file")]


def _marked(kind: type[str]) -> dict[str, str]:
    """The annotation's text per argument, for annotations of exactly this type."""
    hints = get_type_hints(EstimatorArguments, include_extras=True)
    marks = {name: hint.__metadata__[0] for name, hint in hints.items() if hasattr(hint, "__metadata__")}
    return {name: str(mark) for name, mark in marks.items() if type(mark) is kind}


MEMBERS = _marked(str)
"""Request member per argument, for arguments that are only copied."""
ALIASES, IGNORED, UNSUPPORTED = _marked(Alias), _marked(Ignored), _marked(Unsupported)


def canonical(arguments: Mapping[str, Any]) -> tuple[Arguments, list[str]]:
    """(arguments by our names, notes on ignored ones).

    Raises LaunchError for an unknown name, with the nearest known one, and for one argument under two names.
    """
    known = EstimatorArguments.__annotations__
    renamed: dict[str, Any] = {}
    ignored: dict[str, list[str]] = {}
    for name, value in arguments.items():
        if name not in known:
            hint = did_you_mean(name, known, f"known are {', '.join(sorted(known))}")
            raise LaunchError(f"{name}: no such argument; {hint}")
        if name in IGNORED:
            ignored.setdefault(IGNORED[name], []).append(name)
            continue
        if name in UNSUPPORTED:
            if value not in (None, False):
                raise LaunchError(f"{name}: not supported; {UNSUPPORTED[name]}")
            continue
        ours = ALIASES.get(name, name)
        if name == "disable_output_compression":
            ours, value = "compress_output", not value
        if ours in renamed:
            raise LaunchError(f"{ours}: set by two arguments; keep one of them")
        renamed[ours] = value
    notes = [f"{', '.join(names)}: ignored, {why}" for why, names in ignored.items()]
    # The estimators' defaults are None: it means "not passed".
    passed = {name: value for name, value in renamed.items() if value is not None}
    return Arguments(**passed), notes  # type: ignore[typeddict-item]
