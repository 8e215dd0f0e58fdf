"""Workers answer, die with their parent, and their end is reported in words; ranks end together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from estiba.errors import DataError, EstibaError
from estiba.processes import Worker, WorkerDied, WorkerPool, exit_report


@pytest.fixture(autouse=True)
def _answers_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker("answers:make", 100, name="adder")
    yield worker
    worker.kill()


def is_alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_worker_answers_in_its_own_process(worker: Worker) -> None:
    assert [worker.ask(1), worker.ask(2)] == [101, 102]
    pid, parent = worker.ask(("pid",))
    assert (pid, parent) == (worker.pid, os.getpid())


def test_a_workers_prints_go_to_the_log_and_not_into_its_answers(
    capfd: pytest.CaptureFixture[str],
) -> None:
    worker = Worker("answers:make")
    assert worker.ask(("print",)) == "print" and worker.ask(1) == 1
    worker.kill()
    err = capfd.readouterr().err
    for line in ("printed while it was made", "printed by a task", "written by a C library"):
        assert line in err


def test_answers_and_tasks_may_be_larger_than_a_pipe(worker: Worker) -> None:
    assert worker.ask(("bytes", 5_000_000)) == bytes(5_000_000)
    assert worker.ask(("a long task", bytes(5_000_000))) == "a long task"


def test_an_error_for_the_user_is_raised_as_it_is_and_a_bug_with_its_kind(worker: Worker) -> None:
    with pytest.raises(DataError, match=r"^a\.txt: is torn$"):
        worker.ask(("data error",))
    with pytest.raises(EstibaError, match=r"^ValueError: went wrong$"):
        worker.ask(("bug",))
    assert worker.ask(1) == 101


def test_a_worker_that_cannot_start_says_why_at_its_first_task() -> None:
    worker = Worker("answers:refuse")
    with pytest.raises(DataError, match="the model: is not there"):
        worker.ask(1)
    worker.kill()


@pytest.mark.parametrize(
    ("task", "report"),
    [
        (("signal", signal.SIGKILL), "adder was killed, likely out of memory; give the container more"),
        (("signal", signal.SIGSEGV), "adder was killed by SIGSEGV; its last lines are in the log"),
        (("exit", 3), "adder ended with code 3; its last lines are in the log"),
    ],
)
def test_a_worker_that_dies_is_reported_with_its_task(worker: Worker, task: Any, report: str) -> None:
    with pytest.raises(WorkerDied) as caught:
        worker.ask(task)
    assert str(caught.value) == report and caught.value.task == task
    assert caught.value.returncode == (3 if task[0] == "exit" else -task[1])


def test_a_report_of_a_killed_worker_names_the_flag_that_sets_their_number() -> None:
    text = "w was killed, likely out of memory; give the container more or use fewer --workers"
    assert exit_report("w", -signal.SIGKILL, workers_flag="--workers") == text


def test_workers_leave_the_stop_signals_to_their_parent(worker: Worker) -> None:
    for signum in (signal.SIGTERM, signal.SIGINT):
        assert worker.ask(("signal", signum)) == "signal"
    assert worker.ask(1) == 101


def test_a_worker_dies_with_its_parent() -> None:
    parent = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("answers.py"))],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert is_alive(pid)
    parent.kill()
    parent.communicate()
    wait_for(lambda: not is_alive(pid))


def test_settings_of_the_environment_reach_the_workers_alone() -> None:
    worker = Worker("answers:make", environ={"RAYON_NUM_THREADS": "1"})
    assert worker.ask(("environ", "RAYON_NUM_THREADS")) == "1" and "RAYON_NUM_THREADS" not in os.environ
    worker.kill()


# --- pools


def test_a_pool_answers_every_task_and_takes_one_more_ahead_than_it_has_workers() -> None:
    taken: list[int] = []

    def tasks() -> Iterator[int]:
        for number in range(20):
            taken.append(number)
            yield number

    with WorkerPool("answers:make", 1000, size=3) as pool:
        found = pool.map_unordered(tasks())
        answers = [next(found)]
        assert len(taken) <= 4
        answers += found
    assert sorted(answers) == [(number, 1000 + number) for number in range(20)]
    assert not any(is_alive(worker.pid) for worker in pool.workers)


def test_a_pool_names_the_task_that_a_worker_died_on() -> None:
    with (
        WorkerPool("answers:make", size=2, name="packer") as pool,
        pytest.raises(WorkerDied, match=r"^packer-[01] was killed, likely out of memory") as caught,
    ):
        list(pool.map_unordered([1, ("signal", signal.SIGKILL), 2]))
    assert caught.value.task == ("signal", signal.SIGKILL)


def test_a_pool_raises_what_a_task_raised() -> None:
    with WorkerPool("answers:make", size=2) as pool, pytest.raises(DataError, match="is torn"):
        list(pool.map_unordered([1, ("data error",), 2]))


def test_a_stop_ends_a_pool_without_waiting_for_its_tasks() -> None:
    started = time.monotonic()
    with WorkerPool("answers:make", size=1) as pool:
        assert list(pool.map_unordered([("sleep", 60)], lambda: time.monotonic() > started + 0.5)) == []
    assert time.monotonic() < started + 10


def test_a_worker_killed_by_the_stop_is_not_an_error() -> None:
    with WorkerPool("answers:make", size=1) as pool:
        worker = pool.workers[0]
        found = pool.map_unordered([1, ("signal", signal.SIGKILL), 2], lambda: not is_alive(worker.pid))
        assert list(found) == [(1, 1)]


# --- ranks

RANKS = """
import os, signal, sys, time
rank = int(os.environ["RANK"])
# One write, which the other rank's cannot come between.
os.write(1, f"{rank} {os.environ['WORLD_SIZE']} {os.environ['MASTER_PORT']} {sys.argv[1:]}\\n".encode())
if sys.argv[1] == "fail" and rank == 1:
    sys.exit(7)
if sys.argv[1] == "stop":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    time.sleep(60)
if sys.argv[1] == "fail":
    time.sleep(60)
if sys.argv[1] == "lose":  # rank 0 ends because it lost rank 1, which is the one that failed
    sys.exit(75 if rank == 0 else 7)
if sys.argv[1] in ("save", "deaf") and rank == 0:
    sys.exit(75)
if sys.argv[1] == "deaf":
    signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
    time.sleep(60)
if sys.argv[1] == "save":
    time.sleep(2)  # longer than a failed rank's grace
    print("saved", flush=True)
    sys.exit(75)
"""


def start_ranks(folder: Path, word: str, lost_ranks_grace_s: float = 30.0) -> subprocess.Popen[str]:
    (folder / "ranks.py").write_text(RANKS)
    text = textwrap.dedent(f"""
        from estiba import processes
        processes._FAILED_RANK_GRACE_S = 0.2
        processes._LOST_RANKS_GRACE_S = {lost_ranks_grace_s}
        processes.run_ranks("ranks", [{word!r}, "--flag"], 2)
    """)
    return subprocess.Popen(
        [sys.executable, "-c", text],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])},
    )


def test_ranks_know_each_other_and_get_the_flags(tmp_path: Path) -> None:
    process = start_ranks(tmp_path, "end")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and err == "2 processes, one for each device\n"
    lines = [line.split(maxsplit=3) for line in sorted(out.splitlines())]
    assert [(line[0], line[1], line[3]) for line in lines] == [(str(n), "2", "['end', '--flag']") for n in range(2)]
    assert lines[0][2] == lines[1][2]


def test_a_rank_that_fails_ends_the_others_with_its_status(tmp_path: Path) -> None:
    started = time.monotonic()
    process = start_ranks(tmp_path, "fail")
    process.communicate(timeout=50)
    assert process.returncode == 7 and time.monotonic() - started < 30


def test_a_rank_that_lost_others_is_not_the_reason_and_does_not_end_those_that_save(tmp_path: Path) -> None:
    process = start_ranks(tmp_path, "lose")
    process.communicate(timeout=50)
    assert process.returncode == 7
    process = start_ranks(tmp_path, "save")
    out, _ = process.communicate(timeout=50)
    assert process.returncode == 75 and "saved" in out


def test_a_rank_that_is_killed_since_it_does_not_end_is_not_the_reason(tmp_path: Path) -> None:
    process = start_ranks(tmp_path, "deaf", lost_ranks_grace_s=0.2)
    process.communicate(timeout=50)
    assert process.returncode == 75


def test_a_stop_reaches_every_rank(tmp_path: Path) -> None:
    process = start_ranks(tmp_path, "stop")
    assert process.stdout is not None
    for _ in range(2):
        process.stdout.readline()
    time.sleep(0.3)
    process.terminate()
    process.communicate(timeout=50)
    assert process.returncode == 143
