"""watch.sh of the ssh target with a docker that is a stub: what it does when engine, machine or disk let it down."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from estiba_launch.request import jobfile
from estiba_launch.targets import registry
from estiba_launch.targets.ssh.script import work_dir
from estiba_launch.targets.ssh.watch import watch_script

DOCKER = """#!/bin/sh
echo "$*" >> "$STATE/calls"
case "$1 $*" in
  inspect*-sync) exit 1 ;;
  info*) [ ! -e "$STATE/away" ] ;;
  inspect*Name*) [ ! -e "$STATE/away" ] && echo "/embed-1 $(cat "$STATE/container") false start finish" ;;
  inspect*) cat "$STATE/container" 2>/dev/null || exit 1
    if [ -e "$STATE/goes-away" ]; then mv "$STATE/goes-away" "$STATE/away"; exit 1; fi ;;
  start*embed-1) echo 'exited 0' > "$STATE/container" ;;
  logs*) echo "stamp line" ;;
  stop* | rm* | network*) ;;
esac
"""
# Time passes: the engine comes back, and the disk gets room.
SLEEP = """#!/bin/sh
rm -f "$STATE/away"
[ "$1" = 2 ] || rm -rf end.new
"""


class Watch:
    def __init__(self, folder: Path, script: str) -> None:
        self.state, self.job = folder / "state", folder / work_dir("embed-1")
        (self.job / "algo-1/output").mkdir(parents=True)
        (folder / "bin").mkdir()
        self.state.mkdir()
        self.script = script
        for name, text in (("docker", DOCKER), ("sleep", SLEEP)):
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)
        self.environ = {"PATH": f"{folder}/bin:{os.environ['PATH']}", "HOME": str(folder), "STATE": str(self.state)}

    def run(self, container: str) -> str:
        """Returns `end` for a container in this state."""
        (self.state / "container").write_text(f"{container}\n")
        subprocess.run(["sh", "-c", self.script], env=self.environ, check=True, capture_output=True, timeout=60)
        return (self.job / "end").read_text()

    @property
    def restarts(self) -> int:
        return sum(line.endswith("start embed-1") for line in (self.state / "calls").read_text().splitlines())


@pytest.fixture
def watch(tmp_path, good) -> Watch:
    return Watch(tmp_path, watch_script(jobfile.check(Path("job.yaml"), good, registry.parse("ssh://h"))))


def test_a_container_that_the_machine_took_down_is_started_again_once(watch):
    (watch.job / "engine").write_text("another boot\n")
    (watch.job / "algo-1/output/failure").write_text("of the first attempt")
    assert watch.run("exited 255") == "/embed-1 exited 0 false start finish\n"
    assert watch.restarts == 1
    assert len((watch.job / "restarts").read_text().splitlines()) == 1
    assert not (watch.job / "algo-1/output/failure").exists()


def test_a_container_that_failed_by_itself_is_not_started_again(watch):
    assert watch.run("exited 3").split()[1:3] == ["exited", "3"]
    assert watch.restarts == 0


def test_a_job_that_was_stopped_before_the_restart_stays_stopped(watch):
    (watch.job / "engine").write_text("another boot\n")
    (watch.job / "stopped").write_text("requested by the user\n")
    assert watch.run("exited 143").split()[1:3] == ["exited", "143"]
    assert watch.restarts == 0


def test_a_job_whose_time_is_over_is_not_started_again(watch):
    (watch.job / "engine").write_text("another boot\n")
    (watch.job / "deadline").write_text("1\n")
    assert watch.run("exited 255").split()[1:3] == ["exited", "255"]
    assert watch.restarts == 0


def test_an_engine_that_goes_away_between_two_questions_ends_no_job(watch):
    (watch.state / "goes-away").touch()
    assert watch.run("exited 0").split()[1:3] == ["exited", "0"]


def test_the_end_is_written_once_the_disk_has_room_and_containers_with_secrets_stay_until_then(watch):
    (watch.job / "end.new").mkdir()
    (watch.job / "had-secrets").touch()
    assert watch.run("exited 0").split()[1:3] == ["exited", "0"]
    calls = (watch.state / "calls").read_text().splitlines()
    assert sum(call.startswith("logs") for call in calls) == 2
    assert calls.index("rm --force embed-1") > max(n for n, call in enumerate(calls) if call.startswith("logs"))
