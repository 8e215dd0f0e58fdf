"""demo/run.sh says which step it is at, never falls silent, and leaves no job behind without a word."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

# Ends at once, except for what $SLOW names, which waits for the file `go`.
STUB = """#!/bin/sh
case "$(basename "$0") $*" in *"$SLOW"*) [ -z "$SLOW" ] || until [ -e "$PLACE/go" ]; do sleep 0.05; done ;; esac
case "$*" in *--follow*) echo 'rows=1 of=2' ;; container*ExitCode*) echo 0 ;; container*) echo exited ;; esac
exit 0
"""
STEPS = ["Docker engine", "host tools", "image", "corpus", "model", "embedding", "search"]


# One container, whose state is in files. Its job ends when the file `end` appears, or when it is killed.
DOCKER = """#!/bin/sh
cd "$PLACE"
running() { [ -e started ] && [ ! -e end ] && ! grep -q KILL signals 2>/dev/null; }
case "$*" in
    run*--detach*)
        echo "$$" >starting
        until [ -e start ]; do sleep 0.05; done
        touch started ;;
    run*) echo found ;;
    container*ExitCode*) if grep -q . signals 2>/dev/null; then echo 143; else echo 0; fi ;;
    container*) if running; then echo running; elif [ -e started ]; then echo exited; else exit 1; fi ;;
    logs*) echo 'rows=1 of=2'; while running; do sleep 0.05; done ;;
    kill*) running && echo "$3" >>signals ;;
    rm*) ! running && rm -f started ;;
esac
"""


class Demo:
    """A checkout in which every program of the demo only pretends."""

    def __init__(self, root: Path, place: Path) -> None:
        self.place = place
        for name in ("bin/docker", "bin/make", "scripts/engine.sh", "scripts/env.sh", ".venv/bin/python",
                     ".build/tools/bin/python"):  # fmt: skip
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_text(STUB)
            (place / name).chmod(0o755)
        (place / "demo").mkdir()
        shutil.copy(root / "demo/run.sh", place / "demo")

    def start(self, slow: str = "") -> subprocess.Popen[str]:
        environ = os.environ | {
            "PATH": f"{self.place}/bin:{os.environ['PATH']}", "PLACE": str(self.place), "SLOW": slow,
            "ESTIBA_DEMO_TICK_S": "0.1", "ESTIBA_DEMO_BURST_S": "0",
        }  # fmt: skip
        return subprocess.Popen(
            ["bash", self.place / "demo/run.sh"],
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def signals(self) -> list[str]:
        """What the job in its container was sent."""
        path = self.place / "signals"
        return path.read_text().split() if path.exists() else []


@pytest.fixture
def demo(root: Path, tmp_path: Path) -> Iterator[Demo]:
    demo = Demo(root, tmp_path)
    yield demo
    (tmp_path / "go").touch()


def test_each_step_is_announced_with_its_number(demo: Demo) -> None:
    output, _ = demo.start().communicate()
    begun = re.findall(r"^demo: step (\d) of 7: ([^:\n]+)", output, re.MULTILINE)
    first = dict(reversed(begun))
    assert [first[number].startswith(name) for number, name in zip("1234567", STEPS, strict=True)] == [True] * 7, output
    assert all(f"step {number} of 7: {name}" in output and "done in" in output for number, name in first.items())


@pytest.mark.parametrize(
    ("slow", "name"),
    [("engine.sh", "Docker engine"), ("build/embed", "image"), ("corpus.py", "corpus"), ("--follow", "embedding")],
)
def test_a_step_that_takes_long_ticks_until_it_ends(slow: str, name: str, demo: Demo) -> None:
    process = demo.start(slow)
    assert process.stdout is not None
    ticks = 0
    for line in process.stdout:
        ticks += bool(re.match(rf"demo: step \d of 7: {name}[^:]*(:local)?: \d+ s", line))
        if ticks == 2:
            (demo.place / "go").touch()
    assert ticks >= 2
    assert process.wait() == 0


@pytest.fixture
def job(demo: Demo) -> Iterator[Demo]:
    (demo.place / "bin/docker").write_text(DOCKER)
    yield demo
    (demo.place / "start").touch()
    (demo.place / "end").touch()


def read_until(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"no {text!r}")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_group_reaches_the_job_and_the_demo_waits_for_its_end(
    job: Demo, signum: signal.Signals
) -> None:
    (job.place / "start").touch()
    process = job.start()
    read_until(process, "rows=1")
    os.killpg(process.pid, signum)
    read_until(process, "stopping: the job saves its finished work")
    if signum == signal.SIGTERM:  # The first follower ended with the group. Ctrl-C does not reach it.
        read_until(process, "rows=1")
    (job.place / "end").touch()
    output, _ = process.communicate()
    assert job.signals() == [signum.name.removeprefix("SIG")]
    assert "`make demo` resumes" in output
    assert process.returncode == 128 + signum


def test_a_later_signal_ends_the_job_at_once(job: Demo) -> None:
    (job.place / "start").touch()
    process = job.start()
    read_until(process, "rows=1")
    os.killpg(process.pid, signal.SIGTERM)
    read_until(process, "stopping: the job saves its finished work")
    # Bash forgets a signal that comes while the handler of the same one is still returning. The follower that comes
    # after it says that it has returned.
    read_until(process, "rows=1")
    os.killpg(process.pid, signal.SIGTERM)
    process.communicate()
    assert job.signals() == ["TERM", "KILL"]
    assert process.returncode == 143


def test_a_signal_while_the_job_is_started_is_not_lost(job: Demo) -> None:
    process = job.start()
    read_until(process, "embedding")
    while not (job.place / "starting").exists():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    (job.place / "start").touch()
    read_until(process, "rows=1")
    assert job.signals() == ["TERM"]
    (job.place / "end").touch()
    process.communicate()
    assert process.returncode == 143


def test_a_job_that_goes_on_is_announced(job: Demo) -> None:
    """As when the engine stops answering this shell."""
    (job.place / "start").touch()
    docker = job.place / "bin/docker"
    docker.write_text(
        DOCKER.replace("run*) echo found ;;", "run*) touch started; exit 1 ;;").replace(
            "touch started ;;", "touch started; exit 1 ;;"
        )
    )
    output, _ = job.start().communicate()
    assert "the job goes on: `make demo` follows it, `docker stop estiba-demo-" in output
