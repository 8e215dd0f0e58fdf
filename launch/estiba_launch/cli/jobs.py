"""The commands for jobs that exist: status, logs, stop, list, fetch, cost, resume, interrupt."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option

from estiba_launch.cli import options as opt
from estiba_launch.cli.render import account_row, job_row, summary
from estiba_launch.cli.submit import follow
from estiba_launch.errors import LaunchError
from estiba_launch.jobs import directory
from estiba_launch.jobs.control import Fault
from estiba_launch.targets import operations


def name_or_latest(name: str | None) -> str:
    """`name`, or the name of the latest job. Raises LaunchError when there is none."""
    names = [name] if name is not None else directory.job_names()
    if not names:
        raise LaunchError(f"no job on this machine yet ({directory.jobs_root()}); start one with `estiba run JOB`")
    return names[-1]


@opt.command
def status(
    name: opt.JobName = None, target: opt.AccountTarget = None, region: opt.Region = None, as_json: opt.AsJson = False
) -> None:
    """Show a job and its attempts; with --json, as DescribeTrainingJob would.

    With --target, records a job that was started elsewhere, so that logs, stop and fetch find it too.
    """
    if name is not None and target is not None and name not in directory.job_names():
        operations.find(name, target, region)
    job = operations.status(name_or_latest(name))
    opt.show(job.to_json() if as_json else summary(job))


@opt.command
def logs(
    name: opt.JobName = None,
    follow_: Annotated[bool, Option("--follow", "-f", help="Wait for more until the job ends.")] = False,
) -> None:
    """Print the log of a job, with all its attempts."""
    job_name = name_or_latest(name)
    if follow_:
        follow(job_name)
        return
    for line in operations.log_lines(job_name, follow=False):
        print(line)


@opt.command
def stop(
    name: opt.JobName = None,
    wait: Annotated[bool, Option("--wait", help="Return when the job has ended.")] = False,
) -> None:
    """Stop a job: TERM, then KILL after 120 seconds. Its checkpoints and its model are kept."""
    job_name = name_or_latest(name)
    operations.stop(job_name)
    opt.say(f"{job_name}: stopping")
    if wait:
        opt.say(summary(operations.wait(job_name)))


@opt.command
def resume(name: opt.JobName = None) -> None:
    """Start a new supervisor for a job whose supervisor died. Its containers have kept running."""
    job_name = name_or_latest(name)
    state = "has a new supervisor" if operations.resume(job_name) else "has a supervisor, nothing to do"
    opt.say(f"{job_name}: {state}")


@opt.command
def interrupt(
    name: opt.JobName = None,
    notice: Annotated[bool, Option(help="TERM first, KILL after --grace-s; without it, KILL at once.")] = True,
    grace_s: Annotated[int, Option(min=0, help="Seconds from TERM to KILL.")] = 120,
    host: Annotated[str | None, Option(help="Host to take away, such as algo-2; default: all.")] = None,
    capacity_wait_s: Annotated[float, Option(min=0, help="Seconds until there is a new host.")] = 0.0,
) -> None:
    """Interrupt a running job. As on spot capacity, it continues from its checkpoint on new hosts."""
    job_name = name_or_latest(name)
    operations.interrupt(job_name, Fault(notice=notice, grace_s=grace_s, host=host, capacity_wait_s=capacity_wait_s))
    opt.say(f"{job_name}: interrupted")


@opt.command
def list_jobs(target: opt.AccountTarget = None, region: opt.Region = None, as_json: opt.AsJson = False) -> None:
    """List the jobs of this machine, oldest first. With --target, the latest of that account or host."""
    jobs = operations.list_account(target, region) if target is not None else operations.list_jobs(opt.say)
    if as_json:
        opt.show([job.to_json() for job in jobs])
        return
    for row in map(job_row, jobs) if target is None else map(account_row, reversed(jobs)):
        print(row)


@opt.command
def fetch(
    name: opt.JobName = None,
    into: Annotated[Path | None, Option(metavar="DIR", help="Default: a folder with the job's name.")] = None,
    as_json: opt.AsJson = False,
) -> None:
    """Download the results of a finished job: the model to DIR/model, the output to DIR/output."""
    job_name = name_or_latest(name)
    folder = into or Path(job_name)
    counts = operations.download(job_name, folder)
    if as_json:
        root = folder.absolute()
        opt.show({what: {"files": count, "path": str(root / what)} for what, count in counts.items()})
        return
    for what, count in counts.items():
        opt.say(f"{count} files")
        print(folder / what)


@opt.command
def cost(price: opt.PriceFlags, name: opt.JobName = None, as_json: opt.AsJson = False) -> None:
    """Show how long a job took and what it costs.

    For a job on this machine or over ssh, also what the same time costs on SageMaker.
    """
    bill = operations.cost(name_or_latest(name), price.load(), price.region)
    for warning in bill.warnings:
        opt.say(f"warning: {warning}")
    opt.show(bill.to_json() if as_json else bill.render())
