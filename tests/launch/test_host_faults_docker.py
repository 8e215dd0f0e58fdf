"""Drills of one host's faults, against containers that watch each other by heartbeats as small as they can be."""

from __future__ import annotations

from typing import Any

import pytest

from base_image import NEEDS_BASE_IMAGE
from drill_run import DrillRun, drills

pytestmark = NEEDS_BASE_IMAGE


@pytest.fixture
def run(tmp_path, monkeypatch):
    yield from drills(tmp_path, monkeypatch)


WATCHES = """
# Counts steps, saves each, and ends with a reason that names a host that was not heard of for SILENT_S.
import json, os, pathlib, signal, socket, sys, threading, time
resources = json.loads(pathlib.Path("/opt/ml/input/config/resourceconfig.json").read_text())
me, hosts = resources["current_host"], resources["hosts"]
silent_s, steps = float(os.environ.get("SILENT_S", "6")), int(os.environ.get("STEPS", "40"))
others = [host for host in hosts if host != me]
receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
receiver.bind(("0.0.0.0", 7001))
heard, done = {}, set()

def fail(host, what):
    pathlib.Path("/opt/ml/output/failure").write_text(f"host {host}: {what}")
    print(f"{me}: host {host}: {what}", flush=True)
    os._exit(143)

def listen():
    while True:
        word, _, host = receiver.recvfrom(99)[0].decode().partition(" ")
        heard[host] = time.monotonic()
        if word == "done":
            done.add(host)

def send(word):
    for host in others:
        try:
            receiver.sendto(f"{word} {me}".encode(), (socket.gethostbyname(host), 7001))
        except OSError:
            pass

def check():
    for host in others:
        if host not in done and time.monotonic() - heard[host] > silent_s:
            fail(host, f"no heartbeat for {silent_s:g} s")

state = {"word": "works"}
def beat():
    while True:
        send(state["word"])
        time.sleep(0.1)

for thread in (listen, beat):
    threading.Thread(target=thread, daemon=True).start()
started = time.monotonic()
while set(heard) != set(others):
    if time.monotonic() - started > 40:
        fail(next(iter(set(others) - set(heard))), "never came")
    time.sleep(0.05)
print(f"{me}: all are here after {time.monotonic() - started:.1f} s", flush=True)
folder = pathlib.Path("/opt/ml/checkpoints") / me
folder.mkdir(exist_ok=True)
saved = folder / "step"
step = int(saved.read_text()) if saved.exists() else 0
if step:
    print(f"resuming: {step} steps are saved", flush=True)
while step < steps:
    time.sleep(0.1)
    check()
    step += 1
    with (folder / "step.new").open("w") as file:
        file.write(str(step)); file.flush(); time.sleep(float(os.environ.get("WRITE_S", "0"))); os.fsync(file.fileno())
    (folder / "step.new").rename(saved)
    print(f"step={step} of={steps}", flush=True)
state["word"] = "done"
while set(others) - done:
    check()
    time.sleep(0.05)
time.sleep(0.5)
pathlib.Path("/opt/ml/model", f"weights-{hosts.index(me)}").write_text(f"after {step} steps")
pathlib.Path("/opt/ml/output/data", f"results-{me}.json").write_text(json.dumps(resources))
"""
HANGS = """
echo "step=1"; sleep 1; echo "step=2"; touch /opt/ml/checkpoints/$(hostname)
[ -e /opt/ml/checkpoints/algo-1 ] && [ -e /opt/ml/checkpoints/algo-2 ] && exit 0
while sleep 1; do :; done
"""
TWO = {"InstanceType": "ml.g4dn.xlarge", "InstanceCount": 2, "VolumeSizeInGB": 1}
THREE = {**TWO, "InstanceCount": 3}


def drill(run: DrillRun, *words: str, resources: dict[str, Any] = TWO, **environ: str) -> tuple[int, Any, str]:
    (run.tmp / "code" / "watches.py").write_text(WATCHES)
    request = {"ResourceConfig": resources, "Environment": environ}
    shell = "exec python /opt/ml/input/data/code/watches.py"
    return run.drill(shell, "--no-reference", *words, request=request)


def test_survivors_of_a_lost_host_end_by_themselves_and_name_it(run):
    code, document, stderr = drill(run, "--fault", "lost-host", "--seed", "5", resources=THREE)
    assert (code, document["problems"]) == (0, []), (document, stderr)
    (note,) = document["host_faults"]
    assert len(note["Hosts"]) == 2
    for end in note["Hosts"].values():
        assert (end["ExitCode"], end["Reason"]) == (143, f"host {note['Host']}: no heartbeat for 6 s")
        assert 5 < end["EndedAfterSeconds"] < 40
    how = {entry["host"]: entry["how"] for entry in document["attempts"] if entry["attempt"] == 1}
    assert how[note["Host"]] == f"KILL of {note['Host']}"
    assert all("ended after" in text for host, text in how.items() if host != note["Host"])
    assert {entry["attempt"] for entry in document["attempts"]} == {1, 2}


@pytest.mark.slow
def test_a_silent_host_is_noticed_though_no_connection_is_closed(run):
    code, document, stderr = drill(run, "--fault", "silent-host", "--seed", "1")
    assert (code, document["problems"]) == (0, []), (document, stderr)
    assert document["host_faults"][0]["Kind"] == "silence"


@pytest.mark.parametrize("fault", ["pause", "partition"])
def test_a_short_fault_costs_nothing(run, fault: str):
    code, document, stderr = drill(run, "--fault", fault, "--fault-s", "2", STEPS="60")
    assert (code, document["problems"]) == (0, []), (document, stderr)
    assert {entry["attempt"] for entry in document["attempts"]} == {1}
    (note,) = document["host_faults"]
    assert note["UndoneTime"] > note["Time"]


@pytest.mark.slow
def test_both_sides_of_a_long_partition_end_and_name_what_they_lost(run):
    code, document, stderr = drill(run, "--fault", "partition", "--fault-s", "31", "--grace-s", "1")
    assert (code, document["problems"]) == (0, []), (document, stderr)
    (note,) = document["host_faults"]
    assert set(note["Hosts"]) == {"algo-1", "algo-2"}
    assert all(end["ExitCode"] == 143 for end in note["Hosts"].values())


def test_a_kill_in_a_hosts_own_save_leaves_the_save_before(run):
    code, document, stderr = drill(run, "--fault", "lost-in-save", "--seed", "2", WRITE_S="0.05")
    assert (code, document["problems"]) == (0, []), (document, stderr)
    (note,) = document["host_faults"]
    assert note["During"].endswith("step.new")


@pytest.mark.parametrize("fault", ["late-host", "late-dns"])
def test_a_late_host_is_waited_for(run, fault: str):
    code, document, stderr = drill(run, "--fault", fault, "--fault-s", "4")
    assert (code, document["problems"]) == (0, []), (document, stderr)
    assert {entry["attempt"] for entry in document["attempts"]} == {1}
    assert document["planned"] == []


def test_hosts_get_the_names_and_the_interface_that_the_drill_gives_them(run):
    code, document, stderr = drill(run, "--fault", "host-names", "--log-interval-s", "1", resources=THREE, STEPS="5")
    assert (code, document["problems"]) == (0, []), (document, stderr)
    assert {entry["host"] for entry in document["attempts"]} == {"algo-1", "algo-10", "algo-2"}
    code, document, stderr = drill(run, "--fault", "no-interface", STEPS="5")
    assert (code, document["problems"]) == (0, []), (document, stderr)


@pytest.mark.slow
def test_a_survivor_that_stands_still_fails_the_drill(run):
    code, document, _ = run.drill(
        HANGS, "--no-reference", "--fault", "lost-host", "--grace-s", "0", request={"ResourceConfig": TWO}
    )
    assert code == 1
    struck = document["host_faults"][0]["Host"]
    (other,) = {"algo-1", "algo-2"} - {struck}
    assert any(text.startswith(f"attempt 1: {other} hung: loss of {struck}") for text in document["problems"])
