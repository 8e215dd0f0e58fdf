"""Scenarios, and the schedule of faults for a seed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import StrEnum

from estiba_launch.errors import LaunchError
from estiba_launch.jobs.control import Fault

EARLIEST, LATEST = 0.05, 0.8
"""Faults come between these shares of the work; near either end, an interruption costs little."""
CAPACITY_WAIT_S = 10.0
RANDOM_WAIT_S = 3.0
RANDOM_WAIT_PROBABILITY = 0.25


class Scenario(StrEnum):
    TERM = "term"
    """TERM, then KILL after the grace period."""
    KILL = "kill"
    """KILL without notice."""
    KILL_DURING_SAVE = "kill-during-save"
    """KILL while a checkpoint file is being written; the torn file reaches the store."""
    KILL_BEFORE_SYNC = "kill-before-sync"
    """KILL while some saved files are not in the store yet; they are lost with the host."""
    ONE_HOST = "one-host"
    """KILL of one host out of several."""
    CAPACITY_WAIT = "capacity-wait"
    """TERM, and a new host only after a wait."""
    RANDOM = "random"
    """Any of the others except capacity-wait, drawn with the seed."""


@dataclass(frozen=True, kw_only=True)
class PlannedFault:
    scenario: StrEnum
    """A Scenario other than RANDOM, or a HostFault."""
    share: float
    """Share of the work, 0 to 1, after which the fault comes."""
    fault: Fault
    """What the target does."""


def schedule(
    scenario: Scenario, kills: int, seed: int, hosts: list[str], *, grace_s: int = 120, wait_s: float | None = None
) -> list[PlannedFault]:
    """Plan `kills` faults, in order. Equal arguments give equal schedules. Raises LaunchError.

    `wait_s` replaces the default wait for a new host, in scenarios that have one.
    """
    if kills < 1:
        raise LaunchError(f"--kills {kills}: must be at least 1")
    if scenario is Scenario.ONE_HOST and len(hosts) < 2:
        raise LaunchError(
            f"--scenario {scenario}: the job has {len(hosts)} host; raise InstanceCount to 2 or more, "
            "or choose another scenario"
        )
    rng = random.Random(seed)
    shares = sorted(rng.uniform(EARLIEST, LATEST) for _ in range(kills))
    candidates = [Scenario.TERM, Scenario.KILL, Scenario.KILL_DURING_SAVE, Scenario.KILL_BEFORE_SYNC]
    if len(hosts) > 1:
        candidates.append(Scenario.ONE_HOST)
    planned = []
    for share in shares:
        drawn = rng.choice(candidates) if scenario is Scenario.RANDOM else scenario
        capacity_wait_s = 0.0
        if drawn is Scenario.CAPACITY_WAIT:
            capacity_wait_s = CAPACITY_WAIT_S if wait_s is None else wait_s
        elif scenario is Scenario.RANDOM and rng.random() < RANDOM_WAIT_PROBABILITY:
            longest_s = RANDOM_WAIT_S if wait_s is None else max(wait_s, 0.5)
            capacity_wait_s = round(rng.uniform(0.5, longest_s), 1)
        fault = Fault(
            notice=drawn in (Scenario.TERM, Scenario.CAPACITY_WAIT),
            grace_s=grace_s,
            host=rng.choice(hosts) if drawn is Scenario.ONE_HOST else None,
            capacity_wait_s=capacity_wait_s,
            at_write=drawn is Scenario.KILL_DURING_SAVE,
        )
        planned.append(PlannedFault(scenario=drawn, share=share, fault=fault))
    return planned
