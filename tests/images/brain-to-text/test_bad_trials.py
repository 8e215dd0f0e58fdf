"""`--on-bad-trial skip` skips trials whose own values are bad, and nothing else; a store's faults change no batch."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from bucket import Bucket
from hdf5_files import SESSIONS, WIDTH, open_trials, write_folder, write_session
from rehearsal import StopPoint, config_at, outcome, recordings, run, stopped_at

from brain_to_text.data.collate import Batch
from brain_to_text.data.dataset import TrialDataset
from brain_to_text.data.reading import ranges, source
from brain_to_text.data.schema import to_diphones
from estiba.errors import DataError, StoreError

STEPS = 25
READERS = ["ranges", "h5py"]
DAMAGED = f"{SESSIONS[1]}/trial_0004"


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """One trial has a chunk that does not decompress."""
    folder = write_folder(tmp_path / "damaged", splits=("train",), layout="gzip")
    damage_chunk(folder / SESSIONS[1] / "data_train.hdf5", "trial_0004")
    return folder


def damage_chunk(path: Path, trial: str) -> None:
    with h5py.File(path, "r+") as file:
        chunk = file[trial]["input_features"].id.get_chunk_info(0)
    with open(path, "r+b") as raw:
        raw.seek(chunk.byte_offset + 9)
        raw.write(b"\xff\x00\xff")


def skipping(location: str | Path, reader: str = "ranges", **options: Any) -> TrialDataset:
    return open_trials(location, **{"cache_bytes": 0, "on_bad_trial": "skip", "reader": reader, **options})


def bits(batch: Batch) -> tuple[bytes, list[str]]:
    return batch.features.numpy().tobytes(), batch.trial


def batches(trials: TrialDataset, steps: int = STEPS) -> list[tuple[bytes, list[str]]]:
    with trials:
        return [bits(trials.batch(step)) for step in range(steps)]


# --- what is no trial's fault


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ["missing", "precondition", "html", "no etag"])
def test_responses_that_deny_an_object_that_is_there_cost_only_time(
    bucket: Bucket, folder: Path, kind: str, reader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "FIRST_PAUSE_S", 0.01)
    url = bucket.put_folder(folder)
    expected = batches(open_trials(url, cache_bytes=0))
    for flag in ("fail", "skip"):
        with open_trials(url, cache_bytes=0, reader=reader, on_bad_trial=flag, num_dataloader_workers=0) as trials:
            first = len(bucket.gets)
            bucket.fault = lambda number, _: (kind, 0.0) if number - first in (1, 2, 3, 5) else None  # noqa: B023
            assert [bits(trials.batch(step)) for step in range(STEPS)] == expected
            assert trials.skipped == []
            assert trials.statistics()["retries"] >= 3 or (reader, kind) == ("ranges", "no etag"), "the length is right"


@pytest.mark.parametrize("reader", READERS)
def test_a_session_whose_access_is_denied_ends_the_run_instead_of_losing_its_trials(
    bucket: Bucket, folder: Path, reader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "FIRST_PAUSE_S", 0.01)
    trials = skipping(bucket.put_folder(folder), reader)
    bucket.fault = lambda _, key: ("denied", 0.0) if SESSIONS[1] in key else None
    with pytest.raises(StoreError, match=rf"{SESSIONS[1]}/data_train.hdf5: .*access denied"):
        batches(trials)
    assert trials.skipped == []


@pytest.mark.parametrize("reader", READERS)
def test_an_object_that_is_replaced_ends_the_run_instead_of_losing_its_trials(
    bucket: Bucket, folder: Path, tmp_path: Path, reader: str
) -> None:
    trials = skipping(bucket.put_folder(folder), reader)
    other = write_session(tmp_path / "other", SESSIONS[1], trials=13)
    bucket.objects[f"data/{SESSIONS[1]}/data_train.hdf5"] = other.read_bytes()
    with pytest.raises(DataError, match=r"is no longer the object that was indexed.*expected ETag .*; found ETag"):
        batches(trials)
    assert trials.skipped == []


@pytest.mark.parametrize("reader", READERS)
def test_a_file_that_is_truncated_during_the_run_ends_it(folder: Path, reader: str) -> None:
    trials = skipping(folder, reader, num_dataloader_workers=0)
    trials.batch(0)
    for session in SESSIONS:
        os.truncate(folder / session / "data_train.hdf5", 9000)
    with pytest.raises(DataError, match=r"data_train.hdf5: is no longer the object that was indexed"):
        batches(trials)
    assert trials.skipped == []


def test_a_file_that_was_truncated_before_it_was_indexed_ends_the_run(folder: Path) -> None:
    path = folder / SESSIONS[1] / "data_train.hdf5"
    os.truncate(path, path.stat().st_size - 200)
    with pytest.raises(DataError, match="truncated"):
        skipping(folder)


def test_a_store_that_fails_while_it_is_indexed_is_not_published_as_a_trials_problem(
    bucket: Bucket, folder: Path
) -> None:
    url = bucket.put_folder(write_folder(folder, splits=("train",), trials=60))
    bucket.fault = lambda number, _: ("denied", 0.0) if number > 12 else None
    with pytest.raises(StoreError, match="access denied"):
        skipping(url)
    bucket.fault = lambda *_: None
    with skipping(url) as trials:
        assert trials.skipped == [] and trials.n_trials == 180


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        ("RequestTimeTooSkewed", "set this machine's clock"),
        ("InvalidObjectState", "is archived: restore it"),
        ("InvalidAccessKeyId", "correct AWS_ACCESS_KEY_ID"),
        ("AccessDenied", "allow s3:GetObject .*AWS_REQUEST_PAYER=requester"),
    ],
)
def test_each_refusal_comes_with_its_own_remedy(
    bucket: Bucket, folder: Path, code: str, remedy: str, reader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "FIRST_PAUSE_S", 0.01)
    trials = skipping(bucket.put_folder(folder), reader)
    bucket.fault = lambda *_: (code, 0.0)
    with trials, pytest.raises(StoreError, match=f"{code}.*{remedy}") as caught:
        trials.batch(0)
    assert code == "AccessDenied" or "s3:GetObject" not in str(caught.value)


def test_the_failure_of_the_slower_of_two_requests_is_not_reported_by_asyncio(bucket: Bucket, folder: Path) -> None:
    """A request that is cancelled may fail in its own way."""
    reported: list[Any] = []
    sent: list[Any] = []

    async def request(*_: Any) -> bytes:
        sent.append(None)
        if len(sent) == 2:
            return b"x"
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            raise FileNotFoundError("as requested") from None
        raise AssertionError

    async def scenario(reader: ranges.ObjectRanges) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context["message"]))
        reader._get_once, reader._hedge_after_s = request, 0.01  # type: ignore[method-assign]
        assert await reader._get_hedged(None, 0, 1) == b"x"  # type: ignore[arg-type]
        await asyncio.sleep(0.01)
        gc.collect()

    with skipping(bucket.put_folder(folder)) as trials:
        reader = trials.reader.source
        assert isinstance(reader, ranges.ObjectRanges)
        asyncio.run_coroutine_threadsafe(scenario(reader), reader._loop).result(timeout=20)
    assert reported == []


@pytest.mark.parametrize("kind", ["missing", "precondition"])
def test_a_response_that_denies_the_object_while_it_is_indexed_costs_only_time(
    bucket: Bucket, folder: Path, kind: str
) -> None:
    bucket.fault = lambda number, _: (kind, 0.0) if number % 3 == 1 else None
    with skipping(bucket.put_folder(folder)) as trials:
        assert trials.n_trials == 36


# --- what is


@pytest.mark.parametrize("reader", READERS)
def test_a_trial_that_does_not_decode_is_skipped_and_alone(damaged: Path, bucket: Bucket, reader: str) -> None:
    trials = skipping(bucket.put_folder(damaged), reader)
    read = batches(trials)
    assert {line.partition(": ")[0] for line in trials.skipped} == {DAMAGED}
    drawn = [[trials.refs[trial].name for trial in trials.sampler.trials(step)] for step in range(STEPS)]  # type: ignore[union-attr]
    assert [names for _, names in read] == [[name for name in names if name != DAMAGED] for names in drawn]


def test_what_was_left_out_before_a_stop_is_in_the_results_of_the_resumed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trial is drawn early in the run, and not again after the resume."""
    data = recordings(tmp_path / "data")
    path = next(data.glob("*/data_train.hdf5"))
    with h5py.File(path, "r+") as file:
        for name in file:
            file[name]["input_features"][3, 5] = np.nan if name == "trial_0003" else 0.5
    changes = {"on_bad_trial": "skip", "num_training_batches": 12, "ahead_batches": 1}
    run(tmp_path / "whole", data, **changes)
    expected = json.loads((tmp_path / "whole/output/results.json").read_text())["trials_left_out"]
    assert [line.partition(": ")[0] for line in expected] == [f"{path.parent.name}/trial_0003"]
    stopped_at(StopPoint(11), tmp_path / "first", data, monkeypatch, **changes)
    shutil.copytree(tmp_path / "first/checkpoints", tmp_path / "second/checkpoints")
    run(tmp_path / "second", data, **changes)
    assert json.loads((tmp_path / "second/output/results.json").read_text())["trials_left_out"] == expected
    assert outcome(tmp_path / "second") == outcome(tmp_path / "whole")


def test_a_trial_too_short_for_its_labels_is_known_before_the_first_step(folder: Path) -> None:
    path = folder / SESSIONS[2] / "data_train.hdf5"
    with h5py.File(path, "r+") as file:
        group = file["trial_0002"]
        del group["input_features"]
        group["input_features"] = np.zeros((20, WIDTH), np.float32)
        group.attrs["n_time_steps"] = 20
        group["seq_class_ids"][:17], group.attrs["seq_len"] = np.arange(1, 18), 17
        group = file["trial_0003"]  # fits exactly: 20 bins less the longest cut of 2
        del group["input_features"]
        group["input_features"] = np.zeros((20, WIDTH), np.float32)
        group.attrs["n_time_steps"] = 20
        group["seq_class_ids"][:17], group.attrs["seq_len"] = [*range(1, 17), 16], 17
    wanted = "trial_0003: its 20 bins make 17 output frames .*a cut of 3 bins.*, but its 17 labels need 18"
    with pytest.raises(DataError, match=f"{wanted}.*lower --patch-stride.*--on-bad-trial skip"):
        open_trials(folder, random_cut=4)
    with open_trials(folder, random_cut=3) as trials:
        assert trials.n_trials == 36
    with skipping(folder, random_cut=4) as trials:
        assert trials.n_trials == 35
        assert [line.partition(": ")[0] for line in trials.skipped] == [f"{SESSIONS[2]}/trial_0003"]


def test_the_composite_loss_needs_frames_for_the_phonemes_too(tmp_path: Path) -> None:
    """Two equal phonemes in a row are two different diphones, but need a blank between them."""
    path = write_session(tmp_path, trials=2)
    phonemes = np.array([5, 5, 5, 5, 5, 5, 5, 5, 5, 7])
    with h5py.File(path, "r+") as file:
        for group in file.values():
            group["seq_class_ids"][:10], group.attrs["seq_len"] = to_diphones(phonemes), 10
            group["seq_class_ids_phoneme"] = np.pad(phonemes, (0, 490)).astype(np.int32)
            group.attrs["seq_len_phoneme"] = 10
            del group["input_features"]
            group["input_features"] = np.zeros((19, WIDTH), np.float32)
            group.attrs["n_time_steps"] = 19
    settings: dict[str, Any] = {"n_classes": 1681, "days_per_batch": 1}
    with open_trials(tmp_path, **settings) as trials:
        assert trials.n_trials == 2
    with pytest.raises(DataError, match=r"make 17 output frames .* its 10 labels need 18"):
        open_trials(tmp_path, use_composite_loss=True, **settings)


# --- features and indexes


def test_the_numbers_of_a_feature_subset_are_those_of_the_file(tmp_path: Path) -> None:
    """Whatever --n-input-features says: upstream's default, the width of the file, or that of the subset."""
    data = recordings(tmp_path / "data", features=32)
    for number, width in enumerate((512, 32, 3)):
        changes = {"feature_subset": [0, 2, 5], "n_input_features": width, "num_training_batches": 2}
        config_at(tmp_path, data, **changes).preflight()
        run(tmp_path / str(number), data, **changes)
    with pytest.raises(DataError, match=r"has 32 features, but feature_subset has 32; give indices below 32"):
        run(tmp_path / "wrong", data, feature_subset=[0, 2, 32], num_training_batches=2)


def test_a_prefix_copied_with_its_index_is_indexed_again_with_a_word(
    bucket: Bucket, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The copy was written in other parts, so its ETags differ."""
    url = bucket.put_folder(folder)
    expected = batches(open_trials(url))
    for key in list(bucket.objects):
        copy = key.replace("data/", "copy/", 1)
        bucket.objects[copy] = bucket.objects[key]
        if key.endswith(".hdf5"):
            bucket.etags[copy] = '"0123456789abcdef0123456789abcdef-2"'
    capsys.readouterr()
    assert batches(open_trials("s3://brain/copy")) == expected
    assert "describes s3://brain/data/" in capsys.readouterr().err
    bucket.gets.clear()
    open_trials("s3://brain/copy").close()
    assert not bucket.gets, "its own index was published"


def test_a_second_data_set_may_use_the_same_index_path(bucket: Bucket, folder: Path, tmp_path: Path) -> None:
    first = bucket.put_folder(folder, "first")
    second = bucket.put_folder(write_folder(tmp_path / "second", splits=("train",), trials=9), "second")
    index = str(tmp_path / "index")
    for url, count in ((first, 36), (second, 27), (first, 36)):
        with open_trials(url, index_path=index) as trials:
            assert trials.n_trials == count
    other = write_session(tmp_path / "other", SESSIONS[1], trials=13)
    bucket.objects[f"first/{SESSIONS[1]}/data_train.hdf5"] = other.read_bytes()
    with pytest.raises(DataError, match="is not the object that was indexed"):
        open_trials(first, index_path=index)


# --- remedies


def widen(folder: Path, session: str, trial: str, width: int) -> None:
    with h5py.File(folder / session / "data_train.hdf5", "r+") as file:
        del file[trial]["input_features"]
        file[trial]["input_features"] = np.zeros((20, width), np.float32)


def test_another_width_is_advised_only_if_all_trials_have_it(folder: Path) -> None:
    with pytest.raises(DataError, match=f"{WIDTH} features, but 12 were expected; give --n-input-features {WIDTH}"):
        open_trials(folder, n_input_features=12)
    for width in (0, WIDTH + 1):
        widen(folder, SESSIONS[0], "trial_0001", width)
        with pytest.raises(DataError, match=f"{width} features, but {WIDTH} were expected; rewrite it"):
            open_trials(folder, rebuild_index=True)


def test_without_validation_the_remedy_is_to_turn_it_off(folder: Path) -> None:
    with pytest.raises(DataError, match=r"no session has a data_val.hdf5 .*dataset_probability_val"):
        open_trials(folder, split="val")
    with h5py.File(folder / SESSIONS[0] / "data_val.hdf5", "w"):
        pass
    with pytest.raises(DataError, match=r"data_val.hdf5: has no trials .*dataset_probability_val") as caught:
        open_trials(folder, split="val")
    assert "remove session" not in str(caught.value)


@pytest.mark.parametrize("reader", READERS)
def test_both_readers_pay_for_their_requests_if_the_requester_pays(
    bucket: Bucket, folder: Path, reader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_REQUEST_PAYER", "requester")
    with skipping(bucket.put_folder(folder), reader, num_dataloader_workers=0) as trials:
        trials.batch(0)
    assert bucket.payers == {"requester"}
