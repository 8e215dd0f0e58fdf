"""PID 1: signals reach the process that can handle them, exit statuses are kept, orphans are reaped."""

from __future__ import annotations

import re
import signal
import time
from typing import Any

import pytest

from contract.checks import tree_of
from contract.containers import Image, Tree
from contract.workloads import Prepared

SOON_S = 10.0
"""Enough on a busy machine; a lost signal would cost the whole grace period."""

SAVES = """
import os, pathlib, signal, sys, time
def save(signum, frame):
    pathlib.Path("/opt/ml/model/saved").write_text(signal.Signals(signum).name)
    sys.exit(3)
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGINT, save)
print("ready", flush=True)
while True:
    time.sleep(0.05)  # short, since a signal just before a sleep is handled after it
"""

# Wait until the workload handles TERM.
WORKLOAD = """
import os, pathlib, signal, time
def field(name):
    for path in pathlib.Path("/proc").glob("[0-9]*"):  # processes of this container
        status = dict(line.split(":\\t", 1) for line in (path / "status").read_text().splitlines() if ":\\t" in line)
        if status["PPid"] == "1" and int(status["SigCgt"], 16) >> (signal.SIGTERM - 1) & 1:
            return status[name]
while not field("Pid"):
    time.sleep(0.01)
"""
# Once torch's library is mapped, its import still takes longer than the time between two signals. Python calls
# its handler once for all that arrive during one long call, such as the loading of a library, so TERM is repeated.
TWO_TERMS = f"""{WORKLOAD}
maps = pathlib.Path("/proc", field("Pid").strip(), "maps")
while "libtorch" not in maps.read_text():
    time.sleep(0.01)
while True:
    os.kill(1, signal.SIGTERM)
    time.sleep(0.05)
"""
# Both signals are pending before the workload handles the first one.
TWO_SIGNALS_TO_A_FROZEN_WORKLOAD = f"""{WORKLOAD}
pid = int(field("Pid"))
os.kill(pid, signal.SIGSTOP)
while not field("State").startswith("T"):
    time.sleep(0.01)
for signum in (signal.SIGTERM, signal.SIGINT):
    os.kill(1, signum)
    while not (int(field("ShdPnd"), 16) | int(field("SigPnd"), 16)) >> (signum - 1) & 1:
        time.sleep(0.01)
os.kill(pid, signal.SIGCONT)
time.sleep(600)
"""

ZOMBIES = """
for i in 1 2 3 4 5; do (sleep 0.1 & exec true) & done; wait
for i in $(seq 100); do
    [ "$(ps -o pid= --ppid 1 | wc -l)" = 1 ] && echo "all reaped" && exit 0
    sleep 0.1
done
ps -eo pid,ppid,stat,args; exit 1
"""


def test_pid_1_is_the_job_layer(image: Image) -> None:
    command = image.output_of(["bash", "-c", "tr '\\0' ' ' </proc/1/cmdline"])
    assert re.match(r"\S*python\S* -m estiba\.platform\.entry bash -c", command)


@pytest.mark.parametrize("code", [0, 1, 7, 127])
def test_the_exit_status_of_a_command_is_kept(code: int, image: Image, tree: Tree) -> None:
    ended = image.run(["bash", "-c", f"echo last words >&2; exit {code}"], tree=tree)
    assert ended.code == code
    if code:
        assert tree.failure is not None
        assert tree.failure.startswith("last words\n")
        assert f"exit code {code}" in tree.failure
    else:
        assert tree.failure is None


def test_a_command_that_a_signal_kills_ends_with_128_and_the_signal(image: Image, tree: Tree) -> None:
    ended = image.run(["bash", "-c", "kill -SEGV $$"], tree=tree)
    assert ended.code == 128 + signal.SIGSEGV
    assert "SIGSEGV" in (tree.failure or "").splitlines()[0]


def test_a_command_that_does_not_exist_ends_with_127(image: Image, tree: Tree) -> None:
    ended = image.run(["zarpar"], tree=tree)
    assert ended.code == 127
    assert "'zarpar' is not in this image" in (tree.failure or "")
    assert "Traceback" not in ended.log


def test_a_command_that_cannot_be_run_ends_with_126(image: Image, tree: Tree) -> None:
    ended = image.run(["/etc/passwd"], tree=tree)
    assert ended.code == 126
    assert "/etc/passwd" in (tree.failure or "")
    assert "Traceback" not in ended.log


def test_stdout_and_stderr_are_kept_separate(image: Image) -> None:
    ended = image.run(["bash", "-c", "echo one; echo two >&2"])
    assert (ended.out, ended.err) == ("one\n", "two\n")


def test_a_commands_traceback_is_reported_by_its_last_line(image: Image, tree: Tree) -> None:
    code = "def f():\n raise LookupError('no hay puerto')\nf()"
    assert image.run(["python", "-c", code], tree=tree).code == 1
    assert tree.failure is not None
    assert tree.failure.startswith("LookupError: no hay puerto\n")


def test_docker_stop_reaches_a_shells_trap(image: Image) -> None:
    running = image.start(["bash", "-c", 'trap "echo bye; exit 3" TERM; sleep 600 & echo ready; wait'])
    running.wait_for_line("ready")
    seconds = running.stop()
    ended = running.end()
    assert (ended.code, seconds < SOON_S) == (3, True)
    assert "bye" in ended.log


def test_docker_stop_works_under_another_init(image: Image) -> None:
    """`docker run --init`, and compose's `init: true`: the job layer is then not PID 1."""
    running = image.start(["bash", "-c", 'trap "exit 3" TERM; sleep 600 & echo ready; wait'], init=True)
    running.wait_for_line("ready")
    assert running.stop() < SOON_S
    assert running.end().code == 3


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_reaches_a_program_started_by_a_shell(name: str, image: Image, tree: Tree) -> None:
    """If only the shell got the signal, it would die and the program with it. Both get it, so the program can save."""
    running = image.start(["bash", "-c", f"echo start; python -c '{SAVES}'; exit $?"], tree=tree)
    running.wait_for_line("ready")
    running.signal(name)
    started = time.monotonic()
    ended = running.end()
    assert time.monotonic() - started < SOON_S
    assert (tree.model / "saved").read_text() == name
    assert ended.code in (3, 128 + getattr(signal, name)), (
        ended.log
    )  # the program's status, or that of the shell, which died of the signal
    assert name in (tree.failure or "")


@pytest.mark.parametrize(("name", "code"), [("SIGHUP", 129), ("SIGQUIT", 131), ("SIGUSR1", 138)])
def test_other_signals_are_forwarded(name: str, code: int, image: Image) -> None:
    running = image.start(["python", "-c", "import time; print('ready', flush=True); time.sleep(600)"])
    running.wait_for_line("ready")
    running.signal(name)
    assert running.end().code == code


def test_a_program_that_ignores_term_is_killed_in_time_to_report_it(image: Image, tree: Tree) -> None:
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print('ready', flush=True); time.sleep(600)"
    running = image.start(["python", "-c", code], tree=tree, environment={"ESTIBA_STOP_GRACE_S": "6"})
    running.wait_for_line("ready")
    assert running.stop(timeout_s=60) < 2 + SOON_S
    assert running.end().code == 128 + signal.SIGKILL
    assert "did not stop within 2 s of SIGTERM" in (tree.failure or "")


def test_ctrl_c_on_a_terminal_reaches_the_program(image: Image) -> None:
    wait = "try:\n while True: time.sleep(0.05)\nexcept KeyboardInterrupt: exit(9)"
    code = f"import time\nprint('ready', flush=True)\n{wait}"
    running = image.start(["python", "-c", code], tty=True, stdin_open=True)
    running.wait_for_line("ready")
    socket: Any = running.container.attach_socket(params={"stdin": 1, "stream": 1})
    socket._sock.sendall(b"\x03")
    assert running.end().code == 9
    socket.close()


def test_orphans_are_reaped(image: Image) -> None:
    """Data loaders and shells leave children behind, and only PID 1 can collect their exit status."""
    assert "all reaped" in image.output_of(["bash", "-c", ZOMBIES])


def test_an_orphan_does_not_keep_an_ended_job_alive(image: Image) -> None:
    ended = image.run(["bash", "-c", "setsid sleep 600 & exit 4"])
    assert ended.code == 4
    assert ended.seconds < SOON_S


def test_running_out_of_memory_is_reported_as_such(image: Image, tree: Tree) -> None:
    if not image.client.info().get("MemoryLimit"):
        pytest.skip("this engine cannot limit memory (no memory controller)")
    ended = image.run(["python", "-c", "held = bytearray(10**9)"], tree=tree, mem_limit="256m", memswap_limit="256m")
    assert ended.code == 137, ended.log
    assert (tree.failure or "").startswith("out of memory")
    assert "256 MiB" in (tree.failure or "")


@pytest.mark.slow
def test_a_job_counts_the_memory_of_its_container_and_not_of_the_machine(
    image: Image, prepared: Prepared, tree: Tree
) -> None:
    if not image.client.info().get("MemoryLimit"):
        pytest.skip("this engine cannot limit memory (no memory controller)")
    limit = prepared.memory_limit
    job = tree_of(prepared.large or prepared.quick, tree.root)
    ended = image.run(tree=job, mem_limit=limit, memswap_limit=limit)
    assert ended.code == 0, ended.log


def test_a_second_term_ends_the_workload_at_once(image: Image, prepared: Prepared, tree: Tree) -> None:
    """A second TERM means: do not wait any longer. It arrives while the workload imports torch, which takes seconds."""
    if not prepared.imports_torch:
        pytest.skip(f"{image.name} imports no torch; the next check freezes the workload instead")
    running = image.start(tree=tree_of(prepared.quick, tree.root))
    running.container.exec_run(["python", "-c", TWO_TERMS])
    ended = running.end()
    assert ended.code == 143, ended.log
    assert "a second signal ends at once" in ended.log
    assert "run the same command again" not in ended.log, "it stopped in an orderly way, not at once"
    assert (tree.failure or "").startswith("stopped by SIGTERM")
    assert tree.results() == {}


def test_a_second_signal_that_finds_the_workload_stuck_ends_it_at_once(
    image: Image, prepared: Prepared, tree: Tree
) -> None:
    running = image.start(tree=tree_of(prepared.slow, tree.root))
    running.container.exec_run(["python", "-c", TWO_SIGNALS_TO_A_FROZEN_WORKLOAD])
    ended = running.end()
    assert ended.code == 143, ended.log
    assert "a second signal ends at once" in ended.log
    assert "run the same command again" not in ended.log, "it stopped in an orderly way, not at once"
    assert (tree.failure or "").startswith("stopped by SIGTERM")
    assert tree.results() == {}
