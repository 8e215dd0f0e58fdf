"""`--reader h5py`: by h5py, over s3fs or from files, in processes or a thread: the same bits as by byte ranges."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from bucket import Bucket, bucket_for
from files import LAYOUTS, SESSIONS, open_trials, write_folder, write_session
from rehearsal import Place, outcome, recordings, run, stopped_at

from brain_to_text.data import Trials
from brain_to_text.reading import ranges, s3fs_files
from brain_to_text.reading.h5py_source import H5pySource
from estiba.errors import DataError, EstibaError, Interrupted, StoreError
from estiba.stop import Stop

STEPS = 12
BAD = "trial_0004"


@pytest.fixture(autouse=True)
def _indexes(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    with bucket_for(monkeypatch) as made:
        yield made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "data", splits=("train",))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the reads in this process: so many requests that a few of them can go wrong."""
    monkeypatch.setattr(s3fs_files, "BLOCK_BYTES", 16384)


def by_h5py(location: str | Path, workers: int, **options: Any) -> Trials:
    return open_trials(location, **{"cache_bytes": 0, "read_by": "h5py", "workers": workers, **options})


def bits(trials: Trials, steps: Iterable[int] = range(STEPS)) -> list[tuple[bytes, list[str]]]:
    with trials:
        return [(batch.features.numpy().tobytes(), batch.trial) for batch in map(trials.batch, steps)]


def source_of(trials: Trials) -> H5pySource:
    assert isinstance(trials.reader.source, H5pySource)
    return trials.reader.source


# --- the same bits


@pytest.fixture
def every_layout(tmp_path: Path) -> Path:
    """A session of each, all of them in what is read."""
    for day, layout in enumerate(LAYOUTS):
        write_session(tmp_path / "data", f"t15.2023.08.{day + 10}", trials=3, layout=layout)
    return tmp_path / "data"


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("place", ["folder", "bucket"])
def test_every_layout_gives_the_bits_of_byte_ranges(
    every_layout: Path, bucket: Bucket, workers: int, place: str
) -> None:
    location = str(every_layout) if place == "folder" else bucket.put_folder(every_layout)
    with open_trials(location, cache_bytes=0) as trials:
        ids = [[position] for position in range(trials.n_trials)]
        expected = [trials.read(one).features.numpy().tobytes() for one in ids]
    with by_h5py(location, workers) as trials:
        assert trials.n_trials == 3 * len(LAYOUTS)
        found = [batch.features.numpy().tobytes() for batch in trials.read_all(ids)]
        statistics = trials.statistics()
        assert len(source_of(trials).pids) <= workers
    assert found == expected
    assert statistics["gets"] > 0 and statistics["bytes_fetched"] > 0 and statistics["retries"] == 0
    if place == "bucket":
        assert statistics["gets"] == len([asked for _, asked in bucket.gets if asked == "bytes=0-2097151"])


def test_the_plan_the_look_ahead_and_the_subset_are_the_same(folder: Path) -> None:
    options: dict[str, Any] = {"feature_subset": [6, 1], "n_features": 2, "ahead_batches": 2, "cache_bytes": 3000}
    expected = bits(open_trials(folder, **options))
    assert bits(by_h5py(folder, 2, **options)) == expected


def test_a_whole_training_run_ends_with_the_same_bits_and_may_change_its_reader(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = recordings(tmp_path / "data")
    url = bucket.put_folder(data)
    run(tmp_path / "ranges", data, num_dataloader_workers=1)
    expected = outcome(tmp_path / "ranges")
    run(tmp_path / "s3fs", url, reader="h5py", num_dataloader_workers=1)
    assert outcome(tmp_path / "s3fs") == expected
    stopped_at(Place(7, 1), tmp_path / "both", data, monkeypatch)
    run(tmp_path / "both", data, reader="h5py", num_dataloader_workers=0)
    settings = "model/checkpoint/args.yaml"  # has the number of workers
    assert {**outcome(tmp_path / "both"), settings: b""} == {**expected, settings: b""}


def test_a_script_without_a_guard_for_its_main_module_can_use_processes(folder: Path, tmp_path: Path) -> None:
    expected = bits(open_trials(folder, cache_bytes=0))
    script = tmp_path / "script.py"
    script.write_text(
        "import hashlib\nfrom files import open_trials\n"
        f"trials = open_trials({str(folder)!r}, cache_bytes=0, read_by='h5py', workers=2)\n"
        "digest = hashlib.sha256()\n"
        f"for step in range({STEPS}):\n    digest.update(trials.batch(step).features.numpy().tobytes())\n"
        "print(digest.hexdigest())\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=100,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [hashlib.sha256(b"".join(one for one, _ in expected)).hexdigest()]


# --- an S3 that misbehaves


@pytest.mark.parametrize("kind", ["error", "short", "cut"])
@pytest.mark.usefixtures("small_blocks")
def test_failed_requests_are_asked_again_and_give_the_same_bits(bucket: Bucket, folder: Path, kind: str) -> None:
    url = bucket.put_folder(folder)
    expected = bits(open_trials(url, cache_bytes=0))
    failed: list[int] = []

    def fault(number: int, _: str) -> tuple[str, float] | None:
        if number % 12 == 0:
            failed.append(number)
            return kind, 0.0
        return None

    bucket.fault = fault
    trials = by_h5py(url, 0)
    assert bits(trials) == expected
    assert len(failed) > 3
    assert kind == "error" or trials.statistics()["retries"] > 3  # s3fs asks once more after a 503


def test_processes_ask_again_too(bucket: Bucket, folder: Path) -> None:
    url = bucket.put_folder(folder)
    expected = bits(open_trials(url, cache_bytes=0))
    bucket.gets.clear()
    bucket.fault = lambda number, _: ("short", 0.0) if number <= 3 else None
    trials = by_h5py(url, 2)
    assert bits(trials) == expected
    assert trials.statistics()["retries"] >= 3


@pytest.mark.usefixtures("small_blocks")
def test_what_always_fails_ends_with_the_object_the_trial_and_the_remedy(
    bucket: Bucket, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = bucket.put_folder(folder)
    trials = by_h5py(url, 0)
    monkeypatch.setattr(ranges, "RETRY_S", 0.5)
    bucket.fault = lambda *_: ("short", 0.0)
    with (
        trials,
        pytest.raises(
            StoreError,
            match=r"s3://brain/data/t15.*hdf5: t15.*/trial_00\d\d cannot be read: .*bytes came.*check the endpoint",
        ),
    ):
        trials.batch(0)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_expired_credential_is_renewed_under_way(
    bucket: Bucket, folder: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    url = bucket.put_folder(folder)
    with open_trials(url) as trials:
        expected = trials.read([12]).features.numpy().tobytes()
    with by_h5py(url, workers) as trials:
        trials.read([0])
        bucket.good_keys = {"second"}
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "second")
        assert trials.read([12]).features.numpy().tobytes() == expected, "of another object than the first"
        assert trials.statistics()["renewals"] == 1


def test_credentials_that_stay_expired_and_no_permission_say_so(bucket: Bucket, folder: Path) -> None:
    url = bucket.put_folder(folder)
    with by_h5py(url, 0) as trials:
        bucket.good_keys = set()
        with pytest.raises(StoreError, match=r"t15.*hdf5: t15.*/trial_00\d\d .*ExpiredToken.*renew the credentials"):
            trials.batch(0)
        assert trials.statistics()["renewals"] == ranges.RENEWALS
        bucket.good_keys = None
        bucket.fault = lambda *_: ("denied", 0.0)
        with pytest.raises(StoreError, match=r"trial_00\d\d .*access denied .*AccessDenied.* s3:GetObject"):
            trials.batch(1)


def test_an_object_that_changed_or_went_ends_the_run_with_both_versions(
    bucket: Bucket, folder: Path, tmp_path: Path
) -> None:
    url = bucket.put_folder(folder)
    with by_h5py(url, 0) as trials:
        for session in SESSIONS:
            other = write_session(tmp_path / "other", session, trials=13)
            bucket.objects[f"data/{session}/data_train.hdf5"] = other.read_bytes()
        with pytest.raises(DataError, match=r"hdf5: is no longer .*/trial_00\d\d: expected ETag .*; found ETag"):
            trials.batch(0)
        for session in SESSIONS:
            del bucket.objects[f"data/{session}/data_train.hdf5"]
        with pytest.raises(DataError, match=r"is no longer .*found no such object"):
            trials.batch(1)


# --- files that change


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_changes_under_way_ends_the_run(folder: Path, workers: int) -> None:
    with by_h5py(folder, workers) as trials:
        trials.batch(0)
        for session in SESSIONS:
            os.utime(folder / session / "data_train.hdf5", ns=(5, 5))
        with pytest.raises(DataError, match=r"data_train.hdf5: is no longer .*/trial_00\d\d: .* found changed at 5"):
            bits(trials, range(1, STEPS))


def test_a_file_that_is_gone_and_a_trial_that_is_not_in_it_are_named(folder: Path) -> None:
    path = folder / SESSIONS[1] / "data_train.hdf5"
    trials = by_h5py(folder, 0)
    before = path.stat()
    with h5py.File(path, "r+") as file:
        del file[BAD]
    os.truncate(path, before.st_size)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(DataError, match=f"{BAD}: input_features is not there, where the index has .*--rebuild"):
        trials.read([12 + 4])
    trials.close()
    trials = by_h5py(folder, 0)
    path.unlink()
    with trials, pytest.raises(StoreError, match=r"data_train.hdf5: t15.*/trial_0004 cannot be read \(No such file"):
        trials.read([12 + 4])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_trial_that_cannot_be_used_is_named_or_left_out_by_name_as_by_ranges(tmp_path: Path, workers: int) -> None:
    """One holds a NaN, one a chunk that does not decompress."""
    folder = write_folder(tmp_path, splits=("train",), layout="gzip")
    path = folder / SESSIONS[1] / "data_train.hdf5"
    with h5py.File(path, "r+") as file:
        file[BAD]["input_features"][3, 5] = np.nan
        damaged = file["trial_0007"]["input_features"].id.get_chunk_info(0).byte_offset
    with open(path, "r+b") as raw:
        raw.seek(damaged + 9)
        raw.write(b"\xff\x00\xff")
    expected = open_trials(folder, cache_bytes=0, on_bad_trial="skip")
    found = by_h5py(folder, workers, on_bad_trial="skip")
    assert bits(found, range(40)) == bits(expected, range(40))
    assert [one.split(": ")[0] for one in found.bad] == [one.split(": ")[0] for one in expected.bad]
    assert {one.split(": ")[0].split("/")[1] for one in found.bad} == {BAD, "trial_0007"}
    with by_h5py(folder, workers) as trials:
        with pytest.raises(DataError, match=r"trial_0007: .*filter.*copy the file again"):
            trials.read([12 + 7])
        with pytest.raises(DataError, match=f"{BAD}: input_features holds nan at time step 3 .*--on-bad-trial skip"):
            trials.read([12 + 4])


# --- processes that die, and ours


def test_a_process_killed_in_the_middle_costs_time_alone(bucket: Bucket, folder: Path) -> None:
    url = bucket.put_folder(folder)
    expected = bits(open_trials(url, cache_bytes=0))
    trials = by_h5py(url, 2)
    reading = threading.Event()

    def fault(*_: Any) -> tuple[str, float]:
        reading.set()
        return "slow", 0.5

    bucket.fault = fault
    killed: list[int] = []

    def kill() -> None:
        reading.wait(60)
        bucket.fault = lambda *_: None
        killed.extend(source_of(trials).pids)
        for pid in killed:
            os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    assert bits(trials) == expected
    killer.join()
    assert killed and trials.statistics()["retries"] >= 1
    assert not trials.bad


def test_a_trial_that_costs_one_process_after_another_ends_the_run_with_its_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with by_h5py(folder, 1) as trials:
        monkeypatch.setattr("brain_to_text.reading.h5py_source.Worker.ask", _killed_before())
        with pytest.raises(
            EstibaError,
            match=r"data_train.hdf5: t15.*/trial_0000 cannot be read: 3 processes died .*SIGKILL: out of memory\?",
        ):
            trials.read([0])


def _killed_before() -> Any:
    from brain_to_text.indexing.crew import Worker

    ask = Worker.ask

    def killed(self: Worker, task: Any) -> Any:
        os.kill(self.pid, signal.SIGKILL)
        return ask(self, task)

    return killed


def test_processes_are_gone_after_close_and_with_a_parent_that_was_killed(folder: Path, tmp_path: Path) -> None:
    trials = by_h5py(folder, 2)
    trials.batch(0)
    pids = source_of(trials).pids
    assert pids
    trials.close()
    assert not any(_is_alive(pid) for pid in pids)
    script = (
        f"from files import open_trials\ntrials = open_trials({str(folder)!r}, read_by='h5py', workers=2)\n"
        "trials.batch(0)\nprint(*trials.reader.source.pids, flush=True)\ninput()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert parent.stdout is not None
    children = [int(pid) for pid in parent.stdout.readline().split()]
    assert children and all(_is_alive(pid) for pid in children)
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 10
    while any(_is_alive(pid) for pid in children):
        assert time.monotonic() < deadline, "a process outlived its parent"
        time.sleep(0.02)


def _is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stop_is_not_kept_waiting(bucket: Bucket, folder: Path, workers: int) -> None:
    url = bucket.put_folder(folder)
    stop = Stop()
    trials = by_h5py(url, workers, stop=stop)
    bucket.fault = lambda *_: ("slow", 20.0)
    threading.Timer(0.5, stop.request, ["the test"]).start()
    began = time.monotonic()
    with trials, pytest.raises(Interrupted):
        trials.batch(0)
    assert time.monotonic() - began < 3
    if workers == 0:  # caught inside of h5py, it would keep the process from ending
        assert not [one for one in threading.enumerate() if one.name.startswith("brain-h5py")]
    with pytest.raises(RuntimeError, match="closed"):
        source_of(trials).fetch(trials.known[0])
