"""A drill: the uninterrupted run, the interrupted run, the loss report, PASS or FAIL."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from estiba_launch.drill import host_faults, runner
from estiba_launch.drill.config import DrillConfig
from estiba_launch.drill.loss_report import ProgressByHost, came_late, held_s, loss_report, seconds_of, violations
from estiba_launch.drill.reference import (
    Reference,
    differences,
    digests,
    ignore_patterns,
    reference_key,
    without_ignored,
)
from estiba_launch.drill.report import Report
from estiba_launch.drill.scenario import PlannedFault, Scenario, schedule
from estiba_launch.errors import JobFailed, LaunchError
from estiba_launch.jobs import directory
from estiba_launch.jobs.options import SubmitOptions
from estiba_launch.jobs.status import JobStatus
from estiba_launch.paths import state_root
from estiba_launch.request import contract
from estiba_launch.request.jobfile import JobFile
from estiba_launch.targets import operations, registry
from estiba_launch.targets.base import Capability

LOG_INTERVAL_VARIABLE = "ESTIBA_LOG_INTERVAL_S"
REASON_CHARS = 300
MAX_TRIES = 3
"""A job that ends before all interruptions is drilled again, with earlier ones."""
MIN_PROGRESS_LINES = 50
MIN_LOG_INTERVAL_S = 0.02


def run_drill(job: JobFile, options: SubmitOptions, config: DrillConfig, report: Callable[[str], None]) -> Report:
    """Run the drill. Raises LaunchError if it cannot start, JobFailed if the job fails without interruptions."""
    target = registry.target_of(job.target)
    target.require(Capability.INTERRUPT)
    if not job.request.get("EnableManagedSpotTraining") or "CheckpointConfig" not in job.request:
        raise LaunchError(
            f"{job.path}: not a spot job, so an interruption ends it; set EnableManagedSpotTraining: true "
            "with MaxWaitTimeInSeconds and CheckpointConfig"
        )
    hosts = [host.name for host in contract.hosts(job.request)]
    planned = _planned(config, hosts)
    conditions = host_faults.conditions(config.fault, config.seed, hosts, config.fault_s)
    root = state_root() / "drills"
    options = replace(options, stop_grace_s=config.grace_s)
    if config.fault is not None:
        # What hosts that end by themselves take for it.
        grace = {"ESTIBA_STOP_GRACE_S": str(config.grace_s)}
        options = replace(options, environment={**grace, **options.environment})
    image = target.pin_image(job.request["AlgorithmSpecification"]["TrainingImage"], report)
    reference = None
    if not config.no_reference:
        reference = _reference(job, _with_log_interval(options, config.log_interval_s), root, image, report)
    options = _with_log_interval(options, _log_interval_s(config, reference))
    for tries_left in reversed(range(MAX_TRIES)):
        with runner.isolated(job, "drill", root, image, keep=config.keep, conditions=conditions) as drilled:
            what = config.fault or config.scenario
            report(f"{drilled.name}: {len(planned)} interruption(s), {what}, seed {config.seed}")
            status = runner.run_with_faults(drilled, options, planned, reference, report)
            outcome = _evaluate(status, planned, reference, config)
        if not tries_left or outcome.problems != [outcome.missed]:
            break
        report(f"{drilled.name}: {outcome.missed}")
        report("trying again, with all interruptions twice as early")
        planned = [replace(one, share=one.share / 2) for one in planned]
    return outcome


def _planned(config: DrillConfig, hosts: list[str]) -> list[PlannedFault]:
    """The interruptions, in order. Raises LaunchError."""
    grace_s = config.grace_s
    if config.fault is not None:
        host_faults.check(config.fault, hosts, config.fault_s)
        return host_faults.schedule(
            config.fault, config.kills or 1, config.seed, hosts, grace_s=grace_s, fault_s=config.fault_s
        )
    if config.fault_s is not None:
        raise LaunchError("--fault-s: no --fault to last as long; pass one")
    kills = config.kills or (3 if config.scenario is Scenario.RANDOM else 1)
    return schedule(config.scenario, kills, config.seed, hosts, grace_s=grace_s, wait_s=config.wait_s)


def _with_log_interval(options: SubmitOptions, interval_s: float) -> SubmitOptions:
    return replace(options, environment={LOG_INTERVAL_VARIABLE: f"{interval_s:g}", **options.environment})


def _log_interval_s(config: DrillConfig, reference: Reference | None) -> float:
    """A short job must print often enough to be interrupted at the planned share of its work."""
    if reference is None or not reference.working_s:
        return config.log_interval_s
    return min(config.log_interval_s, max(reference.working_s / MIN_PROGRESS_LINES, MIN_LOG_INTERVAL_S))


def _reference(
    job: JobFile, options: SubmitOptions, root: Path, image: str, report: Callable[[str], None]
) -> Reference:
    """Load the reference of an earlier drill, or run the job uninterrupted. Raises JobFailed."""
    key = reference_key(job.request, options, image)
    if stored := Reference.load(key):
        report(f"reference: {stored.job}, from an earlier drill ({stored.running_s:.0f} s)")
        return stored
    with runner.isolated(job, "reference", root, image) as uninterrupted:
        name = uninterrupted.name
        report(f"reference: {name}, uninterrupted")
        hosts = [host.name for host in contract.hosts(job.request)]
        with runner.started(uninterrupted, options, report), closing(runner.Monitor(name, hosts)) as monitor:
            status = runner.watch(name, monitor, report)
        if status.status != "Completed":
            raise JobFailed(f"{name}: fails even uninterrupted ({_reason(status)}); see `estiba logs {name}`")
        files, _ = _output(name)
    progress = [one for one in runner.read_progress(status).values() if one.points]
    first_line = min((one.points[0][0] for one in progress), default=None)
    start = first_line or seconds_of(status.attempts[0].training_start_time)
    end = seconds_of(status.training_end_time)
    working_s = max(end - start, 0.0) if start and end else None
    unit, total = (progress[0].unit, progress[0].total or progress[0].counter) if progress else (None, None)
    reference = Reference(
        job=name,
        files=files,
        running_s=held_s(status),
        working_s=working_s,
        unit=unit,
        total=total,
        writes=monitor.writes,
    )
    reference.save(key)
    report(f"reference: {reference.running_s:.0f} s, {len(files)} files")
    return reference


def _evaluate(
    status: JobStatus, planned: Sequence[PlannedFault], reference: Reference | None, config: DrillConfig
) -> Report:
    problems = []
    files: dict[str, str] | None = None
    results: dict[str, Any] | None = None
    if status.status != "Completed":
        problems.append(f"the job ended {status.status}: {_reason(status)}; see `estiba logs {status.name}`")
    else:
        try:
            files, results = _output(status.name)
        except LaunchError as error:
            problems.append(f"its output cannot be read: {error}")
    progress = runner.read_progress(status)
    losses = loss_report(status.attempts, progress, planned, results)
    missed = _missed(status, planned, progress)
    problems += [missed] if missed else []
    problems += violations(losses, config.limits)
    problems += host_faults.problems(status.attempts, runner.progress_after_watch(status, progress))
    ignore = ignore_patterns(config.ignore or (), os.environ)
    report = Report(
        config=config,
        planned=planned,
        status=status,
        losses=losses,
        reference=reference,
        ignored=ignore,
        missed=missed,
        problems=problems,
    )
    if reference and files is not None:
        expected = without_ignored(reference.files, ignore)
        report.compared, report.differences = len(expected), differences(expected, without_ignored(files, ignore))
        if report.differences:
            problems.append(f"{len(report.differences)} files differ from the uninterrupted run")
        elif not expected:
            problems.append("the job wrote nothing to compare; check its output, or pass --no-reference")
    return report


def _missed(status: JobStatus, planned: Sequence[PlannedFault], progress: ProgressByHost) -> str | None:
    """The problem if fewer interruptions than planned hit the job at work, else None."""
    applied = runner.count_interruptions(status)
    late = sum(came_late(attempt, progress) for attempt in status.attempts)
    if applied - late >= len(planned):
        return None
    why = f", and {late} after the last of its work" if late else ""
    if applied < len(planned) and planned[applied].scenario is Scenario.KILL_DURING_SAVE:
        why += f"; {Scenario.KILL_DURING_SAVE} found no open checkpoint file, since each write ended before the kill"
    return (
        f"{applied - late} of {len(planned)} interruptions took place before the job's work was done{why}; "
        "give it more work, or lower --kills"
    )


def _output(name: str) -> tuple[dict[str, str], dict[str, Any] | None]:
    """Digests of the model and output of a finished job, and its results.json. Raises LaunchError."""
    with tempfile.TemporaryDirectory(prefix="estiba-drill-") as folder:
        operations.download(name, Path(folder))
        try:
            results = directory.read_json(Path(folder) / "output/results.json")
        except (LaunchError, OSError):
            results = None
        return digests(Path(folder)), results if isinstance(results, dict) else None


def _reason(status: JobStatus) -> str:
    return (status.reason or status.secondary_status)[:REASON_CHARS]
