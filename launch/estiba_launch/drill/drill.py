"""A whole drill: reference, interrupted job, accounting, verdict."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import contract, state
from ..errors import JobFailed, LaunchError
from ..jobfile import JobFile
from ..localhost.control import LocalOptions
from ..localhost.engine import Engine
from . import account, compare, conduct
from .report import Report
from .scenario import Scenario, Strike, schedule

WORDS_OF_FAILURE = 300


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What is to be rehearsed."""

    scenario: Scenario = Scenario.RANDOM
    kills: int = 3
    seed: int = 0
    limits: Sequence[account.Limit] = ()
    reference: bool = True
    """False does without the undisturbed run, and so without the comparison."""
    ignore: Sequence[str] = ()
    """Further patterns of files that may differ."""
    grace_s: int = 120
    wait_s: float | None = None
    """Seconds to a new host in the scenarios that wait."""
    log_interval_s: float = 1.0
    """What the container is told in ESTIBA_LOG_INTERVAL_S, unless the request says otherwise."""
    keep: bool = False
    """Keep output and checkpoints of the drilled job."""


def rehearse(job: JobFile, options: LocalOptions, wish: Wish, say: Callable[[str], None]) -> Report:
    """Run the drill. Raises LaunchError when it cannot be held at all."""
    conduct.refuse_unless_spot(job)
    hosts = [host.name for host in contract.hosts(job.request)]
    strikes = schedule(wish.scenario, wish.kills, wish.seed, hosts, wait_s=wish.wait_s)
    place = state.state_root() / "drills"
    environment = {conduct.LOG_INTERVAL_VARIABLE: f"{wish.log_interval_s:g}", **options.environment}
    quick = replace(options, environment=environment, stop_grace_s=wish.grace_s)
    Engine().ensure_image(name_of(job), say)
    image = compare.image_id(name_of(job))
    drilled = conduct.own_places(job, "drill", place, image)
    before = _reference(job, quick, place, image, say) if wish.reference else None
    say(f"{drilled.name}: {len(strikes)} interruption(s), {wish.scenario}, seed {wish.seed}")
    record = conduct.run_interrupted(
        drilled,
        quick,
        strikes,
        grace_s=wish.grace_s,
        reference=before,
        say=say,
    )
    try:
        return _judge(drilled.name, record, strikes, before, wish)
    finally:
        if not wish.keep:
            shutil.rmtree(place / drilled.name, ignore_errors=True)


def name_of(job: JobFile) -> str:
    """The name of the job's image."""
    return str(job.request["AlgorithmSpecification"]["TrainingImage"])


def _reference(
    job: JobFile, options: LocalOptions, place: Path, image: str, say: Callable[[str], None]
) -> compare.Reference:
    """The undisturbed run: an earlier drill's, or one now. Raises LaunchError when the job fails undisturbed."""
    key = compare.key_of(job.request, options, image)
    known = compare.known_reference(key)
    if known:
        say(f"reference: {known.job}, of an earlier drill ({known.running_s:.0f} s)")
        return known
    again = conduct.own_places(job, "reference", place, image)
    name = again.name
    say(f"reference: {name}, undisturbed")
    try:
        record = conduct.run_undisturbed(again, options, say)
        if record["TrainingJobStatus"] != "Completed":
            reason = record.get("FailureReason", record["SecondaryStatus"])[:WORDS_OF_FAILURE]
            raise JobFailed(f"{name}: does not complete even undisturbed ({reason}); see `estiba logs {name}`")
        lines = account.timelines(state.job_dir(name), record)
        first = [line.points[0][0] for line in lines.values() if line.points]
        one = next((line for line in lines.values() if line.points), None)
        made = compare.Reference(
            job=name,
            files=compare.left_by(name).files,
            running_s=account.running_s(record),
            working_s=conduct.working_seconds(record, min(first, default=None)),
            unit=one.unit if one else None,
            total=(one.total or one.counted) if one else None,
        )
    finally:
        shutil.rmtree(place / name, ignore_errors=True)
    made.write(compare.reference_path(key))
    say(f"reference: {made.running_s:.0f} s, {len(made.files)} files")
    return made


def _judge(
    name: str, record: dict[str, Any], strikes: list[Strike], before: compare.Reference | None, wish: Wish
) -> Report:
    problems = []
    left = None
    if record["TrainingJobStatus"] != "Completed":
        reason = record.get("FailureReason", record["SecondaryStatus"])[:WORDS_OF_FAILURE]
        problems.append(f"the job ended {record['TrainingJobStatus']}: {reason}; see `estiba logs {name}`")
    else:
        try:
            left = compare.left_by(name)
        except LaunchError as error:
            problems.append(f"its output cannot be read: {error}")
    lines = account.timelines(state.job_dir(name), record)
    entries = account.account(record, lines, strikes, left.results if left else None)
    landed = sum("Interruption" in attempt for attempt in record["Estiba"]["Attempts"])
    if landed < len(strikes):
        problems.append(
            f"{landed} of {len(strikes)} interruptions took place before the job was over; "
            "give it more work, or lower --kills"
        )
    problems += account.over(entries, wish.limits)
    ignore = compare.patterns(wish.ignore, os.environ)
    differences: list[str] = []
    compared = None
    if before and left:
        differences = compare.differences(before.files, left.files, ignore)
        compared = sum(not compare.is_ignored(one, ignore) for one in before.files)
        if differences:
            problems.append(f"{len(differences)} files differ from the undisturbed run")
        elif compared == 0:
            problems.append("the job left nothing that could be compared; look at its output, or pass --no-reference")
    return Report(
        job=name,
        scenario=wish.scenario,
        seed=wish.seed,
        planned=strikes,
        entries=entries,
        status=record["TrainingJobStatus"],
        running_s=round(account.running_s(record), 1),
        reference=before.job if before else None,
        reference_s=round(before.running_s, 1) if before else None,
        compared=compared,
        differences=differences,
        ignored=ignore,
        limits=[str(limit) for limit in wish.limits],
        problems=problems,
    )
