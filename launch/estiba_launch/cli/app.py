"""`estiba`: one job file, every target. Data goes to stdout, progress and advice to stderr."""

from __future__ import annotations

import typer

from estiba_launch.cli import doctor, drill, jobs, launch, prices, process, submit

HELP = """Stow a workload once, sail it anywhere: one job file for this machine, a host over ssh, or SageMaker.

Exit codes: 0 done, 1 the job or a service failed, 2 invalid input, 3 over budget, 4 interrupted or stopped.
"""

app = typer.Typer(name="estiba", help=HELP, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)
app.add_typer(prices.app, name="prices")
for function in (submit.plan, submit.run, jobs.status, jobs.logs, jobs.stop):
    app.command()(function)
app.command("list")(jobs.list_jobs)
for function in (jobs.fetch, jobs.cost, jobs.resume, jobs.interrupt, drill.drill, launch.launch, doctor.doctor):
    app.command()(function)

if __name__ == "__main__":
    process.start()
    app()
