"""Batches contain the trials that the sampler draws, padded; invalid trials are never dropped silently."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hdf5_files import SESSIONS, WIDTH, features_by_h5py, open_trials, write_folder, write_session

from brain_to_text.data.collate import Batch, PaddingSpec
from brain_to_text.data.dataset import TrialDataset
from brain_to_text.data.sampler import SeededSampler, UpstreamSampler
from brain_to_text.data.schema import to_diphones
from estiba.errors import ConfigError, DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "data", splits=("train", "val"))


def read_all(trials: TrialDataset, steps: Iterable[int]) -> None:
    for step in steps:
        trials.batch(step)


def bits(batch: Batch) -> tuple[bytes, bytes, list[str]]:
    return batch.features.numpy().tobytes(), batch.labels.numpy().tobytes(), batch.trial


def test_a_batch_has_the_trials_that_the_sampler_draws_padded(folder: Path) -> None:
    with open_trials(folder) as trials:
        assert trials.sessions == list(SESSIONS) and trials.n_trials == 36
        sampler = SeededSampler([12, 12, 12], batch_size=6, days_per_batch=2, seed=3)
        for step in (0, 1, 7):
            batch = trials.batch(step)
            ids = sampler.trials(step)
            assert batch.trial == [f"{SESSIONS[trial // 12]}/trial_{trial % 12:04d}" for trial in ids]
            assert batch.day.tolist() == [trial // 12 for trial in ids]
            assert batch.features.dtype == torch.float32 and batch.labels.dtype == torch.int64
            assert batch.features.shape == (6, int(batch.n_time_steps.max()), WIDTH)
            assert batch.phoneme_labels is None and batch.sentences == ["hello."] * 6
            for row, name in enumerate(batch.trial):
                expected = features_by_h5py(folder, name)
                assert int(batch.n_time_steps[row]) == len(expected)
                np.testing.assert_array_equal(batch.features[row, : len(expected)], expected)
                assert not batch.features[row, len(expected) :].any()
                assert int(batch.label_lengths[row]) == 5 and bool((batch.labels[row, :5] > 0).all())


def test_upstream_plan_draws_upstreams_batches(folder: Path) -> None:
    with open_trials(folder, upstream_plan=True) as trials:
        sampler = UpstreamSampler([12, 12, 12], batch_size=6, days_per_batch=2, seed=3)
        names = [f"{SESSIONS[trial // 12]}/trial_{trial % 12:04d}" for trial in sampler.trials(4)]
        assert trials.batch(4).trial == names


@pytest.mark.parametrize(
    "options",
    [
        {"cache_bytes": 0},
        {"cache_bytes": 4000},
        {"ahead_batches": 0},
        {"cache_bytes": 0, "disk": 10**6},
        {"cache_bytes": 2000, "disk": 6000},
    ],
)
def test_caches_change_only_how_much_is_read(folder: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    with open_trials(folder) as trials:
        expected = [bits(trials.batch(step)) for step in range(30)]
    if disk := options.pop("disk", None):
        options["disk_cache"] = (tmp_path / "disk", disk)
    with open_trials(folder, **options) as trials:
        assert [bits(trials.batch(step)) for step in range(30)] == expected
        first = trials.statistics()["gets"]
    with open_trials(folder, **options) as trials:
        assert [bits(trials.batch(step)) for step in range(30)] == expected
        if options.get("disk_cache", (None, 0))[1] >= 10**6:
            assert trials.statistics()["gets"] == 0 < first
            assert trials.statistics()["disk_hits"] > 0


def test_a_cached_trial_is_read_once(folder: Path) -> None:
    with open_trials(folder) as trials:
        for step in range(60):
            trials.batch(step)
        assert trials.statistics()["gets"] == 36 == trials.n_trials


def test_any_step_in_any_order_gives_the_same_batch(folder: Path) -> None:
    with open_trials(folder, cache_bytes=3000) as trials:
        expected = {step: bits(trials.batch(step)) for step in range(25)}
        for step in np.random.default_rng(1).permutation(25).tolist():
            assert bits(trials.batch(step)) == expected[step]


def test_threads_may_read_batches_at_once(folder: Path) -> None:
    with open_trials(folder, cache_bytes=3000) as trials:
        expected = [bits(trials.batch(step)) for step in range(20)]
        with ThreadPoolExecutor(6) as pool:
            assert list(pool.map(lambda step: bits(trials.batch(step)), [*range(20), *range(20)])) == expected * 2


def test_requests_for_other_steps_are_released(folder: Path) -> None:
    with open_trials(folder, ahead_batches=3) as trials:
        for step in (0, 5, 100, 2):
            trials.batch(step)
        ahead = {id_ for step in (3, 4, 5) for id_ in trials.sampler.trials(step).tolist()}  # type: ignore[union-attr]
        assert set(trials.reader._pending) == ahead
    assert not trials.reader._pending


def test_a_sweep_reads_every_trial_once_in_batches_of_one_day(folder: Path) -> None:
    with open_trials(folder, split="val") as trials:
        batches = trials.sweep(5)
        assert [len(batch) for batch in batches] == [5, 5, 2] * 3
        assert [trial for batch in batches for trial in batch] == list(range(36))
        read = list(trials.read_all(batches))
        assert [batch.day.unique().tolist() for batch in read] == [[0]] * 3 + [[1]] * 3 + [[2]] * 3
        for batch in read:
            for row, name in enumerate(batch.trial):
                expected = features_by_h5py(folder, name, "val")
                np.testing.assert_array_equal(batch.features[row, : len(expected)], expected)
        assert not trials.reader._pending
        with pytest.raises(ConfigError, match="only the training split"):
            trials.batch(0)


def test_a_day_without_val_trials_keeps_its_number(folder: Path) -> None:
    (folder / SESSIONS[0] / "data_val.hdf5").unlink()
    with open_trials(folder, split="val") as trials:
        assert trials.sessions == list(SESSIONS)
        assert {day for ids in trials.sweep(50) for day in trials.read(ids).day.tolist()} == {1, 2}


def test_the_test_split_needs_no_labels(tmp_path: Path) -> None:
    path = write_session(tmp_path, split="test", trials=3)
    write_session(tmp_path)
    with h5py.File(path, "r+") as file:
        for group in file.values():
            del group["seq_class_ids"], group["transcription"]
            del group.attrs["seq_len"], group.attrs["sentence_label"]
    with open_trials(tmp_path, split="test") as trials:
        batch = trials.read([0, 1, 2])
        assert batch.label_lengths.tolist() == [0, 0, 0] and batch.labels.shape == (3, 0)
        assert batch.sentences == [None] * 3


def test_diphone_labels_come_with_their_phonemes(tmp_path: Path) -> None:
    path = write_session(tmp_path, trials=4)
    with h5py.File(path, "r+") as file:
        for group in file.values():
            phonemes = group["seq_class_ids"][:5]
            padded = np.zeros(500, np.int32)
            padded[:5] = phonemes
            group["seq_class_ids_phoneme"] = padded
            group.attrs["seq_len_phoneme"] = 5
            group["seq_class_ids"][:5] = to_diphones(phonemes)
    with open_trials(tmp_path, n_classes=1681, days_per_batch=1) as trials:
        batch = trials.batch(0)
        assert batch.phoneme_labels is not None and batch.phoneme_lengths is not None
        np.testing.assert_array_equal(batch.labels % 41, batch.phoneme_labels)
        np.testing.assert_array_equal(batch.labels[:, 1:] // 41, batch.phoneme_labels[:, :-1])
        assert batch.phoneme_lengths.tolist() == [5] * 6
    with pytest.raises(DataError, match="outside 1 to 40; these look like diphones: give --n-classes 1681"):
        open_trials(tmp_path, days_per_batch=1)


def test_a_trial_that_lacks_the_phoneme_labels_of_the_others_is_named(tmp_path: Path) -> None:
    path = write_session(tmp_path, trials=4)
    with h5py.File(path, "r+") as file:
        for group in list(file.values())[:3]:
            group["seq_class_ids_phoneme"], group.attrs["seq_len_phoneme"] = group["seq_class_ids"][:5], 5
    with pytest.raises(DataError, match="trial_0003: has no dataset seq_class_ids_phoneme, which other trials have"):
        open_trials(tmp_path, n_classes=1681, days_per_batch=1)
    with open_trials(tmp_path, days_per_batch=1) as trials:
        assert trials.n_trials == 4


def test_a_session_without_training_trials_is_skipped_by_name(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / SESSIONS[1] / "data_train.hdf5").unlink()
    with open_trials(folder, split="val") as trials:
        assert trials.sessions == [SESSIONS[0], SESSIONS[2]]
    assert f"skipped session {SESSIONS[1]}: has a data_val.hdf5 but no data_train.hdf5" in capsys.readouterr().err


def test_feature_subset_and_bad_trials_dict_leave_out_features_and_trials(folder: Path) -> None:
    bad = {SESSIONS[1]: {"1": [2, 3], "2": [10]}}
    with open_trials(folder, feature_subset=[6, 1], n_input_features=2, bad_trials_dict=bad) as trials:
        assert trials.n_trials == 33 and not trials.skipped
        batch = trials.batch(0)
        expected = features_by_h5py(folder, batch.trial[0])[:, [6, 1]]
        np.testing.assert_array_equal(batch.features[0, : len(expected)], expected)
        assert f"{SESSIONS[1]}/trial_0002" not in {ref.name for ref in trials.refs}


def test_the_identity_is_that_of_the_training_data(folder: Path, tmp_path: Path) -> None:
    def identity(location: Path, **options: Any) -> str:
        with open_trials(location, **options) as trials:
            return trials.identity

    first = identity(folder)
    import shutil

    shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copy)
    assert identity(folder) == first == identity(tmp_path / "copy")
    others = [
        identity(folder, dataset_seed=4), identity(folder, batch_size=5), identity(folder, upstream_plan=True),
        identity(folder, sessions=SESSIONS[:2]), identity(folder, split="val"),
    ]  # fmt: skip
    assert len({first, *others}) == 6


# Invalid data -------------------------------------------------------------------------------------------------------

BAD = "trial_0004"


def without_features(group: h5py.Group) -> None:
    del group["input_features"]


def too_wide(group: h5py.Group) -> None:
    del group["input_features"]
    group["input_features"] = np.zeros((20, WIDTH + 1), np.float32)


def class_41(group: h5py.Group) -> None:
    group["seq_class_ids"][2] = 41


def class_below_0(group: h5py.Group) -> None:
    group["seq_class_ids"][2] = -1


def blank_inside(group: h5py.Group) -> None:
    group["seq_class_ids"][2] = 0


def without_labels(group: h5py.Group) -> None:
    del group["seq_class_ids"]


def too_many_labels(group: h5py.Group) -> None:
    group.attrs["seq_len"] = 501


def too_many_steps(group: h5py.Group) -> None:
    group.attrs["n_time_steps"] = 4000


def no_steps(group: h5py.Group) -> None:
    del group["input_features"]
    group["input_features"] = np.zeros((0, WIDTH), np.float32)


def flat(group: h5py.Group) -> None:
    del group["input_features"]
    group["input_features"] = np.zeros(50, np.float32)


def endless(group: h5py.Group) -> None:
    del group["input_features"]
    group.create_dataset("input_features", (2**36, WIDTH), "f4", chunks=(1000, WIDTH))


def text(group: h5py.Group) -> None:
    del group["input_features"]
    group["input_features"] = np.array([[b"x"]])


INVALID: list[tuple[Callable[[h5py.Group], None], str]] = [
    (without_features, "has no dataset input_features"),
    (too_wide, f"has {WIDTH + 1} features, but {WIDTH} were expected; rewrite it"),
    (class_41, "class 41 at position 2, outside 1 to 40"),
    (class_below_0, "class -1 at position 2, outside 1 to 40"),
    (blank_inside, "class 0 at position 2, .*0 is the blank"),
    (without_labels, "has no dataset seq_class_ids, which the train split needs"),
    (too_many_labels, "says 501 labels, but seq_class_ids has 500"),
    (too_many_steps, "n_time_steps is 4000"),
    (no_steps, r"shape \[0, 8\]"),
    (flat, r"shape \[50\]"),
    (endless, r"shape \[68719476736, 8\], 2,199 GB"),
    (text, "not numbers"),
]


def break_trial(folder: Path, how: Callable[[h5py.Group], None]) -> None:
    with h5py.File(folder / SESSIONS[1] / "data_train.hdf5", "r+") as file:
        how(file[BAD])


@pytest.mark.parametrize(("how", "words"), INVALID, ids=[how.__name__ for how, _ in INVALID])
def test_a_problem_in_the_index_ends_the_run_before_training(
    folder: Path, how: Callable[[h5py.Group], None], words: str
) -> None:
    break_trial(folder, how)
    with pytest.raises(DataError, match=f"{SESSIONS[1]}/data_train.hdf5: {BAD}: .*{words}"):
        open_trials(folder)


@pytest.mark.parametrize("how", [how for how, _ in INVALID], ids=[how.__name__ for how, _ in INVALID])
def test_or_the_trial_is_skipped_by_name_if_that_is_allowed(
    folder: Path, how: Callable[[h5py.Group], None], capsys: pytest.CaptureFixture[str]
) -> None:
    break_trial(folder, how)
    with open_trials(folder, on_bad_trial="skip") as trials:
        assert trials.n_trials == 35 and len(trials.skipped) == 1
        assert trials.skipped[0].startswith(f"{SESSIONS[1]}/{BAD}: ")
        assert f"{SESSIONS[1]}/{BAD}" in capsys.readouterr().err
        assert all(len(trials.batch(step).trial) == 6 for step in range(20))
        assert trials.statistics()["bad"] == 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_non_finite_value_ends_the_run_when_it_is_read(folder: Path, value: float) -> None:
    def break_value(group: h5py.Group) -> None:
        group["input_features"][3, 5] = value

    break_trial(folder, break_value)
    with (
        open_trials(folder) as trials,
        pytest.raises(DataError, match=f"{BAD}: .* at time step 3 .*feature 5, .*--on-bad"),
    ):
        read_all(trials, range(40))
    with open_trials(folder, on_bad_trial="skip") as trials:
        sizes = [len(trials.batch(step).trial) for step in range(40)]
        drawn = sum(trials.sampler.trials(step).tolist().count(16) for step in range(40))  # type: ignore[union-attr]
        assert sum(sizes) == 240 - drawn < 240, "only the invalid trial is missing from batches"
        assert len(trials.skipped) == 1 and BAD in trials.skipped[0]


def test_large_finite_values_are_valid(folder: Path) -> None:
    def large(group: h5py.Group) -> None:
        group["input_features"][...] = 3e38

    break_trial(folder, large)
    with open_trials(folder) as trials:
        for step in range(20):
            trials.batch(step)


def test_a_session_without_trials_is_named(folder: Path) -> None:
    with h5py.File(folder / SESSIONS[2] / "data_train.hdf5", "w"):
        pass
    for flag in ("fail", "skip"):
        with pytest.raises(DataError, match=f"{SESSIONS[2]}/data_train.hdf5: has no trials"):
            open_trials(folder, on_bad_trial=flag)


def test_missing_sessions_are_named(folder: Path) -> None:
    with pytest.raises(DataError, match=r"has no session t15.2024.01.01 \(it has 3: t15.2023.08.11"):
        open_trials(folder, sessions=[SESSIONS[0], "t15.2024.01.01"])
    with pytest.raises(ConfigError, match="more than once"):
        open_trials(folder, sessions=[SESSIONS[0], SESSIONS[0]])
    (folder / SESSIONS[0] / "data_train.hdf5").unlink()
    with pytest.raises(DataError, match=r"has no data_train\.hdf5"):
        open_trials(folder, sessions=SESSIONS)
    with pytest.raises(DataError, match=r"no session has a data_test.hdf5"):
        open_trials(folder, split="test")


def test_the_order_of_the_sessions_setting_is_that_of_the_days(folder: Path) -> None:
    with open_trials(folder, sessions=SESSIONS[::-1]) as trials:
        assert trials.sessions == list(SESSIONS[::-1])
        batch = trials.batch(0)
        assert [SESSIONS[::-1][day] for day in batch.day.tolist()] == [name.split("/")[0] for name in batch.trial]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_trials_cached_on_the_device_give_the_same_batches(folder: Path, dtype: torch.dtype) -> None:
    padding = PaddingSpec(multiple_of=16, min_steps=14, extra_steps=2)
    with (
        open_trials(folder, padding=padding) as trials,
        open_trials(folder, padding=padding, cache_bytes=10**9) as on_device,
    ):
        assert on_device.keep_on(torch.device("cpu"), limit_bytes=10**6, dtype=dtype)
        for step in (*range(60), *range(5)):
            expected, batch = trials.batch(step), on_device.batch(step)
            assert torch.equal(batch.features, expected.features.to(dtype).float())
            assert batch.trial == expected.trial and torch.equal(batch.labels, expected.labels)
            assert torch.equal(batch.n_time_steps, expected.n_time_steps) and torch.equal(batch.day, expected.day)
        counts = on_device.statistics()
        assert (
            counts["gets"]
            == len({name for step in range(64) for name in trials.batch(step).trial})
            == on_device.n_trials
        )
        assert counts["device_hits"] > 300
        assert on_device.reader.memory.policy.used_bytes == 0, "trials on the device are not also cached in memory"


def test_trials_are_not_cached_on_the_device_unless_all_fit(folder: Path) -> None:
    with open_trials(folder) as trials:
        steps = sum(trials.steps_stored(position) for position in range(trials.n_trials))
        size_bytes = (steps + 1) * trials.width * 4
        assert not trials.keep_on(torch.device("cpu"), limit_bytes=size_bytes - 1)
        trials.batch(0)
        assert trials.statistics()["device_hits"] == 0
        assert trials.keep_on(torch.device("cpu"), limit_bytes=size_bytes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_trials_cached_on_a_gpu_give_the_same_batches(folder: Path) -> None:
    with open_trials(folder) as trials, open_trials(folder) as on_device:
        assert on_device.keep_on(torch.device("cuda"), limit_bytes=10**6)
        for step in range(20):
            assert torch.equal(on_device.batch(step).features.cpu(), trials.batch(step).features)


def test_excluded_trials_are_part_of_the_identity(folder: Path, tmp_path: Path) -> None:
    """Without different trials it is other data, even if as many are left; and positions in the disk cache differ."""
    cache = (tmp_path / "cache", 10**9)
    identities = set()
    for number in (1, 5):
        dictionary = {SESSIONS[0]: {"1": [number]}}
        with open_trials(folder, bad_trials_dict=dictionary) as plain:
            assert plain.n_trials == 35
            with open_trials(folder, bad_trials_dict=dictionary, cache_bytes=0, disk_cache=cache) as cached:
                for step in range(10):
                    assert bits(cached.batch(step)) == bits(plain.batch(step))
                cached.reader.disk.flush()
                assert bits(cached.batch(3)) == bits(plain.batch(3))
            identities.add(plain.identity)
    assert len(identities) == 2


def test_a_batch_has_the_padding_that_a_step_needs(folder: Path) -> None:
    with (
        open_trials(folder) as plain,
        open_trials(folder, padding=PaddingSpec(multiple_of=64, min_steps=100, extra_steps=2)) as roomy,
    ):
        for step in range(5):
            tight, wide = plain.batch(step).features, roomy.batch(step).features
            longest = tight.shape[1]
            assert wide.shape[1] == max(-(-longest // 64) * 64, 128) + 2
            assert torch.equal(wide[:, :longest], tight) and not wide[:, longest:].any()


def test_a_batch_does_not_change_while_others_are_read(folder: Path) -> None:
    with open_trials(folder) as trials:
        kept = [trials.batch(step) for step in range(25)]
        views = [trials.batch(step).features[1:3] for step in range(25)]
        for step in range(25):
            again = trials.batch(step).features
            assert torch.equal(kept[step].features, again) and torch.equal(views[step], again[1:3])


def test_closing_ends_the_threads(folder: Path) -> None:
    before = threading.active_count()
    with open_trials(folder) as trials:
        trials.batch(0)
    for thread in threading.enumerate():
        if thread.name.startswith("brain-"):
            thread.join(timeout=2)
    assert threading.active_count() <= before
