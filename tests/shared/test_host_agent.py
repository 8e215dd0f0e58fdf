"""Several hosts of a script job, as processes with addresses of their own: who ends, when, and for which reason."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from estiba.platform.host_agent import HostAgent
from estiba.platform.hosts import token_of
from estiba.platform.outcomes import CONSEQUENCE, ERROR, LOST, Failure, first
from estiba.platform.steps import StepWatch, report_step
from shared.script_hosts import Hosts, free_port

A, B, C = "127.0.0.1", "127.0.0.2", "127.0.0.3"
QUICK = {"ESTIBA_HOST_LOST_S": "3", "ESTIBA_STOP_GRACE_S": "12"}
SAVES = """
import os, signal, sys, time
def save(signum, frame):
    open(os.environ["SM_MODEL_DIR"] + "/saved", "w").close()
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
print("training", flush=True)
while True:
    time.sleep(0.02)
"""
TRAIN_SH = "python launcher.py 1 train.py 2>&1 | tee log.txt\n"
FAILS = "import time\ntime.sleep(float({delay}))\nraise {error}\n"


@pytest.fixture
def training(hosts: Callable[..., Hosts]) -> Callable[..., Hosts]:
    """Start hosts that train until they hear TERM, then save; return once all of them train."""

    def start(*names: str, env: dict[str, str] | None = None) -> Hosts:
        job = hosts(*names)
        job.write("train.py", SAVES)
        job.write("train.sh", TRAIN_SH)
        job.start("train.sh", env={**QUICK, **(env or {})})
        job.wait_for("training")
        return job

    return start


def test_hosts_that_end_well_end_without_waiting_for_each_other(hosts: Callable[..., Hosts]) -> None:
    """A host that has finished is not lost, however long the others go on."""
    job = hosts(A, B)
    job.write("train.sh", "python train.py\n")
    job.write("train.py", "import os, time\nif os.environ['SM_CURRENT_HOST_RANK'] == '1':\n    time.sleep(6)\n")
    job.start("train.sh", env=QUICK)
    assert job.end(A) == [0], job.log(A)
    assert job.running[B].poll() is None
    assert job.end(B) == [0], job.log(B)


def test_a_killed_host_is_named_by_all_others_which_save(training: Callable[..., Hosts]) -> None:
    job = training(A, B, C)
    job.signal_all(B, signal.SIGKILL)
    assert job.end(A, C) == [75, 75], job.log(A)
    for name in (A, C):
        assert job.failure(name).startswith(f"lost host {B}: no heartbeat for "), job.failure(name)
        assert job.model(name) == ["saved"]


def test_a_frozen_host_is_lost_and_says_so_itself_when_it_wakes(training: Callable[..., Hosts]) -> None:
    job = training(A, B)
    job.signal_all(B, signal.SIGSTOP)
    assert job.end(A) == [75], job.log(A)
    assert job.failure(A).startswith(f"lost host {B}: no heartbeat for ")
    time.sleep(3)
    job.signal_all(B, signal.SIGCONT)
    assert job.end(B) == [75], job.log(B)
    assert f"after this host ({B}) had stood still for " in job.failure(B), job.failure(B)


def test_a_short_pause_costs_nothing(training: Callable[..., Hosts]) -> None:
    job = training(A, B, env={"ESTIBA_HOST_LOST_S": "12"})
    job.signal_all(B, signal.SIGSTOP)
    time.sleep(5)
    job.signal_all(B, signal.SIGCONT)
    time.sleep(8)
    assert [process.poll() for process in job.running.values()] == [None, None], job.log(A) + job.log(B)
    job.term()
    assert job.end() == [0, 0]


def test_an_error_on_one_host_ends_all_with_its_rank_host_and_exception(hosts: Callable[..., Hosts]) -> None:
    job = hosts(A, B, C)
    job.write("train.py", SAVES)
    job.write_on(B, "train.py", FAILS.format(delay=1, error="ValueError('loss is nan')"))
    job.write("train.sh", TRAIN_SH)
    job.start("train.sh", env=QUICK)
    assert job.end() == [1, 1, 1], job.log(A)
    for name in (A, B, C):
        assert job.failure(name).startswith(f"ValueError: loss is nan (rank 1 on {B}, "), job.failure(name)
        assert "train.py line 3)" in job.failure(name)
    assert job.model(A) == ["saved"], "the others get TERM, so that they save"


WAITS = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("training", flush=True)
while not os.path.exists(os.environ["ESTIBA_LOST_FILE"]):
    time.sleep(0.02)
print("heard:", open(os.environ["ESTIBA_LOST_FILE"]).read(), flush=True)
sys.exit(75)
"""


@pytest.mark.parametrize("error", ["RuntimeError('Connection closed by peer [10.0.0.2]')", "ValueError('loss is nan')"])
def test_ranks_that_wait_in_a_collective_are_told_that_those_of_another_host_have_ended(
    hosts: Callable[..., Hosts], error: str
) -> None:
    """Also when that host ended since it lost a third one: each rank of a replica must save its part."""
    job = hosts(A, B)
    job.write("train.py", WAITS)
    job.write_on(B, "train.py", FAILS.format(delay=1, error=error))
    job.write("train.sh", TRAIN_SH)
    job.start("train.sh", env={**QUICK, "ESTIBA_STOP_GRACE_S": "30"})
    job.end()
    name, _, text = error.removesuffix("')").partition("('")
    assert f"heard: {name}: {text} (rank 1 on {B}, " in job.log(A), job.log(A)


def test_ranks_that_save_together_after_a_stop_are_told_of_a_host_that_is_lost_meanwhile(
    hosts: Callable[..., Hosts],
) -> None:
    job = hosts(A, B)
    job.write("train.py", WAITS)
    job.write("train.sh", TRAIN_SH)
    job.start("train.sh", env={**QUICK, "ESTIBA_STOP_GRACE_S": "30"}).wait_for("training")
    job.term(B).wait_for("stopping, since", A)
    assert "heard" not in job.log(A), "a stop alone takes no ranks away"
    job.signal_all(B, signal.SIGKILL)
    job.end(A)
    assert f"heard: lost host {B}: no heartbeat" in job.log(A), job.log(A)


def test_a_lost_connection_is_not_the_reason_when_the_error_comes_later(hosts: Callable[..., Hosts]) -> None:
    """torchrun on the host of the error may take half a minute to end; the others' connections break at once."""
    job = hosts(A, B)
    job.write("train.sh", "python launcher.py 1 train.py\nsleep 2\nexit 1\n")
    job.write("train.py", FAILS.format(delay=0.5, error="RuntimeError('Connection closed by peer [10.0.0.2]')"))
    job.write_on(B, "train.py", FAILS.format(delay=1.5, error="KeyError('texto')"))
    job.start("train.sh", env=QUICK)
    assert job.end() == [1, 1], job.log(A)
    assert [job.failure(name).splitlines()[0].partition(",")[0] for name in (A, B)] == [
        f"KeyError: 'texto' (rank 1 on {B}"
    ] * 2


def test_errors_after_a_host_was_lost_are_its_consequence(hosts: Callable[..., Hosts]) -> None:
    job = hosts(A, B)
    job.write("train.py", SAVES)
    job.write("train.sh", TRAIN_SH)
    job.write_on(A, "train.py", "import os, time\nprint('training', flush=True)\nwhile not os.path.exists('gone'):\n"
                 "    time.sleep(0.02)\nraise RuntimeError('an odd error of a broken group')\n")  # fmt: skip
    job.start("train.sh", env=QUICK)
    job.wait_for("training")
    time.sleep(1)
    job.signal_all(B, signal.SIGKILL)
    time.sleep(1.2)
    (job.root(A) / "code/gone").touch()
    assert job.end(A) == [75], job.log(A)
    assert job.failure(A).startswith(f"lost host {B}")


def test_requirements_that_fail_on_one_host_end_all_with_its_reason(hosts: Callable[..., Hosts]) -> None:
    job = hosts(A, B)
    job.write("train.sh", "echo started\n")
    job.write_on(B, "requirements.txt", "no-such-package-of-estiba==9\n")
    job.start("train.sh", env={**QUICK, "PIP_NO_INDEX": "1"})
    assert job.end() == [1, 1], job.log(A)
    assert "no-such-package-of-estiba==9" in job.failure(B).splitlines()[0]
    assert "no-such-package-of-estiba==9" in job.failure(A) and f"host {B}" in job.failure(A)
    assert "started" not in job.log(A) + job.log(B)


def test_the_script_starts_when_the_last_host_is_ready(hosts: Callable[..., Hosts]) -> None:
    job = hosts(A, B)
    job.write("train.sh", "date +%s.%N\n")
    job.start("train.sh", A, env=QUICK)
    time.sleep(3)
    assert job.running[A].poll() is None
    job.start("train.sh", B, env=QUICK)
    assert job.end() == [0, 0], job.log(A)
    times = [float(job.log(name).split()[-1]) for name in (A, B)]
    assert abs(times[0] - times[1]) < 2


def test_a_host_of_an_older_image_is_told_and_not_waited_for_for_ever(hosts: Callable[..., Hosts]) -> None:
    job = hosts(A, B)
    job.write("train.sh", "echo started\n")
    job.start("train.sh", A, env={**QUICK, "ESTIBA_HOSTS_WAIT_S": "2"})
    assert job.end(A) == [0], job.log(A)
    assert f"warning: {B} runs no host agent" in job.log(A)
    assert "started" in job.log(A)


def test_term_on_one_host_is_told_to_the_others(training: Callable[..., Hosts]) -> None:
    job = training(A, B)
    job.term(B)
    assert job.end() == [0, 0], job.log(A)
    assert [job.model(name) for name in (A, B)] == [["saved"], ["saved"]]
    assert f"stopping, since stopped by SIGTERM on {B}" in job.log(A)


def test_a_preemption_is_no_bug(hosts: Callable[..., Hosts]) -> None:
    job = hosts(A, B)
    job.write("train.py", "import time; print('training', flush=True); time.sleep(600)")
    job.write("train.sh", TRAIN_SH)
    job.start("train.sh", env=QUICK).wait_for("training")
    job.term(B)
    assert job.end() == [143, 143], job.log(A)
    assert job.failure(B).startswith("stopped by SIGTERM: the script ended with 143")
    assert job.failure(A).startswith(f"stopped by SIGTERM on {B}: the script ended with 143")


def test_term_on_all_hosts_reaches_each_rank_once(hosts: Callable[..., Hosts]) -> None:
    """The platform's own TERM is no second signal to a host that already heard of it from another."""
    job = hosts(A, B)
    job.write("train.py", SAVES.replace("def save(signum, frame):", "def save(signum, frame):\n    print('heard')"))
    job.write("train.sh", TRAIN_SH)
    job.start("train.sh", env={**QUICK, "SAVE_S": "2"}).wait_for("training")
    job.term(B).wait_for("stopping, since", A)
    job.term(A)
    assert job.end() == [0, 0], job.log(A)
    assert job.log(A).count("heard") == 1


def test_ranks_that_stand_still_after_a_loss_are_killed_at_the_end_of_the_grace_period(
    hosts: Callable[..., Hosts],
) -> None:
    job = hosts(A, B)
    job.write("train.py", "import signal, time\nsignal.signal(15, signal.SIG_IGN)\nprint('training', flush=True)\n"
              "time.sleep(600)\n")  # fmt: skip
    job.write("train.sh", TRAIN_SH)
    job.start("train.sh", env={**QUICK, "ESTIBA_STOP_GRACE_S": "7"}).wait_for("training")
    job.signal_all(B, signal.SIGKILL)
    assert job.end(A, timeout_s=30) == [75], job.log(A)
    assert job.failure(A).startswith(f"lost host {B}")
    assert "(the script was killed 3 s after it was told to stop)" in job.failure(A)
    assert job.gone(A)


def test_a_script_that_reports_steps_and_stops_doing_so_has_stalled(hosts: Callable[..., Hosts]) -> None:
    job = hosts(A, B)
    job.write("train.py", "import os, time\nfor step in range(5):\n    open(os.environ['ESTIBA_STEP_FILE'], 'w')"
              ".write(str(step))\n    time.sleep(0.6)\nprint('hanging', flush=True)\ntime.sleep(600)\n")  # fmt: skip
    job.write("train.sh", TRAIN_SH)
    job.start("train.sh", env={**QUICK, "ESTIBA_STALL_S": "1"})
    assert job.end() == [1, 1], job.log(A)
    for name in (A, B):
        assert job.failure(name).startswith("stalled: no step for "), job.failure(name)
        assert "after step 4, of which one takes" in job.failure(name)


def test_a_job_on_one_host_opens_no_port_and_waits_for_none(hosts: Callable[..., Hosts]) -> None:
    job = hosts()
    job.write("train.py", "import os, socket\nprobe = socket.socket()\n"
              "port = int(os.environ['ESTIBA_AGENT_PORT'])\n"
              "print('open', probe.connect_ex(('127.0.0.1', port)) == 0)\n")  # fmt: skip
    job.start("train.py")
    assert job.end() == [0], job.log("localhost")
    assert "open False" in job.log("localhost")


# --- a workload whose hosts need each other ------------------------------------------------------------------------

LINKED = {**QUICK, "ESTIBA_HOST_AGENT": "1", "ESTIBA_WORKLOAD": "linked"}
WORKLOAD = """
import os, time
from estiba.config import Config
from estiba.platform.steps import report_step
from estiba.platform.workload import run

class LinkedConfig(Config):
    fails_on: str = ""
    stalls: bool = False

def work(config, job, stop):
    print("training", flush=True)
    while not stop.wait(0.1):
        report_step(0 if config.stalls and time.monotonic() > begun + 3 else int(10 * (time.monotonic() - begun)))
        if config.fails_on == job.current_host and time.monotonic() > begun + 1:
            raise ValueError("loss is nan")
        while config.stalls and time.monotonic() > begun + 2 and not stop():
            time.sleep(0.1)
    raise stop.interrupted("3 steps are saved")

begun = time.monotonic()
if __name__ == "__main__":
    run(LinkedConfig, work)
"""


def linked(hosts: Callable[..., Hosts], *names: str, env: dict[str, str] | None = None, **settings: str) -> Hosts:
    job = hosts(*names)
    packages = job.folder / "packages/linked"
    packages.mkdir(parents=True)
    (packages / "__init__.py").touch()
    (packages / "__main__.py").write_text(WORKLOAD)
    job.environ["PYTHONPATH"] += f":{packages.parent}"
    job.start("", env={**LINKED, **(env or {})}, hyperparameters=settings)
    job.wait_for("training")
    return job


def test_a_linked_workload_saves_and_names_the_lost_host(hosts: Callable[..., Hosts]) -> None:
    job = linked(hosts, A, B)
    job.signal_all(B, signal.SIGKILL)
    assert job.end(A) == [75], job.log(A)
    assert job.failure(A).startswith(f"lost host {B}: no heartbeat")
    assert "3 steps are saved" in job.failure(A)


def test_a_linked_workload_names_the_error_of_another_host(hosts: Callable[..., Hosts]) -> None:
    job = linked(hosts, A, B, fails_on=B)
    assert job.end() == [1, 1], job.log(A)
    assert job.failure(A).startswith(f"ValueError: loss is nan (host {B})")
    assert job.failure(B).startswith("ValueError: loss is nan")


def test_a_linked_workload_that_makes_no_step_has_stalled(hosts: Callable[..., Hosts]) -> None:
    job = linked(hosts, A, B, env={"ESTIBA_STALL_S": "2"}, stalls="true")
    assert job.end() == [1, 1], job.log(A)
    assert job.failure(A).startswith("stalled: no step for ")


def test_a_linked_workload_on_one_host_needs_no_network_and_waits_for_nothing(hosts: Callable[..., Hosts]) -> None:
    job = linked(hosts, "no-such-name-of-estiba")
    job.term()
    assert job.end() == [143], job.log("no-such-name-of-estiba")
    assert "3 steps are saved" in job.failure("no-such-name-of-estiba")


# --- parts ---------------------------------------------------------------------------------------------------------


def test_the_agents_of_another_job_are_ignored() -> None:
    port = free_port()
    ours = HostAgent([A, B], A, token=token_of({"TRAINING_JOB_NAME": "ours"}, [A, B]), port=port, lost_s=5).start()
    theirs = HostAgent([A, B], B, token=token_of({"TRAINING_JOB_NAME": "theirs"}, [A, B]), port=port, lost_s=5).start()
    theirs.publish(failure=Failure(text="not ours", host=B, at=0.0))
    with socket.create_connection((A, port)) as nonsense:
        nonsense.sendall(b'{"job": 1}\n[\n' + b"x" * 100_000)
    time.sleep(2.5)
    assert ours.verdict() is None
    assert ours.peers[B].heard_at is None
    ours.close()
    theirs.close()


def test_hosts_find_each_other_where_only_the_first_ones_address_is_known() -> None:
    names, port = ["node-0", "node-1", "node-2"], free_port()

    def agent(name: str) -> HostAgent:
        return HostAgent(names, name, token="t", port=port, lost_s=5, first_address=A).start()

    agents = {name: agent(name) for name in reversed(names)}
    while not all(peer.heard_at for each in agents.values() for peer in each.peers.values()):
        time.sleep(0.02)
    assert agents["node-1"].addresses.of("node-2") == (A, agents["node-2"].addresses.port)
    agents["node-0"].close()  # the others know each other without it from now on
    agents["node-2"].publish(failure=Failure(text="ValueError: found", host="node-2", at=1.0))
    while (verdict := agents["node-1"].verdict()) is None:
        time.sleep(0.02)
    assert verdict.text == "ValueError: found"
    for each in agents.values():
        each.close()


def test_two_jobs_of_aws_batch_are_told_apart_and_the_nodes_of_one_are_not() -> None:
    tokens = [token_of({"AWS_BATCH_JOB_ID": name}, [A, B]) for name in ("one#0", "one#1", "two#0")]
    assert tokens[0] == tokens[1] != tokens[2]
    own = [token_of({"ESTIBA_JOB_TOKEN": name}, [A, B]) for name in ("team#one", "team#two")]
    assert own[0] != own[1]


def test_two_static_torchruns_on_the_same_hosts_are_told_apart_by_their_ports() -> None:
    of_torchrun = {"GROUP_RANK": "0", "MASTER_ADDR": A}
    tokens = [token_of({**of_torchrun, "MASTER_PORT": port}, [A, B]) for port in ("29500", "29500", "29501")]
    assert tokens[0] == tokens[1] != tokens[2]
    kubeflow = [token_of({"PET_NODE_RANK": "0", "PET_MASTER_PORT": port}, [A, B]) for port in ("29500", "29501")]
    assert kubeflow[0] != kubeflow[1]


@pytest.mark.parametrize("seed", range(3))
def test_all_hosts_agree_on_the_reason(seed: int) -> None:
    names, port = [A, B, C], free_port()
    agents = [HostAgent(names, name, token="t", port=port, lost_s=5).start() for name in names]
    while not all(peer.heard_at for agent in agents for peer in agent.peers.values()):
        time.sleep(0.02)
    own = {
        A: Failure(text="Connection closed by peer", host=A, at=10.0 + seed, kind=CONSEQUENCE),
        B: Failure(text="ValueError: late", host=B, at=12.0),
        C: Failure(text="KeyError: first", host=C, at=11.0),
    }
    found: dict[str, Failure | None] = {}

    def end(agent: HostAgent) -> None:
        time.sleep(0.2 * ((names.index(agent.current) + seed) % 3))
        found[agent.current] = agent.finish(own[agent.current])

    threads = [threading.Thread(target=end, args=(agent,)) for agent in agents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {name: failure and failure.text for name, failure in found.items()} == dict.fromkeys(
        names, "KeyError: first"
    )
    for agent in agents:
        agent.close()


def test_a_host_that_ends_for_anothers_lost_connection_waits_until_it_knows_which_host_is_lost() -> None:
    """B's script breaks first, A is ended by it without a failure of its own, and C is the host that died."""
    names, port = [A, B, C], free_port()
    agents = {name: HostAgent(names, name, token="t", port=port, lost_s=7).start() for name in names}
    while not all(peer.heard_at for agent in agents.values() for peer in agent.peers.values()):
        time.sleep(0.02)
    agents[C].close()
    found: dict[str, Failure | None] = {}

    def end(name: str, failure: Failure | None) -> None:
        found[name] = agents[name].finish(failure)

    broken = Failure(text="Connection reset by peer", host=B, at=time.time(), kind=CONSEQUENCE)
    threads = [threading.Thread(target=end, args=words) for words in ((B, broken), (A, None))]
    for thread in threads:
        thread.start()
        time.sleep(0.5)
    for thread in threads:
        thread.join()
    for name in (A, B):
        reason = found[name]
        assert reason is not None and reason.text.startswith(f"lost host {C}: "), reason
        agents[name].close()


def test_the_reason_is_the_earliest_that_is_nobody_elses_consequence() -> None:
    late = Failure(text="late", host=A, at=9.0, kind=ERROR)
    lost = Failure(text="lost", host=B, at=5.0, kind=LOST)
    broken = Failure(text="broken", host=C, at=1.0, kind=CONSEQUENCE)
    assert first([late, broken, lost]) == lost
    assert first([broken]) == broken
    assert first([]) is None


@pytest.mark.parametrize(
    ("step_s", "silent_s", "is_stalled"), [(1, 299, False), (1, 303, True), (60, 1100, False), (60, 1300, True)]
)
def test_a_stall_is_five_minutes_or_twenty_median_steps(
    tmp_path: Path, step_s: float, silent_s: float, is_stalled: bool
) -> None:
    watch = StepWatch(tmp_path / "step")
    now = 0.0
    for step in range(6):
        report_step(step, {"ESTIBA_STEP_FILE": str(tmp_path / "step")})
        os.utime(tmp_path / "step", (step, step))
        for _ in range(int(step_s)):
            assert watch.look(now) is None
            now += 1.0
    last = now - step_s
    while now < last + silent_s:
        found = watch.look(now)
        now += 1.0
    assert (found is not None) == is_stalled


def test_reporting_the_same_step_again_is_a_sign_of_life_and_a_frozen_host_proves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "step"
    watch = StepWatch(path, stall_s=30)
    for step in range(4):
        path.write_text(str(step))
        os.utime(path, (step, step))
        assert watch.look(float(step)) is None
    for now in range(4, 100, 4):  # an evaluation
        os.utime(path, (now, now))
        assert watch.look(float(now)) is None
    assert watch.look(5000.0) is None, "this host stood still"
    assert json.loads(path.read_text()) == 3
