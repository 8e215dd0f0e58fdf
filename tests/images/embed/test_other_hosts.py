"""The last host to end says which files are in no host's part; no other one does, and nothing else is taken for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from embed.artifacts.other_hosts import files_in_no_part, forget_own_results, listing_of, write_results
from embed.data.table import InputFile
from estiba.platform.contract import Job
from estiba.storage import FileStore


@pytest.fixture
def job(root: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes the job as one of its hosts sees it."""
    (root / "input/config").mkdir(parents=True)

    def as_host(number: int, hosts: int = 2, name: str | None = "nightly-1") -> Job:
        names = [f"algo-{index + 1}" for index in range(hosts)]
        config = {"current_host": names[number - 1], "hosts": names}
        (root / "input/config/resourceconfig.json").write_text(json.dumps(config))
        monkeypatch.setenv("TRAINING_JOB_NAME", name or "")
        return Job.read()

    return as_host


@pytest.fixture
def target(tmp_path: Path) -> FileStore:
    (tmp_path / "out").mkdir()
    return FileStore(tmp_path / "out")


def add(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).write_bytes(b"PAR1")


def end(target: FileStore, job: Job, listed: str, bad: tuple[str, ...] = ()) -> dict:
    files = [InputFile(path=f"{letter}.parquet", size_bytes=4, etag=None) for letter in listed]
    found = {"job": job.name, "hosts": job.host_count, "status": "complete", "listing": listing_of(files)}
    results = found | {"files": {"bad": [{"path": f"{letter}.parquet", "reason": "cut"} for letter in bad]}}
    write_results(target, job, results)
    return results


def test_a_file_that_only_another_host_listed_is_named(target, inputs, job):
    add(inputs, "a.parquet", "b.parquet", "c.parquet")
    add(target.root, "a.parquet", "b.parquet")
    end(target, job(2), "abc")
    last = job(1)
    text = files_in_no_part(target, last, end(target, last, "ab"), str(inputs))
    assert text is not None and "algo-2 listed 3 files" in text and "without output: c.parquet" in text


@pytest.mark.parametrize("listed", [("ab", "ab"), ("abc", "ab")])
def test_nothing_is_said_of_equal_listings_and_a_warning_where_nothing_is_missing(target, inputs, job, caplog, listed):
    add(inputs, "a.parquet", "b.parquet")
    add(target.root, "a.parquet")
    end(target, job(2), listed[0], bad=("b",))  # which was reported by its host
    last = job(1)
    assert files_in_no_part(target, last, end(target, last, listed[1]), str(inputs)) is None
    assert ("every file has an output" in caplog.text) is (listed[0] != listed[1])


def test_a_host_that_is_not_the_last_one_says_nothing(target, inputs, job, caplog):
    add(inputs, "a.parquet", "b.parquet", "c.parquet")
    end(target, job(1, hosts=3), "ab")
    second = job(2, hosts=3)
    assert files_in_no_part(target, second, end(target, second, "abc"), str(inputs)) is None
    assert not caplog.text


def test_results_of_an_earlier_attempt_of_a_running_host_do_not_count(target, inputs, job, caplog):
    add(inputs, "a.parquet", "b.parquet")
    end(target, job(1), "a")  # in the attempt before, in which the second host was interrupted
    forget_own_results(target, job(1))  # it has started again
    second = job(2)
    assert files_in_no_part(target, second, end(target, second, "ab"), str(inputs)) is None
    assert not caplog.text


@pytest.mark.parametrize("name", [None, "nightly-2"])
def test_results_of_another_job_do_not_end_this_one(target, inputs, job, name):
    add(inputs, "a.parquet", "b.parquet")
    end(target, job(1, name=None if name is None else "nightly-1"), "a")
    second = job(2, name=name)
    assert files_in_no_part(target, second, end(target, second, "ab"), str(inputs)) is None


def test_names_that_are_not_utf_8_are_listed():
    files = [InputFile(path="caf\udce9.parquet", size_bytes=1, etag=None)]
    assert listing_of(files)["files"] == 1
