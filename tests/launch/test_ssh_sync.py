"""A remote host whose folder, disk or store fails: its containers end, and the status says what is not in the store."""

from __future__ import annotations

import copy
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from estiba_launch.jobs import directory
from estiba_launch.jobs.record import new_document
from estiba_launch.jobs.status import JobStatus
from estiba_launch.request import jobfile
from estiba_launch.targets import registry
from estiba_launch.targets.docker_command import STOP_S
from estiba_launch.targets.ssh import observe
from estiba_launch.targets.ssh.connection import RemoteHost
from estiba_launch.targets.ssh.script import work_dir
from estiba_launch.targets.ssh.watch import watch_script

LAST_LINE = "last sync: /data: Input/output error"

DOCKER = r"""#!/bin/sh
# As much of docker as the watcher asks for. A file in $STATE is a container, its content the status and exit code.
echo "$*" >> "$STATE/../calls"
case "$1" in
  info | network | logs | rm | start | top) [ "$1" != rm ] || { shift 2; cd "$STATE" && rm -f "$@"; }
    [ "$1" != logs ] || { [ "$2" = --tail ] || echo ready; echo "$LAST_LINE"; } ;;
  stop) shift 3; for name in "$@"; do
      case $name in *-sync) code=${SYNC_CODE:-0} ;; *) code=143 ;; esac
      echo "exited $code" > "$STATE/$name"
    done ;;
  inspect) format=$3; shift 3
    for name in "$@"; do
      [ -e "$STATE/$name" ] || exit 1
      read -r status code < "$STATE/$name"
      case $format in
        *Running*) [ "$status" = running ] && echo true || echo false ;;
        *Status*ExitCode*Started*) finished=2026-01-01T00:00:09Z
          [ "$status" = exited ] || finished=0001-01-01T00:00:00Z
          echo "/$name $status $code false 2026-01-01T00:00:00Z $finished" ;;
        *Status*) echo "$status $code" ;;
        *ExitCode*) echo "$code" ;;
      esac
    done ;;
esac
exit 0
"""


class Remote:
    """A home directory with a job that runs, and a docker that only keeps books."""

    def __init__(self, tmp_path: Path, request: dict[str, Any]) -> None:
        self.job = jobfile.check(tmp_path / "job.yaml", request, registry.parse("ssh://u@h"))
        self.home, self.state = tmp_path / "home", tmp_path / "containers"
        self.work = self.home / work_dir(self.job.name)
        self.state.mkdir()
        self.work.mkdir(parents=True)
        (self.work / "start.sh").touch()
        (self.work / "watch.sh").write_text(watch_script(self.job))
        bin_dir = tmp_path / "bin"
        bin_dir.mkdir()
        (bin_dir / "docker").write_text(DOCKER)
        (bin_dir / "docker").chmod(0o755)
        # A watcher that waits two seconds between looks is not waited for.
        (bin_dir / "sleep").write_text("#!/bin/sh\nexec /bin/sleep 0.05\n")
        (bin_dir / "sleep").chmod(0o755)
        self.environment = {
            **os.environ,
            "PATH": f"{bin_dir}:{os.environ['PATH']}",
            "HOME": str(self.home),
            "STATE": str(self.state),
            "LAST_LINE": LAST_LINE,
        }
        self.document = new_document(copy.deepcopy(dict(self.job.request)))
        self.document["SecondaryStatus"] = "Training"
        self.document["Estiba"]["Attempts"] = [
            {"Number": 1, "StartTime": self.document["CreationTime"], "Hosts": ["algo-1"]}
        ]

    def set(self, container: str, status: str) -> None:
        (self.state / container).write_text(f"{status}\n")

    def watch(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(["sh", str(self.work / "watch.sh")], env=self.environment, stdout=subprocess.DEVNULL)

    def shell(self, script: str) -> str:
        done = subprocess.run(
            ["sh"], input=script, env=self.environment, cwd=self.home, capture_output=True, text=True, check=False
        )
        return done.stdout

    def status(self) -> JobStatus:
        seen = observe.parse(self.shell(observe.command([self.document])), [self.document])
        found = seen.get(self.job.name)
        document = observe.advance(self.document, found, "ssh://u@h") if found else self.document
        return JobStatus.from_json(document)

    @property
    def calls(self) -> str:
        path = self.state.parent / "calls"
        return path.read_text() if path.exists() else ""


@pytest.fixture
def remote(good, tmp_path) -> Remote:
    found = Remote(tmp_path, good)
    found.set(found.job.name, "running 0")
    found.set(f"{found.job.name}-sync", "running 0")
    return found


def rm_rf(folder: Path) -> None:
    subprocess.run(["rm", "-rf", str(folder)], check=True)


def until(done: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not done():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_last_sync_that_fails_ends_the_job_and_is_in_its_status(remote):
    remote.environment["SYNC_CODE"] = "1"
    remote.set(remote.job.name, "exited 0")
    assert remote.watch().wait(20) == 0
    status = remote.status()
    assert (status.status, status.unsynced) == ("Completed", LAST_LINE)
    assert LAST_LINE in status.document["SecondaryStatusTransitions"][-1]["StatusMessage"]
    assert f"rm --force {remote.job.name}-sync" in remote.calls


def test_a_last_sync_that_succeeds_leaves_no_note(remote):
    remote.set(remote.job.name, "exited 0")
    assert remote.watch().wait(20) == 0
    assert (remote.status().status, remote.status().unsynced) == ("Completed", None)


def test_a_syncing_container_that_died_makes_the_last_sync_all_the_same(remote):
    remote.set(remote.job.name, "exited 0")
    remote.set(f"{remote.job.name}-sync", "exited 137")
    # "ready" is seen once before the start and, in this docker, never twice; so `top` has to say that it ended.
    docker = Path(remote.environment["PATH"].split(":")[0]) / "docker"
    docker.write_text(
        docker.read_text()
        .replace("rm | start | top)", "rm | start)")
        .replace('case "$1" in', 'case "$1" in\n  top) exit 1 ;;', 1)
    )
    assert remote.watch().wait(20) == 0
    calls = remote.calls
    assert calls.index(f"start {remote.job.name}-sync") < calls.index(f"stop --time 600 {remote.job.name}-sync")
    assert remote.status().status == "Completed"


def test_a_folder_that_is_removed_while_the_job_runs_keeps_the_job_from_nothing(remote):
    watcher = remote.watch()
    until(lambda: f".State.ExitCode}}}} {remote.job.name}" in remote.calls)
    rm_rf(remote.work)
    assert not remote.status().is_terminal, "it still runs"
    remote.set(remote.job.name, "exited 0")
    assert watcher.wait(20) == 0
    assert remote.status().status == "Completed"
    assert f"stop --time 600 {remote.job.name}-sync" in remote.calls


def test_a_job_without_folder_and_watcher_can_be_stopped_and_ends(remote, monkeypatch, tmp_path):
    monkeypatch.setenv("ESTIBA_STATE", str(tmp_path / "state"))
    rm_rf(remote.work)
    assert not remote.status().is_terminal, "it still runs"
    folder = directory.create(remote.job.name)
    directory.write_json(folder / directory.REQUEST, dict(remote.job.request))
    ran: list[str] = []
    monkeypatch.setattr(RemoteHost, "run", lambda _, command, **__: ran.append(command))
    target = registry.target_of(registry.parse("ssh://u@h"))
    target.stop(remote.job.name, "enough")
    remote.shell(ran[-1] + "\nwait")
    until(lambda: "exited" in (remote.state / remote.job.name).read_text())
    assert f"stop --time {STOP_S} {remote.job.name}" in remote.calls
    status = remote.status()
    assert (status.status, status.secondary_status) == ("Stopped", "Stopped")


def test_a_job_whose_folder_and_containers_are_gone_has_failed(remote):
    rm_rf(remote.work)
    (remote.state / remote.job.name).unlink()
    assert remote.status().status == "Failed"
    assert "removed from the host" in str(remote.status().reason)
    remote.document["SecondaryStatus"] = "Starting"
    assert not remote.status().is_terminal, "a job that is being started has no folder for a moment"
