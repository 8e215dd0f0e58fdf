"""Jobs of the ssh tests: shell scripts that come through a channel."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from estiba_launch.jobs.options import SubmitOptions
from estiba_launch.request import jobfile
from estiba_launch.request.options import HostOptions
from estiba_launch.targets import operations as jobs
from estiba_launch.targets import registry
from remote_host import RemoteMachine

IMAGE = os.environ.get("ESTIBA_TEST_IMAGE", "estiba/base:local")


def prefix(tmp_path: Path) -> str:
    """What the names of one test's jobs begin with."""
    return "t-" + tmp_path.name[-20:].replace("_", "-").strip("-")


class Work:
    """One test's job: a shell script that comes through a channel."""

    def __init__(self, tmp_path: Path, machine: RemoteMachine) -> None:
        self.tmp, self.machine, self.count = tmp_path, machine, 0
        for name in ("data/sub", "code", "checkpoints"):
            (tmp_path / name).mkdir(parents=True)
        (tmp_path / "data/a.txt").write_text("hola\n")
        (tmp_path / "data/sub/b c.txt").write_text("mundo\n")

    def request(self, script: str, **changes: Any) -> dict[str, Any]:
        self.count += 1
        (self.tmp / "code/run.sh").write_text(script)

        def channel(name: str, **more: Any) -> dict[str, Any]:
            source = {"S3DataType": "S3Prefix", "S3Uri": f"file://{self.tmp}/{name}", **more}
            return {"ChannelName": name, "DataSource": {"S3DataSource": source}}

        return {
            "TrainingJobName": f"{prefix(self.tmp)}-{self.count}-{os.getpid()}",
            "AlgorithmSpecification": {
                "TrainingImage": IMAGE,
                "TrainingInputMode": "File",
                "ContainerEntrypoint": ["sh", "/opt/ml/input/data/code/run.sh"],
                "MetricDefinitions": [{"Name": "loss", "Regex": "loss=([0-9.]+)"}],
            },
            "HyperParameters": {"model": "it's $HOME"},
            "Environment": {"COLOUR": "blue green"},
            "InputDataConfig": [channel("code"), channel("data", S3DataDistributionType="ShardedByS3Key")],
            "OutputDataConfig": {"S3OutputPath": f"file://{self.tmp}/out"},
            "ResourceConfig": {"InstanceType": "ml.g4dn.xlarge", "InstanceCount": 1, "VolumeSizeInGB": 1},
            "StoppingCondition": {"MaxRuntimeInSeconds": 60, "MaxWaitTimeInSeconds": 100},
            "EnableManagedSpotTraining": True,
            "CheckpointConfig": {"S3Uri": f"file://{self.tmp}/checkpoints"},
            **changes,
        }

    def start(self, script: str, options: HostOptions | None = None, **changes: Any) -> str:
        job = jobfile.check(self.tmp / "job.yaml", self.request(script, **changes), registry.parse(self.machine.target))
        self.said: list[str] = []
        chosen = options or HostOptions(gpus="all", gpus_if_any=True)
        jobs.start(jobs.prepare(job, SubmitOptions(host=chosen)), self.said.append)
        return job.name

    def run(self, script: str, **changes: Any) -> dict[str, Any]:
        name = self.start(script, **changes)
        jobs.wait(name, 60)
        lines = list(jobs.log_lines(name, follow=False))
        return {**jobs.status(name).to_json(), "log": lines}

    def wait_for(self, name: str, text: str) -> None:
        until = time.monotonic() + 30
        while time.monotonic() < until:
            if any(text in line for line in jobs.log_lines(name, follow=False)):
                return
            time.sleep(0.2)
        raise AssertionError(text)
