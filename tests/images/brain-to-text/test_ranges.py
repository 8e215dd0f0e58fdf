"""Byte ranges: one exact request per trial, and the same bytes from a bucket that misbehaves."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bucket import NAME, Bucket
from hdf5_files import SESSIONS, features_by_h5py, open_trials, write_session

from brain_to_text.data.dataset import TrialDataset
from brain_to_text.data.indexing.index import FOLDER
from brain_to_text.data.reading import ranges, source
from estiba.errors import DataError, StoreError

STEPS = 40


def features_of_steps(trials: TrialDataset, steps: int = STEPS) -> list[bytes]:
    features = [trials.batch(step).features.numpy().tobytes() for step in range(steps)]
    trials.close()
    return features


def read_all(trials: TrialDataset, steps: Iterable[int]) -> None:
    for step in steps:
        trials.batch(step)


def without_cache(location: str, **options: Any) -> TrialDataset:
    return open_trials(location, **{"cache_bytes": 0, **options})


def test_each_trial_is_one_exact_request(bucket: Bucket, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "HEDGE_SHARE", -1.0)  # a busy machine would cause hedged requests
    url = bucket.put_folder(folder)
    trials = without_cache(url, ahead_batches=0)
    bucket.gets.clear()
    bucket.sent_bytes = 0
    ids = trials.sweep(100)
    batches = [trials.read(positions) for positions in ids]
    statistics = trials.statistics()
    trials.close()
    assert sum(len(batch.trial) for batch in batches) == trials.n_trials == 36
    assert statistics["gets"] == len(bucket.gets) == 36
    assert statistics["bytes_fetched"] == statistics["bytes_used"] == bucket.sent_bytes
    for batch in batches:
        for row, name in enumerate(batch.trial):
            expected = features_by_h5py(folder, name)
            steps = int(batch.n_time_steps[row])
            assert batch.features[row, :steps].numpy().tobytes() == expected.tobytes()


def test_the_index_is_published_next_to_the_data_and_used_by_the_next_run(
    bucket: Bucket, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No hedging and no reading ahead: a request still in flight at close() could reach the bucket after clear().
    monkeypatch.setattr(ranges, "HEDGE_SHARE", -1.0)
    url = bucket.put_folder(folder)
    expected = features_of_steps(without_cache(url, ahead_batches=0), 3)
    published = [key for key in bucket.objects if FOLDER in key]
    assert len(published) == 3
    bucket.gets.clear()
    trials = without_cache(url)
    assert not bucket.gets, "opening does not read the HDF5 files"
    assert features_of_steps(trials, 3) == expected


def test_the_index_of_a_read_only_bucket_is_kept_on_this_machine(
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
def test_failed_requests_are_retried_and_give_the_same_bits(bucket: Bucket, folder: Path, kind: str) -> None:
    url = bucket.put_folder(folder)
    expected = features_of_steps(without_cache(url))
    bucket.fault = lambda number, _: (kind, 0.0) if number % 12 == 0 else None
    trials = without_cache(url)
    assert features_of_steps(trials) == expected
    # obstore itself retries a 503 and a response that breaks off.
    assert kind != "short" or trials.statistics()["retries"] > 3


def test_slow_requests_are_hedged(bucket: Bucket, folder: Path) -> None:
    url = bucket.put_folder(folder)
    expected = features_of_steps(without_cache(url))
    bucket.gets.clear()
    bucket.fault = lambda number, _: ("slow", 2.0) if number % 25 == 0 else None
    trials = without_cache(url)
    assert features_of_steps(trials) == expected
    slow = len(bucket.gets) // 25
    assert trials.statistics()["hedged"] >= slow - 2, "hedging starts only after twenty responses"


def test_hedging_is_limited_if_everything_is_slow(bucket: Bucket, folder: Path) -> None:
    url = bucket.put_folder(folder)
    trials = without_cache(url)
    random = np.random.default_rng(0)
    waits = random.exponential(0.02, 10_000)
    bucket.gets.clear()
    bucket.fault = lambda number, _: ("slow", float(waits[number]))
    features_of_steps(trials)
    statistics = trials.statistics()
    assert statistics["hedged"] <= ranges.HEDGE_SHARE * statistics["gets"] + 1


def test_expired_credentials_are_renewed_during_a_run(
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


def test_an_endpoint_that_restarts_costs_only_time(bucket: Bucket, folder: Path) -> None:
    url = bucket.put_folder(folder)
    expected = features_of_steps(without_cache(url))
    trials = without_cache(url)
    features = [trials.batch(step).features.numpy().tobytes() for step in range(5)]
    bucket.stop()
    threading.Timer(1.0, bucket.start).start()
    features += [trials.batch(step).features.numpy().tobytes() for step in range(5, STEPS)]
    trials.close()
    assert features == expected


def test_an_unreachable_endpoint_ends_the_run_even_if_bad_trials_may_be_skipped(
    bucket: Bucket, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "RETRY_S", 0.5)
    monkeypatch.setattr("estiba.storage.s3_client.RETRY_TIMEOUT", timedelta(seconds=1))
    trials = without_cache(bucket.put_folder(folder), on_bad_trial="skip")
    trials.batch(0)
    bucket.stop()
    with pytest.raises(StoreError, match=r"trial_00\d\d .*check the endpoint and the network"):
        read_all(trials, range(1, 20))
    assert trials.skipped == [], "nothing is wrong with any trial"
    trials.close()
    bucket.start()


def test_an_object_that_changes_during_a_run_ends_it_with_both_versions(
    bucket: Bucket, folder: Path, tmp_path: Path
) -> None:
    url = bucket.put_folder(folder)
    trials = without_cache(url)
    trials.batch(0)
    for session in SESSIONS:
        other = write_session(tmp_path / "other", session, trials=13)
        bucket.objects[f"data/{session}/data_train.hdf5"] = other.read_bytes()
    with pytest.raises(DataError, match=r"data_train.hdf5: is no longer .*/trial_00\d\d: expected ETag .*; found ETag"):
        read_all(trials, range(1, 20))
    trials.close()
    with pytest.raises(
        DataError, match=r"is not the object that was indexed: expected ETag .*; found ETag .*--rebuild"
    ):
        without_cache(url)
    without_cache(url, rebuild_index=True).close()
    without_cache(url).close()


def test_a_deleted_object_is_named(bucket: Bucket, folder: Path) -> None:
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
    monkeypatch.setattr(source, "RETRY_S", 1.0)
    bucket.fault = lambda *_: ("short", 0.0)
    with pytest.raises(StoreError, match=r"hdf5: t15.*/trial_00\d\d \(bytes .*check the endpoint"):
        trials.batch(0)
    trials.close()


def test_a_stop_does_not_wait_for_a_slow_store(bucket: Bucket, folder: Path) -> None:
    from estiba.errors import Interrupted
    from estiba.platform.stop import Stop

    url = bucket.put_folder(folder)
    stop = Stop()
    trials = without_cache(url, stop=stop)
    bucket.fault = lambda *_: ("slow", 20.0)
    threading.Timer(0.3, stop.request, ["the test"]).start()
    started = time.monotonic()
    with pytest.raises(Interrupted):
        trials.batch(0)
    trials.close()
    assert time.monotonic() - started < 3


def test_a_file_that_changes_during_a_run_ends_it(folder: Path) -> None:
    trials = without_cache(str(folder))
    trials.batch(0)
    for session in SESSIONS:
        path = folder / session / "data_train.hdf5"
        with open(path, "r+b") as file:
            file.seek(5000)
            file.write(b"x")
        os.utime(path, ns=(5, 5))
    with pytest.raises(DataError, match=r"data_train.hdf5: is no longer .*/trial_00\d\d"):
        read_all(trials, range(1, 20))
    trials.close()


def test_bucket_urls_name_the_bucket() -> None:
    assert Bucket().put_folder(Path("/nowhere")) == f"s3://{NAME}/data"
