"""What is kept: the newest, every so many, the best, and always two that were read back."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from estiba.checkpoint import format as ckpt_format
from estiba.checkpoint.format import Manifest
from estiba.checkpoint.manager import CheckpointManager
from estiba.checkpoint.retention import MIN_VERIFIED, Retention
from tensors.states import flip_bit, state_of


def found(*steps: int, **losses: float) -> list[tuple[str, Manifest]]:
    """Newest first; `s10=0.5` gives step 10 a validation loss."""
    made = []
    for step in sorted(steps, reverse=True):
        metrics = {"val_loss": losses[f"s{step}"]} if f"s{step}" in losses else {}
        made.append((ckpt_format.checkpoint_name(step), Manifest(step=step, metrics=metrics, files={})))
    return made


def kept(retention: Retention, listed: list[tuple[str, Manifest]], verified: list[int] | None = None) -> list[int]:
    names = (
        [name for name, _ in listed] if verified is None else [ckpt_format.checkpoint_name(step) for step in verified]
    )
    surplus = retention.surplus(listed, names)
    return [manifest.step for name, manifest in listed if name not in surplus]


def test_the_newest_stay() -> None:
    assert kept(Retention(keep_last=3), found(10, 20, 30, 40, 50)) == [50, 40, 30]


def test_every_so_many_steps_stay() -> None:
    assert kept(Retention(keep_last=2, keep_every=20), found(10, 20, 30, 40, 50)) == [50, 40, 20]


def test_the_best_stay_and_what_is_not_a_number_is_never_among_them() -> None:
    listed = found(10, 20, 30, 40, 50, 60, s10=0.4, s20=float("nan"), s30=0.3, s40=0.9, s50=0.8, s60=float("nan"))
    assert kept(Retention(keep_last=2, keep_best=2), listed) == [60, 50, 30, 10]


def test_nothing_goes_while_fewer_than_two_that_stay_were_read_back() -> None:
    listed = found(10, 20, 30, 40, 50)
    assert kept(Retention(keep_last=2), listed, verified=[50]) == [50, 40, 30, 20, 10]
    assert kept(Retention(keep_last=2), listed, verified=[]) == [50, 40, 30, 20, 10]
    assert kept(Retention(keep_last=2), listed, verified=[10, 20]) == [50, 40, 20, 10]
    assert kept(Retention(keep_last=2), listed, verified=[50, 10]) == [50, 40, 10]


@settings(max_examples=200, deadline=None)
@given(
    st.sets(st.integers(1, 60), max_size=12),
    st.data(),
    st.integers(2, 5),
    st.none() | st.integers(1, 20),
    st.integers(0, 3),
)
def test_however_it_is_set_the_newest_and_two_that_verify_stay(
    steps: set[int], data: Any, keep_last: int, keep_every: int | None, keep_best: int
) -> None:
    verified = data.draw(st.sets(st.sampled_from(sorted(steps)))) if steps else set()
    losses = {f"s{step}": data.draw(st.floats()) for step in steps}
    stay = kept(
        Retention(keep_last=keep_last, keep_every=keep_every, keep_best=keep_best),
        found(*steps, **losses),
        list(verified),
    )
    assert stay[:keep_last] == sorted(steps, reverse=True)[:keep_last]
    assert len(verified & set(stay)) >= min(MIN_VERIFIED, len(verified))
    if len(verified) < MIN_VERIFIED:
        assert set(stay) == steps


def test_less_than_two_cannot_be_asked_for() -> None:
    with pytest.raises(ValidationError):
        Retention(keep_last=1)


def test_on_the_disk_it_is_as_was_asked_for(opened: Callable[..., CheckpointManager]) -> None:
    checkpoints = opened(retention=Retention(keep_last=2, keep_every=4, keep_best=1))
    for step in range(1, 8):
        checkpoints.save(step, state_of(step, width=8), metrics={"val_loss": abs(step - 2.0)}, wait=True)
        time.sleep(0.1)  # until it was read back; of those that come faster, the newest is
    checkpoints.close()
    assert [manifest.step for manifest in _manifests(checkpoints.folder)] == [7, 6, 4, 2]


def test_a_write_that_reads_back_wrong_is_reported_and_costs_no_older_one(
    opened: Callable[..., CheckpointManager],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    checkpoints = opened(retention=Retention(keep_last=2))
    for step in (1, 2):
        checkpoints.save(step, state_of(step), wait=True)
    checkpoints.close()
    # A disk that takes every write and gives other bytes back, in the writer alone.
    (tmp_path / "sitecustomize.py").write_text(
        "import estiba.checkpoint.disk as disk\nreal = disk.digest_of\n"
        "disk.digest_of = lambda path, size: real(path, size) if 'step-00000004' not in str(path) else 'f' * 32\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    again = opened(retention=Retention(keep_last=2))
    assert again.restore() is not None
    again.save(3, state_of(3), wait=True)
    again.save(4, state_of(4), wait=True)
    again.close()
    assert (
        "it was written just now, so do not trust this disk (quarantined as bad-step-00000004)"
        in capfd.readouterr().err
    )
    assert [manifest.step for manifest in _manifests(again.folder)][:2] == [3, 2]


def _manifests(folder: Path) -> list[Manifest]:
    return [ckpt_format.verify(folder / name) for name in ckpt_format.checkpoint_names(folder)]


def test_what_was_quarantined_does_not_pile_up(opened: Callable[..., CheckpointManager]) -> None:
    for attempt in range(5):
        checkpoints = opened()
        found = checkpoints.restore()
        first = 0 if found is None else found.step
        for step in range(first + 1, first + 3):
            checkpoints.save(step, state_of(step, width=8), wait=True)
        checkpoints.close()
        newest = ckpt_format.checkpoint_names(checkpoints.folder)[0]
        flip_bit(checkpoints.folder / newest / "state.json", 30 + attempt)
    assert len(ckpt_format.quarantined_names(checkpoints.folder)) <= 3
