"""Drills against real containers: a small shell job that counts, saves and resumes, in the base image."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import docker
import pytest

from estiba_launch import state
from estiba_launch.localhost import control, jobs

IMAGE = os.environ.get("ESTIBA_TEST_IMAGE", "estiba/base:local")


def _why_not() -> str | None:
    try:
        docker.from_env(timeout=10).images.get(IMAGE)
    except docker.errors.ImageNotFound:
        return f"no image {IMAGE}; run `make build/base BASE=local`"
    except Exception as error:
        return f"no docker engine ({error}); run `make engine`"
    return None


WHY_NOT = _why_not()
pytestmark = [pytest.mark.docker, pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))]

COUNTS = """
# Publishes each step by rename, as the job layer does; TERM saves and leaves.
cd /opt/ml/checkpoints
step=$(cat step 2>/dev/null || echo 0)
[ "$step" = 0 ] || echo "resuming: $step steps are saved"
trap 'exit 143' TERM
while [ "$step" -lt 40 ]; do
  sleep 0.1
  step=$((step + 1)); echo $step > step.new; sync step.new; mv step.new step
  echo "step=$step of=40"
done
echo "weights after $step steps" > /opt/ml/model/weights
date +%s.%N > /opt/ml/output/data/results.json
[ -z "$FORGETS" ] || echo "restored $(ls | wc -l)" > /opt/ml/output/data/journal
[ -z "$RANDOM_OUTPUT" ] || cat /proc/sys/kernel/random/uuid > /opt/ml/output/data/vectors
"""

SAVES_IN_PLACE = """
# Overwrites its one checkpoint slowly and trusts whatever is there: what a drill is meant to find.
cd /opt/ml/checkpoints
done=0
if [ -e all ]; then
  done=$(tail -n 1 all); [ "$(wc -l < all)" = 5 ] || { echo "resuming: 0 steps"; done=0; torn=yes; }
fi
step=$done
while [ "$step" -lt 30 ]; do
  step=$((step + 1)); echo "step=$step of=30"; sleep 0.1
  if [ $((step % 5)) = 0 ]; then for i in 1 2 3 4 5; do sleep 0.05; echo $step; done > all; fi
done
echo "weights ${torn:-whole}" > /opt/ml/model/weights
"""

FORGETS_EVERYTHING = """
for step in $(seq 1 20); do echo "step=$step of=20"; sleep 0.15; done
echo weights > /opt/ml/model/weights
"""

SILENT = """
cd /opt/ml/checkpoints
n=$(cat n 2>/dev/null || echo 0)
while [ $n -lt 60 ]; do sleep 0.1; n=$((n + 1)); echo $n > n.new; mv n.new n; done
echo weights > /opt/ml/model/weights
"""


class Desk:
    """One test's job file and state."""

    def __init__(self, tmp_path: Path) -> None:
        self.tmp = tmp_path
        (tmp_path / "code").mkdir()
        self.state = tmp_path / "state"

    def write(self, script: str, **changes: Any) -> str:
        path = self.tmp / "code" / "run.sh"
        # A file that is written again is another input, and gets another reference.
        if not path.exists() or path.read_text() != script:
            path.write_text(script)
        source = {"S3DataType": "S3Prefix", "S3Uri": f"file://{self.tmp}/code"}
        request = {
            "AlgorithmSpecification": {
                "TrainingImage": IMAGE,
                "TrainingInputMode": "File",
                "ContainerEntrypoint": ["sh", "/opt/ml/input/data/code/run.sh"],
            },
            "InputDataConfig": [{"ChannelName": "code", "DataSource": {"S3DataSource": source}}],
            "OutputDataConfig": {"S3OutputPath": f"file://{self.tmp}/out"},
            "ResourceConfig": {"InstanceType": "ml.g4dn.xlarge", "InstanceCount": 1, "VolumeSizeInGB": 1},
            "StoppingCondition": {"MaxRuntimeInSeconds": 100, "MaxWaitTimeInSeconds": 200},
            "EnableManagedSpotTraining": True,
            "CheckpointConfig": {"S3Uri": f"file://{self.tmp}/checkpoints"},
            **changes,
        }
        path = self.tmp / "job.yaml"
        path.write_text(json.dumps(request))
        return str(path)

    def drill(self, script: str, *words: str, request: dict[str, Any] | None = None) -> tuple[int, dict[str, Any], str]:
        """(exit code, the document, what was said on stderr)."""
        package = Path(jobs.__file__).parents[2]
        process = subprocess.run(
            [sys.executable, "-m", "estiba_launch.cli", "drill", self.write(script, **(request or {})),
             "--json", "--sync-every-s", "0.3", "--grace-s", "5", "--gpus", "none", *words],
            env={**os.environ, "PYTHONPATH": str(package), "ESTIBA_STATE": str(self.state)},
            text=True, capture_output=True, timeout=110, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert "Traceback" not in process.stderr
        return process.returncode, json.loads(process.stdout or "{}"), process.stderr


@pytest.fixture
def desk(tmp_path, monkeypatch):
    monkeypatch.setenv("ESTIBA_STATE", str(tmp_path / "state"))
    yield Desk(tmp_path)
    client = docker.from_env()
    for name in state.job_names():
        if control.supervised(state.job_dir(name)):
            control.order_stop(state.job_dir(name), "the test is over")
            jobs.wait(name, 30)
        assert client.containers.list(all=True, filters={"label": f"estiba.job={name}"}) == []


@pytest.mark.slow
def test_a_random_mix_passes_on_a_job_that_saves_every_step_and_the_reference_is_made_once(desk):
    code, document, said = desk.drill(COUNTS, "--seed", "3", "--max-lost", "20steps", "--max-lost", "20s")
    assert (code, document["result"], document["problems"]) == (0, "PASS", []), said
    assert len(document["attempts"]) == 4
    assert [entry["interrupted"] for entry in document["attempts"]] == [True, True, True, False]
    assert document["reference"]["files_compared"] == 1
    assert all(entry["checkpoint"] == "intact" for entry in document["attempts"][:3])
    assert 0 <= document["most_lost"]["step"] <= 20
    code, again, said = desk.drill(COUNTS, "--seed", "4", "--kills", "1", "--scenario", "kill")
    assert code == 0
    assert "of an earlier drill" in said
    assert again["reference"]["job"] == document["reference"]["job"]


def test_term_is_a_save_and_costs_nothing(desk):
    code, document, said = desk.drill(COUNTS, "--scenario", "term", "--no-reference", "--max-lost", "1steps")
    assert code == 0, (document, said)
    first, second = document["attempts"]
    assert first["how"] == "TERM, left by itself with 143"
    assert 0 <= first["save_s"] < 5
    assert first["lost"] <= 1
    # What was saved between its last line and the TERM is work kept as well.
    assert second["started_from"] >= first["counted"] - first["lost"]
    assert document["reference"] is None


def test_what_was_not_synced_is_lost_with_the_host_and_counted(desk):
    code, document, said = desk.drill(COUNTS, "--scenario", "kill-before-sync", "--no-reference", "--seed", "2")
    assert code == 0, (document, said)
    first, second = document["attempts"]
    assert "unsynced" in first["how"]
    # The hold lasts for a twentieth of the work, two steps, and the kill takes its time.
    assert first["lost"] >= 2
    assert second["started_from"] == first["counted"] - first["lost"]
    assert document["most_lost"]["step"] == first["lost"]
    assert first["lost_s"] >= 0.1


def test_a_limit_that_is_not_kept_fails_the_drill(desk):
    code, document, _ = desk.drill(COUNTS, "--scenario", "kill-before-sync", "--no-reference", "--max-lost", "1steps")
    assert (code, document["result"]) == (1, "FAIL")
    assert "more than --max-lost 1 steps" in document["problems"][0]


def test_a_kill_during_a_save_finds_the_job_that_trusts_a_torn_file(desk):
    code, document, said = desk.drill(SAVES_IN_PLACE, "--scenario", "kill-during-save", "--seed", "1")
    assert code == 1, (document, said)
    assert document["attempts"][0]["how"] == "KILL in the middle of the write of all"
    assert document["reference"]["differences"] == ["model/weights differs"]
    code, document, said = desk.drill(COUNTS, "--scenario", "kill-during-save", "--no-reference")
    assert code == 0, (document, said)
    assert document["attempts"][0]["how"] == "KILL in the middle of the write of step.new"
    assert document["attempts"][0]["lost"] <= 1


def test_one_host_of_two_takes_the_other_with_it(desk):
    resources = {"InstanceType": "ml.g4dn.xlarge", "InstanceCount": 2, "VolumeSizeInGB": 1}
    # Each host saves under its own name: all hosts share one checkpoint prefix.
    script = COUNTS.replace(" step.new", ' "$(hostname).new"').replace(
        'mv "$(hostname).new" step', 'mv "$(hostname).new" "$(hostname)"'
    )
    script = script.replace("cat step ", 'cat "$(hostname)" ')
    code, document, said = desk.drill(
        script, "--scenario", "one-host", "--no-reference", request={"ResourceConfig": resources}
    )
    assert code == 0, (document, said)
    host = document["planned"][0]["host"]
    how = {entry["host"]: entry["how"] for entry in document["attempts"] if entry["attempt"] == 1}
    assert how[host].startswith(f"KILL of {host}")
    assert all(text.startswith(f"KILL with {host}") for name, text in how.items() if name != host)
    assert {entry["host"] for entry in document["attempts"] if entry["attempt"] == 2} == {"algo-1", "algo-2"}
    assert all(entry["checkpoint"] == "intact" for entry in document["attempts"] if entry["interrupted"])


def test_waiting_for_capacity_is_no_time_that_hosts_are_held(desk):
    code, document, said = desk.drill(COUNTS, "--scenario", "capacity-wait", "--wait-s", "4", "--no-reference")
    assert code == 0, (document, said)
    assert document["attempts"][0]["restart_s"] >= 4
    assert document["running_s"] < 12


def test_a_job_without_checkpoints_loses_everything_and_the_drill_says_how_much(desk):
    code, document, _ = desk.drill(FORGETS_EVERYTHING, "--scenario", "kill", "--max-lost", "1steps", "--no-reference")
    assert code == 1
    first, second = document["attempts"]
    assert (first["lost"], first["checkpoint"], second["started_from"]) == (first["counted"], "none", 0)
    assert first["lost"] >= 1


def test_a_job_that_counts_nothing_is_struck_at_work_and_its_loss_is_unknown(desk):
    code, document, said = desk.drill(SILENT, "--scenario", "kill")
    assert code == 0, (document, said)
    assert document["attempts"][0]["lost"] is None
    assert document["most_lost"] == {"s": None}
    code, document, _ = desk.drill(SILENT, "--scenario", "kill", "--max-lost", "60s")
    assert code == 1
    assert "not known" in document["problems"][0]


def test_a_different_output_is_found_and_can_be_ignored_by_name(desk):
    request = {"Environment": {"RANDOM_OUTPUT": "1"}}
    code, document, _ = desk.drill(COUNTS, "--scenario", "kill", request=request)
    assert code == 1
    assert document["reference"]["differences"] == ["output/vectors differs"]
    code, document, _ = desk.drill(COUNTS, "--scenario", "kill", "--ignore", "vectors", request=request)
    assert code == 0, document


def test_a_job_that_is_over_too_soon_is_no_passed_drill(desk):
    script = COUNTS.replace("-lt 40", "-lt 3").replace("of=40", "of=3")
    code, document, _ = desk.drill(script, "--kills", "9", "--scenario", "term", "--no-reference")
    assert code == 1
    assert "of 9 interruptions took place" in document["problems"][0]


def test_a_job_that_fails_undisturbed_is_told_from_one_that_fails_the_drill(desk):
    code, document, said = desk.drill("echo 'no such column' > /opt/ml/output/failure; exit 1")
    assert (code, document) == (1, {})
    assert "does not complete even undisturbed (no such column)" in said


def test_a_drill_leaves_the_jobs_own_places_alone_and_cleans_up(desk):
    code, document, _ = desk.drill(COUNTS, "--scenario", "kill", "--no-reference")
    assert code == 0
    assert not (desk.tmp / "out").exists()
    assert not (desk.tmp / "checkpoints").exists()
    assert [path.name for path in (desk.state / "drills").iterdir()] == []
    assert jobs.describe(document["job"])["TrainingJobStatus"] == "Completed"
