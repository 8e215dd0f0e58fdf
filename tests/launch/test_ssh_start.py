"""The half of an ssh job's script that runs on the host, while it still downloads data. Docker is a stub here."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from estiba_launch.jobs.record import Record
from estiba_launch.request import jobfile
from estiba_launch.targets import operations, registry
from estiba_launch.targets.ssh import observe
from estiba_launch.targets.ssh.script import START, work_dir

# A download runs until it is killed, or until the file `arrived` appears.
DOCKER = """#!/bin/sh
case "$*" in
    *agent.py\\ get*)
        touch "$HOME/downloading"
        until [ -e "$HOME/arrived" ]; do [ ! -e "$HOME/killed" ] || exit 137; sleep 0.05; done ;;
    run*) echo "$*" >>"$HOME/started" ;;
    ps*volume=*) echo 0123 ;;
    kill*) touch "$HOME/killed" ;;
    stop*) echo "$*" >>"$HOME/stops" ;;
    inspect*) exit 1 ;;
esac
"""


class Remote:
    """A host on which the job starts."""

    def __init__(self, home: Path, request: dict[str, Any]) -> None:
        self.home, self.request = home, request
        job = jobfile.check(home / "job.yaml", request, registry.parse("ssh://user@203.0.113.7"))
        self.work = home / work_dir(job.name)
        self.work.mkdir(parents=True)
        (self.work / "start.sh").write_text(operations.prepare(job).render())
        (home / "docker").write_text(DOCKER)
        (home / "docker").chmod(0o755)
        self.environ = {**os.environ, "HOME": str(home), "PATH": f"{home}:{os.environ['PATH']}"}
        self.document = Record.create(home, request).value
        self.document["Estiba"]["Attempts"] = [{"Number": 1, "StartTime": self.document["CreationTime"]}]

    def start(self) -> subprocess.Popen[bytes]:
        words = ["sh", str(self.work / "start.sh"), START]
        process = subprocess.Popen(words, env=self.environ, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while not (self.home / "downloading").exists():
            assert process.poll() is None, process.stderr and process.stderr.read()
        return process

    def status(self) -> tuple[str, str]:
        script = observe.command([self.document])
        text = subprocess.run(["sh", "-c", script], env=self.environ, capture_output=True, text=True, check=True).stdout
        seen = observe.parse(text, [self.document])[self.request["TrainingJobName"]]
        after = observe.advance(self.document, seen, "ssh://host")
        return after["TrainingJobStatus"], after["SecondaryStatus"]


@pytest.fixture
def remote(tmp_path, good) -> Iterator[Remote]:
    remote = Remote(tmp_path, good)
    yield remote
    (tmp_path / "arrived").touch()


def test_a_stop_while_data_is_downloaded_ends_the_job_before_its_containers_start(remote):
    process = remote.start()
    assert remote.status() == ("InProgress", "Starting")
    (remote.work / "stopped").write_text("requested by the user\n")
    # Not ended yet: its download still runs.
    assert remote.status() == ("Stopping", "Stopping")
    assert process.wait(30) != 0
    assert remote.status() == ("Stopped", "Stopped")
    assert not (remote.home / "started").exists()


def test_max_runtime_holds_while_data_is_downloaded(remote):
    (remote.work / "deadline").write_text("1\n")
    assert remote.start().wait(30) != 0
    assert remote.status() == ("Stopped", "MaxRuntimeExceeded")
    assert not (remote.home / "started").exists()


def test_data_that_arrives_starts_the_job(remote):
    del remote.request["CheckpointConfig"], remote.request["EnableManagedSpotTraining"]
    del remote.request["StoppingCondition"]["MaxWaitTimeInSeconds"]
    remote = Remote(remote.home / "other", remote.request)
    process = remote.start()
    (remote.home / "arrived").touch()
    assert process.wait(30) == 0
    assert "--name embed-1" in (remote.home / "started").read_text()
    assert not (remote.home / "stops").exists()
