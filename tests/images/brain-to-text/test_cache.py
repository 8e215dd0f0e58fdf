"""Caches keep the trials needed soonest, within their size limit, and return what was stored."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from brain_to_text.data.reading.cache import DIGEST_BYTES, DiskCache, MemoryCache
from brain_to_text.data.sampler import NextUse, SeededSampler
from estiba.errors import ConfigError

VALUES = np.arange(100, dtype=np.float32).reshape(10, 10)
SIZE = VALUES.nbytes
FLOAT = np.dtype(np.float32)


def belady_hits(requests: list[int], room: int) -> int:
    """Count the hits of the optimal policy: on a miss, drop what is needed last, which may be the new trial."""
    cached: set[int] = set()
    hits = 0
    for index, trial in enumerate(requests):
        if trial in cached:
            hits += 1
            continue
        cached.add(trial)
        later = {
            other: next((t for t in range(index + 1, len(requests)) if requests[t] == other), 10**9) for other in cached
        }
        if len(cached) > room:
            cached.remove(max(cached, key=later.__getitem__))
    return hits


@pytest.mark.parametrize("room", [1, 4, 12])
def test_the_memory_cache_hits_as_often_as_the_optimal_policy(room: int) -> None:
    sampler = SeededSampler([30], batch_size=1, days_per_batch=1, seed=2)
    requests = [int(sampler.trials(step)[0]) for step in range(400)]
    next_use = NextUse(sampler, 10_000)
    cache = MemoryCache(room * SIZE, next_use.next_use)
    hits = 0
    for step, trial in enumerate(requests):
        next_use.advance(step)
        hits += cache.get(trial) is not None
        next_use.advance(step + 1)
        cache.policy.update(trial)
        cache.put(trial, VALUES)
        assert cache.policy.used_bytes == len(cache._values) * SIZE <= room * SIZE
    best = belady_hits(requests, room)
    assert best - 2 <= hits <= best + 2, "they differ only because of uses after the last request"


def test_a_trial_larger_than_the_limit_is_not_cached() -> None:
    cache = MemoryCache(SIZE - 1, lambda _: 1)
    cache.put(1, VALUES)
    assert cache.get(1) is None and cache.policy.used_bytes == 0


def test_the_limit_holds_for_trials_of_different_sizes() -> None:
    random = np.random.default_rng(0)
    nexts = {trial: int(random.integers(1000)) for trial in range(300)}
    cache = MemoryCache(20_000, nexts.__getitem__)
    for trial in range(300):
        cache.put(trial, np.zeros(int(random.integers(1, 3000)), np.uint8))
        assert sum(values.nbytes for values in cache._values.values()) == cache.policy.used_bytes <= 20_000
    kept = [nexts[trial] for trial in cache._values]
    assert np.median(kept) < 50, "most of them are needed soon; small ones fill the remaining space"


def test_the_disk_cache_returns_what_was_stored_also_in_a_later_run(tmp_path: Path) -> None:
    disk = DiskCache(tmp_path, 10**6, lambda trial: trial, identity="a")
    for trial in range(5):
        disk.put(trial, VALUES + trial)
    disk.flush()
    np.testing.assert_array_equal(disk.get(3, FLOAT, (10, 10)), VALUES + 3)
    disk.close()
    again = DiskCache(tmp_path, 10**6, lambda trial: trial, identity="a")
    np.testing.assert_array_equal(again.get(4, FLOAT, (10, 10)), VALUES + 4)
    again.close()


def test_the_disk_cache_keeps_within_its_limit_the_trials_needed_soonest(tmp_path: Path) -> None:
    room = 4
    disk = DiskCache(tmp_path, room * (SIZE + DIGEST_BYTES), lambda trial: 100 - trial, identity="a")
    for trial in range(10):
        disk.put(trial, VALUES)
        disk.flush()
        files = list(disk.folder.glob("*.trial"))
        assert sum(path.stat().st_size for path in files) <= disk.policy.limit_bytes
    assert sorted(disk.policy.sizes) == [6, 7, 8, 9]
    assert sorted(int(path.stem) for path in disk.folder.glob("*.trial")) == [6, 7, 8, 9]
    disk.close()


@pytest.mark.parametrize("damage", ["flipped", "cut", "deleted"])
def test_a_damaged_file_is_a_miss(tmp_path: Path, damage: str) -> None:
    disk = DiskCache(tmp_path, 10**6, lambda _: 1, identity="a")
    disk.put(1, VALUES)
    disk.flush()
    path = disk.folder / "1.trial"
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    if damage == "deleted":
        path.unlink()
    else:
        path.write_bytes(data if damage == "flipped" else data[:50])
    assert disk.get(1, FLOAT, (10, 10)) is None
    assert 1 not in disk
    disk.close()


def test_folders_of_other_data_sets_are_removed_unless_in_use(tmp_path: Path) -> None:
    used = DiskCache(tmp_path, 10**6, lambda _: 1, identity="used")
    old = DiskCache(tmp_path, 10**6, lambda _: 1, identity="old")
    for disk in (used, old):
        disk.put(1, VALUES)
        disk.flush()
    old.close()
    new = DiskCache(tmp_path, 10**6, lambda _: 1, identity="new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trials-new", "trials-used"]
    same = DiskCache(tmp_path, 10**6, lambda _: 1, identity="used")
    assert same.folder != used.folder, "two caches in use never share a folder"
    for disk in (used, new, same):
        disk.close()


def test_a_full_disk_stops_caching_but_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = DiskCache(tmp_path, 10**6, lambda _: 1, identity="a")
    disk.put(1, VALUES)
    disk.flush()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "rename", full)
    disk.put(2, VALUES)
    disk.flush()
    monkeypatch.undo()
    disk.put(3, VALUES)
    disk.flush()
    assert "is full; no more trials are cached there" in capsys.readouterr().err
    assert 2 not in disk and 3 not in disk
    np.testing.assert_array_equal(disk.get(1, FLOAT, (10, 10)), VALUES)
    disk.close()


def test_unexpected_files_in_a_cache_folder_do_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = DiskCache(tmp_path, 10**6, lambda _: 1, identity="a")
    disk.put(1, VALUES)
    disk.close()
    (disk.folder / "5.trial").mkdir()
    (disk.folder / "²3.trial").write_bytes(b"x")
    (disk.folder / "1.trial").write_bytes((disk.folder / "1.trial").read_bytes()[:-1])
    again = DiskCache(tmp_path, 10**6, lambda _: 1, identity="a")

    def read_only(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", read_only)
    assert 5 not in again and again.get(1, FLOAT, (10, 10)) is None and 1 not in again
    again.close()


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_cache_folder_that_is_not_writable_is_refused_by_name(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="--disk-cache-dir"):
        DiskCache(tmp_path / "x", 10, lambda _: 1, identity="a")


def test_a_cache_folder_that_is_a_file_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(ConfigError, match="--disk-cache-dir"):
        DiskCache(tmp_path / "x", 10, lambda _: 1, identity="a")
