"""Caches keep what is needed soonest, within their bound, and give back what was put."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from brain_to_text.reading.plan import SeededPlan, Upcoming
from brain_to_text.reading.tiers import DIGEST_BYTES, DiskTier, MemoryTier
from estiba.errors import ConfigError

VALUES = np.arange(100, dtype=np.float32).reshape(10, 10)
SIZE = VALUES.nbytes
FLOAT = np.dtype(np.float32)


def belady_hits(requests: list[int], room: int) -> int:
    """Of the best there is: on a miss, what is needed last goes, be it the newcomer."""
    kept: set[int] = set()
    hits = 0
    for at, trial in enumerate(requests):
        if trial in kept:
            hits += 1
            continue
        later = {
            one: next((t for t in range(at + 1, len(requests)) if requests[t] == one), 10**9) for one in kept | {trial}
        }
        kept.add(trial)
        if len(kept) > room:
            kept.remove(max(kept, key=lambda one: later[one]))
    return hits


@pytest.mark.parametrize("room", [1, 4, 12])
def test_memory_hits_as_often_as_can_be(room: int) -> None:
    plan = SeededPlan([30], batch_size=1, days_per_batch=1, seed=2)
    requests = [int(plan.trials(step)[0]) for step in range(400)]
    upcoming = Upcoming(plan, 10_000)
    tier = MemoryTier(room * SIZE, upcoming.next_use)
    hits = 0
    for step, trial in enumerate(requests):
        upcoming.advance(step)
        hits += tier.get(trial) is not None
        upcoming.advance(step + 1)
        tier.touched(trial)
        tier.put(trial, VALUES)
        assert tier.shelf.used_bytes == len(tier._values) * SIZE <= room * SIZE
    best = belady_hits(requests, room)
    assert best - 2 <= hits <= best + 2, "equal but for uses behind the last request"


def test_nothing_is_kept_where_there_is_no_room() -> None:
    tier = MemoryTier(SIZE - 1, lambda _: 1)
    tier.put(1, VALUES)
    assert tier.get(1) is None and tier.shelf.used_bytes == 0


def test_sizes_differ_and_the_bound_holds() -> None:
    random = np.random.default_rng(0)
    nexts = {trial: int(random.integers(1000)) for trial in range(300)}
    tier = MemoryTier(20_000, nexts.__getitem__)
    for trial in range(300):
        tier.put(trial, np.zeros(int(random.integers(1, 3000)), np.uint8))
        assert sum(values.nbytes for values in tier._values.values()) == tier.shelf.used_bytes <= 20_000
    kept = [nexts[trial] for trial in tier._values]
    assert np.median(kept) < 50, "of 300, those of the nearest steps, and small ones in what is left"


def test_the_disk_gives_back_what_was_put_also_to_the_next_process(tmp_path: Path) -> None:
    disk = DiskTier(tmp_path, 10**6, lambda trial: trial, identity="a")
    for trial in range(5):
        disk.put(trial, VALUES + trial)
    disk.flush()
    np.testing.assert_array_equal(disk.get(3, FLOAT, (10, 10)), VALUES + 3)
    disk.close()
    again = DiskTier(tmp_path, 10**6, lambda trial: trial, identity="a")
    np.testing.assert_array_equal(again.get(4, FLOAT, (10, 10)), VALUES + 4)
    again.close()


def test_the_disk_keeps_its_bound_and_the_soonest(tmp_path: Path) -> None:
    room = 4
    disk = DiskTier(tmp_path, room * (SIZE + DIGEST_BYTES), lambda trial: 100 - trial, identity="a")
    for trial in range(10):
        disk.put(trial, VALUES)
        disk.flush()
        files = list(disk.folder.glob("*.trial"))
        assert sum(path.stat().st_size for path in files) <= disk.shelf.limit_bytes
    assert sorted(disk.shelf.sizes) == [6, 7, 8, 9]
    assert sorted(int(path.stem) for path in disk.folder.glob("*.trial")) == [6, 7, 8, 9]
    disk.close()


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_a_damaged_file_is_no_value(tmp_path: Path, damage: str) -> None:
    disk = DiskTier(tmp_path, 10**6, lambda _: 1, identity="a")
    disk.put(1, VALUES)
    disk.flush()
    path = disk.folder / "1.trial"
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(data if damage == "flipped" else data[:50])
    assert disk.get(1, FLOAT, (10, 10)) is None
    assert 1 not in disk
    disk.close()


def test_other_data_sets_make_room_unless_in_use(tmp_path: Path) -> None:
    used = DiskTier(tmp_path, 10**6, lambda _: 1, identity="used")
    old = DiskTier(tmp_path, 10**6, lambda _: 1, identity="old")
    for disk in (used, old):
        disk.put(1, VALUES)
        disk.flush()
    old.close()
    new = DiskTier(tmp_path, 10**6, lambda _: 1, identity="new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trials-new", "trials-used"]
    same = DiskTier(tmp_path, 10**6, lambda _: 1, identity="used")
    assert same.folder != used.folder, "two at once do not write the same files"
    for disk in (used, new, same):
        disk.close()


def test_a_full_disk_ends_the_cache_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = DiskTier(tmp_path, 10**6, lambda _: 1, identity="a")
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
    assert "full; it is used no further" in capsys.readouterr().err
    assert 2 not in disk and 3 not in disk
    np.testing.assert_array_equal(disk.get(1, FLOAT, (10, 10)), VALUES)
    disk.close()


def test_what_is_no_trial_in_the_folder_of_a_cache_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = DiskTier(tmp_path, 10**6, lambda _: 1, identity="a")
    disk.put(1, VALUES)
    disk.close()
    (disk.folder / "5.trial").mkdir()
    (disk.folder / "²3.trial").write_bytes(b"x")
    (disk.folder / "1.trial").write_bytes((disk.folder / "1.trial").read_bytes()[:-1])
    again = DiskTier(tmp_path, 10**6, lambda _: 1, identity="a")

    def read_only(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", read_only)
    assert 5 not in again and again.get(1, FLOAT, (10, 10)) is None and 1 not in again
    again.close()


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_cache_that_cannot_be_written_is_refused_by_name(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="the disk cache"):
        DiskTier(tmp_path / "x", 10, lambda _: 1, identity="a")


def test_a_cache_where_a_file_is_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(ConfigError, match="the disk cache"):
        DiskTier(tmp_path / "x", 10, lambda _: 1, identity="a")
