"""Drills without containers: the schedule from a seed, progress in logs, the loss report, the comparison."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from inotify_simple import flags
from typer.testing import CliRunner

from estiba_launch.cli.app import app
from estiba_launch.drill import reference, runner
from estiba_launch.drill.config import DrillConfig
from estiba_launch.drill.loss_report import Limit, came_late, loss_report, most_lost, violations
from estiba_launch.drill.reference import Reference
from estiba_launch.drill.report import Report
from estiba_launch.drill.runner import Monitor
from estiba_launch.drill.scenario import EARLIEST, LATEST, PlannedFault, Scenario, schedule
from estiba_launch.errors import LaunchError
from estiba_launch.jobs import checkpoint_watch
from estiba_launch.jobs.control import Fault
from estiba_launch.jobs.progress import Progress, ProgressReader
from estiba_launch.jobs.status import AttemptStatus, JobStatus

EMBED = str(Path(__file__).parents[2] / "images/embed/job.yaml")
T0 = 1_800_000_000.0
KILL = PlannedFault(scenario=Scenario.KILL, share=0.5, fault=Fault(notice=False))


def stamp(second: float) -> str:
    """The engine's timestamp of a second of these tests."""
    import datetime

    return datetime.datetime.fromtimestamp(T0 + second, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%f000Z")


def line(*texts: tuple[float, str]) -> Progress:
    progress = Progress()
    for second, text in texts:
        progress.add(stamp(second), text)
    return progress


# ---- the schedule


def test_the_same_seed_plans_the_same_interruptions_and_another_seed_others():
    plan = schedule(Scenario.RANDOM, 6, 7, ["algo-1", "algo-2"])
    assert plan == schedule(Scenario.RANDOM, 6, 7, ["algo-1", "algo-2"])
    assert plan != schedule(Scenario.RANDOM, 6, 8, ["algo-1", "algo-2"])
    assert [one.share for one in plan] == sorted(one.share for one in plan)
    assert all(EARLIEST <= planned.share <= LATEST for planned in plan)


def test_a_random_mix_has_every_kind_and_one_host_only_in_a_cluster():
    many = {
        planned.scenario for seed in range(20) for planned in schedule(Scenario.RANDOM, 5, seed, ["algo-1", "algo-2"])
    }
    assert many == set(Scenario) - {Scenario.RANDOM, Scenario.CAPACITY_WAIT}
    one = [planned for seed in range(20) for planned in schedule(Scenario.RANDOM, 5, seed, ["algo-1"])]
    assert Scenario.ONE_HOST not in {planned.scenario for planned in one}
    assert any(planned.fault.capacity_wait_s for planned in one)


def test_each_scenario_becomes_a_fault():
    def fault(kind: Scenario) -> dict[str, Any]:
        return vars(schedule(kind, 1, 0, ["algo-1", "algo-2"], grace_s=90, wait_s=4)[0].fault)

    assert fault(Scenario.TERM)["notice"] is True
    assert fault(Scenario.TERM)["grace_s"] == 90
    assert fault(Scenario.KILL)["notice"] is False
    assert fault(Scenario.KILL_DURING_SAVE)["at_write"] is True
    assert fault(Scenario.ONE_HOST)["host"] in ("algo-1", "algo-2")
    assert fault(Scenario.CAPACITY_WAIT)["capacity_wait_s"] == 4


def test_one_host_on_a_single_host_and_zero_kills_are_refused():
    with pytest.raises(LaunchError, match="InstanceCount"):
        schedule(Scenario.ONE_HOST, 1, 0, ["algo-1"])
    with pytest.raises(LaunchError, match="--kills 0"):
        schedule(Scenario.KILL, 0, 0, ["algo-1"])


# ---- progress in a log


@pytest.mark.parametrize(
    ("text", "unit", "counted", "total"),
    [
        ("rows=1200 of=6000 rows_per_s=80.1 eta_s=60", "rows", 1200, 6000),
        ("step=40 of=100 loss=0.25", "step", 40, 100),
        ("step=41", "step", 41, None),
        ("tokens=1.2e+06 of=3e+06", "tokens", 1.2e6, 3e6),
        ("  batches=2.5 of=10", "batches", 2.5, 10),
    ],
)
def test_the_first_counter_in_a_progress_line_is_the_work(text, unit, counted, total):
    progress = line((1, text))
    assert (progress.unit, progress.counter, progress.total) == (unit, counted, total)


@pytest.mark.parametrize(
    "text",
    [
        "loss=0.25",
        "epoch 3",
        "total rows=12",
        "rows=x of=y",
        "step=4,of=5",
        "rows=12rows of=4",
        "--- attempt 1 ---",
        "",
    ],
)
def test_other_lines_count_nothing(text):
    assert line((1, text)).counter is None


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("4 files, 12000 rows; 32 dimensions; resuming: 800 rows of unfinished files are saved", 800),
        ("resuming at step 120", 120),
        ("Resumed from step=120, loss 3.1", 120),
        ("resuming: 0 steps are saved", 0),
    ],
)
def test_an_attempt_prints_where_it_resumes(text, start):
    assert line((1, text)).resumed_from == start


@pytest.mark.parametrize(
    "text", ["resuming from /opt/ml/checkpoints/3", "nothing to resume", "presumed 3", "rows=3 of=4"]
)
def test_a_resume_line_without_an_amount_is_ignored(text):
    assert line((1, text)).resumed_from is None


def test_a_growing_log_is_read_by_complete_lines(tmp_path):
    reader = ProgressReader(tmp_path / "algo-1.log")
    assert reader.read().counter is None
    with reader.path.open("w") as file:
        file.write(f"{stamp(1)} rows=1 of=10\n{stamp(2)} rows=2")
        file.flush()
        assert reader.read().counter == 1
        file.write("0 of=40\n")
    assert reader.read().counter == 20
    assert reader.progress.points == [(T0 + 1, 1), (T0 + 2, 20)]


# ---- the loss report


def attempt(number: int, start: float, end: float, **more: Any) -> AttemptStatus:
    value = {
        "Number": number, "Hosts": ["algo-1"], "StartTime": stamp(start)[:-4], "TrainingStartTime": stamp(start)[:-4],
        "EndTime": stamp(end)[:-4], "Outcome": "Interrupted", "ExitCodes": {"algo-1": 137}, **more,
    }  # fmt: skip
    return AttemptStatus.from_json(value)


def zulu(second: float) -> str:
    return stamp(second)[:-4] + "Z"


def loss_of(first: Progress, second: Progress, *, restored: int = 3, note: dict[str, Any] | None = None, **more: Any):
    """The loss of an attempt killed at second 10, with an attempt after it."""
    kill = {"Notice": False, "Host": None, "Time": zulu(10), "EndedTime": zulu(10.5), **(note or {})}
    attempts = [
        attempt(1, 0, 11, Interruption=kill, StartTime=zulu(0), TrainingStartTime=zulu(1), EndTime=zulu(11)),
        attempt(2, 12, 30, RestoredFiles=restored, Outcome="Completed", ExitCodes={"algo-1": 0},
                StartTime=zulu(12), TrainingStartTime=zulu(12), EndTime=zulu(30)),
    ]  # fmt: skip
    return loss_report(attempts, {(1, "algo-1"): first, (2, "algo-1"): second}, [KILL], **more)[0]


WORK = line((3, "rows=100 of=1000"), (6, "rows=200 of=1000"), (9, "rows=300 of=1000"))


def test_lost_work_is_what_was_counted_beyond_the_next_attempts_start():
    loss = loss_of(WORK, line((13, "resuming: 200 rows"), (15, "rows=260 of=1000")))
    assert (loss.counted, loss.lost, loss.lost_is) == (300, 100, "exact")
    assert loss.lost_s == 4.0  # since the line with 200, at second 6
    assert loss.restart_s == 5.0
    assert loss.checkpoint == "intact"
    assert loss.how == "KILL"


def test_work_saved_after_the_last_line_is_not_a_negative_loss():
    loss = loss_of(WORK, line((13, "resuming: 350 rows")))
    assert (loss.lost, loss.lost_s) == (0, 1.0)


def test_nothing_restored_means_everything_counted_is_lost():
    loss = loss_of(WORK, line((15, "rows=60 of=1000")), restored=0)
    assert (loss.lost, loss.lost_is, loss.checkpoint) == (300, "exact", "none")
    assert loss.lost_s == 9.0  # since the start of the workload


def test_a_start_from_the_first_line_is_only_a_bound():
    loss = loss_of(WORK, line((15, "rows=260 of=1000")))
    assert (loss.lost, loss.lost_is, loss.checkpoint) == (40, "at least", "unknown")
    assert violations([loss], [Limit.parse("1000rows")]) == [
        "attempt 1 on algo-1: the loss is not known, so --max-lost 1000 rows cannot be checked"
    ]
    assert most_lost([loss])["rows"] is None


def test_the_loss_of_a_job_that_prints_nothing_is_unknown_not_zero():
    loss = loss_of(line(), line())
    assert (loss.lost, loss.lost_s, loss.counted, loss.lost_is) == (None, None, None, "unknown")
    (problem,) = violations([loss], [Limit.parse("600s")])
    assert "not known" in problem


def test_the_start_of_the_last_attempt_is_read_from_its_results():
    results = {"rows": {"resumed": 250, "computed_in_this_attempt": 750}}
    loss = loss_of(WORK, line((15, "rows=260 of=1000")), results=results)
    assert (loss.lost, loss.lost_is) == (50, "exact")


@pytest.mark.parametrize("word", ["quarantined", "set aside"])
def test_a_checkpoint_that_fails_verification_is_counted(word):
    bad = line((13, f"warning: x: its bytes do not match its digest; {word}, this piece is computed again"))
    assert loss_of(WORK, bad).checkpoint == "1 quarantined"


def test_term_reports_the_seconds_of_the_save_and_that_it_was_killed():
    first = loss_of(WORK, line((13, "resuming: 300 rows")), note={"Notice": True})
    assert (first.save_s, first.how) == (0.5, "TERM, killed after the grace period")


def test_a_limit_is_per_interruption_in_seconds_or_the_jobs_unit():
    loss = loss_of(WORK, line((13, "resuming: 200 rows")))
    assert violations([loss], [Limit.parse("4s"), Limit.parse("100 rows"), Limit.parse("100row")]) == []
    (problem,) = violations([loss], [Limit.parse("99rows")])
    assert "lost 100 rows, more than --max-lost 99 rows" in problem
    assert "the job counts rows" in violations([loss], [Limit.parse("5steps")])[0]
    assert Limit.parse("2min").amount == 120


@pytest.mark.parametrize("text", ["", "10", "rows", "-3s", "1..2s", "3 s s"])
def test_a_limit_without_amount_or_unit_is_refused(text):
    with pytest.raises(LaunchError, match="--max-lost"):
        Limit.parse(text)


# ---- the comparison


def differences(before: dict[str, str], after: dict[str, str], ignore: list[str]) -> list[str]:
    return reference.differences(reference.without_ignored(before, ignore), reference.without_ignored(after, ignore))


def test_missing_new_and_different_files_are_named_unless_ignored():
    before = {"output/a": "1", "output/b": "2", "output/results.json": "3", "output/logs/x.log": "4"}
    after = {"output/a": "1", "output/b": "9", "output/c": "5", "output/results.json": "8", "model/metrics.jsonl": "7"}
    ignore = reference.ignore_patterns(["logs/*"], {reference.IGNORE_VARIABLE: " "})
    assert differences(before, after, ignore) == ["output/c is new", "output/b differs"]
    assert differences(after, before, [*ignore, "b"]) == ["output/c is missing"]
    assert reference.ignore_patterns([], {reference.IGNORE_VARIABLE: "*.tmp, x"})[-2:] == ["*.tmp", "x"]


def test_every_file_has_a_digest(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "f").write_text("x")
    assert reference.digests(tmp_path) == {"deep/f": "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"}


def test_a_broken_reference_is_discarded(tmp_path, monkeypatch):
    monkeypatch.setenv("ESTIBA_STATE", str(tmp_path))
    assert Reference.load("k") is None
    stored = Reference(job="j", files={"a": "1"}, running_s=1.0, working_s=None, unit=None, total=None)
    stored.save("k")
    (path,) = tmp_path.glob("drills/references/k.json")
    assert Reference.load("k") == stored
    path.write_text('{"job": "of another version"}')
    assert Reference.load("k") is None
    path.write_text("{")
    assert Reference.load("k") is None


# ---- the report


def report(**changes: Any) -> Report:
    status = {
        "TrainingJobName": "j",
        "TrainingJobStatus": "Completed",
        "CreationTime": "",
        "Estiba": {"Attempts": [{"Number": 1, "StartTime": zulu(0), "EndTime": zulu(20)}]},
    }
    values: dict[str, Any] = {
        "config": DrillConfig(scenario=Scenario.KILL, seed=3),
        "planned": [KILL],
        "status": JobStatus.from_json(status),
        "losses": [loss_of(WORK, line((13, "resuming: 200 rows")))],
        "reference": Reference(job="r", files={}, running_s=15.0, working_s=None, unit=None, total=None),
        "compared": 2,
    }
    return Report(**{**values, **changes})


def test_the_table_shows_each_attempt_and_the_verdict():
    text = report().table()
    assert text.splitlines()[1].split() == [
        "1", "KILL", "0", "300", "of", "1000", "rows", "100", "<=", "4.0", "-", "?", "intact",
    ]  # fmt: skip
    assert text.endswith("PASS\n")
    assert "host" not in text.splitlines()[0].split()
    failed = report(problems=["two files differ"], differences=["output/a differs"]).table()
    assert "FAIL: two files differ" in failed
    assert "output/a differs" in failed


def test_the_document_is_json_with_null_for_unknown_values():
    document = json.loads(json.dumps(report(losses=[loss_of(line(), line())], reference=None).to_json()))
    assert document["result"] == "PASS"
    assert document["attempts"][0]["lost"] is None
    assert document["most_lost"] == {"s": None}
    assert document["reference"] is None
    assert report().to_json()["reference"]["running_s"] == 15.0
    assert report().to_json()["running_s"] == 20.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--max-lost", "10"), "--max-lost"),
        (("--scenario", "one-host"), "InstanceCount"),
        (("--set", "x"), "NAME=VALUE"),
    ],
)
def test_a_drill_that_cannot_start_exits_2(words, message, tmp_path, monkeypatch):
    monkeypatch.setenv("ESTIBA_STATE", str(tmp_path / "state"))
    result = CliRunner().invoke(app, ["drill", EMBED, *words])
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "state").exists()


def test_a_drill_of_a_job_that_is_not_a_spot_job_is_refused(good, tmp_path, monkeypatch):
    monkeypatch.setenv("ESTIBA_STATE", str(tmp_path / "state"))
    del good["EnableManagedSpotTraining"], good["StoppingCondition"]["MaxWaitTimeInSeconds"]
    (tmp_path / "job.yaml").write_text(json.dumps(good))
    result = CliRunner().invoke(app, ["drill", str(tmp_path / "job.yaml")])
    assert result.exit_code == 2
    assert "EnableManagedSpotTraining" in result.stderr


# ---- a kill during a write


class Job:
    """Records its calls."""

    def __init__(self, calls: list[str], can_freeze: bool = True) -> None:
        self.calls, self.can_freeze = calls, can_freeze

    def freeze(self) -> bool:
        self.calls.append("freeze")
        return self.can_freeze

    def thaw(self) -> None:
        self.calls.append("thaw")

    def kill(self) -> None:
        self.calls.append("kill")


def write_in_a_while(path: Path, calls: list[str]) -> None:
    def write() -> None:
        time.sleep(0.2)
        with path.with_name("metrics.jsonl").open("a") as file:
            file.write("{}")
        time.sleep(0.1)
        with path.open("wb") as file:
            file.write(b"x" * 100)
            file.flush()
            for _ in range(100):
                if calls:
                    break
                time.sleep(0.01)
            calls.append("write ended")

    threading.Thread(target=write, daemon=True).start()


@pytest.mark.parametrize("with_inotify", [True, False])
def test_a_kill_hits_the_write_of_a_checkpoint_not_of_a_metrics_file(tmp_path, with_inotify, monkeypatch):
    calls: list[str] = []
    (tmp_path / "deep").mkdir()
    if not with_inotify:

        def unavailable(roots: list[Path]) -> None:
            raise OSError("no inotify on this system")

        monkeypatch.setattr(checkpoint_watch, "TreeWatch", unavailable)
    write_in_a_while(tmp_path / "deep" / "piece", calls)
    hit = checkpoint_watch.kill_at_write([tmp_path], Job(calls), give_up=lambda: False)
    assert hit is not None
    assert (hit.name, calls[0]) == ("deep/piece", "freeze" if with_inotify else "kill")
    assert "thaw" not in calls
    assert hit.in_the_middle is (True if with_inotify else None)


def test_a_watch_ends_with_the_job(tmp_path):
    calls: list[str] = []
    assert checkpoint_watch.kill_at_write([tmp_path], Job(calls), give_up=lambda: True) is None
    assert calls == []


class FakeTreeWatch:
    """A TreeWatch: each read returns the next batch of (mask, file name)."""

    def __init__(self, *batches: list[tuple[int, str]]) -> None:
        self.batches = list(batches)

    def __call__(self, roots: list[Path]) -> FakeTreeWatch:
        self.root = roots[0]
        return self

    def read(self, _timeout_s: float) -> list[checkpoint_watch.Event]:
        batch = self.batches.pop(0) if self.batches else []
        return [checkpoint_watch.Event(mask, self.root / name) for mask, name in batch]

    def close(self) -> None:
        pass


def hit_of(monkeypatch, *batches: list[tuple[int, str]], can_freeze: bool = True):
    """(the hit, the calls on the job)."""
    script, calls = FakeTreeWatch(*batches), []
    monkeypatch.setattr(checkpoint_watch, "TreeWatch", script)
    job = Job(calls, can_freeze)
    hit = checkpoint_watch.kill_at_write([Path("/checkpoints")], job, give_up=lambda: not script.batches)
    return hit, calls


CREATED, CLOSED, RENAMED = flags.CREATE, flags.CLOSE_WRITE, flags.MOVED_FROM


def test_a_finished_write_is_skipped_for_an_open_one(monkeypatch):
    hit, calls = hit_of(monkeypatch, [(CREATED, "small"), (CLOSED, "small")], [], [(CREATED, "large")], [], [])
    assert hit is not None
    assert (hit.name, hit.in_the_middle, calls) == ("large", True, ["freeze", "kill"])


@pytest.mark.parametrize("end", [CLOSED, RENAMED])
def test_a_write_that_ends_before_the_freeze_is_skipped_and_the_next_one_is_hit(monkeypatch, end):
    hit, calls = hit_of(monkeypatch, [(CREATED, "first")], [], [(end, "first")], [(CREATED, "second")], [], [])
    assert hit is not None
    assert (hit.name, hit.in_the_middle) == ("second", True)
    assert calls == ["freeze", "thaw", "freeze", "kill"]


def test_a_second_write_of_the_same_file_is_hit(monkeypatch):
    hit, calls = hit_of(monkeypatch, [(CREATED, "last"), (CLOSED, "last"), (flags.MODIFY, "last")], [], [])
    assert hit is not None
    assert (hit.name, hit.in_the_middle, calls) == ("last", True, ["freeze", "kill"])


def test_nothing_is_killed_if_every_write_is_too_short(monkeypatch):
    short = [batch for n in range(9) for batch in ([(CREATED, f"{n}")], [], [(CLOSED, f"{n}")])]
    hit, calls = hit_of(monkeypatch, *short)
    assert hit is None
    assert calls == ["freeze", "thaw"] * 9


def test_without_a_freeze_the_kill_is_not_reported_as_in_the_middle(monkeypatch):
    hit, calls = hit_of(monkeypatch, [(CREATED, "piece")], [], [], can_freeze=False)
    assert hit is not None
    assert (hit.in_the_middle, calls) == (None, ["freeze", "kill"])


# ---- the progress of a run


@pytest.fixture
def checkpoints(tmp_path, monkeypatch) -> Path:
    """Checkpoint directory of the first attempt of job j."""
    monkeypatch.setenv("ESTIBA_STATE", str(tmp_path))
    folder = tmp_path / "jobs/j/attempts/1/algo-1/checkpoints"
    folder.mkdir(parents=True)
    (tmp_path / "jobs/j/request.json").write_text("{}")
    return folder


def reference_of(**changes: Any) -> Reference:
    return Reference(**{"job": "r", "files": {}, "running_s": 1.0, "working_s": 1.0, "unit": None, "total": None,
                        **changes})  # fmt: skip


def test_without_progress_lines_checkpoint_writes_of_all_attempts_measure_the_work(checkpoints):
    monitor = Monitor("j", ["algo-1"], reference_of(writes=8))
    monitor.update(1)
    assert monitor.share is None
    for name in ("a", "b", "metrics.jsonl"):
        (checkpoints / name).write_text("x")
    monitor.update(1)
    assert monitor.share == 0.25
    restored = checkpoints.parents[2] / "2/algo-1/checkpoints"
    restored.mkdir(parents=True)
    (restored / "a").write_text("restored before the start")
    monitor.update(2)
    assert monitor.share is None
    (restored / "c.new").write_text("x")
    (restored / "c.new").rename(restored / "c")
    monitor.update(2)
    assert (monitor.share, str(monitor)) == (3 / 8, "3 checkpoint files written")


def test_with_progress_lines_the_counter_measures_the_work(checkpoints):
    monitor = Monitor("j", ["algo-1"], reference_of(writes=8, total=100.0))
    monitor.update(1)
    (checkpoints / "a").write_text("x")
    monitor.update(1)
    assert (monitor.share, monitor.working_since) == (None, None)
    (checkpoints.parents[1] / "algo-1.log").write_text(f"{stamp(1)} rows=30\n{stamp(2)} step=40 of=100\n")
    monitor.update(1)
    assert monitor.share == 0.4


def test_a_job_without_any_sign_of_work_counts_as_working_once_it_runs(checkpoints):
    monitor = Monitor("j", ["algo-1"], reference_of(writes=0))
    monitor.update(1)
    assert monitor.working_since is not None
    assert monitor.share is None


def test_waiting_for_a_job_reports_its_progress(monkeypatch, checkpoints):
    running = {"TrainingJobName": "j", "TrainingJobStatus": "InProgress", "SecondaryStatus": "Training",
               "Estiba": {"Attempts": [{"Number": 1, "StartTime": zulu(0), "TrainingStartTime": zulu(0)}]}}  # fmt: skip
    ended = {**running, "TrainingJobStatus": "Completed"}
    answers = iter([running, running, ended, ended])
    monkeypatch.setattr(runner.operations, "status", lambda _: JobStatus.from_json(next(answers)))
    monkeypatch.setattr(runner, "TICK_S", 0)
    (checkpoints.parents[1] / "algo-1.log").write_text(f"{stamp(1)} rows=30 of=90\n")
    reports: list[str] = []
    assert runner.watch("j", Monitor("j", ["algo-1"]), reports.append).is_terminal
    assert reports == ["j: Training, no progress line yet (0 s)", "j: Training, rows=30 (0 s)"]


def test_an_interruption_after_the_last_row_is_late(monkeypatch):
    def late(*lines: tuple[float, str]) -> bool:
        one = attempt(1, 0, 30, Interruption={"Notice": True, "Host": None, "Time": zulu(10)})
        return came_late(one, {(1, "algo-1"): line(*lines)})

    assert late((3, "rows=50 of=100"), (9, "rows=100 of=100"))
    assert not late((3, "rows=50 of=100"), (9, "rows=99 of=100"))
    # It finished its work within the grace period.
    assert not late((3, "rows=50 of=100"), (12, "rows=100 of=100"))
    assert not late()
    assert not came_late(attempt(1, 0, 30), {(1, "algo-1"): line((1, "rows=1 of=1"))})
