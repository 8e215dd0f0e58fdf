"""The checkpoint manager: saves in the background, and the choice in the time before a kill."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from estiba.checkpoint import format as ckpt_format
from estiba.checkpoint import manager, snapshot
from estiba.checkpoint.manager import CheckpointManager
from estiba.errors import CheckpointError
from tensors.states import is_same, state_of

Opened = Callable[..., CheckpointManager]
WIDE = {"width": 1024, "layers": 4}
"""50 MB."""


@pytest.fixture
def paused() -> Any:
    """Hold the writer of some CheckpointManager still; it is always resumed after the test."""
    held: list[int] = []

    class Pause:
        def hold(self, checkpoints: CheckpointManager) -> None:
            assert checkpoints._writer is not None
            held.append(checkpoints._writer.pid)
            os.kill(held[-1], signal.SIGSTOP)

        def release(self) -> None:
            while held:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(held.pop(), signal.SIGCONT)

    pause = Pause()
    yield pause
    pause.release()


def test_later_changes_are_not_in_a_save(opened: Opened, paused: Any) -> None:
    checkpoints = opened()
    checkpoints.save(1, state_of(1), wait=True)
    paused.hold(checkpoints)  # the writer sees nothing before everything has changed
    state = state_of(2, **WIDE)
    checkpoints.save(2, state)
    for tensor in state["model"].values():
        tensor.fill_(float("nan"))
    for moments in state["optimizer"]["state"].values():
        for tensor in moments.values():
            tensor.zero_()
    state["optimizer"]["param_groups"][0]["lr"] = 99.0
    state["loop"]["step"] = 99
    paused.release()
    checkpoints.wait()
    found = checkpoints.restore()
    assert found is not None and found.step == 2 and is_same(found.state, state_of(2, **WIDE))


def test_a_save_returns_before_anything_is_on_the_disk(opened: Opened, paused: Any) -> None:
    checkpoints = opened()
    checkpoints.save(1, state_of(1), wait=True)
    paused.hold(checkpoints)
    checkpoints.save(2, state_of(2))
    assert checkpoints.is_busy and not checkpoints.is_affordable and checkpoints.newest_step == 1
    assert not checkpoints.wait(timeout_s=0.2)
    assert ckpt_format.checkpoint_names(checkpoints.folder) == ["step-00000001"]
    paused.release()
    assert checkpoints.wait() and not checkpoints.is_busy and checkpoints.newest_step == 2
    assert ckpt_format.checkpoint_names(checkpoints.folder)[0] == "step-00000002"


def test_a_second_save_waits_for_the_first_and_both_are_exact(opened: Opened) -> None:
    checkpoints = opened()
    for step in (1, 2, 3):
        checkpoints.save(step, state_of(step, **WIDE))
    checkpoints.wait()
    for step in (1, 2, 3):
        found = checkpoints.restore(checkpoints.folder / ckpt_format.checkpoint_name(step))
        assert found is not None and is_same(found.state, state_of(step, **WIDE))


def test_saves_are_spaced_by_what_they_cost_the_step(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = opened()
    assert checkpoints.is_affordable
    real = snapshot.copy_file

    def slowly(*given: Any) -> None:
        time.sleep(0.05)
        real(*given)

    monkeypatch.setattr(snapshot, "copy_file", slowly)
    before = time.monotonic()
    checkpoints.save(1, state_of(1), wait=True)
    blocking = checkpoints.timings.blocking_s
    assert blocking >= 0.1 and not checkpoints.is_affordable
    while not checkpoints.is_affordable:
        time.sleep(0.01)
    assert time.monotonic() - before >= manager.SPACING * blocking


def test_a_state_that_grows_is_saved_whole(opened: Opened) -> None:
    checkpoints = opened()
    checkpoints.reserve(state_of(1, width=8))
    for step, width in ((1, 8), (2, 300), (3, 1200), (4, 16)):
        checkpoints.save(step, state_of(step, width=width), wait=True)
        found = checkpoints.restore()
        assert found is not None and is_same(found.state, state_of(step, width=width))


def test_a_state_without_weights_and_one_without_tensors_are_states(opened: Opened) -> None:
    checkpoints = opened()
    for step, state in enumerate(({"a": torch.ones(3)}, {"a": [1, "dos", None]}, {}), start=1):
        checkpoints.save(step, state, wait=True)
        found = checkpoints.restore()
        assert found is not None and found.step == step and is_same(found.state, state)


def test_odd_states_come_back_from_the_disk(opened: Opened) -> None:
    weight = torch.randn(5, 4)
    odd = {
        "model": {"w": weight.t(), "tied": weight.t(), "none": torch.empty(0, 3), "one": torch.tensor(1.5).bfloat16()},
        "mask": torch.tensor([True, False]),
        "random": (3, tuple(range(20)), None),
        "optimizer": {0: {"step": torch.tensor(float("nan"))}, 1: {}},
        "best": float("inf"),
    }
    checkpoints = opened()
    checkpoints.save(1, odd, wait=True)
    found = checkpoints.restore()
    assert found is not None and is_same(found.state, odd)


def test_a_state_that_cannot_be_saved_is_refused_by_its_path_and_the_next_save_works(opened: Opened) -> None:
    checkpoints = opened()
    with pytest.raises(CheckpointError, match="state work/cursor: a generator cannot be saved"):
        checkpoints.save(1, {"work": {"cursor": (x for x in ())}})
    checkpoints.save(2, state_of(2), wait=True)
    assert checkpoints.newest_step == 2


def test_what_comes_back_can_be_changed_in_place(opened: Opened) -> None:
    checkpoints = opened()
    checkpoints.save(1, state_of(1), wait=True)
    found = checkpoints.restore()
    assert found is not None
    found.state["model"]["layers.0.weight"].add_(1)
    again = checkpoints.restore()
    assert again is not None and is_same(again.state, state_of(1))


# --- the time before a kill


def test_a_save_before_a_stop_is_tried_without_a_measurement(opened: Opened) -> None:
    checkpoints = opened()
    assert checkpoints.fits(0.1) and checkpoints.expected_s() == 0
    message = checkpoints.save_before_stop(5, state_of(5), seconds_left=30, kind="interrupt")
    assert message == f"everything up to step 5 is saved in {checkpoints.folder}"
    assert ckpt_format.verify(checkpoints.folder / "step-00000005").kind == "interrupt"


def test_a_save_that_would_take_too_long_is_not_started(opened: Opened, capfd: pytest.CaptureFixture[str]) -> None:
    checkpoints = opened()
    checkpoints.save(5, state_of(5), wait=True)
    checkpoints.timings.durable_s = 80.0
    assert checkpoints.expected_s() == 80.0 * manager.DURABLE_MARGIN
    assert checkpoints.fits(101) and checkpoints.fits(None) and not checkpoints.fits(99)
    message = checkpoints.save_before_stop(9, state_of(9), seconds_left=99)
    assert message == f"everything up to step 5 is saved in {checkpoints.folder}"
    assert "99 s left and a checkpoint takes 100 s here; none is started" in capfd.readouterr().err
    assert ckpt_format.checkpoint_names(checkpoints.folder) == ["step-00000005"]


def test_a_save_in_progress_counts_in_the_time_and_is_finished_instead(
    opened: Opened, paused: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoints = opened()
    checkpoints.save(1, state_of(1), wait=True)
    checkpoints.timings.durable_s = 4.0
    paused.hold(checkpoints)
    checkpoints.save(2, state_of(2))
    assert 4.0 * manager.DURABLE_MARGIN + 3.0 < checkpoints.expected_s() <= 4.0 * manager.DURABLE_MARGIN + 4.0
    paused.release()
    message = checkpoints.save_before_stop(3, state_of(3), seconds_left=4.5, fits=False)
    assert message == f"everything up to step 2 is saved in {checkpoints.folder}"
    assert "finished instead" in capfd.readouterr().err


def test_a_step_that_is_being_saved_is_not_saved_twice(opened: Opened, paused: Any) -> None:
    checkpoints = opened()
    checkpoints.save(1, state_of(1), wait=True)
    paused.hold(checkpoints)
    checkpoints.save(2, state_of(2))
    paused.release()
    assert checkpoints.save_before_stop(2, state_of(2), seconds_left=30).startswith("everything up to step 2")
    assert ckpt_format.checkpoint_names(checkpoints.folder) == ["step-00000002", "step-00000001"]


def test_nothing_saved_is_reported_plainly(opened: Opened) -> None:
    checkpoints = opened()
    checkpoints.timings.durable_s = 80.0
    assert checkpoints.save_before_stop(9, state_of(9), seconds_left=2) == "no checkpoint could be written"


def test_close_with_little_time_ends_in_that_time(opened: Opened, paused: Any) -> None:
    checkpoints = opened()
    checkpoints.save(1, state_of(1), wait=True)
    paused.hold(checkpoints)
    checkpoints.save(2, state_of(2))
    before = time.monotonic()
    checkpoints.close(timeout_s=0.5)
    assert time.monotonic() - before < 3
