"""Drills: the plan from a seed, the reading of logs, the accounting, the comparison; no container is needed here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from estiba_launch.cli import app
from estiba_launch.drill import account, compare
from estiba_launch.drill.account import Limit
from estiba_launch.drill.compare import Reference
from estiba_launch.drill.report import Report
from estiba_launch.drill.scenario import EARLIEST, LATEST, Scenario, Strike, schedule
from estiba_launch.drill.timeline import Reader, Timeline
from estiba_launch.errors import LaunchError
from estiba_launch.localhost import watch

EMBED = str(Path(__file__).parents[2] / "images/embed/job.yaml")
T0 = 1_800_000_000.0


def stamp(second: float) -> str:
    """The engine's timestamp of a second of these tests."""
    import datetime

    return datetime.datetime.fromtimestamp(T0 + second, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%f000Z")


def line(*texts: tuple[float, str]) -> Timeline:
    timeline = Timeline()
    for second, text in texts:
        timeline.read(stamp(second), text)
    return timeline


# ---- the plan


def test_the_same_seed_plans_the_same_interruptions_and_another_seed_others():
    plan = schedule(Scenario.RANDOM, 6, 7, ["algo-1", "algo-2"])
    assert plan == schedule(Scenario.RANDOM, 6, 7, ["algo-1", "algo-2"])
    assert plan != schedule(Scenario.RANDOM, 6, 8, ["algo-1", "algo-2"])
    assert [strike.share for strike in plan] == sorted(strike.share for strike in plan)
    assert all(EARLIEST <= strike.share <= LATEST for strike in plan)


def test_a_random_mix_holds_every_kind_and_one_host_only_where_there_are_several():
    many = {strike.kind for seed in range(20) for strike in schedule(Scenario.RANDOM, 5, seed, ["algo-1", "algo-2"])}
    assert many == set(Scenario) - {Scenario.RANDOM, Scenario.CAPACITY_WAIT}
    one = [strike for seed in range(20) for strike in schedule(Scenario.RANDOM, 5, seed, ["algo-1"])]
    assert Scenario.ONE_HOST not in {strike.kind for strike in one}
    assert any(strike.wait_s for strike in one)


def test_orders_say_what_the_local_host_is_to_do():
    def order(kind: Scenario) -> dict[str, Any]:
        return vars(schedule(kind, 1, 0, ["algo-1", "algo-2"], wait_s=4)[0].order(90))

    assert order(Scenario.TERM)["notice"] is True
    assert order(Scenario.TERM)["grace_s"] == 90
    assert order(Scenario.KILL)["notice"] is False
    assert order(Scenario.KILL_DURING_SAVE)["at_write"] is True
    assert order(Scenario.ONE_HOST)["host"] in ("algo-1", "algo-2")
    assert order(Scenario.CAPACITY_WAIT)["capacity_wait_s"] == 4


def test_one_host_of_one_and_no_kills_are_refused():
    with pytest.raises(LaunchError, match="InstanceCount"):
        schedule(Scenario.ONE_HOST, 1, 0, ["algo-1"])
    with pytest.raises(LaunchError, match="--kills 0"):
        schedule(Scenario.KILL, 0, 0, ["algo-1"])


# ---- what a log tells


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
def test_the_first_counter_of_a_progress_line_is_the_work(text, unit, counted, total):
    found = line((1, text))
    assert (found.unit, found.counted, found.total) == (unit, counted, total)


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
    assert line((1, text)).counted is None


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("4 files, 12000 rows; 32 dimensions; resuming: 800 rows of unfinished files are saved", 800),
        ("resuming at step 120", 120),
        ("Resumed from step=120, loss 3.1", 120),
        ("resuming: 0 steps are saved", 0),
    ],
)
def test_an_attempt_says_what_it_goes_on_from(text, start):
    assert line((1, text)).resumed == start


@pytest.mark.parametrize(
    "text", ["resuming from /opt/ml/checkpoints/3", "nothing to resume", "presumed 3", "rows=3 of=4"]
)
def test_what_is_no_amount_is_not_taken_for_one(text):
    assert line((1, text)).resumed is None


def test_a_log_is_read_as_it_grows_and_a_line_only_when_it_is_whole(tmp_path):
    reader = Reader(tmp_path / "algo-1.log")
    assert reader.read().counted is None
    with reader.path.open("w") as file:
        file.write(f"{stamp(1)} rows=1 of=10\n{stamp(2)} rows=2")
        file.flush()
        assert reader.read().counted == 1
        file.write("0 of=40\n")
    assert reader.read().counted == 20
    assert reader.timeline.points == [(T0 + 1, 1), (T0 + 2, 20)]


# ---- the accounting


def attempt(number: int, start: float, end: float, **more: Any) -> dict[str, Any]:
    return {
        "Number": number, "Hosts": ["algo-1"], "StartTime": stamp(start)[:-4], "TrainingStartTime": stamp(start)[:-4],
        "EndTime": stamp(end)[:-4], "Outcome": "Interrupted", "ExitCodes": {"algo-1": 137}, **more,
    }  # fmt: skip


def zulu(second: float) -> str:
    return stamp(second)[:-4] + "Z"


def two(first: Timeline, second: Timeline, *, restored: int = 3, note: dict[str, Any] | None = None, **more: Any):
    """An attempt that was killed at second 10, and the one after it: the first one's entry."""
    kill = {"Notice": False, "Host": None, "Time": zulu(10), "EndedTime": zulu(10.5), **(note or {})}
    attempts = [
        attempt(1, 0, 11, Interruption=kill, StartTime=zulu(0), TrainingStartTime=zulu(1), EndTime=zulu(11)),
        attempt(2, 12, 30, RestoredFiles=restored, Outcome="Completed", ExitCodes={"algo-1": 0},
                StartTime=zulu(12), TrainingStartTime=zulu(12), EndTime=zulu(30)),
    ]  # fmt: skip
    record = {"Estiba": {"Attempts": attempts}}
    strikes = [Strike(kind=Scenario.KILL, share=0.5)]
    entries = account.account(record, {(1, "algo-1"): first, (2, "algo-1"): second}, strikes, **more)
    return entries[0]


WORK = line((3, "rows=100 of=1000"), (6, "rows=200 of=1000"), (9, "rows=300 of=1000"))


def test_lost_is_what_was_counted_beyond_what_the_next_attempt_starts_from():
    entry = two(WORK, line((13, "resuming: 200 rows"), (15, "rows=260 of=1000")))
    assert (entry.counted, entry.lost, entry.lost_is) == (300, 100, "exact")
    assert entry.lost_s == 4.0  # since the line that said 200, at second 6
    assert entry.restart_s == 5.0
    assert entry.checkpoint == "intact"
    assert entry.how == "KILL"


def test_work_that_was_saved_after_the_last_line_is_no_gain():
    entry = two(WORK, line((13, "resuming: 350 rows")))
    assert (entry.lost, entry.lost_s) == (0, 1.0)


def test_nothing_restored_means_everything_counted_is_lost():
    entry = two(WORK, line((15, "rows=60 of=1000")), restored=0)
    assert (entry.lost, entry.lost_is, entry.checkpoint) == (300, "exact", "none")
    assert entry.lost_s == 9.0  # since the workload was started


def test_a_start_read_off_the_first_line_is_a_bound_and_not_a_fact():
    entry = two(WORK, line((15, "rows=260 of=1000")))
    assert (entry.lost, entry.lost_is, entry.checkpoint) == (40, "at least", "unknown")
    assert account.over([entry], [Limit.parse("1000rows")]) == [
        "attempt 1 on algo-1: how much was lost is not known, so --max-lost 1000 rows is not shown to hold"
    ]
    assert account.worst([entry])["rows"] is None


def test_a_job_that_says_nothing_is_unknown_and_not_zero():
    entry = two(line(), line())
    assert (entry.lost, entry.lost_s, entry.counted, entry.lost_is) == (None, None, None, "unknown")
    (problem,) = account.over([entry], [Limit.parse("600s")])
    assert "not known" in problem


def test_the_results_of_the_last_attempt_say_what_it_started_from():
    results = {"rows": {"resumed": 250, "computed_in_this_attempt": 750}}
    entry = two(WORK, line((15, "rows=260 of=1000")), results=results)
    assert (entry.lost, entry.lost_is) == (50, "exact")


def test_a_piece_that_was_set_aside_is_told():
    bad = line((13, "warning: x: its bytes do not match its digest; set aside, this piece is computed again"))
    assert two(WORK, bad).checkpoint == "1 set aside"


def test_term_tells_how_long_the_save_took_and_a_killed_save_says_so():
    first = two(WORK, line((13, "resuming: 300 rows")), note={"Notice": True})
    assert (first.save_s, first.how) == (0.5, "TERM, killed after the grace")


def test_limits_are_of_one_interruption_in_seconds_or_in_the_jobs_own_unit():
    entry = two(WORK, line((13, "resuming: 200 rows")))
    assert account.over([entry], [Limit.parse("4s"), Limit.parse("100 rows"), Limit.parse("100row")]) == []
    (problem,) = account.over([entry], [Limit.parse("99rows")])
    assert "lost 100 rows, more than --max-lost 99 rows" in problem
    assert "the job counts rows" in account.over([entry], [Limit.parse("5steps")])[0]
    assert Limit.parse("2min").amount == 120


@pytest.mark.parametrize("text", ["", "10", "rows", "-3s", "1..2s", "3 s s"])
def test_a_limit_without_amount_or_unit_is_refused(text):
    with pytest.raises(LaunchError, match="--max-lost"):
        Limit.parse(text)


# ---- the comparison


def test_files_that_are_missing_new_or_different_are_named_and_ignored_ones_are_not():
    reference = {"output/a": "1", "output/b": "2", "output/results.json": "3", "output/logs/x.log": "4"}
    found = {"output/a": "1", "output/b": "9", "output/c": "5", "output/results.json": "8", "model/metrics.jsonl": "7"}
    ignore = compare.patterns(["logs/*"], {compare.IGNORE_VARIABLE: " "})
    assert compare.differences(reference, found, ignore) == ["output/c is new", "output/b differs"]
    assert compare.differences(found, reference, [*ignore, "b"]) == ["output/c is missing"]
    assert compare.patterns([], {compare.IGNORE_VARIABLE: "*.tmp, x"})[-2:] == ["*.tmp", "x"]


def test_digests_are_of_every_file(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "f").write_text("x")
    assert compare.digests(tmp_path) == {"deep/f": "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"}


def test_a_broken_reference_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv("ESTIBA_STATE", str(tmp_path))
    assert compare.known_reference("k") is None
    made = Reference(job="j", files={"a": "1"}, running_s=1.0, working_s=None, unit=None, total=None)
    made.write(compare.reference_path("k"))
    assert compare.known_reference("k") == made
    compare.reference_path("k").write_text('{"job": "of another version"}')
    assert compare.known_reference("k") is None
    compare.reference_path("k").write_text("{")
    assert compare.known_reference("k") is None


# ---- the report


def report(**changes: Any) -> Report:
    entry = two(WORK, line((13, "resuming: 200 rows")))
    strike = Strike(kind=Scenario.KILL, share=0.5)
    values: dict[str, Any] = {
        "job": "j", "scenario": Scenario.KILL, "seed": 3, "planned": [strike], "entries": [entry],
        "status": "Completed", "running_s": 20.0, "reference": "r", "reference_s": 15.0, "compared": 2,
    }  # fmt: skip
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


def test_the_document_is_json_and_holds_null_for_what_is_not_known():
    document = json.loads(json.dumps(report(entries=[two(line(), line())], reference=None).to_json()))
    assert document["result"] == "PASS"
    assert document["attempts"][0]["lost"] is None
    assert document["most_lost"] == {"s": None}
    assert document["reference"] is None


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--max-lost", "10"), "--max-lost"),
        (("--scenario", "one-host"), "InstanceCount"),
        (("--set", "x"), "NAME=VALUE"),
    ],
)
def test_a_drill_that_cannot_be_held_exits_2(words, says, tmp_path, monkeypatch):
    monkeypatch.setenv("ESTIBA_STATE", str(tmp_path / "state"))
    result = CliRunner().invoke(app, ["drill", EMBED, *words])
    assert result.exit_code == 2
    assert says in result.stderr
    assert not (tmp_path / "state").exists()


def test_a_drill_of_a_job_that_is_not_a_spot_job_is_refused(good, tmp_path, monkeypatch):
    monkeypatch.setenv("ESTIBA_STATE", str(tmp_path / "state"))
    del good["EnableManagedSpotTraining"], good["StoppingCondition"]["MaxWaitTimeInSeconds"]
    (tmp_path / "job.yaml").write_text(json.dumps(good))
    result = CliRunner().invoke(app, ["drill", str(tmp_path / "job.yaml")])
    assert result.exit_code == 2
    assert "EnableManagedSpotTraining" in result.stderr


# ---- seeing a write


def write_in_a_while(path: Path, calls: list[str]) -> None:
    import threading
    import time

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
def test_a_kill_comes_while_a_checkpoint_is_written_and_not_for_a_metrics_file(tmp_path, with_inotify, monkeypatch):
    calls: list[str] = []
    (tmp_path / "deep").mkdir()
    if not with_inotify:

        def none(roots: list[Path]) -> None:
            raise OSError("no inotify on this system")

        monkeypatch.setattr(watch, "Inotify", none)
    write_in_a_while(tmp_path / "deep" / "piece", calls)
    hit = watch.kill_at_write([tmp_path], kill=lambda: calls.append("kill"), give_up=lambda: False)
    assert hit is not None
    assert (hit.name, calls[0]) == ("deep/piece", "kill")
    assert hit.in_the_middle is (True if with_inotify else None)


def test_a_watch_gives_up_when_the_job_ends(tmp_path):
    assert watch.kill_at_write([tmp_path], kill=lambda: pytest.fail("killed"), give_up=lambda: True) is None
