"""Faults of one host of several: the schedule, and what a drill asks of the other hosts."""

from __future__ import annotations

from typing import Any

import pytest

from estiba_launch.drill import host_faults
from estiba_launch.drill.host_faults import HostFault, check, conditions, problems, schedule
from estiba_launch.errors import LaunchError
from estiba_launch.jobs.status import AttemptStatus
from estiba_launch.request import contract

HOSTS = ["algo-1", "algo-10", "algo-2"]


def plan(fault: HostFault, seed: int = 0, kills: int = 1, fault_s: float | None = None) -> list[Any]:
    return schedule(fault, kills, seed, HOSTS, grace_s=120, fault_s=fault_s)


def test_equal_seeds_strike_the_same_hosts_at_the_same_share_of_the_work():
    assert plan(HostFault.LOST_HOST, 7, 3) == plan(HostFault.LOST_HOST, 7, 3)
    assert plan(HostFault.LOST_HOST, 7, 3) != plan(HostFault.LOST_HOST, 8, 3)
    assert {one.fault.host for seed in range(30) for one in plan(HostFault.PAUSE, seed)} == set(HOSTS)


def test_each_fault_is_what_it_says():
    faults = {fault: plan(fault)[0].fault for fault in host_faults.KINDS}
    assert faults[HostFault.FIRST_HOST].host == "algo-1"
    assert faults[HostFault.LOST_IN_SAVE].at_write
    assert (faults[HostFault.SILENT_HOST].how, faults[HostFault.SILENT_HOST].duration_s) == ("silence", None)
    assert (faults[HostFault.PAUSE].how, faults[HostFault.PAUSE].duration_s) == ("silence", 5)
    assert (faults[HostFault.PARTITION].how, faults[HostFault.PARTITION].duration_s) == ("partition", 90)
    assert faults[HostFault.LOST_HOST].survivors_s == 30 + 120 + 15
    assert plan(HostFault.PARTITION, fault_s=5)[0].fault.survivors_s == 5


def test_conditions_reach_the_hosts_files():
    def hosts_of(fault: HostFault, count: int = 3) -> tuple[list[str], dict[str, Any], Any]:
        request: dict[str, Any] = {"ResourceConfig": {"InstanceType": "ml.m5.xlarge", "InstanceCount": count}}
        names = [host.name for host in contract.hosts(request)]
        request[contract.CONDITIONS] = conditions(fault, 3, names, None)
        cluster = contract.hosts(request)
        return (
            [host.name for host in cluster],
            contract.resource_config(request, cluster[0]),
            contract.late_host(request),
        )

    names, resources, _ = hosts_of(HostFault.HOST_NAMES)
    assert names == resources["hosts"] == ["algo-1", "algo-10", "algo-2"]
    assert hosts_of(HostFault.NO_INTERFACE)[1]["network_interface_name"] == "ethwe"
    late = hosts_of(HostFault.LATE_HOST)[2]
    assert late is not None and (late.late_s, late.is_nameless, late.name in {*HOSTS, "algo-3"}) == (60, False, True)
    assert hosts_of(HostFault.LATE_DNS)[2].is_nameless
    assert hosts_of(HostFault.LOST_HOST)[2] is None


@pytest.mark.parametrize(
    ("fault", "hosts", "fault_s", "message"),
    [
        (HostFault.PARTITION, ["algo-1"], None, "the job has 1 host; raise InstanceCount to 2 or more"),
        (HostFault.LOST_HOST, HOSTS, 5.0, "lost-host has no end"),
    ],
)
def test_a_fault_that_the_job_cannot_have_is_refused(fault, hosts, fault_s, message: str):
    with pytest.raises(LaunchError, match=message):
        check(fault, hosts, fault_s)


# --- what is asked of the hosts ------------------------------------------------------------------------------------


def attempt(hosts: dict[str, Any], *, struck: str = "algo-2", lasted_s: float | None = None) -> AttemptStatus:
    note = {
        "Notice": False, "Host": struck, "Kind": "silence", "DurationSeconds": lasted_s, "WatchedSeconds": 165.0,
        "Hosts": hosts,
    }  # fmt: skip
    return AttemptStatus(
        number=1, hosts=("algo-1", "algo-2", "algo-3"), start_time="", training_start_time=None, end_time=None,
        outcome="Interrupted", reason="", exit_codes={}, restored_files=None, interruption=note,
    )  # fmt: skip


def ended(reason: str, code: int = 143) -> dict[str, Any]:
    return {"EndedAfterSeconds": 31.0, "ExitCode": code, "Reason": reason}


def test_hosts_that_name_the_lost_one_are_right():
    good = {"algo-1": ended("host algo-2, rank 3: no heartbeat for 30 s"), "algo-3": ended("algo-2: lost")}
    assert list(problems([attempt(good)], {})) == []


def test_another_reason_is_a_problem_also_where_the_name_is_only_a_part():
    wrong = {"algo-1": ended("Connection closed by peer"), "algo-3": ended("algo-20 is lost")}
    first, second = problems([attempt(wrong)], {})
    assert first == ("attempt 1: algo-1 ended by silence of algo-2 without naming it: 'Connection closed by peer'")
    assert "algo-3 ended" in second


def test_a_host_that_stands_still_hung_and_one_that_works_on_did_not():
    still = {"algo-1": {"EndedAfterSeconds": None}, "algo-3": {"EndedAfterSeconds": None}}
    found = list(problems([attempt(still)], {(1, "algo-3"): True}))
    assert found == ["attempt 1: algo-1 hung: silence of algo-2 was 165 s ago"]


def test_the_host_that_was_cut_off_names_any_that_it_lost():
    hosts = {"algo-1": ended("lost algo-2"), "algo-2": ended("lost algo-1"), "algo-3": ended("lost algo-2")}
    assert list(problems([attempt(hosts, lasted_s=90)], {})) == []
    assert len(list(problems([attempt({**hosts, "algo-2": ended("lost")}, lasted_s=90)], {}))) == 1


def test_a_short_fault_must_end_nothing():
    (text,) = problems([attempt({"algo-1": ended("algo-2")}, lasted_s=5)], {})
    assert text == "attempt 1: 5 s of silence of algo-2 ended it; less than 30 s must cost nothing"


def test_a_host_that_finished_its_own_work_is_no_problem():
    assert list(problems([attempt({"algo-1": ended("", code=0)})], {})) == []
