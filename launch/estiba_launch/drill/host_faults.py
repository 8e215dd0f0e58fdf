"""Faults of one host of several: the schedule for a seed, and what each host must have made of it."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from typing import Any

from estiba_launch.drill.scenario import EARLIEST, LATEST, PlannedFault
from estiba_launch.errors import LaunchError
from estiba_launch.jobs import control
from estiba_launch.jobs.control import Fault
from estiba_launch.jobs.status import AttemptStatus

DETECTION_S = 30.0
"""A lost or silent host is known to the others after this time, and a shorter fault costs nothing."""
RESERVE_S = 15.0
"""After the grace period of hosts that end because another one is lost."""


class HostFault(StrEnum):
    LOST_HOST = "lost-host"
    """KILL of one host. The others end by themselves."""
    FIRST_HOST = "first-host"
    """KILL of the host with rank 0."""
    LOST_IN_SAVE = "lost-in-save"
    """KILL of one host while it writes its part of a checkpoint."""
    SILENT_HOST = "silent-host"
    """One host is held for ever: it closes no connection and answers nobody."""
    PAUSE = "pause"
    """One host is held for --fault-s."""
    PARTITION = "partition"
    """One host has no network for --fault-s."""
    LATE_HOST = "late-host"
    """One host starts --fault-s after the others, whose names all resolve from the start."""
    LATE_DNS = "late-dns"
    """The same, and its name resolves only once it is there."""
    NO_INTERFACE = "no-interface"
    """resourceconfig.json names a network interface that does not exist, as version 3 of AWS's SDK does locally."""
    HOST_NAMES = "host-names"
    """algo-1, algo-10, algo-2: an order that is neither that of numbers nor without gaps."""


TAKES_TIME = {
    HostFault.PAUSE: 5.0,
    HostFault.PARTITION: 90.0,
    HostFault.LATE_HOST: 60.0,
    HostFault.LATE_DNS: 60.0,
}
"""Fault -> its seconds unless --fault-s says otherwise."""
KINDS = {
    HostFault.LOST_HOST: control.LOSS,
    HostFault.FIRST_HOST: control.LOSS,
    HostFault.LOST_IN_SAVE: control.LOSS,
    HostFault.SILENT_HOST: control.SILENCE,
    HostFault.PAUSE: control.SILENCE,
    HostFault.PARTITION: control.PARTITION,
}
"""Faults that strike a job at work."""


def check(fault: HostFault, hosts: Sequence[str], fault_s: float | None) -> None:
    """Raise LaunchError for a fault that this job cannot have."""
    if len(hosts) < 2:
        raise LaunchError(f"--fault {fault}: the job has {len(hosts)} host; raise InstanceCount to 2 or more")
    if fault_s is not None and fault not in TAKES_TIME:
        raise LaunchError(f"--fault-s: {fault} has no end; leave it out, or use {' or '.join(TAKES_TIME)}")


def schedule(
    fault: HostFault, kills: int, seed: int, hosts: Sequence[str], *, grace_s: int, fault_s: float | None
) -> list[PlannedFault]:
    """Plan `kills` faults, in order. Equal arguments give equal schedules. Empty for what is so from the start."""
    if fault not in KINDS:
        return []
    rng = random.Random(seed)
    duration_s = seconds_of(fault, fault_s)
    is_short = duration_s is not None and duration_s < DETECTION_S
    planned = []
    for share in sorted(rng.uniform(EARLIEST, LATEST) for _ in range(kills)):
        one = Fault(
            notice=False,
            grace_s=grace_s,
            host=hosts[0] if fault is HostFault.FIRST_HOST else rng.choice(list(hosts)),
            how=KINDS[fault],
            duration_s=duration_s,
            survivors_s=duration_s if is_short and duration_s else DETECTION_S + grace_s + RESERVE_S,
            at_write=fault is HostFault.LOST_IN_SAVE,
        )
        planned.append(PlannedFault(scenario=fault, share=share, fault=one))
    return planned


def seconds_of(fault: HostFault, fault_s: float | None) -> float | None:
    return TAKES_TIME.get(fault) if fault_s is None else fault_s


def conditions(fault: HostFault | None, seed: int, hosts: Sequence[str], fault_s: float | None) -> dict[str, Any]:
    """What is different about the hosts from the start (`request/contract.py`)."""
    if fault in (HostFault.LATE_HOST, HostFault.LATE_DNS):
        late = {"name": random.Random(seed).choice(list(hosts)), "late_s": seconds_of(fault, fault_s)}
        return {"LateHost": {**late, "is_nameless": fault is HostFault.LATE_DNS}}
    if fault is HostFault.NO_INTERFACE:
        return {"Interface": "ethwe"}
    if fault is HostFault.HOST_NAMES:
        return {"HostNames": ["algo-1", "algo-10", *(f"algo-{number}" for number in range(2, len(hosts)))]}
    return {}


def problems(attempts: Sequence[AttemptStatus], progress_after: Mapping[tuple[int, str], bool]) -> Iterator[str]:
    """A sentence for each host that hung, and for each that ended for another reason than the fault.

    `progress_after` tells for (attempt, host) whether it still made progress once its watch was over.
    """
    for attempt in attempts:
        note = attempt.interruption
        if note is None or "Hosts" not in note:
            continue
        struck, kind, lasted_s = note["Host"], note["Kind"], note["DurationSeconds"]
        what = f"{'' if lasted_s is None else f'{lasted_s:g} s of '}{kind} of {struck}"
        if lasted_s is not None and lasted_s < DETECTION_S:
            yield f"attempt {attempt.number}: {what} ended it; less than {DETECTION_S:g} s must cost nothing"
        for host, end in note["Hosts"].items():
            if end["EndedAfterSeconds"] is None:
                if not progress_after.get((attempt.number, host)):
                    yield f"attempt {attempt.number}: {host} hung: {what} was {note['WatchedSeconds']:g} s ago"
            elif end["ExitCode"] and not _names(end["Reason"], host, struck, attempt.hosts):
                shown = end["Reason"].partition("\n")[0][:120]
                yield f"attempt {attempt.number}: {host} ended by {what} without naming it: {shown!r}"


def _names(reason: str, host: str, struck: str, hosts: Sequence[str]) -> bool:
    """Whether a host's reason names the one that was struck. The one that was cut off names any that it lost."""
    words = set(reason.replace(",", " ").replace(":", " ").replace(";", " ").replace("'", " ").split())
    lost = [struck] if host != struck else [one for one in hosts if one != struck]
    return any(one in words for one in lost)
