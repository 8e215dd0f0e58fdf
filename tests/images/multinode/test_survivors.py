"""Hosts of which one is lost: the others save what they hold, and a new attempt loses no step that lives on."""

from __future__ import annotations

import json
import re
import signal
import sys
import time
from pathlib import Path

import pytest
from hosts import Hosts, Scheduler, of_batch, of_torchrun, run

from estiba.checkpoint.sharded import format as sharded_format
from estiba.storage import FileStore


@pytest.fixture(scope="session")
def losses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """The losses of undisturbed runs, by their settings."""
    return {}


def undisturbed(losses: dict[str, list[float]], root: Path, arguments: list[str]) -> list[float]:
    key = " ".join(arguments)
    if key not in losses:
        losses[key] = run(root / "undisturbed", 1, arguments).column("train_loss")
    return losses[key]


def saved_step(text: str) -> int:
    return int(re.findall(r"this replica saved everything up to step (\d+)", text)[-1])


def no_saves(arguments: list[str], steps: int = 60) -> list[str]:
    """Many steps, and no save during them: what is saved, a survivor saved."""
    return [*arguments, "--max-steps", str(steps), "--save-steps", "1000", "--eval-steps", "1000"]


@pytest.mark.parametrize("lost", [0, 1])
def test_a_replica_that_lives_on_saves_its_present_step_when_another_host_is_killed(
    tmp_path: Path, losses: dict[str, list[float]], arguments: list[str], lost: int
) -> None:
    """Also when it is the main host that is lost, with the rows of metrics and the receipts of parts."""
    words = no_saves(arguments)
    expected = undisturbed(losses, tmp_path, words)
    shared = [*words, "--replicas", "2", "--checkpoint-path", str(tmp_path / "shared")]
    two = Hosts(tmp_path / "two", 2, shared)
    two.wait_for("step=7 of")
    two.signal(signal.SIGKILL, [lost])
    codes = two.wait()
    assert codes[1 - lost] == 75, two.logs()
    assert "Traceback" not in two.log(1 - lost)
    step = saved_step(two.failure(1 - lost))
    assert step >= 7
    manifest = sharded_format.read_manifest(FileStore(tmp_path / "shared"), f"step-{step:08d}")
    assert [(part.rank, part.ranks, part.shard) for part in manifest.parts] == [(0, 1, 0)]
    resumed = run(tmp_path / "one", 1, [*words, "--checkpoint-path", str(tmp_path / "shared")])
    assert f"resuming at step {step} of 60" in resumed.log()
    rows = {row["step"]: row["train_loss"] for row in resumed.rows() if "train_loss" in row}
    assert sorted(rows) == list(range(1, 61))
    row = next(row for row in resumed.rows() if row["step"] == step)
    assert row["grad_norm"] > 0 and row["tokens_per_s"] > 0
    others = [number for number in rows if number != step]  # the lost host took its part of that step's loss with it
    assert max(abs(rows[number] - expected[number - 1]) for number in others) <= 1e-6


def test_a_replica_over_two_hosts_saves_its_step_and_the_broken_one_saves_nothing(
    tmp_path: Path, losses: dict[str, list[float]], arguments: list[str]
) -> None:
    """Four hosts, two replicas. The hosts of the whole one write a part each and agree without a collective."""
    words = no_saves(arguments)
    expected = undisturbed(losses, tmp_path, words)
    shared = [*words, "--replicas", "2", "--checkpoint-path", str(tmp_path / "shared")]
    four = Hosts(tmp_path / "four", 4, shared, environ={"ESTIBA_STOP_GRACE_S": "20"})
    four.wait_for("step=5 of")
    four.signal(signal.SIGKILL, [1])
    assert four.wait()[2:] == [75, 75], four.logs()
    step = saved_step(four.failure(2))
    (name,) = sharded_format.committed(FileStore(tmp_path / "shared").list())
    manifest = sharded_format.read_manifest(FileStore(tmp_path / "shared"), name)
    assert [(part.rank, part.ranks, part.shard, part.step) for part in manifest.parts] == [
        (0, 2, 0, step),
        (1, 2, 1, step),
    ]
    resumed = run(tmp_path / "two", 2, [*words, "--checkpoint-path", str(tmp_path / "shared")])
    assert f"resuming at step {step} of 60" in resumed.log()
    assert max(abs(a - b) for a, b in zip(resumed.column("train_loss")[step:], expected[step:], strict=True)) <= 1e-6


def test_a_whole_replica_saves_when_the_broken_ones_other_host_ends_before_the_loss_is_certain(
    tmp_path: Path, arguments: list[str]
) -> None:
    """Host 1 breaks at once. Its end is what hosts 2 and 3 hear first, of which one may wait for the other alone.

    Host 0, the first of the broken replica, would commit it: host 1 must not say that its part is a checkpoint.
    """
    shared = [*no_saves(arguments, steps=1000), "--replicas", "2", "--checkpoint-path", str(tmp_path / "shared")]
    environ = {"ESTIBA_HOST_LOST_S": "3", "ESTIBA_STOP_GRACE_S": "40"}
    four = Hosts(tmp_path, 4, shared, environ=environ, is_watched=True)
    four.wait_for("step=5 of")
    four.signal_all(signal.SIGKILL, 0)
    assert four.wait()[1:] == [75, 75, 75], four.logs()
    for host in (1, 2, 3):
        assert four.failure(host).startswith("lost host 127.0.0.1: no heartbeat for "), four.failure(host)
    step = saved_step(four.failure(2))
    assert step >= 5
    (name,) = sharded_format.committed(FileStore(tmp_path / "shared").list())
    manifest = sharded_format.read_manifest(FileStore(tmp_path / "shared"), name)
    assert [(part.rank, part.ranks, part.step) for part in manifest.parts] == [(0, 2, step), (1, 2, step)]
    assert "this replica saved everything" not in four.failure(1)
    assert "counts once the replica's first rank has committed it" in four.failure(1)


@pytest.mark.parametrize("scheduler", [of_torchrun, of_batch])
def test_a_frozen_host_is_noticed_where_only_the_first_ones_address_is_known(
    tmp_path: Path, arguments: list[str], scheduler: Scheduler
) -> None:
    shared = [*no_saves(arguments, steps=1000), "--replicas", "2", "--checkpoint-path", str(tmp_path / "shared")]
    two = Hosts(tmp_path, 2, shared, environ={"ESTIBA_HOST_LOST_S": "3"}, scheduler=scheduler)
    two.wait_for("step=6 of")
    two.signal_all(signal.SIGSTOP, 1)
    try:
        assert two.processes[0].wait(90) in (1, 75), two.logs()  # torchrun has a status of its own
    finally:
        two.signal_all(signal.SIGKILL, 1)
        two.wait()
    assert re.match(r"lost host node-1: no heartbeat for \d+ s\n\nthis replica saved", two.failure()), two.failure()
    step = saved_step(two.failure())
    assert step >= 6
    assert sharded_format.committed(FileStore(tmp_path / "shared").list()) == [f"step-{step:08d}"]


WAITS = """
import time
from estiba.distributed import DistContext
from estiba.platform.contract import Job
from estiba.platform.stop import Stop
from estiba.training.host_watch import watched_hosts
dist = DistContext.init("cpu")
with watched_hosts(Job.read(), dist, Stop.from_environment()):
    print("watched", flush=True)
    if dist.is_main:
        dist.barrier()
    time.sleep(600)
"""


def ranks_of(program: str) -> Scheduler:
    """One rank of torchrun on each of two hosts."""

    def rank(index: int, _port: str) -> tuple[list[str], dict[str, str]]:
        of_host = {"RANK": str(index), "GROUP_RANK": str(index), "LOCAL_RANK": "0"}
        return [sys.executable, "-c", program], {**of_host, "WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "2"}

    return rank


def freeze_the_second(two: Hosts) -> None:
    """Of two hosts that watch each other: the first one ends because of it."""
    for host in (0, 1):
        two.wait_for("watched", host)
    two.signal_all(signal.SIGSTOP, 1)
    try:
        assert two.processes[0].wait(90) == 75, two.logs()
    finally:
        two.signal_all(signal.SIGKILL, 1)
        two.wait()


@pytest.mark.parametrize("has_file", [False, True])
def test_a_rank_that_waits_for_a_lost_host_where_it_has_nothing_to_save_ends_after_the_grace_period(
    tmp_path: Path, has_file: bool
) -> None:
    """While the model is loaded or written, for instance, below a torchrun that PID 1 did not start.

    With the file, PID 1 is there and knows of one host only: a script of it started torchrun.
    """
    environ = {"ESTIBA_HOST_LOST_S": "3", "ESTIBA_STOP_GRACE_S": "6"}
    if has_file:
        environ["ESTIBA_LOST_FILE"] = str(tmp_path / "of-pid-1")
    ranks = ranks_of(WAITS)
    two = Hosts(tmp_path, 2, [], environ=environ, scheduler=ranks)
    freeze_the_second(two)
    assert two.failure().startswith("lost host node-1: no heartbeat for ")
    assert "this rank did not end within 2 s" in two.log()


LOADS = """
import time
from estiba.distributed import DistContext
from estiba.errors import EstibaError
from estiba.platform.contract import Job
from estiba.platform.stop import Stop
from estiba.training.host_watch import watched_hosts
dist, stop = DistContext.init("cpu"), Stop.from_environment()
try:
    with watched_hosts(Job.read(), dist, stop):
        print("watched", flush=True)
        stop.unless_stopped(lambda: time.sleep(600), "nothing was trained")
except EstibaError as error:
    print(error, flush=True)
    raise SystemExit(error.exit_code)
"""


def test_a_loss_while_a_model_is_loaded_is_a_loss_and_no_stop(tmp_path: Path) -> None:
    """The loading polls the stop, so it ends by itself: with 75, since nobody asked for an end."""
    environ = {"ESTIBA_HOST_LOST_S": "3", "ESTIBA_STOP_GRACE_S": "30"}
    two = Hosts(tmp_path, 2, [], environ=environ, scheduler=ranks_of(LOADS))
    freeze_the_second(two)
    assert "lost host node-1: no heartbeat for " in two.log()
    assert "run the same command again to resume" in two.log()
    assert "did not end within" not in two.log()


def test_hosts_find_each_other_where_the_platform_lists_them_in_another_order_than_torchrun(tmp_path: Path) -> None:
    """MASTER_ADDR is the address of rank 0, and not of the first host in SageMaker's file. LOCAL_RANK may be unset."""

    def rank(index: int, _port: str) -> tuple[list[str], dict[str, str]]:
        names = ["algo-2", "algo-1"]
        path = tmp_path / names[1 - index] / "input/config/resourceconfig.json"
        path.write_text(json.dumps({"hosts": names, "current_host": names[1 - index]}))
        return [sys.executable, "-c", WAITS], {"RANK": str(index), "WORLD_SIZE": "2"}

    environ = {"ESTIBA_HOST_LOST_S": "3", "ESTIBA_STOP_GRACE_S": "6"}
    two = Hosts(tmp_path, 2, [], environ=environ, scheduler=rank)
    freeze_the_second(two)
    assert two.failure().startswith("lost host algo-2: no heartbeat for "), two.failure()


BREAKS = """
import time
from estiba.distributed import DistContext
from estiba.platform.contract import Job
from estiba.platform.failure import write_failure
from estiba.platform.stop import Stop
from estiba.training.host_watch import watched_hosts
dist, job = DistContext.init("cpu"), Job.read()
with watched_hosts(job, dist, Stop.from_environment()):
    time.sleep(2)
    if dist.is_main:
        write_failure(job.failure_path, "DataError: no rows in a.parquet")  # as another rank of this host does
    else:
        raise RuntimeError("Connection closed by peer")
    time.sleep(2)
    raise RuntimeError("Connection reset by peer")
"""


def test_the_consequence_on_another_host_does_not_hide_what_a_rank_of_this_host_wrote(tmp_path: Path) -> None:
    two = Hosts(tmp_path, 2, [], environ={"ESTIBA_HOST_LOST_S": "3"}, scheduler=ranks_of(BREAKS))
    assert two.wait() == [1, 1], two.logs()
    assert two.failure().startswith("DataError: no rows in a.parquet"), two.failure()


def test_a_replica_saves_its_step_while_its_main_thread_waits_for_a_frozen_host(
    tmp_path: Path, losses: dict[str, list[float]], arguments: list[str]
) -> None:
    """No connection breaks, so only PID 1's agent knows; inside a collective Python cannot handle SIGTERM."""
    words = no_saves(arguments)
    shared = [*words, "--replicas", "2", "--checkpoint-path", str(tmp_path / "shared")]
    two = Hosts(tmp_path, 2, shared, environ={"ESTIBA_HOST_LOST_S": "3"}, is_watched=True)
    two.wait_for("step=6 of")
    two.signal_all(signal.SIGSTOP, 1)
    try:
        assert two.processes[0].wait(60) == 75, two.logs()
    finally:
        two.signal_all(signal.SIGKILL, 1)
        two.wait()
    assert re.match(r"lost host 127\.0\.0\.2: no heartbeat for \d+ s\n\nthis replica saved", two.failure())
    step = saved_step(two.failure())
    assert step >= 6
    assert sharded_format.committed(FileStore(tmp_path / "shared").list()) == [f"step-{step:08d}"]


def test_without_a_second_replica_the_last_committed_checkpoint_counts_and_the_survivor_says_so(
    tmp_path: Path, arguments: list[str]
) -> None:
    words = [*arguments, "--max-steps", "1000", "--save-steps", "2", "--eval-steps", "1000"]
    shared = [*words, "--checkpoint-path", str(tmp_path / "shared")]
    two = Hosts(tmp_path, 2, shared, environ={"ESTIBA_HOST_LOST_S": "3"}, is_watched=True)
    two.wait_for("step=6 of")
    # A save takes as long as it takes; the run hears of it at one of its next steps.
    while not sharded_format.committed(FileStore(tmp_path / "shared").list()):
        assert two.processes[0].poll() is None, two.logs()
        time.sleep(0.05)
    reached = max(int(step) for step in re.findall(r"step=(\d+) of", two.log(0)))
    two.wait_for(f"step={reached + 4} of")
    two.signal_all(signal.SIGSTOP, 1)
    try:
        assert two.processes[0].wait(60) == 75, two.logs()
    finally:
        two.signal_all(signal.SIGKILL, 1)
        two.wait()
    assert two.failure().startswith("lost host 127.0.0.2")
    kept = int(re.findall(r"checkpoints up to step (\d+) are kept; a new one would lack", two.failure())[-1])
    assert sharded_format.committed(FileStore(tmp_path / "shared").list())[0] == f"step-{kept:08d}"
