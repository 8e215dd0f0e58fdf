"""`--reader h5py` reads the same bits as byte ranges: over s3fs or from files, in processes or in a thread."""

from __future__ import annotations

import gc
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from bucket import Bucket
from hdf5_files import LAYOUTS, SESSIONS, open_trials, write_folder, write_session
from rehearsal import StopPoint, outcome, recordings, run, stopped_at

from brain_to_text.data.dataset import TrialDataset
from brain_to_text.data.reading import s3fs_files, source
from brain_to_text.data.reading.h5py_files import H5Files
from brain_to_text.data.reading.h5py_source import H5pySource
from estiba.errors import DataError, EstibaError, Interrupted, StoreError
from estiba.platform.stop import Stop

STEPS = 12
BAD = "trial_0004"


@pytest.fixture(autouse=True)
def _indexes(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Split the reads of this process into enough requests for a few of them to fail."""
    monkeypatch.setattr(s3fs_files, "BLOCK_BYTES", 16384)


def by_h5py(location: str | Path, workers: int, **options: Any) -> TrialDataset:
    return open_trials(location, **{"cache_bytes": 0, "reader": "h5py", "num_dataloader_workers": workers, **options})


def bits(trials: TrialDataset, steps: Iterable[int] = range(STEPS)) -> list[tuple[bytes, list[str]]]:
    with trials:
        return [(batch.features.numpy().tobytes(), batch.trial) for batch in map(trials.batch, steps)]


def source_of(trials: TrialDataset) -> H5pySource:
    assert isinstance(trials.reader.source, H5pySource)
    return trials.reader.source


# --- the same bits


@pytest.fixture
def every_layout(tmp_path: Path) -> Path:
    """Write a session in each layout."""
    for day, layout in enumerate(LAYOUTS):
        write_session(tmp_path / "data", f"t15.2023.08.{day + 10}", trials=3, layout=layout)
    return tmp_path / "data"


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("store", ["folder", "bucket"])
def test_every_layout_gives_the_same_bits_as_byte_ranges(
    every_layout: Path, bucket: Bucket, workers: int, store: str
) -> None:
    location = str(every_layout) if store == "folder" else bucket.put_folder(every_layout)
    with open_trials(location, cache_bytes=0) as trials:
        ids = [[position] for position in range(trials.n_trials)]
        expected = [trials.read(positions).features.numpy().tobytes() for positions in ids]
    with by_h5py(location, workers) as trials:
        assert trials.n_trials == 3 * len(LAYOUTS)
        features = [batch.features.numpy().tobytes() for batch in trials.read_all(ids)]
        statistics = trials.statistics()
        assert len(source_of(trials).pids) <= workers
    assert features == expected
    assert statistics["gets"] > 0 and statistics["bytes_fetched"] > 0 and statistics["retries"] == 0
    if store == "bucket":
        assert statistics["gets"] == len([range_ for _, range_ in bucket.gets if range_ == "bytes=0-2097151"])


def test_sampler_read_ahead_and_feature_subset_are_the_same(folder: Path) -> None:
    options: dict[str, Any] = {"feature_subset": [6, 1], "n_input_features": 2, "ahead_batches": 2, "cache_bytes": 3000}
    expected = bits(open_trials(folder, **options))
    assert bits(by_h5py(folder, 2, **options)) == expected


def test_a_training_run_ends_with_the_same_bits_and_may_change_its_reader(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = recordings(tmp_path / "data")
    url = bucket.put_folder(data)
    run(tmp_path / "ranges", data, num_dataloader_workers=1)
    expected = outcome(tmp_path / "ranges")
    run(tmp_path / "s3fs", url, reader="h5py", num_dataloader_workers=1)
    assert outcome(tmp_path / "s3fs") == expected
    stopped_at(StopPoint(7, 1), tmp_path / "both", data, monkeypatch)
    run(tmp_path / "both", data, reader="h5py", num_dataloader_workers=0)
    settings = "model/checkpoint/args.yaml"  # contains the number of workers
    assert {**outcome(tmp_path / "both"), settings: b""} == {**expected, settings: b""}


def test_a_script_without_a_main_guard_can_use_processes(folder: Path, tmp_path: Path) -> None:
    expected = bits(open_trials(folder, cache_bytes=0))
    script = tmp_path / "script.py"
    script.write_text(
        "import hashlib\nfrom hdf5_files import open_trials\n"
        f"trials = open_trials({str(folder)!r}, cache_bytes=0, reader='h5py', num_dataloader_workers=2)\n"
        "digest = hashlib.sha256()\n"
        f"for step in range({STEPS}):\n    digest.update(trials.batch(step).features.numpy().tobytes())\n"
        "print(digest.hexdigest())\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=100,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [hashlib.sha256(b"".join(features for features, _ in expected)).hexdigest()]


# --- a misbehaving S3


@pytest.mark.parametrize("kind", ["error", "short", "cut"])
@pytest.mark.usefixtures("small_blocks")
def test_failed_requests_are_retried_and_give_the_same_bits(bucket: Bucket, folder: Path, kind: str) -> None:
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
    assert kind == "error" or trials.statistics()["retries"] > 3  # s3fs retries a 503 itself


def test_worker_processes_retry_too(bucket: Bucket, folder: Path) -> None:
    url = bucket.put_folder(folder)
    expected = bits(open_trials(url, cache_bytes=0))
    bucket.gets.clear()
    bucket.fault = lambda number, _: ("short", 0.0) if number <= 3 else None
    trials = by_h5py(url, 2)
    assert bits(trials) == expected
    assert trials.statistics()["retries"] >= 3


@pytest.mark.usefixtures("small_blocks")
def test_a_request_that_always_fails_ends_with_the_object_the_trial_and_the_remedy(
    bucket: Bucket, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = bucket.put_folder(folder)
    trials = by_h5py(url, 0)
    monkeypatch.setattr(source, "RETRY_S", 0.5)
    bucket.fault = lambda *_: ("short", 0.0)
    with (
        trials,
        pytest.raises(
            StoreError,
            match=r"s3://brain/data/t15.*hdf5: t15.*/trial_00\d\d cannot be read: .*got .* bytes.*check the endpoint",
        ),
    ):
        trials.batch(0)


@pytest.mark.parametrize("workers", [0, 1])
def test_expired_credentials_are_renewed_during_a_run(
    bucket: Bucket, folder: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    url = bucket.put_folder(folder)
    with open_trials(url) as trials:
        expected = trials.read([12]).features.numpy().tobytes()
    with by_h5py(url, workers) as trials:
        trials.read([0])
        bucket.good_keys = {"second"}
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "second")
        assert trials.read([12]).features.numpy().tobytes() == expected, "this trial is in another object"
        assert trials.statistics()["renewals"] == 1


def test_credentials_that_stay_expired_and_missing_permissions_are_reported(bucket: Bucket, folder: Path) -> None:
    url = bucket.put_folder(folder)
    with by_h5py(url, 0) as trials:
        bucket.good_keys = set()
        with pytest.raises(StoreError, match=r"t15.*hdf5: t15.*/trial_00\d\d .*ExpiredToken.*renew the credentials"):
            trials.batch(0)
        assert trials.statistics()["renewals"] == source.MAX_RENEWALS
        bucket.good_keys = None
        bucket.fault = lambda *_: ("denied", 0.0)
        with pytest.raises(StoreError, match=r"trial_00\d\d .*access denied .*AccessDenied.* s3:GetObject"):
            trials.batch(1)


def test_an_object_that_changed_or_was_deleted_ends_the_run_with_both_versions(
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
def test_a_file_that_changes_during_a_run_ends_it(folder: Path, workers: int) -> None:
    with by_h5py(folder, workers) as trials:
        trials.batch(0)
        for session in SESSIONS:
            os.utime(folder / session / "data_train.hdf5", ns=(5, 5))
        with pytest.raises(DataError, match=r"data_train.hdf5: is no longer .*/trial_00\d\d: .* found changed at 5"):
            bits(trials, range(1, STEPS))


def test_a_missing_file_and_a_missing_trial_are_named(folder: Path) -> None:
    path = folder / SESSIONS[1] / "data_train.hdf5"
    trials = by_h5py(folder, 0)
    before = path.stat()
    with h5py.File(path, "r+") as file:
        del file[BAD]
    os.truncate(path, before.st_size)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(DataError, match=f"{BAD}: input_features is missing, but the index has .*--rebuild"):
        trials.read([12 + 4])
    trials.close()
    trials = by_h5py(folder, 0)
    path.unlink()
    with trials, pytest.raises(StoreError, match=r"data_train.hdf5: t15.*/trial_0004 cannot be read \(No such file"):
        trials.read([12 + 4])


@pytest.mark.parametrize("workers", [0, 1])
def test_an_invalid_trial_is_named_or_skipped_by_name_as_with_byte_ranges(tmp_path: Path, workers: int) -> None:
    """One trial has a NaN, another a chunk that does not decompress."""
    folder = write_folder(tmp_path, splits=("train",), layout="gzip")
    path = folder / SESSIONS[1] / "data_train.hdf5"
    with h5py.File(path, "r+") as file:
        file[BAD]["input_features"][3, 5] = np.nan
        damaged = file["trial_0007"]["input_features"].id.get_chunk_info(0).byte_offset
    with open(path, "r+b") as raw:
        raw.seek(damaged + 9)
        raw.write(b"\xff\x00\xff")
    expected = open_trials(folder, cache_bytes=0, on_bad_trial="skip")
    trials = by_h5py(folder, workers, on_bad_trial="skip")
    assert bits(trials, range(40)) == bits(expected, range(40))
    names = [line.split(": ")[0] for line in trials.skipped]
    assert names == [line.split(": ")[0] for line in expected.skipped]
    assert {name.split("/")[1] for name in names} == {BAD, "trial_0007"}
    with by_h5py(folder, workers) as trials:
        with pytest.raises(DataError, match=r"trial_0007: .*filter.*copy the file again"):
            trials.read([12 + 7])
        with pytest.raises(DataError, match=f"{BAD}: input_features holds nan at time step 3 .*--on-bad-trial skip"):
            trials.read([12 + 4])


# --- processes that die or are stopped


def test_a_killed_worker_process_costs_only_time(bucket: Bucket, folder: Path) -> None:
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
    assert not trials.skipped


def test_a_trial_that_kills_one_worker_after_another_ends_the_run_with_its_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with by_h5py(folder, 1) as trials:
        monkeypatch.setattr("brain_to_text.data.reading.h5py_source.Worker.ask", _killed_before())
        with pytest.raises(
            EstibaError,
            match=r"data_train.hdf5: t15.*/trial_0000 cannot be read: 3 processes died .*killed, likely out of memory",
        ):
            trials.read([0])


def _killed_before() -> Any:
    from estiba.processes import Worker

    ask = Worker.ask

    def killed(self: Worker, task: Any) -> Any:
        os.kill(self.pid, signal.SIGKILL)
        return ask(self, task)

    return killed


def test_worker_processes_end_with_close_and_with_a_killed_parent(folder: Path, tmp_path: Path) -> None:
    trials = by_h5py(folder, 2)
    trials.batch(0)
    pids = source_of(trials).pids
    assert pids
    trials.close()
    assert not any(_is_alive(pid) for pid in pids)
    script = (
        "from hdf5_files import open_trials\n"
        f"trials = open_trials({str(folder)!r}, reader='h5py', num_dataloader_workers=2)\n"
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
def test_a_stop_does_not_wait_for_a_slow_store(bucket: Bucket, folder: Path, workers: int) -> None:
    url = bucket.put_folder(folder)
    stop = Stop()
    trials = by_h5py(url, workers, stop=stop)
    bucket.fault = lambda *_: ("slow", 20.0)
    threading.Timer(0.5, stop.request, ["the test"]).start()
    started = time.monotonic()
    with trials, pytest.raises(Interrupted):
        trials.batch(0)
    assert time.monotonic() - started < 3
    if workers == 0:  # a thread stuck in h5py would keep the process from ending
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("brain-h5py")]
    with pytest.raises(RuntimeError, match="closed"):
        source_of(trials).fetch(trials.refs[0])


@pytest.mark.parametrize("kind", ["error", "short", "cut"])
@pytest.mark.usefixtures("small_blocks")
def test_a_failed_read_leaves_no_h5py_objects_to_the_garbage_collector(bucket: Bucket, folder: Path, kind: str) -> None:
    """Collecting them needs h5py's lock, and would deadlock with a read that waits for the collecting thread."""
    url = bucket.put_folder(folder)
    with by_h5py(url, 0) as trials:
        requests = [source_of(trials)._request_for(trials.refs[at]) for at in (12, 23, 35)]
    files = H5Files()
    assert isinstance(files.read(requests[0]).result, np.ndarray)
    bucket.fault = lambda *_: (kind, 0.0)
    gc.collect()
    gc.disable()
    try:
        for request in requests[1:]:  # in an open file, and while opening one
            assert not isinstance(files.read(request).result, np.ndarray)
        files.close_all()
        assert not [item for item in gc.get_objects() if issubclass(type(item), (h5py.Group, h5py.Dataset))]
    finally:
        gc.enable()
