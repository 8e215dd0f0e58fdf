"""Interrupted twice, anywhere, a run ends with the same bits as one that was never interrupted."""

from __future__ import annotations

import json
import os
import pty
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from estiba.checkpoint import format as ckpt_format
from estiba.checkpoint.manager import CheckpointManager
from estiba.errors import ConfigError, Interrupted
from estiba.platform.stop import Stop
from estiba.training.fingerprint import check_fingerprint
from estiba.training.schedule import Schedule
from tensors import runs, toy

MILESTONES = ("train_loss", "val_loss", "accuracy", "evaluations", "grad_norm", "lr", "points", "step")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    digest, _ = runs.attempt(folder)
    assert digest is not None
    return digest, rows_of(folder)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """What was measured, without what depends on the clock."""
    lines = (folder / "metrics/metrics.jsonl").read_text().splitlines()
    return [{name: row[name] for name in MILESTONES if name in row} for row in map(json.loads, lines)]


PLACES = {
    "in a step, between micro-batches": (("micro", 3, 0), ("micro", 8, 0)),
    "at the end of a step": (("micro", 3, 1), ("micro", 9, 1)),
    "in an evaluation": (("evaluation", 5, 1), ("evaluation", 10, 3)),
    "right after an evaluation": (("evaluated", 5, 0), ("evaluated", 10, 0)),
    "in the last evaluation": (("micro", 2, 1), ("evaluation", 14, 2)),
    "twice in the same step": (("micro", 6, 0), ("micro", 6, 0)),
}


@pytest.mark.parametrize("where", PLACES)
def test_two_interruptions_leave_no_trace(
    tmp_path: Path, uninterrupted: tuple[str, list[dict[str, Any]]], where: str
) -> None:
    for place in PLACES[where]:
        digest, trainer = runs.attempt(tmp_path, place)
        assert digest is None and trainer.step >= place[1]
    digest, _ = runs.attempt(tmp_path)
    assert digest == uninterrupted[0]
    assert rows_of(tmp_path) == uninterrupted[1]


def test_interruptions_at_random_places_leave_no_trace(
    tmp_path: Path, uninterrupted: tuple[str, list[dict[str, Any]]]
) -> None:
    chance = random.Random(7)
    for step in sorted(chance.sample(range(1, runs.STEPS), 4)):
        runs.attempt(tmp_path, ("micro", step, chance.randrange(2)))
    assert runs.attempt(tmp_path)[0] == uninterrupted[0]
    assert rows_of(tmp_path) == uninterrupted[1]


def test_a_run_that_falls_back_to_an_older_checkpoint_ends_the_same_and_its_metrics_are_cut(
    tmp_path: Path, uninterrupted: tuple[str, list[dict[str, Any]]]
) -> None:
    runs.attempt(tmp_path, ("micro", 11, 1))
    newest = tmp_path / "checkpoints" / ckpt_format.checkpoint_names(tmp_path / "checkpoints")[0]
    data = bytearray((newest / "state.safetensors").read_bytes())
    data[-1] ^= 1
    (newest / "state.safetensors").write_bytes(data)
    digest, _ = runs.attempt(tmp_path)
    assert digest == uninterrupted[0]
    assert rows_of(tmp_path) == uninterrupted[1]  # no step twice


def test_metrics_that_were_lost_with_the_host_are_written_again(
    tmp_path: Path, uninterrupted: tuple[str, list[dict[str, Any]]]
) -> None:
    runs.attempt(tmp_path, ("micro", 9, 1))
    for path in (tmp_path / "metrics").iterdir():
        path.unlink()
    runs.attempt(tmp_path)
    assert rows_of(tmp_path) == uninterrupted[1]


def test_a_finished_run_started_again_does_nothing_and_ends_well(
    tmp_path: Path, uninterrupted: tuple[str, list[dict[str, Any]]]
) -> None:
    runs.attempt(tmp_path)
    before = [(path, path.stat().st_mtime_ns) for path in sorted((tmp_path / "checkpoints").rglob("*.json"))]
    digest, trainer = runs.attempt(tmp_path)
    assert digest == uninterrupted[0] and trainer.step == runs.STEPS
    assert [(path, path.stat().st_mtime_ns) for path in sorted((tmp_path / "checkpoints").rglob("*.json"))] == before
    assert rows_of(tmp_path) == uninterrupted[1]


def test_a_stop_before_the_first_step_ends_saves_nothing_and_reports_it(tmp_path: Path) -> None:
    stop = Stop()
    stop.request("the test", seconds_left=60)
    checkpoints = CheckpointManager(tmp_path / "checkpoints")
    trainer = runs.make(tmp_path, toy.Toy(), stop=stop, checkpoints=checkpoints)
    trainer.resume(None)
    with pytest.raises(Interrupted, match="no step was completed") as caught:
        trainer.run()
    checkpoints.close()
    assert caught.value.exit_code == 143 and ckpt_format.checkpoint_names(tmp_path / "checkpoints") == []


def test_a_stop_ends_a_wait_for_data(tmp_path: Path) -> None:
    stop = Stop()

    class Starved(toy.Toy):
        def batches(self, step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
            if step == 2:
                time.sleep(0.4)  # the first two steps are done meanwhile
                stop.request("the test", seconds_left=60)
                time.sleep(5)
            return super().batches(step)

    checkpoints = CheckpointManager(tmp_path / "checkpoints")
    trainer = runs.make(tmp_path, Starved(), stop=stop, checkpoints=checkpoints)
    trainer.resume(None)
    before = time.monotonic()
    with pytest.raises(Interrupted, match=r"everything up to step \d is saved"):
        trainer.run()
    assert time.monotonic() - before < 4
    checkpoints.close()


def test_a_stop_with_too_little_time_keeps_what_there_is(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    stop = Stop()
    checkpoints = CheckpointManager(tmp_path / "checkpoints")

    def at(kind: str, step: int, index: int) -> None:
        if (kind, step, index) == ("micro", 11, 1):
            checkpoints.wait()
            checkpoints.timings.durable_s = 500.0
            stop.request("the test", seconds_left=60)

    trainer = runs.make(tmp_path, runs.Watched(at), stop=stop, checkpoints=checkpoints)
    trainer.resume(None)
    with pytest.raises(Interrupted) as caught:
        trainer.run()
    checkpoints.close()
    newest = ckpt_format.verify(checkpoints.folder / ckpt_format.checkpoint_names(checkpoints.folder)[0])
    assert 0 < newest.step < trainer.step and f"everything up to step {newest.step} is saved" in str(caught.value)
    assert "55 s left and a checkpoint takes 625 s here" in capfd.readouterr().err


# --- the plan


def test_a_changed_fingerprint_is_refused_by_its_fields_unless_it_is_accepted(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    runs.attempt(tmp_path, ("micro", 7, 1))
    other: dict[str, Any] = {"schedule": Schedule(peak=0.02, steps=20, warmup_steps=3), "clip": None}
    with pytest.raises(ConfigError) as caught:
        runs.attempt(tmp_path, **other)
    text = str(caught.value)
    assert "clip: saved 1.0, now None; schedule.peak: saved 0.01, now 0.02" in text and "--accept-changed-plan" in text
    assert "seed" not in text and "warmup" not in text
    _, trainer = runs.attempt(tmp_path, accept_changed_plan=True, **other)
    assert trainer.step == 20
    assert "Continuing with the current settings" in capfd.readouterr().err


class Decaying(runs.Watched):
    """AdamW with a weight decay of 0.5."""

    def __init__(self, at: Any, **how: Any) -> None:
        super().__init__(at, **how)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), weight_decay=0.5, fused=True)

    def run_fingerprint(self) -> dict[str, Any]:
        return {**super().run_fingerprint(), "weight_decay": 0.5}


def test_an_accepted_weight_decay_is_the_one_that_the_optimizer_uses(tmp_path: Path) -> None:
    """The log said so, and later checkpoints recorded it, while the optimizer kept the old one."""
    runs.attempt(tmp_path, ("micro", 7, 1))
    _, trainer = runs.attempt(tmp_path, kind=Decaying, accept_changed_plan=True)
    assert [group["weight_decay"] for group in trainer.task.optimizer.param_groups] == [0.5]
    assert trainer.step == runs.STEPS and trainer.task.optimizer.state_dict()["state"][0]["step"] == runs.STEPS


def test_sizes_that_no_longer_fit_are_one_message_even_if_accepted(tmp_path: Path) -> None:
    runs.attempt(tmp_path, ("micro", 7, 1))
    checkpoints = CheckpointManager(tmp_path / "checkpoints")
    trainer = runs.make(tmp_path, toy.Toy(hidden=16, seed=2), checkpoints=checkpoints, accept_changed_plan=True)
    restored = checkpoints.restore()
    with pytest.raises(ConfigError, match=r"do not fit this model and optimizer \(size mismatch.*--checkpoint-path"):
        trainer.resume(restored)
    checkpoints.close()


def test_a_field_that_tensors_depend_on_cannot_be_accepted_and_details_explain_a_digest(
    capfd: pytest.CaptureFixture[str],
) -> None:
    saved = {"data": "81c1", "model": {"width": 8, "dropout": 0.1}, "details": {"documents": 130}}
    now = {"data": "81c2", "model": {"width": 8, "dropout": 0.2}, "details": {"documents": 131}}
    with pytest.raises(ConfigError, match=r"data: saved '81c1', now '81c2'; .*documents: saved 130, now 131"):
        check_fingerprint(saved, now, "here", accept=False)
    check_fingerprint(saved, now, "here", accept=True, fixed={"model.width"})
    assert "documents: saved 130, now 131" in capfd.readouterr().err
    check_fingerprint({**now, "details": {}}, now, "here", accept=False)  # details alone are no difference
    with pytest.raises(ConfigError, match=r"cannot continue with model.width: saved 8, now 9, even by --accept"):
        check_fingerprint(saved, {**saved, "model": {"width": 9, "dropout": 0.1}}, "here", accept=True,
                          fixed={"model.width"})  # fmt: skip


def test_what_a_task_adds_to_the_fingerprint_counts(tmp_path: Path) -> None:
    runs.attempt(tmp_path, ("micro", 7, 1))
    checkpoints = CheckpointManager(tmp_path / "checkpoints")
    trainer = runs.make(tmp_path, toy.Toy(seed=2), checkpoints=checkpoints)
    with pytest.raises(ConfigError, match="data: saved 'toy-1', now 'toy-2'"):
        trainer.resume(checkpoints.restore())
    checkpoints.close()


# --- as processes


def test_a_lost_terminal_saves_as_term_does_and_the_run_ends_with_the_same_bits(
    tmp_path: Path, until: Any, toys: Any
) -> None:
    """A dropped ssh connection: the terminal is gone, so that writing to it fails, and HUP comes more than once."""
    whole = toys.start(tmp_path / "whole", "--steps", "24")
    pid, terminal = pty.fork()
    if pid == 0:
        words = [str(tmp_path / "run"), "--steps", "24", "--pause-s", "0.05", "--save-every", "100"]
        os.environ["OMP_NUM_THREADS"] = "1"
        os.execv(sys.executable, [sys.executable, "-m", "tensors.toy", *words])
    said = b""

    def has_trained() -> bool:
        nonlocal said
        said += os.read(terminal, 1000)
        return (tmp_path / "run/metrics/metrics.jsonl").exists() and b"/24" in said and b" 5/24" in said

    until(has_trained)
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGHUP
    (name,) = ckpt_format.checkpoint_names(tmp_path / "run/checkpoints")
    assert ckpt_format.verify(tmp_path / "run/checkpoints" / name).kind == "interrupt"
    code, out, err = toys.end(toys.start(tmp_path / "run", "--steps", "24", "--save-every", "100"))
    assert code == 0 and "resuming at step" in err
    assert out.splitlines()[-1] == toys.end(whole)[1].splitlines()[-1]


def test_term_ends_a_process_with_143_and_the_same_command_goes_on_to_the_same_bits(
    tmp_path: Path, toys: Any, until: Any
) -> None:
    words = ["--steps", "24", "--pause-s", "0.02"]
    whole = toys.start(tmp_path / "whole", "--steps", "24")
    first = toys.start(tmp_path / "run", *words)
    until(lambda: "step=8 of" in first.out.read_text())
    _signal(first, signal.SIGTERM)
    code, _, err = toys.end(first)
    assert code == 143 and "stopped by SIGTERM: everything up to step" in err
    second = toys.start(tmp_path / "run", *words)
    until(lambda: "step=16 of" in second.out.read_text())
    _signal(second, signal.SIGKILL)
    assert toys.end(second)[0] == -signal.SIGKILL
    code, out, err = toys.end(toys.start(tmp_path / "run", "--steps", "24"))
    assert code == 0 and "resuming at step" in err
    assert out.splitlines()[-1] == toys.end(whole)[1].splitlines()[-1]


def test_a_second_signal_ends_at_once(tmp_path: Path, toys: Any, until: Any) -> None:
    process = toys.start(tmp_path, "--steps", "1000", "--pause-s", "5")
    until(lambda: (tmp_path / "checkpoints/.training.lock").exists() and "starting" in process.err.read_text())
    time.sleep(0.7)  # it is in the middle of its first micro-batch, which takes five seconds
    _signal(process, signal.SIGTERM)
    until(lambda: "SIGTERM received" in process.err.read_text())
    before = time.monotonic()
    _signal(process, signal.SIGINT)
    code, _, _ = toys.end(process)
    assert code == 130 and time.monotonic() - before < 0.4


def _signal(process: Any, signum: int) -> None:
    os.kill(process.pid, signum)
