"""The commands about jobs: run, status, logs, stop, resume, interrupt, list, fetch, cost."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from . import jobfile, plan, prices, state
from .console import (
    AsJson,
    Cpus,
    Encoding,
    EnvFile,
    Gpus,
    JobPath,
    LikeInstance,
    Memory,
    PriceFile,
    Region,
    Settings,
    ShmSize,
    command,
    host_options,
    say,
    show_json,
)
from .errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_JOB_FAILED, LaunchError
from .localhost import jobs
from .localhost.control import Interruption, LocalOptions
from .target import Target
from .variables import parse_settings

EXIT_CODES = {"Completed": EXIT_DONE, "Failed": EXIT_JOB_FAILED, "Stopped": EXIT_INTERRUPTED}

JobName = Annotated[str | None, typer.Argument(metavar="[NAME]", help="Job name; the latest job when left out.")]
RunTarget = Annotated[
    str, typer.Option("--target", metavar="TARGET", help="local, sagemaker or ssh://user@host[:port].")
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Start without asking.")]
Detach = Annotated[bool, typer.Option("--detach", "-d", help="Start and return; the job goes on by itself.")]
MaxCost = Annotated[
    float | None, typer.Option("--max-cost", metavar="USD", help="Refuse (exit 3) a job that may cost more.")
]
CopyInputs = Annotated[
    bool, typer.Option("--copy-inputs", help="Writable copies of File channels, not read-only mounts.")
]
SyncEvery = Annotated[float, typer.Option("--sync-every-s", min=0.05, help="Seconds between checkpoint syncs.")]
KeepHosts = Annotated[bool, typer.Option("--keep-hosts", help="Keep the directories of finished hosts.")]


@command
def run(
    job: JobPath,
    target: RunTarget = "local",
    set_: Settings = None,
    yes: Yes = False,
    detach: Detach = False,
    max_cost: MaxCost = None,
    price_file: PriceFile = None,
    region: Region = None,
    gpus: Gpus = "auto",
    shm_size: ShmSize = "8g",
    memory: Memory = None,
    cpus: Cpus = None,
    like_instance: LikeInstance = False,
    encoding: Encoding = "plain",
    env_file: EnvFile = None,
    copy_inputs: CopyInputs = False,
    sync_every_s: SyncEvery = 5.0,
    keep_hosts: KeepHosts = False,
) -> None:
    """Start a job and follow its log to the end. Ctrl-C leaves the job running and says how to stop it."""
    where = Target.parse(target)
    loaded = jobfile.load(job, where, parse_settings(set_ or []))
    tables = prices.load(region or "us-east-1", price_file)
    options = host_options(loaded, gpus, shm_size, memory, cpus, like_instance, encoding, env_file, tables)
    planned = plan.make(loaded, tables, options=options, region=region)
    for warning in planned.warnings:
        say(f"warning: {warning}")
    say(plan.describe(planned).rstrip())
    plan.refuse_over(planned, max_cost)
    if where.kind != "local":
        raise LaunchError(
            f"--target {where}: this version starts local jobs only; `estiba plan {job} --target {where}` prints "
            "the request or script to run by hand"
        )
    ask(f"start {loaded.name} here?", yes)
    settings = LocalOptions(host=options, copy_inputs=copy_inputs, sync_every_s=sync_every_s, keep_hosts=keep_hosts)
    started = jobs.start(loaded, settings, say)
    if detach:
        print(started.name)
        say(next_commands(started.name, "logs -f", "status", "stop"))
        return
    say(f"{started.name}: started; Ctrl-C leaves it running")
    follow(started.name)
    value = jobs.wait(started.name)
    say(summary(value))
    say(next_commands(started.name, "fetch", "status", "cost"))
    raise typer.Exit(EXIT_CODES[value["TrainingJobStatus"]])


def ask(question: str, yes: bool) -> None:
    """Let a person agree. Raises LaunchError off a terminal, typer.Exit when they do not."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise LaunchError("not on a terminal, so nobody can be asked; pass --yes to start")
    if not typer.confirm(question, default=True, err=True):
        raise typer.Exit(EXIT_INTERRUPTED)


def follow(name: str) -> None:
    """Print the log until the end. Ctrl-C raises typer.Exit after saying how to go on; the job is left alone."""
    try:
        for line in jobs.log_lines(name, follow=True):
            print(line, flush=True)
    except KeyboardInterrupt:
        say(f"\n{name}: still running")
        say(next_commands(name, "logs -f", "stop"))
        raise typer.Exit(EXIT_INTERRUPTED) from None


def next_commands(name: str, *verbs: str) -> str:
    return "\n".join(f"  estiba {verb} {name}" for verb in verbs)


def chosen(name: str | None) -> str:
    """`name`, or the latest job. Raises LaunchError when there is none."""
    if name is not None:
        return name
    known = state.job_names()
    if not known:
        raise LaunchError(f"no job on this machine yet ({state.jobs_root()}); start one with `estiba run JOB`")
    return known[-1]


def summary(value: dict[str, Any]) -> str:
    """A job in a few lines."""
    estiba = value["Estiba"]
    lines = [f"{value['TrainingJobName']}: {value['TrainingJobStatus']} ({value['SecondaryStatus']})"]
    if value.get("FailureReason"):
        lines.append(f"  reason    {value['FailureReason']}")
    if jobs.orphaned(value):
        lines.append(f"  nobody looks after it: its supervisor died; `estiba resume {value['TrainingJobName']}`")
    for attempt in estiba["Attempts"]:
        restored = f", restored {attempt['RestoredFiles']} files" if attempt.get("RestoredFiles") else ""
        codes = ", ".join(f"{host} {code}" for host, code in attempt.get("ExitCodes", {}).items())
        lines.append(
            f"  attempt {attempt['Number']} {attempt['StartTime']} {attempt.get('Outcome', 'running')}"
            f"{f' (exit {codes})' if codes else ''}{restored}"
        )
    if "TrainingTimeInSeconds" in value:
        lines.append(f"  time      {plan.duration(value['TrainingTimeInSeconds'])}")
    for metric in value.get("FinalMetricDataList", []):
        lines.append(f"  metric    {metric['MetricName']} = {metric['Value']:g}")
    for what, uri in (
        ("model", value.get("ModelArtifacts", {}).get("S3ModelArtifacts")),
        ("output", estiba.get("OutputArtifacts")),
    ):
        if uri:
            lines.append(f"  {what:<9} {uri}")
    return "\n".join(lines)


@command
def status(name: JobName = None, as_json: AsJson = False) -> None:
    """Show a job as DescribeTrainingJob would, attempts included."""
    value = jobs.describe(chosen(name))
    if as_json:
        show_json(value)
    else:
        print(summary(value))


@command
def logs(
    name: JobName = None,
    follow_: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job is over.")] = False,
) -> None:
    """Print the whole log of a job, attempts marked."""
    picked = chosen(name)
    if follow_:
        follow(picked)
        return
    for line in jobs.log_lines(picked, follow=False):
        print(line)


@command
def stop(
    name: JobName = None,
    wait: Annotated[bool, typer.Option("--wait", help="Return when it is over.")] = False,
) -> None:
    """Stop a job: TERM, then KILL after 120 seconds; what it saved and its model are kept."""
    picked = chosen(name)
    jobs.stop(picked)
    say(f"{picked}: stopping")
    if wait:
        say(summary(jobs.wait(picked)))


@command
def resume(name: JobName = None) -> None:
    """Look after a job again whose supervisor was killed; its containers have gone on meanwhile."""
    picked = chosen(name)
    say(f"{picked}: {'looked after again' if jobs.resume(picked) else 'needs nothing'}")


@command
def interrupt(
    name: JobName = None,
    notice: Annotated[bool, typer.Option(help="TERM and up to --grace-s seconds; without, KILL at once.")] = True,
    grace_s: Annotated[int, typer.Option("--grace-s", min=0, help="Seconds from TERM to KILL.")] = 120,
    host: Annotated[str | None, typer.Option(help="The host that is lost, such as algo-2; default is all.")] = None,
    capacity_wait_s: Annotated[float, typer.Option("--capacity-wait-s", min=0, help="Seconds to a new host.")] = 0.0,
) -> None:
    """Take the spot capacity of a running job away; it goes on from its checkpoint on new hosts."""
    picked = chosen(name)
    jobs.interrupt(picked, Interruption(notice=notice, grace_s=grace_s, host=host, capacity_wait_s=capacity_wait_s))
    say(f"{picked}: interrupted")


@command
def list_jobs(as_json: AsJson = False) -> None:
    """List the jobs of this machine, oldest first."""
    values = [jobs.describe(name) for name in state.job_names()]
    if as_json:
        show_json(values)
        return
    for value in values:
        shown = "Orphaned" if jobs.orphaned(value) else value["SecondaryStatus"]
        attempts = len(value["Estiba"]["Attempts"])
        print(f"{value['TrainingJobName']:<63} {shown:<20} {attempts:>3} attempts  {value['CreationTime']}")


@command
def fetch(
    name: JobName = None,
    into: Annotated[
        Path | None, typer.Option("--into", metavar="DIR", help="Default: a folder named like the job.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Bring the model and output of a finished job here, unpacked into DIR/model and DIR/output."""
    picked = chosen(name)
    folder = into or Path(picked)
    found = jobs.fetch(picked, folder)
    if as_json:
        show_json({what: {"files": count, "path": str((folder / what).absolute())} for what, count in found.items()})
        return
    for what, count in found.items():
        say(f"{count} files")
        print(folder / what)


@command
def cost(name: JobName = None, as_json: AsJson = False, price_file: PriceFile = None, region: Region = None) -> None:
    """Show the hours a local job took, and what the same hours on its SageMaker instances would have cost."""
    picked = chosen(name)
    value = jobs.describe(picked)
    tables = prices.load(region or "us-east-1", price_file)
    hosts = [(tables.get(kind), count) for kind, count in prices.hosts_of(value)]
    seconds = value.get("BillableTimeInSeconds", 0)
    usd_per_h = sum(instance.usd_per_h * count for instance, count in hosts)
    document = {
        "job": picked,
        "billable_s": seconds,
        "usd": 0.0,
        "sagemaker_usd_per_h": usd_per_h,
        "sagemaker_usd": usd_per_h * seconds / 3600,
        "prices_read": min(instance.date for instance, _ in hosts).isoformat(),
    }
    for warning in tables.warnings([instance.name for instance, _ in hosts], region):
        say(f"warning: {warning}")
    if as_json:
        show_json(document)
        return
    shape = ", ".join(f"{count} x {instance.name}" for instance, count in hosts)
    print(f"{picked}: {plan.duration(seconds)} on this machine, 0.00 USD")
    read = f"{usd_per_h:.4g} USD/h, read {document['prices_read']}"
    print(f"the same time on {shape}: {document['sagemaker_usd']:.4f} USD ({read})")


COMMANDS: dict[str, Callable[..., None]] = {
    "run": run,
    "status": status,
    "logs": logs,
    "stop": stop,
    "list": list_jobs,
    "fetch": fetch,
    "cost": cost,
    "resume": resume,
    "interrupt": interrupt,
}
