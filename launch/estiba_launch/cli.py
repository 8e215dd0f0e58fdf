"""`estiba`: one job file, three targets. Data goes to stdout, progress and advice to stderr."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Annotated

import typer

from . import cli_drill, cli_jobs, cli_launch, jobfile, plan, prices, scripts
from . import doctor as checks
from .console import (
    AsJson,
    Cpus,
    Encoding,
    EnvFile,
    Gpus,
    Interruptions,
    JobPath,
    LikeInstance,
    Memory,
    NoticeSaves,
    PriceFile,
    Region,
    SaveSeconds,
    Settings,
    ShmSize,
    TargetName,
    WorkSeconds,
    assume,
    command,
    host_options,
    say,
    show_json,
)
from .errors import EXIT_JOB_FAILED, LaunchError
from .target import Target
from .variables import parse_settings

HELP = """Stow a workload once, sail it anywhere: one job file on this machine, an ssh box or SageMaker.

Exit codes: 0 done, 1 the job failed, 2 invalid input, 3 refused by budget, 4 interrupted.
"""

app = typer.Typer(name="estiba", help=HELP, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)
prices_app = typer.Typer(help="What instance types cost.", invoke_without_command=True, rich_markup_mode=None)
app.add_typer(prices_app, name="prices")
for name, function in {**cli_jobs.COMMANDS, **cli_drill.COMMANDS, **cli_launch.COMMANDS}.items():
    app.command(name)(function)


@app.command("plan")
@command
def plan_command(
    job: JobPath,
    target: TargetName = None,
    set_: Settings = None,
    as_json: AsJson = False,
    price_file: PriceFile = None,
    region: Region = None,
    interruptions: Interruptions = 0.15,
    save_s: SaveSeconds = 60.0,
    notice_saves: NoticeSaves = 0.0,
    work_s: WorkSeconds = None,
    gpus: Gpus = "auto",
    shm_size: ShmSize = "8g",
    memory: Memory = None,
    cpus: Cpus = None,
    like_instance: LikeInstance = False,
    encoding: Encoding = "plain",
    env_file: EnvFile = None,
) -> None:
    """Check a job file and print exactly what would be started and what it may cost. Starts nothing.

    Without --target, local and sagemaker are both shown.
    """
    assumptions = assume(interruptions, save_s, notice_saves, work_s)
    tables = prices.load(region or "us-east-1", price_file)
    targets = [Target.parse(target)] if target else [Target.parse("local"), Target.parse("sagemaker")]
    shown = []
    refused: LaunchError | None = None
    now = datetime.datetime.now(datetime.UTC)
    for one in targets:
        try:
            loaded = jobfile.load(job, one, parse_settings(set_ or []), now=now)
            options = host_options(loaded, gpus, shm_size, memory, cpus, like_instance, encoding, env_file, tables)
            planned = plan.make(loaded, tables, assumptions=assumptions, options=options, region=region)
        except LaunchError as error:
            # With both targets asked for, a file that is only ready for one is still worth showing.
            if target:
                raise
            say(f"estiba: not ready for --target {one}: {error}")
            refused = error
            continue
        shown.append(planned)
        for warning in planned.warnings:
            say(f"warning: {warning}")
        if not as_json:
            say(plan.describe(planned))
            print(scripts.artefact(loaded, options), flush=True)
    if not shown and refused:
        raise typer.Exit(refused.exit_code)
    if as_json:
        documents = [planned.to_json() for planned in shown]
        show_json(documents[0] if target else documents)


@prices_app.callback(invoke_without_command=True)
@command
def prices_command(
    context: typer.Context,
    names: Annotated[str | None, typer.Option("--only", metavar="TEXT", help="Only types that hold this text.")] = None,
    as_json: AsJson = False,
    price_file: PriceFile = None,
    region: Region = None,
) -> None:
    """Print the price table in use, with where and when each price was read."""
    if context.invoked_subcommand:
        return
    tables = prices.load(region or "us-east-1", price_file)
    chosen = [one for name, one in sorted(tables.instances.items()) if not names or names in name]
    for warning in tables.warnings([one.name for one in chosen], region):
        say(f"warning: {warning}")
    if as_json:
        show_json([{**vars(one), "date": one.date.isoformat()} for one in chosen])
        return
    print(f"{'instance type':<20} {'USD/h':>9}  {'GPUs':<22} {'vCPU':>5} {'GiB':>5}  region     read")
    for one in chosen:
        gpu = f"{one.gpus} x {one.gpu} {one.gpu_memory_mib} MiB" if one.gpus else "-"
        print(
            f"{one.name:<20} {one.usd_per_h:>9.4f}  {gpu:<22} {one.vcpus or '?':>5} {one.memory_gib or '?':>5}  "
            f"{one.region:<10} {one.date}"
        )


@prices_app.command("refresh")
@command
def refresh_command(
    region: Annotated[str, typer.Argument(help="AWS region.")] = "us-east-1",
    url: Annotated[str | None, typer.Option(help="Offer file to read instead of AWS's own.")] = None,
) -> None:
    """Read AWS's public price list (no account needed) and keep its training prices for this user."""
    say(f"reading {url or prices.OFFER_URL.format(region=region)}")
    print(prices.refresh(region, url))


@app.command("doctor")
@command
def doctor_command(
    job: Annotated[Path | None, typer.Argument(metavar="[JOB]", help="Job file to be ready for.")] = None,
    set_: Settings = None,
    role: Annotated[str | None, typer.Option("--role", metavar="NAME|ARN", help="Role to look at.")] = None,
    region: Region = None,
    as_json: AsJson = False,
    offline: Annotated[bool, typer.Option("--offline", help="Leave out checks that ask another machine.")] = False,
) -> None:
    """Check this machine: docker, GPU driver, disk, ssh, AWS login, region and clock.

    With JOB also its image and CUDA, its role and the account's quota for its instances. Exit 1 when a check fails.
    """
    subject = checks.Subject(role=role, region=region)
    if job:
        subject = checks.subject_of(job, parse_settings(set_ or []), role, region)
    found = []
    for check in checks.run(subject, network=not offline):
        found.append(check)
        if not as_json:
            print(f"{check.status:<8} {check.name:<16} {check.seen}", flush=True)
            if check.remedy:
                print(f"{'':<8} {'':<16} -> {check.remedy}", flush=True)
    if as_json:
        show_json([check.to_json() for check in found])
    if checks.worst(found) == "fail":
        raise typer.Exit(EXIT_JOB_FAILED)


if __name__ == "__main__":
    app()
