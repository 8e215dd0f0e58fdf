"""What is rehearsed: kinds of interruption, and the moments at which they come, all from one seed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import StrEnum

from ..errors import LaunchError
from ..localhost.control import Interruption

EARLIEST, LATEST = 0.05, 0.8
"""Shares of the work between which interruptions come: at neither end is there anything to lose."""
WAIT_S = 10.0
RANDOM_WAIT_S = 3.0


class Scenario(StrEnum):
    """A kind of interruption."""

    TERM = "term"
    """TERM, then KILL after the grace."""
    KILL = "kill"
    """KILL without notice."""
    KILL_DURING_SAVE = "kill-during-save"
    """KILL while a checkpoint file is being written; the torn file reaches the store."""
    KILL_BEFORE_SYNC = "kill-before-sync"
    """KILL when some of what was saved is not in the store yet; it is lost with the host."""
    ONE_HOST = "one-host"
    """KILL of one host of several."""
    CAPACITY_WAIT = "capacity-wait"
    """TERM, and a new host only after a while."""
    RANDOM = "random"
    """Any of the others, drawn with the seed."""


@dataclass(frozen=True, kw_only=True)
class Strike:
    """One planned interruption."""

    kind: Scenario
    share: float
    """How much of the work is done when it comes, 0 to 1."""
    host: str | None = None
    wait_s: float = 0.0
    """Seconds until there is a new host."""

    def order(self, grace_s: int) -> Interruption:
        """What the local host is told."""
        return Interruption(
            notice=self.kind in (Scenario.TERM, Scenario.CAPACITY_WAIT),
            grace_s=grace_s,
            host=self.host,
            capacity_wait_s=self.wait_s,
            at_write=self.kind is Scenario.KILL_DURING_SAVE,
        )


def schedule(
    scenario: Scenario, kills: int, seed: int, hosts: list[str], *, saves: bool = True, wait_s: float | None = None
) -> list[Strike]:
    """`kills` strikes in the order they come. The same arguments give the same strikes. Raises LaunchError.

    `saves` False leaves out kinds that need a checkpoint directory.
    """
    if kills < 1:
        raise LaunchError(f"--kills {kills}: must be at least 1")
    if scenario is Scenario.ONE_HOST and len(hosts) < 2:
        raise LaunchError(
            f"--scenario {scenario}: the job has {len(hosts)} host; raise InstanceCount to 2 or more, "
            "or choose another scenario"
        )
    dice = random.Random(seed)
    shares = sorted(dice.uniform(EARLIEST, LATEST) for _ in range(kills))
    kinds = [Scenario.TERM, Scenario.KILL]
    if saves:
        kinds += [Scenario.KILL_DURING_SAVE, Scenario.KILL_BEFORE_SYNC]
    if len(hosts) > 1:
        kinds.append(Scenario.ONE_HOST)
    strikes = []
    for share in shares:
        kind = dice.choice(kinds) if scenario is Scenario.RANDOM else scenario
        pause_s = 0.0
        if kind is Scenario.CAPACITY_WAIT:
            pause_s = WAIT_S if wait_s is None else wait_s
        elif scenario is Scenario.RANDOM and dice.random() < 0.25:
            pause_s = round(dice.uniform(0.5, RANDOM_WAIT_S if wait_s is None else max(wait_s, 0.5)), 1)
        host = dice.choice(hosts) if kind is Scenario.ONE_HOST else None
        strikes.append(Strike(kind=kind, share=share, host=host, wait_s=pause_s))
    return strikes
