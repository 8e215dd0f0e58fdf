"""The command as a process: signals at any time, and streams that are narrow, full or closed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from estiba_launch.jobs.directory import REQUEST, create, write_json
from estiba_launch.jobs.logs import LOG
from estiba_launch.jobs.record import Record

LAUNCH = Path(__file__).parents[2] / "launch"


def estiba(*words: str, first: Path | None = None, **settings: Any) -> subprocess.Popen[str]:
    """`first` is a folder whose modules are found before all others."""
    paths = [*([str(first)] if first else []), str(LAUNCH)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **settings.pop("environ", {})}
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **settings}
    return subprocess.Popen([sys.executable, "-m", "estiba_launch", *words], env=env, text=True, **streams)


@pytest.fixture
def job(tmp_path, monkeypatch, good) -> Path:
    """The directory of a job that ended; its log has more lines than a pipe holds, and some beyond ASCII."""
    monkeypatch.setenv("ESTIBA_STATE", str(tmp_path / "state"))
    folder = create(good["TrainingJobName"])
    record = Record.create(folder, good)
    record.to("Failed", "se acabó")
    write_json(folder / REQUEST, good)
    (folder / LOG).write_text("--- año ünd 1 · 2 ---\n" + "línea\n" * 50_000)
    return folder


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_command_is_loaded_ends_it_with_4_and_no_traceback(tmp_path, signum):
    (tmp_path / "typer.py").write_text("import time\nprint('loading', flush=True)\ntime.sleep(60)\n")
    process = estiba("status", first=tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "loading\n"
    process.send_signal(signum)
    _, err = process.communicate()
    assert (process.returncode, err) == (4, "")


WAITS = """
import sys, time, threading, typer
from estiba_launch.cli import options, process

process.start()

@options.command
def wait() -> None:
    threading.Thread(target=time.sleep, args=(60,)).start()
    try:
        print("working", flush=True)
        time.sleep(60)
    finally:
        print("ending", flush=True)
        if "in order" in sys.argv:
            time.sleep(60)

app = typer.Typer()
app.command()(wait)
sys.argv, words = [sys.argv[0]], sys.argv
sys.argv.append("in order") if "in order" in words else None
app([])
"""


@pytest.mark.parametrize("where", ["in order", "at the exit"])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_a_command_at_once_and_with_4_too(where, signum):
    env = {**os.environ, "PYTHONPATH": str(LAUNCH)}
    words = [sys.executable, "-c", WAITS, where]
    process = subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "working\n"
    process.send_signal(signum)
    assert process.stdout.readline() == "ending\n"
    # A thread holds up the exit.
    process.send_signal(signum)
    _, err = process.communicate()
    assert (process.returncode, err) == (4, "")


def test_a_background_job_that_ignores_ctrl_c_still_ignores_it(tmp_path):
    (tmp_path / "typer.py").write_text("import signal\nprint(signal.getsignal(signal.SIGINT).name)\nraise SystemExit\n")
    process = estiba("status", first=tmp_path, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    out, _ = process.communicate()
    assert out == "SIG_IGN\n"


def test_a_log_is_shown_on_a_terminal_that_knows_only_ascii(job):
    process = estiba("logs", environ={"PYTHONIOENCODING": "ascii"})
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    assert out.startswith("--- a\\xf1o \\xfcnd 1 \\xb7 2 ---\nl\\xednea\n")


def test_json_on_a_terminal_that_knows_only_ascii_is_still_json(job):
    process = estiba("status", "--json", environ={"PYTHONIOENCODING": "ascii"})
    out, _ = process.communicate()
    assert json.loads(out)["FailureReason"] == "se acabó"


@pytest.mark.parametrize(
    "words", [("logs",), ("logs", "-f"), ("status",), ("list",), ("status", "--json"), ("--help",), ("run", "--help")]
)
def test_a_full_device_is_one_line_and_not_a_traceback(job, words):
    with open("/dev/full", "w") as full:
        process = estiba(*words, stdout=full)
        _, err = process.communicate()
    assert process.returncode == 1
    assert err == "estiba: cannot write (No space left on device); free some space, or send the output elsewhere\n"


def test_a_full_stderr_does_not_end_a_command(job):
    with open("/dev/full", "w") as full:
        process = estiba("resume", stderr=full)
        process.communicate()
    assert process.returncode == 0


@pytest.mark.parametrize("words", [("logs",), ("logs", "-f")])
def test_a_reader_that_leaves_early_is_no_error(job, words):
    process = estiba(*words)
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == "--- año ünd 1 · 2 ---\n"
    process.stdout.close()
    assert (process.wait(timeout=30), process.stderr.read()) == (0, "")


LATE = """
import os, signal, sys
from estiba_launch.cli import process

process.start()

class Late:
    def __del__(self, kill=os.kill, pid=os.getpid(), signum=signal.{name}):
        kill(pid, signum)

late = Late()  # deleted once the interpreter has given up its handlers
sys.exit(4)
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_while_the_interpreter_ends_does_not_change_the_exit_code(name):
    environ = {**os.environ, "PYTHONPATH": str(LAUNCH)}
    done = subprocess.run([sys.executable, "-c", LATE.format(name=name)], env=environ, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (4, "")
