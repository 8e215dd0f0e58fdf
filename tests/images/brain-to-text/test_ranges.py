"""From a bucket that misbehaves, the same bytes: one exact request a trial, retried, hedged, renewed, pinned."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bucket import NAME, Bucket, bucket_for
from files import SESSIONS, features_by_h5py, open_trials, write_folder, write_session

from brain_to_text.data import Trials
from brain_to_text.indexing.index import FOLDER
from brain_to_text.reading import ranges as module
from estiba.errors import DataError, StoreError

STEPS = 40


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    with bucket_for(monkeypatch) as made:
        yield made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "data", splits=("train",))


def features_of_steps(trials: Trials, steps: int = STEPS) -> list[bytes]:
    found = [trials.batch(step).features.numpy().tobytes() for step in range(steps)]
    trials.close()
    return found


def all_of(trials: Trials, steps: Iterable[int]) -> None:
    for step in steps:
        trials.batch(step)


def without_cache(location: str, **options: Any) -> Trials:
    return open_trials(location, **{"cache_bytes": 0, **options})


def test_each_trial_is_one_exact_request(bucket: Bucket, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEDGE_SHARE", -1.0)  # this machine may be slow now and then
    url = bucket.put_folder(folder)
    trials = without_cache(url, ahead_batches=0)
    bucket.gets.clear()
    bucket.sent_bytes = 0
    ids = trials.sweep(100)
    read = [trials.read(one) for one in ids]
    statistics = trials.statistics()
    trials.close()
    assert sum(len(batch.trial) for batch in read) == trials.n_trials == 36
    assert statistics["gets"] == len(bucket.gets) == 36
    assert statistics["bytes_fetched"] == statistics["bytes_used"] == bucket.sent_bytes
    for batch in read:
        for row, name in enumerate(batch.trial):
            expected = features_by_h5py(folder, name)
            steps = int(batch.n_time_steps[row])
            assert batch.features[row, :steps].numpy().tobytes() == expected.tobytes()


def test_the_index_is_published_beside_the_data_and_used_by_the_next(bucket: Bucket, folder: Path) -> None:
    url = bucket.put_folder(folder)
    expected = features_of_steps(without_cache(url), 3)
    published = [key for key in bucket.objects if FOLDER in key]
    assert len(published) == 3
    bucket.gets.clear()
    trials = without_cache(url)
    assert not bucket.gets, "opening reads nothing of the HDF5 files"
    assert features_of_steps(trials, 3) == expected


def test_a_bucket_that_is_read_only_keeps_the_index_on_this_machine(
    bucket: Bucket, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    bucket.is_read_only = True
    url = bucket.put_folder(folder)
    without_cache(url).close()
    assert not [key for key in bucket.objects if FOLDER in key]
    assert len(list((tmp_path / "cache").rglob("*.index"))) == 3
    bucket.gets.clear()
    without_cache(url).close()
    assert not bucket.gets


@pytest.mark.parametrize("kind", ["error", "short", "cut"])
def test_failed_requests_are_asked_again_and_the_run_has_the_same_bits(bucket: Bucket, folder: Path, kind: str) -> None:
    url = bucket.put_folder(folder)
    expected = features_of_steps(without_cache(url))
    bucket.fault = lambda number, _: (kind, 0.0) if number % 12 == 0 else None
    trials = without_cache(url)
    assert features_of_steps(trials) == expected
    # A 503, and an answer that breaks off, are asked for again below us.
    assert kind != "short" or trials.statistics()["retries"] > 3


def test_slow_requests_are_asked_a_second_time(bucket: Bucket, folder: Path) -> None:
    url = bucket.put_folder(folder)
    expected = features_of_steps(without_cache(url))
    bucket.gets.clear()
    bucket.fault = lambda number, _: ("slow", 2.0) if number % 25 == 0 else None
    trials = without_cache(url)
    assert features_of_steps(trials) == expected
    slow = len(bucket.gets) // 25
    assert trials.statistics()["hedged"] >= slow - 2, "before twenty answers nobody knows what is slow"


def test_hedging_is_bounded_where_everything_is_slow(bucket: Bucket, folder: Path) -> None:
    url = bucket.put_folder(folder)
    trials = without_cache(url)
    random = np.random.default_rng(0)
    waits = random.exponential(0.02, 10_000)
    bucket.gets.clear()
    bucket.fault = lambda number, _: ("slow", float(waits[number]))
    features_of_steps(trials)
    statistics = trials.statistics()
    assert statistics["hedged"] <= module.HEDGE_SHARE * statistics["gets"] + 1


def test_an_expired_credential_is_renewed_under_way(
    bucket: Bucket, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = bucket.put_folder(folder)
    expected = features_of_steps(without_cache(url))
    trials = without_cache(url)
    first = [trials.batch(step).features.numpy().tobytes() for step in range(5)]
    bucket.good_keys = {"second"}
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "second")
    rest = [trials.batch(step).features.numpy().tobytes() for step in range(5, STEPS)]
    trials.close()
    assert first + rest == expected
    assert trials.statistics()["renewals"] == 1


def test_credentials_that_stay_expired_end_with_the_object_the_trial_and_the_remedy(
    bucket: Bucket, folder: Path
) -> None:
    url = bucket.put_folder(folder)
    trials = without_cache(url)
    bucket.good_keys = set()
    with pytest.raises(
        StoreError, match=r"s3://brain/data/t15.*/data_train.hdf5: t15.*/trial_00\d\d .*ExpiredToken.*renew"
    ):
        trials.batch(0)
    trials.close()


def test_an_endpoint_that_restarts_costs_time_alone(bucket: Bucket, folder: Path) -> None:
    url = bucket.put_folder(folder)
    expected = features_of_steps(without_cache(url))
    trials = without_cache(url)
    found = [trials.batch(step).features.numpy().tobytes() for step in range(5)]
    bucket.stop()
    threading.Timer(1.0, bucket.start).start()
    found += [trials.batch(step).features.numpy().tobytes() for step in range(5, STEPS)]
    trials.close()
    assert found == expected


def test_an_endpoint_that_stays_away_ends_the_run_though_bad_trials_may_be_skipped(
    bucket: Bucket, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RETRY_S", 0.5)
    monkeypatch.setattr("estiba.s3.RETRY_TIMEOUT", timedelta(seconds=1))
    trials = without_cache(bucket.put_folder(folder), on_bad_trial="skip")
    trials.batch(0)
    bucket.stop()
    with pytest.raises(StoreError, match=r"trial_00\d\d .*check the endpoint and the network"):
        all_of(trials, range(1, 20))
    assert trials.bad == [], "nothing is wrong with any trial"
    trials.close()
    bucket.start()


def test_an_object_that_changes_under_way_ends_the_run_with_both_versions(
    bucket: Bucket, folder: Path, tmp_path: Path
) -> None:
    url = bucket.put_folder(folder)
    trials = without_cache(url)
    trials.batch(0)
    for session in SESSIONS:
        other = write_session(tmp_path / "other", session, trials=13)
        bucket.objects[f"data/{session}/data_train.hdf5"] = other.read_bytes()
    with pytest.raises(DataError, match=r"data_train.hdf5: is no longer .*/trial_00\d\d: expected ETag .*; found ETag"):
        all_of(trials, range(1, 20))
    trials.close()
    with pytest.raises(
        DataError, match=r"is not the object that was indexed: expected ETag .*; found ETag .*--rebuild"
    ):
        without_cache(url)
    without_cache(url, rebuild_index=True).close()
    without_cache(url).close()


def test_an_object_that_is_gone_is_named(bucket: Bucket, folder: Path) -> None:
    url = bucket.put_folder(folder)
    trials = without_cache(url)
    for session in SESSIONS:
        del bucket.objects[f"data/{session}/data_train.hdf5"]
    with pytest.raises(DataError, match="no such object"):
        trials.batch(0)
    trials.close()


def test_a_request_that_always_fails_ends_with_the_object_the_trial_and_the_remedy(
    bucket: Bucket, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = bucket.put_folder(folder)
    trials = without_cache(url)
    monkeypatch.setattr(module, "RETRY_S", 1.0)
    bucket.fault = lambda *_: ("short", 0.0)
    with pytest.raises(StoreError, match=r"hdf5: t15.*/trial_00\d\d \(bytes .*check the endpoint"):
        trials.batch(0)
    trials.close()


def test_a_stop_is_not_kept_waiting(bucket: Bucket, folder: Path) -> None:
    from estiba.errors import Interrupted
    from estiba.stop import Stop

    url = bucket.put_folder(folder)
    stop = Stop()
    trials = without_cache(url, stop=stop)
    bucket.fault = lambda *_: ("slow", 20.0)
    threading.Timer(0.3, stop.request, ["the test"]).start()
    began = time.monotonic()
    with pytest.raises(Interrupted):
        trials.batch(0)
    trials.close()
    assert time.monotonic() - began < 3


def test_a_file_that_changes_under_way_ends_the_run(folder: Path) -> None:
    trials = without_cache(str(folder))
    trials.batch(0)
    for session in SESSIONS:
        path = folder / session / "data_train.hdf5"
        with open(path, "r+b") as file:
            file.seek(5000)
            file.write(b"x")
        os.utime(path, ns=(5, 5))
    with pytest.raises(DataError, match=r"data_train.hdf5: is no longer .*/trial_00\d\d"):
        all_of(trials, range(1, 20))
    trials.close()


def test_the_bucket_here_is_the_one_in_urls() -> None:
    assert Bucket().put_folder(Path("/nowhere")) == f"s3://{NAME}/data"
