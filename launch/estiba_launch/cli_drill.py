"""`estiba drill`: rehearse spot interruptions here, count the lost work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from . import jobfile, prices
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
    Settings,
    ShmSize,
    command,
    host_options,
    say,
    show_json,
)
from .drill import account, drill
from .drill.scenario import Scenario
from .errors import EXIT_DONE, EXIT_JOB_FAILED
from .localhost.control import LocalOptions
from .target import Target
from .variables import parse_settings

MaxLost = Annotated[
    list[str] | None,
    typer.Option(
        "--max-lost", metavar="AMOUNT", help="Most one interruption may cost: 120s, 500rows. May be repeated."
    ),
]


@command
def drill_command(
    job: JobPath,
    scenario: Annotated[Scenario, typer.Option(help="What kind of interruption.")] = Scenario.RANDOM,
    kills: Annotated[int | None, typer.Option(min=1, help="Interruptions; 3 for random, else 1.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed plans the same interruptions.")] = 0,
    max_lost: MaxLost = None,
    no_reference: Annotated[
        bool, typer.Option("--no-reference", help="No undisturbed run first, and no comparison with it.")
    ] = False,
    ignore: Annotated[
        list[str] | None,
        typer.Option(
            "--ignore",
            metavar="PATTERN",
            help="Output that may differ, beside results*.json, metrics* and those in ESTIBA_DRILL_IGNORE (a,b).",
        ),
    ] = None,
    grace_s: Annotated[int, typer.Option("--grace-s", min=0, help="Seconds from TERM to KILL.")] = 120,
    wait_s: Annotated[
        float | None, typer.Option("--wait-s", min=0, help="Seconds to a new host, where one waits.")
    ] = None,
    log_interval_s: Annotated[
        float, typer.Option("--log-interval-s", min=0.01, help="Seconds between the job's progress lines.")
    ] = 1.0,
    sync_every_s: Annotated[
        float, typer.Option("--sync-every-s", min=0.05, help="Seconds between checkpoint syncs.")
    ] = 5.0,
    keep: Annotated[bool, typer.Option("--keep", help="Keep output and checkpoints of the drilled job.")] = False,
    set_: Settings = None,
    as_json: AsJson = False,
    price_file: PriceFile = None,
    gpus: Gpus = "auto",
    shm_size: ShmSize = "8g",
    memory: Memory = None,
    cpus: Cpus = None,
    like_instance: LikeInstance = False,
    encoding: Encoding = "plain",
    env_file: EnvFile = None,
) -> None:
    """Rehearse spot interruptions of a job on this machine: what is lost, and is the result the same?

    Runs the job undisturbed once (kept for the next drill), then with its hosts taken away at moments inside the work;
    each restart is a new host that gets only the checkpoint directory. Output and checkpoints go to places of the
    drill's own. Exits 0 for PASS, 1 for FAIL, 2 for invalid.

    What was done and lost is read from the job's log: progress lines that begin with a counter (`rows=12 of=90 ...`,
    `step=7`), and one `resuming: 12 rows ...` when an attempt goes on from saved work. What a job does not say is
    shown as unknown. Seconds lost are an upper bound: from the last line whose work was kept to the interruption.
    """
    loaded = jobfile.load(job, Target.parse("local"), parse_settings(set_ or []))
    tables = prices.load("us-east-1", price_file)
    options = host_options(loaded, gpus, shm_size, memory, cpus, like_instance, encoding, env_file, tables)
    wish = drill.Wish(
        scenario=scenario,
        kills=kills or (3 if scenario is Scenario.RANDOM else 1),
        seed=seed,
        limits=[account.Limit.parse(text) for text in max_lost or []],
        reference=not no_reference,
        ignore=ignore or [],
        grace_s=grace_s,
        wait_s=wait_s,
        log_interval_s=log_interval_s,
        keep=keep,
    )
    report = drill.rehearse(loaded, LocalOptions(host=options, sync_every_s=sync_every_s), wish, say)
    if as_json:
        show_json(report.to_json())
    else:
        print(report.table(), end="", flush=True)
    raise typer.Exit(EXIT_DONE if report.passed else EXIT_JOB_FAILED)


COMMANDS: dict[str, Callable[..., None]] = {"drill": drill_command}
