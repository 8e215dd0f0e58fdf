"""`estiba plan` and `estiba run`, and how `run` and `launch` start and follow a job."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import typer

from estiba_launch.cli import options as opt
from estiba_launch.cli.render import next_commands, summary
from estiba_launch.errors import (
    EXIT_DONE,
    EXIT_INTERRUPTED,
    EXIT_INVALID,
    EXIT_JOB_FAILED,
    AwsUnavailable,
    InvalidJob,
    LaunchError,
)
from estiba_launch.jobs import directory, inputs
from estiba_launch.jobs.options import SubmitOptions
from estiba_launch.request import jobfile
from estiba_launch.request.address import TargetAddress
from estiba_launch.request.estimate import Estimate, estimate, refuse_over
from estiba_launch.request.forecast import Assumptions
from estiba_launch.request.jobfile import JobFile
from estiba_launch.request.prices import Prices
from estiba_launch.targets import operations, registry
from estiba_launch.targets.base import Capability

EXIT_CODES = {"Completed": EXIT_DONE, "Failed": EXIT_JOB_FAILED, "Stopped": EXIT_INTERRUPTED}

STAND_IN_ROLE = "arn:aws:iam::999999999999:role/name"


@opt.command
def plan(
    job: opt.JobPath,
    *,
    target: opt.OptionalTarget = None,
    set_: opt.Settings = None,
    as_json: opt.AsJson = False,
    cost: opt.HostPriceFlags,
    role: opt.Role = None,
    assumptions: Assumptions,
    host: opt.HostFlags,
) -> None:
    """Print exactly what a job would submit, and what it may cost.

    Checks the job file and starts nothing. Without --target, shows every target that the job is ready for and what
    the others lack.
    """
    cost.load()  # A price table that cannot be read is no fault of any target.
    settings = opt.settings_for(job, set_)
    now = datetime.datetime.now(datetime.UTC)
    addresses = (
        [registry.parse(target)]
        if target
        else [address for address in registry.addresses() if registry.target_of(address).can(Capability.SUBMIT)]
    )
    documents = []
    notes: dict[str, None] = {}
    exit_code = EXIT_INVALID
    refused: list[tuple[TargetAddress, LaunchError]] = []
    for address in addresses:
        try:
            loaded = _load_for_plan(job, address, settings, now, role)
            table = cost.load(loaded)
            options = SubmitOptions(host=host.read(loaded, table), region=cost.region, usd_per_h=cost.usd_per_h)
            submission = operations.prepare(loaded, options)
            price = _estimate(loaded, table, cost, assumptions)
        except LaunchError as error:
            if target:
                raise
            refused.append((address, error))
            continue
        documents.append({"job": loaded.name, "target": str(address), **submission.to_json(), **price.to_json()})
        notes.update(dict.fromkeys(submission.job.notes))
        if not as_json:
            opt.say(price.render())
            print(submission.render(), end="", flush=True)
        # A submission that is only printed may run on another machine, which has the data.
        reads_here = registry.target_of(address).can(Capability.SUBMIT) and not address.on_aws
        missing = list(inputs.local_problems(loaded.request, runs_here=address.runs_here)) if reads_here else []
        for problem in missing:
            opt.say(f"{job}: not ready for --target {address}: {problem}")
        if not missing:
            exit_code = EXIT_DONE
            opt.say(f"{job}: ready for --target {address}")
    _say_notes(notes)
    for address, refusal in refused:
        if documents:
            fields = _refused_fields(refusal)
            opt.say(f"{job}: note: would be refused on {address} ({fields}); `--target {address}` shows why")
        else:
            opt.say(f"{job}: not ready for --target {address}: {refusal}")
    if as_json and documents:
        opt.show(documents[0] if target else documents)
    if exit_code:
        raise typer.Exit(exit_code if documents else refused[-1][1].exit_code)


def _load_for_plan(
    job: Path, address: TargetAddress, settings: dict[str, str], now: datetime.datetime, role: str | None
) -> JobFile:
    """The job as `run` sends it, except that a role's name stays one, since AWS is not asked."""
    names: list[str] = []

    def stand_in(name: str) -> str:
        names.append(name)
        return STAND_IN_ROLE

    values = {**settings, "ROLE_ARN": role} if role and address.on_aws else settings
    loaded = jobfile.load(job, address, values, now=now, resolve_role=stand_in)
    if not names:
        return loaded
    note = f"RoleArn {names[0]}: a role's name, of which `estiba run` asks AWS for the ARN"
    return replace(loaded, request={**loaded.request, "RoleArn": names[0]}, notes=(*loaded.notes, note))


def _estimate(
    job: JobFile, table: Prices, cost: opt.HostPriceFlags, assumptions: Assumptions | None = None
) -> Estimate:
    price = estimate(job, table, assumptions=assumptions, region=cost.region_of(job), usd_per_h=cost.usd_per_h)
    for warning in price.warnings:
        opt.say(f"warning: {warning}")
    return price


def _say_notes(notes: Iterable[str]) -> None:
    for note in notes:
        opt.say(f"note: {note}")


def _refused_fields(error: LaunchError) -> str:
    """The fields that a target would refuse, in one line."""
    if not isinstance(error, InvalidJob):
        return str(error).partition("\n")[0]
    fields = {problem.field.rpartition(".")[2] for problem in error.problems}
    return ", ".join(sorted(fields))


@opt.command
def run(
    job: opt.JobPath,
    *,
    set_: opt.Settings = None,
    start: opt.RunFlags,
    cost: opt.HostPriceFlags,
    role: opt.Role = None,
    host: opt.HostFlags,
) -> None:
    """Start a job and follow its log to the end. Ctrl-C leaves the job running and shows how to stop it."""
    settings = opt.settings_for(job, set_)

    def load(address: TargetAddress) -> JobFile:
        resolve_role = partial(registry.target_of(address).resolve_role, region=cost.region)
        values = {**settings, "ROLE_ARN": resolve_role(role)} if role and address.on_aws else settings
        return jobfile.load(job, address, values, resolve_role=resolve_role)

    start_and_follow(load, start, host, cost, local_command=f"estiba run {job} --target local")


def start_and_follow(
    load: Callable[[TargetAddress], JobFile],
    start: opt.RunFlags,
    host: opt.HostFlags,
    cost: opt.HostPriceFlags,
    *,
    local_command: str,
    show_plan: bool = False,
) -> None:
    """Load the job for its target, show its price, ask, start it and follow it. Exits with the job's exit code."""
    try:
        name = operations.with_fallback(
            lambda address: _start(load(address), start, host, cost, show_plan), start.target, start.fallback, opt.say
        )
    except AwsUnavailable as error:
        if not registry.parse(start.target).on_aws:
            raise
        raise AwsUnavailable(f"{error}\n  the same job on this machine: {local_command}") from None
    if start.detach:
        print(name)
        opt.say(next_commands(name, "logs -f", "status", "stop"))
        return
    opt.say(f"{name}: started; Ctrl-C leaves it running")
    try:
        follow(name)
    except OSError:
        # The reader of stdout is gone, or the disk is full.
        opt.drop_stdout()
        _say_running(name, "still running")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    status = operations.wait(name)
    opt.say(summary(status))
    verbs = ["fetch"] if status.model_uri or status.output_uri else ["logs"]
    opt.say(next_commands(name, *verbs, "status", "cost"))
    raise typer.Exit(EXIT_CODES[status.status])


def _start(job: JobFile, start: opt.RunFlags, host: opt.HostFlags, cost: opt.HostPriceFlags, show_plan: bool) -> str:
    registry.target_of(job.target).require(Capability.SUBMIT)
    table = cost.load(job)
    submission = operations.prepare(job, start.options(host.read(job, table), cost))
    price = _estimate(job, table, cost)
    if show_plan:
        opt.say(submission.render().rstrip())
    _say_notes(submission.job.notes)
    opt.say(price.render().rstrip())
    refuse_over(price, start.max_cost)
    _ask(f"start {job.name} on {job.target}?", start.yes)
    try:
        operations.start(submission, opt.say)
    except KeyboardInterrupt:
        if job.name in directory.job_names():
            _say_running(job.name, "interrupted during its start, and may be running")
        raise
    return job.name


def _ask(question: str, yes: bool) -> None:
    """Raises LaunchError off a terminal, typer.Exit when the user declines."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise LaunchError("stdin is not a terminal to ask on; pass --yes to start")
    if not typer.confirm(question, default=True, err=True):
        raise typer.Exit(EXIT_INTERRUPTED)


def follow(name: str) -> None:
    """Print the log to its end. Ctrl-C raises typer.Exit and leaves the job running."""
    try:
        for line in operations.log_lines(name, follow=True):
            print(line, flush=True)
    except KeyboardInterrupt:
        _say_running(name, "still running")
        raise typer.Exit(EXIT_INTERRUPTED) from None


def _say_running(name: str, state: str) -> None:
    """Say that a job continues without this command, and how to follow or stop it."""
    opt.say(f"\n{name}: {state}")
    opt.say(next_commands(name, "logs -f", "stop"))
