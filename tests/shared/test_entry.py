"""PID 1, as real processes: what runs, who is signalled, which exit status and failure text result."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

PY = sys.executable
ALL_BYTES = bytes(range(256))


# --- what runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "batch_size"),
    [
        ([], 5),
        (["train"], 5),
        (["--batch-size", "6"], 6),
        (["--batch_size=6"], 6),
        (["train", "--batch-size", "6"], 6),
    ],
)
def test_the_workload_runs_with_hyperparameters_and_flags(place: Any, arguments: list[str], batch_size: int) -> None:
    place.hyperparameters(**{"batch-size": "5", "text-column": '"a b"'})
    done = place.run(place.entry(*arguments))
    assert (done.returncode, done.stderr) == (0, b"")
    found = json.loads(done.stdout)
    assert (found["batch_size"], found["text_column"]) == (batch_size, "a b")
    assert not place.failure.exists()


def test_anything_else_is_a_command_with_its_arguments_untouched(place: Any) -> None:
    script = place.script("import sys; print(sys.argv[1:])")
    done = place.run(place.entry(PY, script, "a b", "--batch-size", "", "$HOME"))
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == b"['a b', '--batch-size', '', '$HOME']\n"


def test_a_command_reads_what_is_piped_to_it(place: Any) -> None:
    reading, writing = os.pipe()
    os.write(writing, b"piped")
    os.close(writing)
    done = place.run(place.entry("cat", stdin=reading))
    os.close(reading)
    assert done.stdout == b"piped"


def test_an_image_without_a_workload_is_an_error_with_the_remedy(place: Any) -> None:
    done = place.run(place.entry("train", env={"ESTIBA_WORKLOAD": None}))
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr
    assert place.failure_text().startswith("ESTIBA_WORKLOAD is not set")


def test_serving_is_refused_with_the_remedy(place: Any) -> None:
    done = place.run(place.entry("serve"))
    assert done.returncode == 2
    assert "`train`" in place.failure_text()


@pytest.mark.parametrize("by", ["environment", "hyperparameter"])
def test_flags_beside_a_script_are_refused_with_the_remedy(place: Any, by: str) -> None:
    env = {"SAGEMAKER_PROGRAM": "x.py"} if by == "environment" else {}
    if by == "hyperparameter":
        place.hyperparameters(sagemaker_program='"x.py"')
    done = place.run(place.entry("train", "--batch-size", "3", env=env))
    assert done.returncode == 2
    assert "'x.py'" in place.failure_text()
    assert "hyperparameters" in place.failure_text()


@pytest.mark.parametrize("text", ["soon", "-3", "0"])
def test_a_grace_period_that_is_not_a_time_is_refused_before_anything_runs(place: Any, text: str) -> None:
    done = place.run(place.entry("touch", "ran", env={"ESTIBA_STOP_GRACE_S": text}))
    assert done.returncode == 2
    assert not (place.folder / "ran").exists()
    assert place.failure_text().startswith(f"environment variable ESTIBA_STOP_GRACE_S is {text!r}")


# --- exit status ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 1, 2, 7, 126, 127, 255])
def test_the_exit_status_of_a_command_survives(place: Any, code: int) -> None:
    assert place.run(place.entry("sh", "-c", f"exit {code}")).returncode == code
    assert place.failure.exists() == (code != 0)


@pytest.mark.parametrize("name", ["KILL", "TERM", "SEGV", "HUP", "PIPE"])
def test_a_death_by_signal_is_128_and_its_number(place: Any, name: str) -> None:
    done = place.run(place.entry("sh", "-c", f"ulimit -c 0; kill -{name} $$"))
    assert done.returncode == 128 + signal.Signals[f"SIG{name}"]
    assert f"killed by SIG{name}" in place.failure_text()


def test_a_missing_command_exits_127_and_one_that_cannot_run_126(place: Any) -> None:
    done = place.run(place.entry("no-such-command", "x"))
    assert done.returncode == 127
    assert done.stderr == b"error: command 'no-such-command' is not in this image; check its spelling\n"
    assert place.failure_text() == "command 'no-such-command' is not in this image; check its spelling\n"
    plain = place.script("#!/bin/sh\n", "plain.sh")
    done = place.run(place.entry(plain))
    assert done.returncode == 126
    assert "Permission denied" in place.failure_text()
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize(("mode", "code"), [("config-error", 2), ("data-error", 1), ("crash", 1), ("kill-myself", 137)])
def test_the_exit_status_of_the_workload_survives(place: Any, mode: str, code: int) -> None:
    assert place.run(place.entry("--mode", mode)).returncode == code


def test_the_status_is_kept_where_the_starter_ignores_its_children(place: Any) -> None:
    """SIGCHLD ignored is inherited, and hides every child's end."""
    starter = place.script(
        """
        import os, signal, sys
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        os.execv(sys.executable, [sys.executable, "-m", "estiba.platform.entry", "sh", "-c", "exit 7"])
        """
    )
    assert place.run(place.start(PY, starter)).returncode == 7


# --- the failure file ----------------------------------------------------------------------------------------------


def test_the_failure_file_of_an_earlier_attempt_is_removed(place: Any) -> None:
    place.failure.parent.mkdir(parents=True)
    place.failure.write_text("an old story\n")
    assert place.run(place.entry("true")).returncode == 0
    assert not place.failure.exists()
    place.failure.write_text("an old story\n")
    assert place.run(place.entry("false")).returncode == 1
    assert "old story" not in place.failure_text()


@pytest.mark.parametrize(
    ("arguments", "first_line"),
    [
        (["--mode", "crash"], "ValueError: the third step went wrong"),
        (["--mode", "config-error"], "--mode is 'config-error': that cannot be; choose another"),
        (["--mode", "data-error"], "a.parquet: no column 'texto'; pass --text-column NAME"),
        (["--batch-size", "x"], "flag --batch-size is 'x'"),
        (["--mode", "abort"], f"{PY} -m stub was killed by SIGABRT"),
        ([PY, "-c", "raise KeyError('texto')"], "KeyError: 'texto'"),
        ([PY, "-c", "import sys; sys.exit('no such column')"], "no such column"),
        (["sh", "-c", "echo loading; echo 'disk is full' >&2; exit 3"], "disk is full"),
        (["sh", "-c", "exit 3"], "sh -c exit 3 ended with exit code 3"),
    ],
)
def test_the_failure_file_begins_with_the_cause(place: Any, arguments: list[str], first_line: str) -> None:
    assert place.run(place.entry(*arguments)).returncode != 0
    assert place.failure_text().splitlines()[0].startswith(first_line)
    assert place.failure_text()[:1024].strip() != ""


def test_a_workload_that_cannot_be_imported_is_explained(place: Any) -> None:
    done = place.run(place.entry("train", env={"ESTIBA_WORKLOAD": "stub.absent"}))
    assert done.returncode == 1
    assert "No module named stub.absent" in place.failure_text().splitlines()[0]


def test_a_failure_file_that_cannot_be_written_changes_nothing_else(place: Any) -> None:
    done = place.run(place.entry("sh", "-c", "exit 7", env={"ESTIBA_ROOT": "/dev/null/ml"}))
    assert (done.returncode, done.stderr) == (7, b"")


# --- stderr --------------------------------------------------------------------------------------------------------


def test_stderr_passes_through_unchanged(place: Any) -> None:
    script = place.script(
        """
        import sys
        out = sys.stderr.buffer
        for step in range(100):
            out.write(b"\\r%3d%%" % step)
            out.flush()
        out.write(bytes(range(256)) * 8192)
        """
    )
    done = place.run(place.entry(PY, script))
    assert done.returncode == 0
    assert done.stderr == b"".join(b"\r%3d%%" % step for step in range(100)) + ALL_BYTES * 8192
    assert done.stdout == b""


def test_a_line_appears_when_it_is_written_and_not_at_the_end(place: Any) -> None:
    process = place.entry("sh", "-c", "echo one >&2; read x", stdin=-1)
    assert process.stderr.readline() == b"one\n"
    assert process.poll() is None
    process.stdin.close()
    process.wait(10)


def test_a_slow_reader_still_gets_the_last_lines(place: Any) -> None:
    size = 150_000  # the pipes' capacity: the program ends while all of it is unread
    process = place.entry(PY, "-c", f"import os; os.write(2, b'x' * {size}); os.write(2, b'the cause')")
    time.sleep(1.8)
    done = place.run(process)
    assert done.stderr == b"x" * size + b"the cause"


def test_a_helper_that_holds_stderr_does_not_hold_up_the_end(place: Any) -> None:
    process = place.entry("sh", "-c", "sleep 60 & exit 3")
    started = time.monotonic()
    assert process.wait(10) == 3
    assert time.monotonic() - started < 5


# --- signals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--mode", "wait"], ["train"]])
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_reaches_the_workload(place: Any, arguments: list[str], signum: signal.Signals, code: int) -> None:
    place.hyperparameters(mode="wait")
    process = place.entry(*arguments)
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signum)
    done = place.run(process)
    assert done.returncode == code
    assert place.failure_text().startswith(f"stopped by {signum.name}: 3 steps are saved")


def test_a_workload_that_finishes_in_the_grace_period_succeeds(place: Any) -> None:
    process = place.entry("--mode", "finish")
    assert process.stdout.readline() == b"ready\n"
    process.terminate()
    assert place.run(process).returncode == 0
    assert not place.failure.exists()


SAVES = """
import os, signal, sys, time
from pathlib import Path
def save(signum, frame):
    time.sleep(0.2)
    Path("saved").write_text(signal.Signals(signum).name)
    print("saved", flush=True)
    sys.exit(3)
signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
while True:
    time.sleep(0.05)  # short: a signal just before a sleep is seen after it
"""


@pytest.mark.parametrize("wrapper", ["bash", "sh"])
def test_term_reaches_a_program_behind_a_shell_and_nothing_runs_after_it(place: Any, wrapper: str) -> None:
    place.script(SAVES)
    process = place.entry(wrapper, "-c", f"{PY} x.py; echo no")
    assert process.stdout.readline() == b"ready\n"
    process.terminate()
    done = place.run(process)
    assert done.stdout == b"saved\n"
    assert (place.folder / "saved").read_text() == "SIGTERM"
    assert done.returncode == 143
    assert "stopped by SIGTERM" in place.failure_text()


def test_term_reaches_a_program_behind_a_shell_script_behind_a_shell(place: Any) -> None:
    place.script(SAVES)
    place.script(f"{PY} x.py\necho no\n", "inner.sh")
    process = place.entry("bash", "-c", "bash inner.sh; echo no")
    assert process.stdout.readline() == b"ready\n"
    process.terminate()
    assert place.run(process).stdout == b"saved\n"


def test_a_programs_own_helpers_are_not_signalled(place: Any) -> None:
    """A data loader's workers must keep running while their parent saves."""
    place.script(
        """
        import signal, sys, time
        def note(signum, frame):
            open("helper-was-signalled", "w").close()
        signal.signal(signal.SIGTERM, note)
        print("ready", flush=True)
        for line in sys.stdin:
            print("fed", line.strip(), flush=True)
        """,
        "helper.py",
    )
    script = place.script(
        """
        import signal, subprocess, sys, time
        helpers = [subprocess.Popen([sys.executable, "helper.py"], stdin=-1, stdout=-1, text=True) for _ in range(2)]
        for helper in helpers:
            helper.stdout.readline()
        def save(signum, frame):
            for helper in helpers:
                out, _ = helper.communicate("last batch\\n")
                print(out.strip(), helper.returncode, flush=True)
            sys.exit(0)
        signal.signal(signal.SIGTERM, save)
        print("ready", flush=True)
        while True:
            time.sleep(0.05)
        """
    )
    process = place.entry(PY, script)
    assert process.stdout.readline() == b"ready\n"
    process.terminate()
    done = place.run(process)
    assert done.stdout == b"fed last batch 0\n" * 2
    assert done.returncode == 0
    assert not (place.folder / "helper-was-signalled").exists()


def test_other_signals_are_passed_on_and_stop_nothing(place: Any) -> None:
    script = place.script(
        """
        import signal, sys
        signal.signal(signal.SIGUSR1, lambda *_: print("noted", flush=True))
        signal.signal(signal.SIGHUP, lambda *_: print("read again", flush=True))
        print("ready", flush=True)
        for line in sys.stdin:
            pass
        """
    )
    process = place.entry(PY, script, stdin=-1, env={"ESTIBA_STOP_GRACE_S": "5"})
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGUSR1)
    assert process.stdout.readline() == b"noted\n"
    time.sleep(1.2)  # longer than the grace period leaves
    assert process.poll() is None
    assert place.run(process).returncode == 0


IGNORES = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
time.sleep(60)
"""


def test_a_program_that_ignores_term_is_killed_at_the_end_of_the_grace_period(place: Any) -> None:
    process = place.entry(PY, place.script(IGNORES), env={"ESTIBA_STOP_GRACE_S": "6"})
    assert process.stdout.readline() == b"ready\n"
    sent = time.monotonic()
    process.terminate()
    done = place.run(process)
    assert 1.5 < time.monotonic() - sent < 5
    assert done.returncode == 137
    assert place.failure_text() == f"{PY} {place.folder}/x.py did not stop within 2 s of SIGTERM: killed\n"
    assert b"killed processes that were still running 2 s after the signal" in done.stderr


def test_a_grace_period_too_short_to_divide_is_never_reported_as_a_negative_time(place: Any) -> None:
    process = place.entry(PY, place.script(IGNORES), env={"ESTIBA_STOP_GRACE_S": "2"})
    assert process.stdout.readline() == b"ready\n"
    process.terminate()
    assert place.run(process).returncode == 137
    assert "did not stop within 1 s of SIGTERM" in place.failure_text()


def test_the_second_signal_is_passed_on_too(place: Any) -> None:
    script = place.script(
        """
        import signal, sys, time
        count = 0
        def note(signum, frame):
            global count
            count += 1
            print(count, flush=True)
            if count == 2:
                sys.exit(143)
        signal.signal(signal.SIGTERM, note)
        print("ready", flush=True)
        while True:
            time.sleep(0.05)
        """
    )
    process = place.entry(PY, script)
    assert process.stdout.readline() == b"ready\n"
    for expected in (b"1\n", b"2\n"):
        process.terminate()
        assert process.stdout.readline() == expected
    assert place.run(process).returncode == 143


def test_a_pause_of_the_whole_container_is_no_signal(place: Any) -> None:
    """After SIGSTOP and SIGCONT, sigtimedwait may return a number that is no signal."""
    quick = "from estiba.platform import entry, supervisor; supervisor.Supervisor.poll_s = 0.2"
    process = place.start(PY, "-c", f"{quick}; entry.main(['sh', '-c', 'echo ready; sleep 1.5'])")
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(0.7)
    process.send_signal(signal.SIGCONT)
    done = place.run(process)
    assert (done.returncode, done.stderr) == (0, b"")


ORPHANS = """
import os, signal, subprocess, sys, time
work = "import time; time.sleep(0.7); open('orphan-is-done', 'w').close()"
def leave(signum, frame):
    os._exit(143)
signal.signal(signal.SIGTERM, leave)
if os.fork() == 0:
    os.setsid()
    for fd in (0, 1, 2):  # nothing but the process itself may be what is waited for
        os.dup2(os.open(os.devnull, os.O_RDWR), fd)
    os.execv(sys.executable, [sys.executable, "-c", work])
print("ready", flush=True)
while True:
    time.sleep(0.05)  # short: a signal just before a sleep is seen after it
"""


def test_orphans_are_waited_for_while_stopping(place: Any) -> None:
    process = place.entry(PY, place.script(ORPHANS))
    assert process.stdout.readline() == b"ready\n"
    process.terminate()
    assert process.wait(10) == 143
    assert (place.folder / "orphan-is-done").exists()


def test_orphans_are_not_waited_for_past_the_grace_period(place: Any) -> None:
    process = place.entry(
        PY, place.script(ORPHANS.replace("time.sleep(0.7)", "time.sleep(50)")), env={"ESTIBA_STOP_GRACE_S": "5"}
    )
    assert process.stdout.readline() == b"ready\n"
    sent = time.monotonic()
    process.terminate()
    process.wait(10)
    assert 0.5 < time.monotonic() - sent < 5
    assert not (place.folder / "orphan-is-done").exists()


def test_orphans_that_end_leave_no_zombies(place: Any) -> None:
    script = place.script(
        """
        import os, subprocess, sys, time
        middle = "import subprocess; print(subprocess.Popen(['true']).pid)"
        pid = int(subprocess.run([sys.executable, "-c", middle], stdout=-1, check=True).stdout)
        for _ in range(500):
            if not os.path.exists(f"/proc/{pid}"):
                print("reaped")
                break
            time.sleep(0.01)
        """
    )
    assert place.run(place.entry(PY, script)).stdout == b"reaped\n"


# --- a terminal ----------------------------------------------------------------------------------------------------


def read_until(terminal: int, words: bytes) -> bytes:
    seen = b""
    deadline = time.monotonic() + 10
    while words not in seen and time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.1)[0]:
            try:
                seen += os.read(terminal, 4096)
            except OSError:  # the other end is closed
                break
    return seen


def test_on_a_terminal_ctrl_c_reaches_the_child_and_stderr_stays_a_terminal(place: Any) -> None:
    script = place.script(
        """
        import os, signal, sys, time
        def note(signum, frame):
            print("noted", signal.Signals(signum).name, flush=True)
            sys.exit(130)
        signal.signal(signal.SIGINT, note)
        print("ready", [os.isatty(fd) for fd in (0, 1, 2)], os.getpgrp() == os.tcgetpgrp(0), flush=True)
        print("typed", input(), flush=True)
        while True:
            time.sleep(0.05)
        """
    )
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(place.folder)
        os.execve(PY, [PY, "-m", "estiba.platform.entry", PY, str(script)], place.environ)
    assert b"ready [True, True, True] True" in read_until(terminal, b"True\r\n")
    os.write(terminal, b"hola\n")
    assert b"typed hola" in read_until(terminal, b"typed hola")
    os.write(terminal, b"\x03")
    assert b"noted SIGINT" in read_until(terminal, b"noted SIGINT")
    _, status = os.waitpid(child, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 130
    assert "SIGINT" in place.failure_text()


# --- the user's script ---------------------------------------------------------------------------------------------


@pytest.fixture
def code(place: Any) -> Path:
    """The folder for scripts."""
    folder: Path = place.root / "code"
    for path in (folder, place.root / "input/config", place.root / "output", place.root / "model"):
        path.mkdir(parents=True, exist_ok=True)
    (place.root / "input/config/hyperparameters.json").write_text('{"epochs": "3"}')
    (place.root / "input/config/inputdataconfig.json").write_text("{}")
    (place.root / "input/config/resourceconfig.json").write_text(
        '{"current_host": "localhost", "hosts": ["localhost"], "network_interface_name": "lo"}'
    )
    return folder


@pytest.mark.parametrize("exit_code", [0, 3])
def test_a_script_runs_with_its_hyperparameters_and_keeps_its_status(place: Any, code: Path, exit_code: int) -> None:
    (code / "x.py").write_text(f"import sys; print(sys.argv[1:], flush=True); sys.exit({exit_code})")
    done = place.run(place.entry("train", env={"SAGEMAKER_PROGRAM": "x.py"}), timeout_s=60)
    assert b"['--epochs', '3']" in done.stdout
    assert done.returncode == exit_code
    assert place.failure.exists() == (exit_code != 0)


def test_the_cause_of_a_scripts_failure_comes_first(place: Any, code: Path) -> None:
    (code / "x.py").write_text("raise ValueError('loss is nan')")
    done = place.run(place.entry("train", env={"SAGEMAKER_PROGRAM": "x.py"}), timeout_s=60)
    assert done.returncode == 1
    assert place.failure_text().startswith("ValueError: loss is nan")
    assert "exit code 1" in place.failure_text()


@pytest.mark.parametrize("name", ["x.py", "x.sh"])
def test_term_reaches_a_script(place: Any, code: Path, name: str) -> None:
    (code / "save.py").write_text(SAVES)
    (code / "x.py").write_text(SAVES)
    (code / "x.sh").write_text(f"{PY} save.py\n")
    process = place.entry("train", env={"SAGEMAKER_PROGRAM": name})
    lines = iter(process.stdout.readline, b"")
    assert any(line == b"ready\n" for line in lines)
    process.terminate()
    done = place.run(process)
    assert b"saved\n" in done.stdout
    assert done.returncode == (3 if name == "x.py" else 143)


# --- the child's environment ---------------------------------------------------------------------------------------


def test_idle_openmp_threads_of_every_image_sleep_soon_unless_it_is_set_otherwise(place: Any) -> None:
    script = place.script("import os; print(os.environ.get('GOMP_SPINCOUNT'))")
    assert place.run(place.entry(PY, script, env={"GOMP_SPINCOUNT": None})).stdout == b"3000\n"
    assert place.run(place.entry(PY, script, env={"GOMP_SPINCOUNT": "7"})).stdout == b"7\n"
