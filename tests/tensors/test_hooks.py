"""The trainer's hooks: a schedule for each group, early stopping, and partial model states."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from estiba.checkpoint import format as ckpt_format
from estiba.checkpoint.manager import CheckpointManager
from estiba.training.schedule import Schedule
from estiba.training.task import Sums
from tensors import runs, toy


def train(task: toy.Toy, folder: Path | None = None, **how: Any) -> Any:
    checkpoints = None if folder is None else CheckpointManager(folder / "checkpoints")
    trainer = runs.make(folder, task, checkpoints=checkpoints, **how)
    try:
        trainer.resume(None if checkpoints is None else checkpoints.restore())
        trainer.run()
    finally:
        if checkpoints is not None:
            checkpoints.close(timeout_s=30)
    return trainer


# --- a schedule for each group


class TwoSchedules(toy.Toy):
    """The last layer follows a schedule of its own."""

    own = Schedule(kind="linear", peak=0.2, steps=10)

    def __init__(self, **how: Any) -> None:
        super().__init__(**how)
        self.seen: list[list[float]] = []
        first, last = self.model[0], self.model[3]
        self.optimizer = torch.optim.AdamW(
            [{"params": list(first.parameters()), "name": "first"}, {"params": list(last.parameters()), "name": "last"}]
        )
        self.optimizer.register_step_pre_hook(
            lambda *_: self.seen.append([group["lr"] for group in self.optimizer.param_groups])
        )

    def group_schedule(self, group: Mapping[str, Any]) -> Schedule | None:
        return self.own if group["name"] == "last" else None


def test_a_group_follows_its_own_schedule_and_the_others_that_of_the_trainer() -> None:
    task = TwoSchedules()
    main = Schedule(kind="constant", peak=0.5, steps=4)
    trainer = train(task, steps=4, schedule=main, log_every=1)
    assert task.seen == [[0.5, pytest.approx(0.2 * (1 - step / 10))] for step in range(4)]
    assert [row["lr"] for row in trainer.metrics_logger.rows if "lr" in row] == [0.5] * 4


def test_a_group_follows_its_own_schedule_after_a_resume(tmp_path: Path) -> None:
    whole = TwoSchedules()
    train(whole, steps=runs.STEPS)
    train(TwoSchedules(), tmp_path, steps=6, accept_changed_plan=True)
    task = TwoSchedules()
    train(task, tmp_path, steps=runs.STEPS, accept_changed_plan=True)
    assert [last for _, last in task.seen] == [last for _, last in whole.seen[6:]]


# --- early stopping


class Impatient(toy.Toy):
    """Stops when its accuracy has been measured three times."""

    def should_stop(self, step: int, metrics: Mapping[str, float]) -> str | None:
        del step
        return "three evaluations were held" if metrics.get("evaluations", 0) >= 3 else None


def test_a_run_that_stops_early_is_saved_as_complete_and_stays_so_when_it_is_started_again(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trainer = train(Impatient(), tmp_path, steps=100)
    assert trainer.step == 15
    assert capfd.readouterr().err.count("three evaluations were held; stopping early at step 15") == 1
    folder = tmp_path / "checkpoints"
    newest = ckpt_format.checkpoint_names(folder)[0]
    assert newest == "step-00000015" and ckpt_format.verify(folder / newest).kind == "final"

    again = Impatient()
    trainer = train(again, tmp_path, steps=100)
    assert trainer.step == 15 and again.evaluations == 3
    assert ckpt_format.checkpoint_names(folder)[0] == newest
    assert "stopping early" not in capfd.readouterr().err


def test_an_interrupted_run_stops_early_at_the_same_step_with_the_same_bits(tmp_path: Path) -> None:
    whole = train(Impatient(), tmp_path / "whole", steps=100)
    for place in (("micro", 3, 1), ("evaluation", 10, 2), ("evaluated", 15, 0)):
        digest, _ = runs.attempt(tmp_path / "stopped", place, kind=WatchedImpatient, steps=100)
        assert digest is None
    digest, trainer = runs.attempt(tmp_path / "stopped", kind=WatchedImpatient, steps=100)
    assert (digest, trainer.step) == (toy.digest(whole.task.model), 15)


class WatchedImpatient(runs.Watched, Impatient):
    pass


# --- partial model states


class FrozenBase(toy.Toy):
    """Trains the last layer; the first one is frozen and comes from elsewhere."""

    def __init__(self, **how: Any) -> None:
        super().__init__(**how)
        self.model[0].requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.model[3].parameters())

    def model_state(self) -> Mapping[str, torch.Tensor]:
        return self.model[3].state_dict()

    def load_model_state(self, state: Mapping[str, torch.Tensor]) -> None:
        self.model[3].load_state_dict(dict(state))


def test_a_frozen_base_stays_out_of_checkpoints_and_the_run_resumes_to_the_same_bits(tmp_path: Path) -> None:
    whole = train(FrozenBase())
    digest, _ = runs.attempt(tmp_path, ("micro", 8, 1), kind=WatchedFrozenBase)
    assert digest is None
    checkpoints = CheckpointManager(tmp_path / "checkpoints")
    restored = checkpoints.restore()
    checkpoints.close()
    assert restored is not None and sorted(restored.state["model"]) == ["bias", "weight"]
    base_bytes = sum(p.numel() * p.element_size() for p in whole.task.model[0].parameters())
    assert restored.manifest.files["model.safetensors"]["size"] < base_bytes

    digest, _ = runs.attempt(tmp_path, kind=WatchedFrozenBase)
    assert digest == toy.digest(whole.task.model)


class WatchedFrozenBase(runs.Watched, FrozenBase):
    pass


def test_results_of_on_evaluation_are_among_the_metrics(tmp_path: Path) -> None:
    class Counting(toy.Toy):
        def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> Mapping[str, float]:
            assert set(metrics) == {"val_loss", "accuracy"}
            return {"doubled": 2 * metrics["accuracy"], "at": step}

    trainer = train(Counting(), tmp_path, steps=5)
    assert trainer.metrics["doubled"] == 2 * trainer.metrics["accuracy"] and trainer.metrics["at"] == 5
    assert trainer.metrics_logger.rows[-1]["doubled"] == trainer.metrics["doubled"]


def test_should_stop_is_asked_with_the_results_of_the_evaluation() -> None:
    asked: list[tuple[int, set[str]]] = []

    class Asking(toy.Toy):
        def should_stop(self, step: int, metrics: Mapping[str, float]) -> str | None:
            asked.append((step, set(metrics)))
            return None

        def evaluate(self, model: torch.nn.Module) -> Any:
            del model
            sums: Sums = {"val_loss": (1.0, 1)}
            yield sums

    train(Asking(), steps=10)
    assert asked == [(5, {"val_loss", "evaluations"}), (10, {"val_loss", "evaluations"})]
