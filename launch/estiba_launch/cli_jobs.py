"""The commands about jobs: run, status, logs, stop, resume, interrupt, list, fetch, cost."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from . import backends, costs, jobfile, plan, prices, state
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
from .errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_JOB_FAILED, AwsUnavailable, LaunchError
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
Fallback = Annotated[
    str | None, typer.Option("--fallback", metavar="local", help="Run here when AWS cannot be reached or refuses.")
]
AccountJobs = Annotated[
    str | None, typer.Option("--target", metavar="sagemaker", help="Ask AWS for jobs that were started elsewhere too.")
]
Role = Annotated[
    str | None, typer.Option("--role", metavar="NAME|ARN", help="SageMaker: the role the job takes; fills ROLE_ARN.")
]
BoxPrice = Annotated[
    float | None, typer.Option("--usd-per-h", min=0, help="ssh: what the box costs an hour, for --max-cost and cost.")
]
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
    fallback: Fallback = None,
    role: Role = None,
    usd_per_h: BoxPrice = None,
) -> None:
    """Start a job and follow its log to the end. Ctrl-C leaves the job running and says how to stop it."""
    if fallback not in (None, "local"):
        raise LaunchError(f"--fallback {fallback!r}: only local can be fallen back to")
    values = parse_settings(set_ or [])
    tables = prices.load(region or "us-east-1", price_file)

    def launch(where: Target) -> str:
        loaded = load(job, where, values, role, region)
        options = host_options(loaded, gpus, shm_size, memory, cpus, like_instance, encoding, env_file, tables)
        planned = plan.make(loaded, tables, options=options, region=region, box_usd_per_h=usd_per_h)
        for warning in planned.warnings:
            say(f"warning: {warning}")
        say(plan.describe(planned).rstrip())
        plan.refuse_over(planned, max_cost)
        ask(f"start {loaded.name} {'here' if where.kind == 'local' else f'on {where}'}?", yes)
        settings = LocalOptions(host=options, copy_inputs=copy_inputs, sync_every_s=sync_every_s, keep_hosts=keep_hosts)
        return start(loaded, settings, region, usd_per_h)

    where = Target.parse(target)
    try:
        name = launch(where)
    except AwsUnavailable as error:
        here = f"estiba run {job} --target local"
        if fallback is None:
            raise AwsUnavailable(f"{error}\n  the same file on this machine: {here}") from None
        say(f"estiba: {error}")
        say("*" * 72)
        say(f"** NOT ON AWS: --fallback local runs {job} on this machine instead **")
        say("*" * 72)
        name = launch(Target.parse("local"))
    if detach:
        print(name)
        say(next_commands(name, "logs -f", "status", "stop"))
        return
    say(f"{name}: started; Ctrl-C leaves it running")
    follow(name)
    value = backends.of(name).wait(name)
    say(summary(value))
    say(next_commands(name, "fetch", "status", "cost"))
    raise typer.Exit(EXIT_CODES[value["TrainingJobStatus"]])


def load(job: Path, where: Target, values: dict[str, str], role: str | None, region: str | None) -> jobfile.JobFile:
    """The job file, checked for `where`; on SageMaker a role's name becomes its ARN. Raises LaunchError."""
    if not where.is_sagemaker:
        return jobfile.load(job, where, values)
    from .sagemaker.role import arn_of

    if role:
        values = {**values, "ROLE_ARN": arn_of(role, region)}
    return jobfile.load(job, where, values, resolve_role=lambda name: arn_of(name, region))


def start(loaded: jobfile.JobFile, settings: LocalOptions, region: str | None, usd_per_h: float | None) -> str:
    """Start a checked job on its target and return its name. Raises LaunchError."""
    if loaded.target.kind == "local":
        return jobs.start(loaded, settings, say).name
    if loaded.target.is_sagemaker:
        from .sagemaker import jobs as sagemaker_jobs

        return sagemaker_jobs.start(loaded, region, say).name
    from .ssh import jobs as ssh_jobs

    return ssh_jobs.start(loaded, settings.host, say, usd_per_h=usd_per_h).name


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
        for line in backends.of(name).log_lines(name, follow=True):
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


def account_wide(target: str | None) -> bool:
    """Whether AWS is to be asked for jobs of the account. Raises LaunchError for other targets."""
    if target not in (None, "sagemaker"):
        raise LaunchError(f"--target {target!r}: only sagemaker knows jobs that were started elsewhere")
    return target is not None


def local_only(name: str | None, what: str) -> str:
    """`chosen(name)`. Raises LaunchError when that job is not on this machine."""
    picked = chosen(name)
    where = backends.target(picked)
    if where.kind != "local":
        raise LaunchError(f"{picked}: runs on {where}; {what} is for jobs of this machine")
    return picked


def summary(value: dict[str, Any]) -> str:
    """A job in a few lines."""
    estiba = value["Estiba"]
    lines = [f"{value['TrainingJobName']}: {value['TrainingJobStatus']} ({value['SecondaryStatus']})"]
    if value.get("FailureReason"):
        lines.append(f"  reason    {value['FailureReason']}")
    if estiba.get("Unreachable"):
        lines.append(f"  last known; {estiba['Unreachable']}")
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
def status(name: JobName = None, as_json: AsJson = False, target: AccountJobs = None, region: Region = None) -> None:
    """Show a job as DescribeTrainingJob would, attempts included.

    With --target sagemaker a job that was started elsewhere becomes known here, to logs, stop and fetch too.
    """
    if name is not None and account_wide(target) and name not in state.job_names():
        from .sagemaker import jobs as sagemaker_jobs

        sagemaker_jobs.adopt(name, region)
    picked = chosen(name)
    value = backends.of(picked).describe(picked)
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
    for line in backends.of(picked).log_lines(picked, follow=False):
        print(line)


@command
def stop(
    name: JobName = None,
    wait: Annotated[bool, typer.Option("--wait", help="Return when it is over.")] = False,
) -> None:
    """Stop a job: TERM, then KILL after 120 seconds; what it saved and its model are kept."""
    picked = chosen(name)
    backends.of(picked).stop(picked)
    say(f"{picked}: stopping")
    if wait:
        say(summary(backends.of(picked).wait(picked)))


@command
def resume(name: JobName = None) -> None:
    """Look after a job again whose supervisor was killed; its containers have gone on meanwhile."""
    picked = local_only(name, "resume")
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
    picked = local_only(name, "interrupt")
    jobs.interrupt(picked, Interruption(notice=notice, grace_s=grace_s, host=host, capacity_wait_s=capacity_wait_s))
    say(f"{picked}: interrupted")


@command
def list_jobs(as_json: AsJson = False, target: AccountJobs = None, region: Region = None) -> None:
    """List the jobs started from this machine, oldest first; with --target sagemaker, all of the account's latest."""
    if account_wide(target):
        from .sagemaker import jobs as sagemaker_jobs

        found = sagemaker_jobs.account_jobs(region)
        if as_json:
            show_json(found)
            return
        for one in reversed(found):
            print(f"{one['TrainingJobName']:<63} {one['TrainingJobStatus']:<20} {one['CreationTime']}")
        return
    values = [backends.of(name).describe(name) for name in state.job_names()]
    if as_json:
        show_json(values)
        return
    for value in values:
        shown = "Orphaned" if jobs.orphaned(value) else value["SecondaryStatus"]
        attempts = len(value["Estiba"]["Attempts"])
        where = value["Estiba"].get("Target", "local")
        unsure = "?" if value["Estiba"].get("Unreachable") else ""
        when = f"{attempts:>3} attempts  {value['CreationTime']}"
        print(f"{value['TrainingJobName']:<63} {shown + unsure:<20} {when}  {where}")


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
    found = backends.of(picked).fetch(picked, folder)
    if as_json:
        show_json({what: {"files": count, "path": str((folder / what).absolute())} for what, count in found.items()})
        return
    for what, count in found.items():
        say(f"{count} files")
        print(folder / what)


@command
def cost(name: JobName = None, as_json: AsJson = False, price_file: PriceFile = None, region: Region = None) -> None:
    """Show the time a job took, what it is billed (SageMaker, boxes with a price), or would have been (local)."""
    picked = chosen(name)
    value = backends.of(picked).describe(picked)
    document, warnings = costs.of(value, prices.load(region or "us-east-1", price_file), region)
    for warning in warnings:
        say(f"warning: {warning}")
    if as_json:
        show_json(document)
    else:
        print(costs.describe(document))


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
