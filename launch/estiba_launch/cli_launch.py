"""`estiba launch`: a job from flags alone, with the names that the original launchers took."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from . import api, backends, plan, prices
from .cli_jobs import EXIT_CODES, Detach, MaxCost, RunTarget, Yes, ask, next_commands, summary
from .console import Gpus, PriceFile, Region, ShmSize, command, host_options, say, show_json
from .errors import EXIT_INTERRUPTED, LaunchError
from .localhost.control import LocalOptions
from .target import Target
from .variables import parse_settings

Pairs = list[str] | None


@command
def launch(
    image: Annotated[str, typer.Option("--image", help="Image to run.", envvar="IMAGE")],
    s3_bucket: Annotated[str | None, typer.Option("--s3-bucket", help="Bucket of the data; a hyperparameter.")] = None,
    s3_data_prefix: Annotated[
        str | None, typer.Option("--s3-data-prefix", help="Prefix of the data in the bucket; a hyperparameter.")
    ] = None,
    config_file: Annotated[
        str | None, typer.Option("--config-file", help="Configuration in the image or source; a hyperparameter.")
    ] = None,
    num_training_batches: Annotated[int | None, typer.Option(min=1, help="A hyperparameter.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="A hyperparameter.")] = None,
    hyperparameter: Annotated[
        Pairs, typer.Option("--hyperparameter", "-p", metavar="NAME=VALUE", help="Any other; may be repeated.")
    ] = None,
    env: Annotated[Pairs, typer.Option("--env", metavar="NAME=VALUE", help="Environment; may be repeated.")] = None,
    channel: Annotated[
        Pairs, typer.Option("--channel", metavar="NAME=URI", help="Input, s3:// or file://; may be repeated.")
    ] = None,
    source_dir: Annotated[
        Path | None, typer.Option(help="Folder packed as code.tar.gz, with requirements.txt if it has needs.")
    ] = None,
    entry_point: Annotated[str | None, typer.Option(help="Program in the source directory (.py or .sh).")] = None,
    job_name: Annotated[str | None, typer.Option("--job-name", help="Default: image and time.")] = None,
    instance_type: Annotated[str, typer.Option("--instance-type")] = "ml.g4dn.xlarge",
    instance_count: Annotated[int, typer.Option(min=1)] = 1,
    volume_gb: Annotated[int, typer.Option(min=1, help="Disk of each host.")] = 30,
    role: Annotated[str | None, typer.Option("--role", envvar="ROLE_ARN", help="Name or ARN, for SageMaker.")] = None,
    output_uri: Annotated[
        str | None, typer.Option(help="Default: s3://BUCKET/output on SageMaker, else file://runs/NAME.")
    ] = None,
    checkpoint_uri: Annotated[
        str | None, typer.Option(help="Default with spot: NAME/checkpoints below the output.")
    ] = None,
    spot: Annotated[bool, typer.Option("--spot/--no-spot", help="Managed spot with checkpoints.")] = True,
    max_run_s: Annotated[int, typer.Option(min=1)] = 86_400,
    max_wait_s: Annotated[int | None, typer.Option(min=1, help="Default: three times --max-run-s.")] = None,
    keep_alive_s: Annotated[int | None, typer.Option(min=0, help="Warm pool; not with spot.")] = None,
    target: RunTarget = "local",
    as_request: Annotated[bool, typer.Option("--request", help="Print the request and start nothing.")] = False,
    yes: Yes = False,
    detach: Detach = False,
    max_cost: MaxCost = None,
    price_file: PriceFile = None,
    region: Region = None,
    gpus: Gpus = "auto",
    shm_size: ShmSize = "8g",
) -> None:
    """Start a job from flags, without a job file; `--request` shows the request they mean.

    --s3-bucket, --s3-data-prefix, --config-file, --num-training-batches and --batch-size become hyperparameters of
    these names, which the workload (or the program of --source-dir) gets as flags.
    """
    where = Target.parse(target)
    name = job_name or api.unique_name(str(source_dir.resolve().name) if source_dir else image)
    if output_uri is None:
        if where.is_sagemaker and s3_bucket is None:
            raise LaunchError("--output-uri: SageMaker needs one; pass s3://BUCKET/PREFIX, or --s3-bucket")
        output_uri = f"s3://{s3_bucket}/output" if where.is_sagemaker else "file://runs"
    named = {
        "s3-bucket": s3_bucket,
        "s3-data-prefix": s3_data_prefix,
        "config-file": config_file,
        "num-training-batches": num_training_batches,
        "batch-size": batch_size,
    }
    request = api.build_request(
        image_uri=image,
        output_path=output_uri,
        role=api.role_arn(role, region) if role and where.is_sagemaker else role,
        job_name=name,
        instance_type=instance_type,
        instance_count=instance_count,
        volume_size_gb=volume_gb,
        keep_alive_s=keep_alive_s,
        hyperparameters={
            **{key: value for key, value in named.items() if value is not None},
            **pairs("--hyperparameter", hyperparameter),
        },
        environment=parse_settings(env or []),
        channels=dict(pairs("--channel", channel)),
        use_spot=spot,
        max_run_s=max_run_s,
        max_wait_s=max_wait_s,
        checkpoint_s3_uri=checkpoint_uri or (f"{output_uri.rstrip('/')}/{name}/checkpoints" if spot else None),
        source_dir=source_dir,
        entry_point=entry_point,
    )
    job = api.prepare(where, request)
    if as_request:
        show_json(job.request)
        return
    tables = prices.load(region or "us-east-1", price_file)
    options = host_options(job, gpus, shm_size, None, None, False, "plain", None, tables)
    planned = plan.make(job, tables, options=options, region=region)
    for warning in planned.warnings:
        say(f"warning: {warning}")
    say(plan.describe(planned).rstrip())
    plan.refuse_over(planned, max_cost)
    ask(f"start {job.name} on {where}?", yes)
    handle = api.start(job, LocalOptions(host=options), say, region)
    if detach:
        print(handle.name)
        say(next_commands(handle.name, "logs -f", "status", "stop"))
        return
    say(f"{handle.name}: started; Ctrl-C leaves it running")
    try:
        for line in handle.logs(follow=True):
            print(line, flush=True)
        value = backends.of(handle.name).wait(handle.name)
    except KeyboardInterrupt:
        say(f"\n{handle.name}: still running")
        say(next_commands(handle.name, "logs -f", "stop"))
        raise typer.Exit(EXIT_INTERRUPTED) from None
    say(summary(value))
    say(next_commands(handle.name, "fetch", "status", "cost"))
    raise typer.Exit(EXIT_CODES[value["TrainingJobStatus"]])


def pairs(flag: str, given: Pairs) -> dict[str, str]:
    """`["lr=1e-4"]` -> `{"lr": "1e-4"}`; names may hold a dash. Raises LaunchError."""
    found: dict[str, str] = {}
    for text in given or []:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise LaunchError(f"{flag} {text!r}: not NAME=VALUE; write for example {flag} epochs=3")
        found[name] = value
    return found


COMMANDS: dict[str, Callable[..., None]] = {"launch": launch}
