"""Text for people: a job, a list of jobs, prices, checks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from estiba_launch.jobs.check import Check
from estiba_launch.jobs.status import JobStatus
from estiba_launch.request.estimate import duration
from estiba_launch.request.prices import Instance


def summary(job: JobStatus) -> str:
    lines = [f"{job.name}: {job.status} ({job.secondary_status})"]
    if job.reason:
        lines.append(f"  reason    {job.reason}")
    if job.unsynced:
        lines.append(f"  unsynced  checkpoints: {job.unsynced}")
    if job.unreachable:
        lines.append(f"  last known state; {job.unreachable}")
    if job.is_orphaned:
        lines.append(f"  orphaned: its supervisor died; run `estiba resume {job.name}`")
    for attempt in job.attempts:
        codes = ", ".join(f"{host} {code}" for host, code in attempt.exit_codes.items())
        exits = f" (exit {codes})" if codes else ""
        restored = f", restored {attempt.restored_files} files" if attempt.restored_files else ""
        lines.append(f"  attempt {attempt.number} {attempt.start_time} {attempt.outcome or 'running'}{exits}{restored}")
    if job.training_s is not None:
        lines.append(f"  time      {duration(job.training_s)}")
    lines += [f"  metric    {name} = {value:g}" for name, value in job.metrics.items()]
    lines += [f"  {name:<9} {uri}" for name, uri in (("model", job.model_uri), ("output", job.output_uri)) if uri]
    lines += [f"  {name:<9} {url}" for name, url in job.links.items()]
    return "\n".join(lines)


def job_row(job: JobStatus) -> str:
    shown = ("Orphaned" if job.is_orphaned else job.secondary_status) + ("?" if job.unreachable else "")
    return f"{job.name:<63} {shown:<20} {len(job.attempts):>3} attempts  {job.creation_time}  {job.target}"


def account_row(job: JobStatus) -> str:
    """A job that was started elsewhere, with fewer known facts."""
    return f"{job.name:<63} {job.status:<20} {job.creation_time}"


def price_table(instances: Iterable[Instance]) -> Iterator[str]:
    yield f"{'instance type':<20} {'USD/h':>9}  {'GPUs':<22} {'vCPU':>5} {'GiB':>5}  region     read"
    for one in instances:
        gpus = f"{one.gpus} x {one.gpu} {one.gpu_memory_mib} MiB" if one.gpus else "-"
        yield (
            f"{one.name:<20} {one.usd_per_h or 0:>9.4f}  {gpus:<22} {one.vcpus or '?':>5} {one.memory_gib or '?':>5}  "
            f"{one.region:<10} {one.date}"
        )


def check_row(check: Check) -> str:
    row = f"{check.status:<8} {check.name:<16} {check.seen}"
    return f"{row}\n{'':<8} {'':<16} -> {check.remedy}" if check.remedy else row


def next_commands(name: str, *verbs: str) -> str:
    return "\n".join(f"  estiba {verb} {name}" for verb in verbs)
