"""Settings of a drill; those with an Option are options of `estiba drill`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

from typer import Option

from estiba_launch.drill.host_faults import HostFault
from estiba_launch.drill.loss_report import Limit
from estiba_launch.drill.scenario import Scenario


@dataclass(kw_only=True)
class DrillConfig:
    """What to rehearse, and what a PASS requires."""

    scenario: Annotated[Scenario, Option(help="The kind of interruption.")] = Scenario.RANDOM
    fault: Annotated[
        HostFault | None, Option(help="Instead of a scenario: a fault of one host of several, which the others notice.")
    ] = None
    fault_s: Annotated[
        float | None,
        Option(min=0.1, help="Seconds that it lasts; default: pause 5, partition 90, late-host and late-dns 60."),
    ] = None
    kills: Annotated[int | None, Option(min=1, help="Interruptions; default: 3 for random, else 1.")] = None
    seed: Annotated[int, Option(help="Equal seeds give equal schedules.")] = 0
    max_lost: Annotated[
        list[str] | None,
        Option(
            metavar="AMOUNT",
            help="The most that one interruption may cost, such as 120s or 500rows; may be repeated.",
        ),
    ] = None
    no_reference: Annotated[
        bool, Option("--no-reference", help="Skip the uninterrupted run and the comparison with it.")
    ] = False
    ignore: Annotated[
        list[str] | None,
        Option(
            metavar="PATTERN",
            help="Output that may differ, besides results*.json, metrics* and the patterns in ESTIBA_DRILL_IGNORE "
            "(comma-separated); may be repeated.",
        ),
    ] = None
    grace_s: Annotated[int, Option(min=0, help="Seconds from TERM to KILL.")] = 120
    wait_s: Annotated[
        float | None, Option(min=0, help="Seconds until there is a new host, in scenarios that wait.")
    ] = None
    log_interval_s: Annotated[float, Option(min=0.01, help="Seconds between the job's progress lines.")] = 1.0
    """ESTIBA_LOG_INTERVAL_S of the container, unless the request sets it."""
    keep: Annotated[bool, Option("--keep", help="Keep output and checkpoints of the interrupted run.")] = False
    limits: Sequence[Limit] = field(init=False)
    """`max_lost`, parsed."""

    def __post_init__(self) -> None:
        """Raise LaunchError for a limit that cannot be parsed."""
        self.limits = [Limit.parse(text) for text in self.max_lost or []]
