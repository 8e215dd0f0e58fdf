"""`estiba launch`: a job from flags, with the names that earlier launch scripts used."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from estiba_launch.cli import options as opt
from estiba_launch.cli.submit import start_and_follow
from estiba_launch.request.address import TargetAddress
from estiba_launch.request.build import (
    build_job,
    default_checkpoints,
    default_output,
    free_name,
    name_stem,
    unique_name,
)
from estiba_launch.request.jobfile import JobFile
from estiba_launch.request.variables import parse_settings
from estiba_launch.targets import registry

Pairs = list[str] | None
ANY_NAME = "[^=]+"


@dataclass(kw_only=True)
class JobFlags:
    """Options with the names of `build_job`'s arguments."""

    image_uri: Annotated[str, Option("--image", help="Image to run.", envvar="IMAGE")]
    source_dir: Annotated[
        Path | None, Option(help="Folder to pack as code.tar.gz, with a requirements.txt if it needs one.")
    ] = None
    entry_point: Annotated[str | None, Option(help="Program in the source directory (.py or .sh).")] = None
    s3_bucket: Annotated[str | None, Option(help="Bucket of the data; a hyperparameter.")] = None
    s3_data_prefix: Annotated[str | None, Option(help="Prefix of the data; a hyperparameter.")] = None
    config_file: Annotated[str | None, Option(help="Configuration file; a hyperparameter. A file here is sent.")] = None
    num_training_batches: Annotated[int | None, Option(min=1, help="A hyperparameter.")] = None
    batch_size: Annotated[int | None, Option(min=1, help="A hyperparameter.")] = None
    job_name: Annotated[str | None, Option(help="Default: source or image, and time.")] = None
    instance_type: Annotated[str, Option(help="Instance type.")] = "ml.g4dn.xlarge"
    instance_count: Annotated[int, Option(min=1, help="Number of hosts.")] = 1
    volume_size_gb: Annotated[int, Option("--volume-gb", min=1, help="Disk of each host, GB.")] = 30
    role: Annotated[str | None, Option(envvar="ROLE_ARN", help="SageMaker: name or ARN of the role.")] = None
    output_path: Annotated[
        str | None, Option("--output-uri", help="Default: s3://BUCKET/output on SageMaker, else file://runs.")
    ] = None
    checkpoint_s3_uri: Annotated[
        str | None,
        Option("--checkpoint-uri", help="Default with spot: below the output, the same for the same command."),
    ] = None
    use_spot: Annotated[bool, Option("--spot/--no-spot", help="Managed spot with checkpoints.")] = True
    max_run_s: Annotated[int, Option(min=1, help="Time limit, seconds.")] = 86_400
    max_wait_s: Annotated[
        int | None, Option(min=1, help="Time limit including waits for capacity; default: 3 x --max-run-s.")
    ] = None
    keep_alive_s: Annotated[int | None, Option(min=0, help="Keep a warm pool this long; not with spot.")] = None


@opt.command
def launch(
    *,
    flags: JobFlags,
    hyperparameter: Annotated[
        Pairs, Option("--hyperparameter", "-p", metavar="NAME=VALUE", help="Another hyperparameter; may be repeated.")
    ] = None,
    env: Annotated[Pairs, Option(metavar="NAME=VALUE", help="Environment variable; may be repeated.")] = None,
    channel: Annotated[
        Pairs, Option(metavar="NAME=URI", help="Input, s3:// or file:// (uploaded for SageMaker); may be repeated.")
    ] = None,
    as_request: Annotated[bool, Option("--request", help="Print the request and start nothing.")] = False,
    show_plan: Annotated[bool, Option("--show-plan", help="Print what is submitted before it starts.")] = False,
    start: opt.RunFlags,
    host: opt.HostFlags,
    cost: opt.HostPriceFlags,
) -> None:
    """Start a job from flags, without a job file.

    --s3-bucket, --s3-data-prefix, --config-file, --num-training-batches and --batch-size become hyperparameters with
    these names, which the workload (or the program in --source-dir) gets as flags.
    """
    base = flags.source_dir.resolve().name if flags.source_dir else flags.image_uri
    stem, wanted = flags.job_name or name_stem(base), flags.job_name
    flags.job_name = free_name(wanted) if wanted else unique_name(base)
    if wanted and flags.job_name != wanted:
        opt.say(f"note: a job named {wanted} is known already, so this one is {flags.job_name}")
    arguments: dict[str, Any] = {name: value for name, value in dataclasses.asdict(flags).items() if value is not None}
    arguments["hyperparameters"] = parse_settings(hyperparameter, "--hyperparameter", "epochs=3", ANY_NAME)
    arguments["environment"] = parse_settings(env, "--env", "HF_HUB_OFFLINE=1")
    arguments["channels"] = parse_settings(channel, "--channel", "train=file://data", ANY_NAME)

    def load(address: TargetAddress) -> JobFile:
        output = flags.output_path or default_output(address, arguments)  # type: ignore[arg-type]
        complete = {**arguments, "output_path": output}
        if flags.use_spot:
            complete.setdefault("checkpoint_s3_uri", default_checkpoints(arguments, output, stem))
        target = registry.target_of(address)
        return build_job(
            address,
            resolve_role=partial(target.resolve_role, region=cost.region),
            default_role=partial(target.default_role, region=cost.region),
            report=lambda line: opt.say(f"note: {line}"),
            **complete,
        )

    if as_request:
        opt.show(load(registry.parse(start.target)).request)
        return
    start_and_follow(load, start, host, cost, local_command="the same command with --target local", show_plan=show_plan)
