"""The ssh target where things are missing or go away: no engine, no password, no connection, no power, no disk."""

from __future__ import annotations

import json
import os
import pty
import sys
import threading
from pathlib import Path

import pytest

from estiba_launch.errors import HostError, LaunchError
from estiba_launch.jobs.options import SubmitOptions
from estiba_launch.request import jobfile
from estiba_launch.targets import operations as jobs
from estiba_launch.targets import registry
from estiba_launch.targets.ssh import bootstrap
from estiba_launch.targets.ssh.connection import HostUnreachable, RemoteHost
from remote_host import RemoteMachine
from ssh_job import Work

pytestmark = [pytest.mark.docker, pytest.mark.timeout(600)]  # the first test waits for a machine with an engine


def host_of(machine: RemoteMachine, user: str) -> RemoteHost:
    return RemoteHost(registry.parse(machine.target_of(user)))


def test_a_bare_machine_is_given_an_engine_once_unattended_upgrades_have_ended(machine):
    said = "\n".join(machine.bootstrap_log)
    assert "docker does not answer; installing" in said
    assert "(python3) holds the package lock (unattended upgrades?); waiting up to 900 s" in said
    assert "answers, with buildx and compose v2" in said
    assert bootstrap.probe(host_of(machine, "user")) == bootstrap.Equipment(
        docker=True, gpu=False, gpu_in_docker=False, rsync=True
    )


def test_a_user_who_may_not_become_root_is_told_in_sudos_words(machine, monkeypatch):
    guest = host_of(machine, "guest")
    allow = "echo 'guest ALL=(ALL) NOPASSWD: ALL' > /etc/sudoers.d/estiba"
    with pytest.raises(LaunchError, match="sudo asks for guest's password; run this in a terminal") as told:
        bootstrap.bootstrap(guest, print, needs_rsync=False)
    assert allow in str(told.value)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    with pytest.raises(LaunchError, match="guest is not in the sudoers file") as told:
        bootstrap.sudo_password(guest, lambda _: "open sesame")
    assert allow in str(told.value)
    machine.sh("echo 'Defaults:guest requiretty' > /etc/sudoers.d/guest")
    with pytest.raises(LaunchError, match="sorry, you must have a tty to run sudo"):
        bootstrap.sudo_password(guest)
    machine.sh("rm /etc/sudoers.d/guest; mv /usr/bin/sudo /usr/bin/sudo.away")
    with pytest.raises(LaunchError, match=r"sudo: (command )?not found; install Docker and rsync there by hand"):
        bootstrap.sudo_password(guest)
    machine.sh("mv /usr/bin/sudo.away /usr/bin/sudo")


def test_a_wrong_password_is_tried_once(machine, monkeypatch):
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    asked: list[str] = []

    def ask(prompt: str) -> str:
        asked.append(prompt)
        return "guess"

    with pytest.raises(LaunchError, match="sudo did not accept the password of typist"):
        bootstrap.sudo_password(host_of(machine, "typist"), ask)
    assert asked == ["[sudo] password for typist on 127.0.0.1: "]


def test_a_password_that_sudo_does_not_want_after_all_is_not_run_as_a_command(machine, monkeypatch):
    monkeypatch.setattr(bootstrap, "sudo_password", lambda _: "touch /tmp/ran-the-password")
    monkeypatch.setattr(bootstrap, "engine_script", lambda: "#!/bin/sh\necho installing $*\n")
    machine.sh("mv /usr/bin/rsync /usr/bin/rsync.away")
    said: list[str] = []
    bootstrap.bootstrap(host_of(machine, "user"), said.append, needs_rsync=True)
    machine.sh("mv /usr/bin/rsync.away /usr/bin/rsync")
    assert said[-1] == "  installing rsync"
    assert machine.sh("ls /tmp/ran-the-password", check=False) == ""


def test_run_asks_for_the_sudo_password_once_and_the_job_runs_to_its_results(work, remote, tmp_path):
    (tmp_path / "job.yaml").write_text(json.dumps(work.request("echo hola; echo 1 > /opt/ml/model/w")))
    assert bootstrap.probe(host_of(remote, "typist")).docker is False
    screen = on_a_terminal(
        ["run", "job.yaml", "--target", remote.target_of("typist"), "--yes"],
        answer=("[sudo] password for typist on 127.0.0.1: ", "open sesame"),
    )
    assert screen.count("[sudo] password") == 1, screen
    assert "open sesame" not in screen
    assert "adding typist to the docker group" in screen
    assert "hola" in screen
    (name,) = [one.name for one in jobs.list_jobs()]
    assert jobs.status(name).status == "Completed"
    assert jobs.download(name, tmp_path / "got")["model"] == 1
    # It is not asked again.
    assert bootstrap.probe(host_of(remote, "typist")).docker


def on_a_terminal(words: list[str], *, answer: tuple[str, str]) -> str:
    """Run the command on a terminal and type the answer to its question. Returns all that was shown."""
    question, typed = answer
    child, terminal = pty.fork()
    if child == 0:
        path = str(Path(jobfile.__file__).parents[2])
        environ = {**os.environ, "PYTHONPATH": path, "COLUMNS": "400"}
        os.execve(sys.executable, [sys.executable, "-m", "estiba_launch.cli.app", *words], environ)
    shown, typed_at = b"", -1
    while True:
        try:
            chunk = os.read(terminal, 1 << 16)
        except OSError:
            break
        if not chunk:
            break
        shown += chunk
        if question.encode() in shown and typed_at < 0:
            typed_at = len(shown)
            os.write(terminal, typed.encode() + b"\n")
    os.waitpid(child, 0)
    return shown.decode("utf-8", "replace")


def test_an_installation_that_loses_its_connection_is_finished_by_the_same_command(machine):
    host = host_of(machine, "user")
    machine.sh("dpkg --remove rsync")
    upgrade = machine.hold_package_lock()

    def lose(line: str) -> None:
        if "holds the package lock" in line:
            machine.disconnect()

    with pytest.raises(HostUnreachable, match=r"connection was lost while packages were installed.*same command again"):
        bootstrap.bootstrap(host, lose, needs_rsync=True)
    upgrade.kill()
    machine.connect()
    assert bootstrap.bootstrap(host, print, needs_rsync=True).rsync


COUNTS_TO_NINE = """
trap 'exit 0' TERM
cd /opt/ml/checkpoints; n=$(cat n 2>/dev/null || echo 0); echo from $n
while [ $n -lt 9 ]; do
  n=$((n + 1)); echo $n > n.new; mv n.new n
  if [ $n = 5 ]; then until [ -e go ]; do sleep 0.1; done; fi
done
echo $n > /opt/ml/model/n
"""


def goes_on(work: Work, name: str) -> None:
    """The job ends with what an undisturbed one leaves, from its checkpoint on the machine."""
    work.machine.sh(f"touch {work.machine.job_folder(name)}/checkpoints/go")
    value = jobs.wait(name, 120).to_json()
    assert value["TrainingJobStatus"] == "Completed", value
    attempts = value["Estiba"]["Attempts"]
    assert [one["Outcome"] for one in attempts] == ["Interrupted", "Completed"]
    assert "the host or its engine restarted" in attempts[0]["Reason"]
    assert list(jobs.log_lines(name, follow=False)) == ["from 0", "from 5"]
    jobs.download(name, work.tmp / "got")
    assert (work.tmp / "got/model/n").read_text() == "9\n"


def half_done(work: Work) -> str:
    name = work.start(COUNTS_TO_NINE, StoppingCondition={"MaxRuntimeInSeconds": 600, "MaxWaitTimeInSeconds": 600})
    work.machine.sh(f'until [ "$(cat {work.machine.job_folder(name)}/checkpoints/n)" = 5 ]; do sleep 0.1; done')
    return name


def test_a_machine_that_loses_its_power_continues_the_job_from_its_checkpoints(work, remote):
    name = half_done(work)
    remote.cut_power()
    assert "cannot be reached" in str(jobs.status(name).unreachable)
    remote.boot()
    goes_on(work, name)


def test_an_engine_that_is_upgraded_continues_the_job_from_its_checkpoints(work, remote):
    name = half_done(work)
    remote.restart_engine()
    goes_on(work, name)


def test_checkpoints_that_were_not_fetched_are_found_by_the_next_job_on_the_machine(work, remote, tmp_path):
    name = half_done(work)
    jobs.stop(name)
    assert jobs.wait(name, 60).status == "Stopped"
    assert list((tmp_path / "checkpoints").iterdir()) == []
    again = work.start("cat /opt/ml/checkpoints/n; echo 6 > /opt/ml/checkpoints/n")
    assert jobs.wait(again, 60).status == "Completed"
    assert list(jobs.log_lines(again, follow=False)) == ["5"]
    assert f"checkpoints: from {name} on this host, which was not fetched" in "\n".join(work.said)
    jobs.download(again, tmp_path / "got")
    assert (tmp_path / "checkpoints/n").read_text() == "6\n"


def test_a_start_that_loses_its_connection_starts_the_job_nevertheless(work, remote):
    request = work.request("echo hola")
    name = request["TrainingJobName"]
    lost = threading.Thread(target=lose_while_starting, args=(remote, name))

    def report(line: str) -> None:
        said.append(line)
        if "starting on" in line:
            remote.sh("pkill -STOP dockerd")
            lost.start()

    said: list[str] = []
    job = jobfile.check(work.tmp / "job.yaml", request, registry.parse(remote.target))
    jobs.start(jobs.prepare(job, SubmitOptions()), report)
    lost.join()
    assert f"{name} may be running, `estiba status {name}` asks again" in said[-1]
    assert jobs.wait(name, 60).status == "Completed"
    assert list(jobs.log_lines(name, follow=False)) == ["hola"]


def lose_while_starting(remote: RemoteMachine, name: str) -> None:
    lock = f"{remote.job_folder(name)}/start.lock"
    remote.sh(f"while flock --nonblock {lock} true; do sleep 0.1; done")
    remote.disconnect()
    remote.sh("pkill -CONT dockerd")
    remote.connect()


def test_a_start_that_never_arrived_is_a_failure_that_says_to_run_it_again(work, remote):
    request = work.request("echo hola")
    name = request["TrainingJobName"]
    job = jobfile.check(work.tmp / "job.yaml", request, registry.parse(remote.target))
    jobs.start(jobs.prepare(job, SubmitOptions()), lambda line: remote.disconnect() if "starting on" in line else None)
    remote.connect()
    assert jobs.status(name).status == "InProgress"
    remote.sh(f"touch --date '5 minutes ago' {remote.job_folder(name)}/start.lock")
    found = jobs.status(name)
    assert (found.status, found.reason) == (
        "Failed",
        "InternalServerError: the connection or the host was lost before it had started; run it again",
    )


@pytest.fixture
def small_disk(remote):
    remote.sh(
        "install -d -o user ~user/estiba && mount -t tmpfs -o size=16m tmpfs ~user/estiba && chown user ~user/estiba"
    )
    yield
    remote.sh("docker ps --all --quiet | xargs --no-run-if-empty docker rm --force; umount ~user/estiba")


def test_data_that_does_not_fit_is_refused_with_the_remedy(small_disk, work, remote):
    (work.tmp / "data/large").write_bytes(os.urandom(20_000_000))
    with pytest.raises(HostError, match=r"No space left on device.*make room there .*old jobs in ~/estiba/jobs"):
        work.start("true")
    (work.tmp / "data/large").unlink()
    remote.sh("rm -r ~user/estiba/data")
    assert work.run("echo hola")["log"] == ["hola"]


def test_a_full_disk_loses_neither_log_nor_checkpoint_nor_end(small_disk, work, remote):
    name = work.start("echo 7 > /opt/ml/checkpoints/n; cat /dev/zero > /opt/ml/checkpoints/large; echo bye; exit 3")
    remote.sh(f"until docker ps --all --filter name={name} --filter status=exited | grep {name}; do sleep 0.1; done")
    found = jobs.status(name)
    assert not found.is_terminal
    assert "is full; make room there" in str(found.unreachable)
    remote.sh(f"rm {remote.job_folder(name)}/checkpoints/large")
    found = jobs.wait(name, 60)
    assert (found.status, found.attempts[-1].exit_codes) == ("Failed", {"algo-1": 3})
    assert list(jobs.log_lines(name, follow=False))[-1] == "bye"
    jobs.download(name, work.tmp / "got")
    assert (work.tmp / "checkpoints/n").read_text() == "7\n"


def test_a_job_can_be_stopped_on_a_full_disk(small_disk, work, remote):
    name = work.start(
        "trap 'exit 0' TERM; cat /dev/zero > /opt/ml/checkpoints/large; echo up; while :; do sleep 0.1; done"
    )
    work.wait_for(name, "up")
    jobs.stop(name)
    remote.sh(f"until docker ps --all --filter name={name} --filter status=exited | grep {name}; do sleep 0.1; done")
    remote.sh(f"rm {remote.job_folder(name)}/checkpoints/large")
    assert jobs.wait(name, 60).status == "Stopped"
