"""`estiba drill`: rehearse spot interruptions and measure the work that they cost."""

from __future__ import annotations

from typing import Annotated

import typer
from typer import Option

from estiba_launch.cli import options as opt
from estiba_launch.drill.config import DrillConfig
from estiba_launch.drill.drill import run_drill
from estiba_launch.errors import EXIT_DONE, EXIT_JOB_FAILED
from estiba_launch.jobs.options import SubmitOptions
from estiba_launch.request import jobfile
from estiba_launch.targets import registry


@opt.command
def drill(
    job: opt.JobPath,
    *,
    target: Annotated[str, Option(metavar="TARGET", help="A target that can interrupt jobs.")] = "local",
    config: DrillConfig,
    sync_every_s: opt.SyncEvery = 5.0,
    set_: opt.Settings = None,
    as_json: opt.AsJson = False,
    price: opt.PriceFlags,
    host: opt.HostFlags,
) -> None:
    """Rehearse spot interruptions of a job.

    Measures how much work is lost, and whether the result is the same.

    Runs the job uninterrupted once (later drills reuse that run), then takes its hosts away while it works. Each
    restart is a new host that gets only the checkpoint directory. The drill uses its own output and checkpoint
    folders. Exits 0 for PASS, 1 for FAIL, 2 for invalid input.

    The loss is computed from the job's log: progress lines that begin with a counter (`rows=12 of=90 ...`, `step=7`),
    and one line `resuming: 12 rows ...` when an attempt continues from saved work. What the log does not contain is
    shown as unknown. Lost seconds are an upper bound: from the last line whose work was saved to the interruption.
    """
    loaded = jobfile.load(job, registry.parse(target), opt.settings_for(job, set_))
    options = SubmitOptions(host=host.read(loaded, price.load()), sync_every_s=sync_every_s)
    report = run_drill(loaded, options, config, opt.say)
    opt.show(report.to_json() if as_json else report.table().rstrip())
    raise typer.Exit(EXIT_DONE if report.passed else EXIT_JOB_FAILED)
