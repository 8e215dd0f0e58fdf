"""A container's limits: what PID 1 says of a job that ran into one, and its wait for hosts that do not answer."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from estiba.errors import ConfigError, Interrupted
from estiba.platform import peers, process_tree
from estiba.platform.peers import wait_for_hosts
from estiba.platform.supervisor import Command, Supervisor

OOM = "out of memory: a process was killed at the container's limit of 64 MiB; give it more memory"
PIDS = "the container's limit of 8 processes and threads was reached; raise it (--pids-limit)"
SIGNALS = frozenset({signal.SIGUSR1})


@pytest.fixture(params=["version 1", "version 2"])
def cgroup(request, tmp_path, monkeypatch) -> dict[str, Path]:
    """The files of this container's limits, none of which was hit so far."""
    monkeypatch.setattr(process_tree, "CGROUP", tmp_path)
    names = {
        "version 1": ("memory/memory.oom_control", "memory/memory.limit_in_bytes", "pids/pids.events", "pids/pids.max"),
        "version 2": ("memory.events", "memory.max", "pids.events", "pids.max"),
    }[request.param]
    files = dict(zip(("oom", "memory", "pids", "pids_max"), (tmp_path / name for name in names), strict=True))
    for path, text in zip(files.values(), ("low 0\noom_kill 2\n", f"{64 << 20}\n", "max 1\n", "8\n"), strict=True):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return files


@pytest.mark.parametrize(
    ("hit", "code", "written", "failure"),
    [
        ("oom", -9, None, f"{OOM}\n\nx was killed by SIGKILL\n"),
        ("oom", 1, "a worker died\n", f"{OOM}\n\na worker died\n"),
        ("pids", 1, None, f"{PIDS}\n\nx ended with exit code 1\n"),
        ("pids", 2, "--output-path cannot be written\n", f"{PIDS}\n\n--output-path cannot be written\n"),
    ],
)
def test_a_job_that_hit_a_limit_says_so_in_its_log_and_in_its_failure_file(
    cgroup, tmp_path, capsys, hit, code, written, failure
):
    path = tmp_path / "failure"
    supervisor = Supervisor(Command(("x",)), path, 120)
    if written:
        path.write_text(written)
    cgroup[hit].write_text("low 0\noom_kill 3\n" if hit == "oom" else "max 9\n")
    assert supervisor._explain(code) == (137 if code < 0 else code)
    assert capsys.readouterr().err == f"error: {OOM if hit == 'oom' else PIDS}\n"
    assert path.read_text() == failure


def test_a_job_that_hit_no_limit_is_told_as_before(cgroup, tmp_path, capsys):
    path = tmp_path / "failure"
    path.write_text("no column\n")
    assert Supervisor(Command(("x",)), path, 120)._explain(1) == 1
    assert (capsys.readouterr().err, path.read_text()) == ("", "no column\n")


def test_a_limit_that_was_hit_by_a_job_that_succeeded_is_not_mentioned(cgroup, tmp_path, capsys):
    supervisor = Supervisor(Command(("x",)), tmp_path / "failure", 120)
    cgroup["pids"].write_text("max 9\n")
    assert (supervisor._explain(0), capsys.readouterr().err) == (0, "")


def test_a_job_that_is_killed_by_a_signal_says_so_in_its_log(tmp_path):
    words = [sys.executable, "-m", "estiba.platform.entry", sys.executable, "-c"]
    words += ["import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"]
    env = {**os.environ, "ESTIBA_ROOT": str(tmp_path), "PYTHONPATH": str(Path(peers.__file__).parents[2])}
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 139
    assert "was killed by SIGSEGV" in done.stderr


# ---- hosts


def test_hosts_that_resolve_are_not_waited_for(capsys):
    wait_for_hosts(["localhost"], SIGNALS)
    assert capsys.readouterr().err == ""


def test_hosts_of_a_container_without_a_network_are_refused_at_once(monkeypatch, tmp_path):
    (tmp_path / "lo").touch()
    monkeypatch.setattr(peers, "_NETWORKS", tmp_path)
    with pytest.raises(ConfigError, match=r"no network, so no-such-host.invalid of resourceconfig.json"):
        wait_for_hosts(["localhost", "no-such-host.invalid"], SIGNALS)


@pytest.fixture
def names(monkeypatch) -> set[str]:
    """The host names that resolve."""
    known: set[str] = set()

    def resolve(host: str) -> str:
        if host not in known:
            raise socket.gaierror
        return "127.0.0.1"

    monkeypatch.setattr(socket, "gethostbyname", resolve)
    monkeypatch.setattr(peers, "_has_network", lambda: True)
    monkeypatch.setattr(peers, "POLL_S", 0)
    return known


def test_a_host_that_is_late_is_waited_for_and_named(names, monkeypatch, capsys):
    wait = signal.sigtimedwait

    def start_peer(signals: frozenset[signal.Signals], seconds: float) -> object:
        names.add("algo-2")
        return wait(signals, seconds)

    names.add("algo-1")
    monkeypatch.setattr(signal, "sigtimedwait", start_peer)
    wait_for_hosts(["algo-1", "algo-2"], SIGNALS)
    assert capsys.readouterr().err == "waiting for the name of algo-2 to resolve: 0 s of at most 900\n"


def test_the_wait_for_a_host_has_an_end(names):
    with pytest.raises(ConfigError, match=r"algo-2 of resourceconfig.json did not resolve within 0 s"):
        wait_for_hosts(["algo-2"], SIGNALS, wait_s=0)


def test_a_signal_ends_the_wait_for_a_host(names):
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
        with pytest.raises(Interrupted, match="stopped by SIGUSR1 while waiting for algo-2") as caught:
            wait_for_hosts(["algo-2"], SIGNALS)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    assert caught.value.exit_code == 128 + signal.SIGUSR1
