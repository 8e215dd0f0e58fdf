"""Drills against real containers: a small shell job that counts, saves and resumes, in the base image."""

from __future__ import annotations

import pytest

from base_image import NEEDS_BASE_IMAGE
from drill_run import drills
from estiba_launch.targets import operations

pytestmark = NEEDS_BASE_IMAGE


@pytest.fixture
def run(tmp_path, monkeypatch):
    yield from drills(tmp_path, monkeypatch)


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
# Overwrites its only checkpoint slowly and trusts any content: what a drill should find.
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
while [ $n -lt 60 ]; do sleep ${PACE:-0.1}; n=$((n + 1)); echo $n > n.new; mv n.new n; done
echo weights > /opt/ml/model/weights
"""


@pytest.mark.slow
def test_a_random_mix_passes_on_a_job_that_saves_every_step_and_reuses_the_reference(run):
    code, document, stderr = run.drill(COUNTS, "--seed", "3", "--max-lost", "20steps", "--max-lost", "20s")
    assert (code, document["result"], document["problems"]) == (0, "PASS", []), stderr
    assert len(document["attempts"]) == 4
    assert [entry["interrupted"] for entry in document["attempts"]] == [True, True, True, False]
    assert document["reference"]["files_compared"] == 1
    assert all(entry["checkpoint"] == "intact" for entry in document["attempts"][:3])
    assert 0 <= document["most_lost"]["step"] <= 20
    code, again, stderr = run.drill(COUNTS, "--seed", "4", "--kills", "1", "--scenario", "kill")
    assert code == 0
    assert "from an earlier drill" in stderr
    assert again["reference"]["job"] == document["reference"]["job"]


def test_term_is_a_save_and_costs_nothing(run):
    code, document, stderr = run.drill(COUNTS, "--scenario", "term", "--no-reference", "--max-lost", "1steps")
    assert code == 0, (document, stderr)
    first, second = document["attempts"]
    assert first["how"] == "TERM, exited with 143"
    assert 0 <= first["save_s"] < 5
    assert first["lost"] <= 1
    # Work saved between its last line and the TERM is kept too.
    assert second["started_from"] >= first["counted"] - first["lost"]
    assert document["reference"] is None


def test_unsynced_work_is_lost_with_the_host_and_counted(run):
    code, document, stderr = run.drill(COUNTS, "--scenario", "kill-before-sync", "--no-reference", "--seed", "2")
    assert code == 0, (document, stderr)
    first, second = document["attempts"]
    assert "unsynced" in first["how"]
    # The hold lasts for a twentieth of the work, two steps, and the kill takes its time.
    assert first["lost"] >= 2
    assert second["started_from"] == first["counted"] - first["lost"]
    assert document["most_lost"]["step"] == first["lost"]
    assert first["lost_s"] >= 0.1


def test_an_exceeded_limit_fails_the_drill(run):
    code, document, _ = run.drill(COUNTS, "--scenario", "kill-before-sync", "--no-reference", "--max-lost", "1steps")
    assert (code, document["result"]) == (1, "FAIL")
    assert "more than --max-lost 1 steps" in document["problems"][0]


def test_a_kill_during_a_save_finds_the_job_that_trusts_a_torn_file(run):
    code, document, stderr = run.drill(SAVES_IN_PLACE, "--scenario", "kill-during-save", "--seed", "1")
    assert code == 1, (document, stderr)
    assert document["attempts"][0]["how"] == "KILL in the middle of the write of all"
    assert document["reference"]["differences"] == ["model/weights differs"]
    # A slow write: an `echo` alone closes the file before any watcher wakes up.
    slow = COUNTS.replace("echo $step > step.new", "{ echo $step; sleep 0.05; } > step.new")
    code, document, stderr = run.drill(slow, "--scenario", "kill-during-save", "--no-reference")
    assert code == 0, (document, stderr)
    assert document["attempts"][0]["how"] == "KILL in the middle of the write of step.new"
    assert document["attempts"][0]["lost"] <= 1


def test_one_host_of_two_takes_the_other_with_it(run):
    resources = {"InstanceType": "ml.g4dn.xlarge", "InstanceCount": 2, "VolumeSizeInGB": 1}
    # Each host saves under its own name: all hosts share one checkpoint prefix.
    script = COUNTS.replace(" step.new", ' "$(hostname).new"').replace(
        'mv "$(hostname).new" step', 'mv "$(hostname).new" "$(hostname)"'
    )
    script = script.replace("cat step ", 'cat "$(hostname)" ')
    code, document, stderr = run.drill(
        script, "--scenario", "one-host", "--no-reference", request={"ResourceConfig": resources}
    )
    assert code == 0, (document, stderr)
    host = document["planned"][0]["host"]
    how = {entry["host"]: entry["how"] for entry in document["attempts"] if entry["attempt"] == 1}
    assert how[host].startswith(f"KILL of {host}")
    assert all(text.startswith(f"KILL with {host}") for name, text in how.items() if name != host)
    assert {entry["host"] for entry in document["attempts"] if entry["attempt"] == 2} == {"algo-1", "algo-2"}
    assert all(entry["checkpoint"] == "intact" for entry in document["attempts"] if entry["interrupted"])


def test_waiting_for_capacity_does_not_count_as_held_time(run):
    code, document, stderr = run.drill(COUNTS, "--scenario", "capacity-wait", "--wait-s", "4", "--no-reference")
    assert code == 0, (document, stderr)
    assert document["attempts"][0]["restart_s"] >= 4
    assert document["running_s"] < 12


def test_a_job_without_checkpoints_loses_everything_and_the_drill_counts_it(run):
    code, document, _ = run.drill(FORGETS_EVERYTHING, "--scenario", "kill", "--max-lost", "1steps", "--no-reference")
    assert code == 1
    first, second = document["attempts"]
    assert (first["lost"], first["checkpoint"], second["started_from"]) == (first["counted"], "none", 0)
    assert first["lost"] >= 1


def test_a_job_without_progress_lines_is_hit_at_work_and_its_loss_is_unknown(run):
    code, document, stderr = run.drill(SILENT, "--scenario", "kill")
    assert code == 0, (document, stderr)
    assert document["attempts"][0]["lost"] is None
    assert document["most_lost"] == {"s": None}
    code, document, _ = run.drill(SILENT, "--scenario", "kill", "--max-lost", "60s")
    assert code == 1
    assert "not known" in document["problems"][0]


def test_a_drill_that_runs_faster_than_its_reference_still_hits_the_job_at_work(run):
    """As if the machine was busy during the reference: a share of its seconds is past the end of the drilled run."""
    script = "case $TRAINING_JOB_NAME in *-reference-*) PACE=0.2 ;; *) PACE=0.1 ;; esac\n" + SILENT
    code, document, stderr = run.drill(script, "--scenario", "kill")
    assert code == 0, (document, stderr)
    assert document["planned"][0]["share"] > 0.6
    assert "trying again" not in stderr


def test_a_term_after_all_work_fails_the_drill(run):
    script = """
    trap 'exit 143' TERM
    for step in 1 2 3 4; do echo "step=$step of=4"; done
    for wait in $(seq 30); do sleep 0.1; done
    echo weights > /opt/ml/model/weights
    """
    code, document, stderr = run.drill(script, "--scenario", "term", "--no-reference")
    assert (code, document["result"]) == (1, "FAIL")
    assert "0 of 1 interruptions took place before the job's work was done, and 1 after the last" in stderr
    assert stderr.count("trying again, with all interruptions twice as early") == 2


def test_a_different_output_is_found_and_can_be_ignored_by_name(run):
    request = {"Environment": {"RANDOM_OUTPUT": "1"}}
    code, document, _ = run.drill(COUNTS, "--scenario", "kill", request=request)
    assert code == 1
    assert document["reference"]["differences"] == ["output/vectors differs"]
    code, document, _ = run.drill(COUNTS, "--scenario", "kill", "--ignore", "vectors", request=request)
    assert code == 0, document


def test_a_job_that_ends_before_all_interruptions_fails_the_drill(run):
    script = COUNTS.replace("-lt 40", "-lt 3").replace("of=40", "of=3")
    code, document, _ = run.drill(script, "--kills", "9", "--scenario", "term", "--no-reference")
    assert code == 1
    assert "of 9 interruptions took place" in document["problems"][0]


def test_a_job_that_fails_uninterrupted_is_reported_as_such(run):
    code, document, stderr = run.drill("echo 'no such column' > /opt/ml/output/failure; exit 1")
    assert (code, document) == (1, {})
    assert "fails even uninterrupted (no such column)" in stderr


def test_a_drill_leaves_the_jobs_own_places_alone_and_cleans_up(run):
    code, document, _ = run.drill(COUNTS, "--scenario", "kill", "--no-reference")
    assert code == 0
    assert not (run.tmp / "out").exists()
    assert not (run.tmp / "checkpoints").exists()
    assert [path.name for path in (run.state / "drills").iterdir()] == []
    assert operations.status(document["job"]).status == "Completed"
