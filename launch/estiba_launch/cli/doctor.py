"""`estiba doctor`: is this machine ready?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from estiba_launch.cli import options as opt
from estiba_launch.cli.render import check_row
from estiba_launch.doctor import doctor as checks
from estiba_launch.errors import EXIT_JOB_FAILED
from estiba_launch.jobs.check import Requirements, worst


@opt.command
def doctor(
    job: Annotated[Path | None, Argument(metavar="[JOB]", help="Job file that the machine should run.")] = None,
    set_: opt.Settings = None,
    role: opt.Role = None,
    region: opt.Region = None,
    as_json: opt.AsJson = False,
    offline: Annotated[bool, Option("--offline", help="Skip checks that ask another machine.")] = False,
) -> None:
    """Check that this machine is ready.

    Checks docker, the GPU driver, disk space, ssh, and the AWS login, region and clock. With JOB, also its image and
    CUDA version, its role and the role's rights on every S3 address, the regions of its buckets, and the account's
    quotas. Exits 1 when a check fails.
    """
    needs = Requirements(role=role, region=region)
    if job:
        needs = checks.requirements_of(job, opt.settings_for(job, set_), role, region)
    results = []
    for check in checks.run(needs, network=not offline):
        results.append(check)
        if not as_json:
            print(check_row(check), flush=True)
    if as_json:
        opt.show([check.to_json() for check in results])
    if worst(results) == "fail":
        raise typer.Exit(EXIT_JOB_FAILED)
