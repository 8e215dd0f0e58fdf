"""Steps, evaluations and metrics of the trainer that all tensor workloads share."""

from __future__ import annotations

import copy
import csv
import json
import math
import random
import threading
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from estiba.checkpoint import tree_spec
from estiba.checkpoint.format import Manifest
from estiba.checkpoint.manager import CheckpointManager, Restored
from estiba.distributed import DistContext
from estiba.errors import ConfigError, DataError
from estiba.training import loss_check, rng
from estiba.training.metrics import PACKED_ROWS, MetricsLogger, rows_in
from estiba.training.precision import AmpContext
from estiba.training.prefetch import Prefetcher, to_device
from estiba.training.schedule import Schedule
from estiba.training.throughput import ThroughputMeter
from tensors import runs, toy

CPU = torch.device("cpu")


def trained(micro: tuple[int, ...], **settings: Any) -> dict[str, torch.Tensor]:
    """Three steps over the same 11 points a step, cut into micro-batches of these sizes; no dropout."""

    class Cut(toy.Toy):
        def batches(self, step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
            points, labels = self.points(step, 11)
            return list(zip(points.split(list(self.micro)), labels.split(list(self.micro)), strict=True))

    work = Cut(micro=micro)
    work.model[2].p = 0.0
    trainer = runs.make(None, work, steps=3, **settings)
    trainer.resume(None)
    trainer.run()
    return dict(work.model.state_dict())


@pytest.mark.parametrize("micro", [(8, 3), (1, 10), (4, 4, 3), (0, 11)])
def test_micro_batches_of_unequal_size_learn_what_one_big_batch_does(micro: tuple[int, ...]) -> None:
    whole = trained((11,))
    for name, tensor in trained(micro).items():
        torch.testing.assert_close(tensor, whole[name], rtol=1e-4, atol=1e-6)


def test_nothing_to_learn_from_is_an_error_with_the_step() -> None:
    trainer = runs.make(None, toy.Toy(micro=(0, 0)))
    trainer.resume(None)
    with pytest.raises(DataError, match="step 0: nothing in its batches to learn from"):
        trainer.run()


# --- the schedule


def test_warm_up_rises_to_the_peak_and_each_kind_ends_at_its_floor() -> None:
    for kind in ("linear", "cosine", "wsd"):
        schedule = Schedule(kind=kind, peak=1.0, steps=110, warmup_steps=10, floor=0.1)  # type: ignore[arg-type]
        assert [schedule.at(step) for step in range(3)] == pytest.approx([0.1, 0.2, 0.3])
        assert schedule.at(9) == schedule.at(10) == 1.0
        assert schedule.at(110) == schedule.at(999) == pytest.approx(0.1)
        rates = [schedule.at(step) for step in range(10, 111)]
        assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize(
    ("kind", "middle", "late"),
    [("linear", 0.5, 0.1), ("cosine", 0.5, 0.0244717), ("wsd", 1.0, 0.5), ("constant", 1.0, 1.0)],
)
def test_each_kind_runs_its_course(kind: Any, middle: float, late: float) -> None:
    schedule = Schedule(kind=kind, peak=1.0, steps=110, warmup_steps=10)
    assert schedule.at(60) == pytest.approx(middle)
    assert schedule.at(100) == pytest.approx(late, abs=1e-6)


def test_a_warm_up_longer_than_the_run_and_a_run_of_one_step_are_schedules() -> None:
    assert Schedule(peak=1.0, steps=5, warmup_steps=10).at(4) == 0.5
    assert Schedule(peak=1.0, steps=1).at(0) == 1.0
    for wrong in ({"peak": 0.0, "steps": 1}, {"peak": 1.0, "steps": 0}, {"peak": 1.0, "steps": 1, "floor": 2.0}):
        with pytest.raises(ValidationError):
            Schedule(**wrong)  # type: ignore[arg-type]


def test_groups_follow_the_schedule_by_their_own_scale() -> None:
    work = toy.Toy()
    groups = [
        {"params": [p], "lr_scale": scale} for p, scale in zip(work.model.parameters(), (1, 2, 3, 4), strict=True)
    ]
    work.optimizer = torch.optim.AdamW(groups)
    trainer = runs.make(None, work, steps=4, schedule=Schedule(kind="constant", peak=0.5, steps=2))
    trainer.resume(None)
    trainer.run()
    assert [group["lr"] for group in work.optimizer.param_groups] == [0.5, 1.0, 1.5, 2.0]


# --- gradients that are no numbers


class Broken(runs.Watched):
    """Its loss is not finite in some steps."""

    def __init__(self, broken: set[int], value: float = float("nan"), **how: Any) -> None:
        super().__init__(lambda *_: None, **how)
        self.broken, self.value = broken, value

    def loss(self, model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        loss = super().loss(model, batch)
        return loss * self.value if self._step in self.broken else loss


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("clip", [1.0, None])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_change_nothing(
    fused: bool, clip: float | None, value: float, capfd: pytest.CaptureFixture[str]
) -> None:
    work = Broken({2}, value)
    work.optimizer = torch.optim.AdamW(work.model.parameters(), fused=fused)
    trainer = runs.make(None, work, steps=3, clip=clip, log_every=3, evaluate_every=None)
    trainer.resume(None)
    seen: list[Any] = []
    real = trainer._update

    def update(norm: torch.Tensor) -> None:
        before = json.dumps(_plain(work), sort_keys=True)
        real(norm)
        seen.append((before, json.dumps(_plain(work), sort_keys=True)))

    trainer._update = update  # type: ignore[method-assign]
    trainer.run()
    assert [before == after for before, after in seen] == [False, False, True]
    assert (
        trainer.skipped_steps == 1
        and "1 of the last steps skipped: gradients were not finite" in capfd.readouterr().err
    )
    row = next(row for row in trainer.metrics_logger.rows if "train_loss" in row)
    assert math.isfinite(row["train_loss"]) and 0 < row["train_loss"] < 5  # of the steps that were good


def _plain(work: toy.Toy) -> list[Any]:
    state = work.optimizer.state_dict()["state"]
    return [
        [tensor.tolist() for tensor in work.model.state_dict().values()],
        {index: {name: value.tolist() for name, value in moments.items()} for index, moments in state.items()},
    ]


def test_a_run_in_which_nothing_is_finite_ends_with_advice() -> None:
    trainer = runs.make(None, Broken(set(range(14))))
    trainer.resume(None)
    with pytest.raises(
        DataError, match="step 14: no gradient was finite for 14 steps in a row; lower the learning rate"
    ):
        trainer.run()


@pytest.mark.parametrize("log_every", [1, 7, 100])
def test_bad_steps_end_a_run_when_fifty_come_in_a_row_however_often_it_logs(log_every: int) -> None:
    """One bad step ended a run that logs every step, and every second one a run that logs every hundred."""
    spread = runs.make(None, Broken(set(range(1, 130, 2))), steps=130, log_every=log_every, evaluate_every=None)
    spread.resume(None)
    spread.run()
    assert spread.step == 130 and spread.skipped_steps == 65
    in_a_row = runs.make(None, Broken(set(range(20, 90))), steps=130, log_every=log_every, evaluate_every=None)
    in_a_row.resume(None)
    with pytest.raises(DataError, match="step 100: no gradient was finite for 70 steps in a row"):
        in_a_row.run()


def test_a_run_whose_losses_stop_being_finite_saves_the_weights_from_before(tmp_path: Path) -> None:
    checkpoints = CheckpointManager(tmp_path / "checkpoints")
    broken = Broken(set(range(5, 200)))
    run = runs.make(tmp_path, broken, checkpoints=checkpoints, steps=60, save_every=100, evaluate_every=None)
    run.resume(None)
    try:
        with pytest.raises(DataError, match="step 60: no gradient was finite for 55 steps in a row"):
            run.run()
        saved = checkpoints.restore()
    finally:
        checkpoints.close(timeout_s=30)
    assert saved is not None and saved.step == 60


def test_bad_steps_in_a_row_are_counted_across_a_resume(tmp_path: Path) -> None:
    class Dying(Broken):
        def __init__(self, at: Any, **how: Any) -> None:
            super().__init__(set(range(1, 200)), **how)
            self._at = at

    runs.attempt(tmp_path, ("micro", 30, 0), kind=Dying, steps=60, save_every=100, evaluate_every=None)
    with pytest.raises(
        DataError, match=r"step 50: no gradient was finite for 49 steps|step 60: .* for 59 steps in a row"
    ):
        runs.attempt(tmp_path, kind=Dying, steps=60, save_every=100, evaluate_every=None)


class Mean(toy.Toy):
    """Its loss is a mean over its points."""

    def loss(self, model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return super().loss(model, batch) / len(batch[1])


def test_a_loss_that_is_a_mean_is_noticed_at_the_start_and_the_check_leaves_no_trace() -> None:
    trainer = runs.make(None, Mean(), steps=3)
    trainer.resume(None)
    with pytest.raises(TypeError, match=r"Mean.loss returned .* it is a mean, and must be the SUM"):
        trainer.run()
    assert trainer.step == 0
    found = []
    for micro in ((8, 3), (1,)):  # one point cannot be halved
        work = toy.Toy(micro=micro)
        trainer = runs.make(None, work, steps=3)
        trainer.resume(None)
        before = torch.get_rng_state()
        loss_check.check_loss_is_a_sum(work, work.batches(0), trainer.amp, trainer.device)
        found.append(torch.equal(before, torch.get_rng_state()) and work.model.training)
    assert found == [True, True]


# --- evaluation


def test_an_evaluation_more_or_less_does_not_change_the_training() -> None:
    found = []
    for every in (None, 1, 4):
        work = toy.Toy()
        trainer = runs.make(None, work, evaluate_every=every)
        trainer.resume(None)
        trainer.run()
        found.append(toy.digest(work.model))
        assert work.evaluations == (1 if every is None else len(range(every, 15, every)) + (runs.STEPS % every != 0))
    assert len(set(found)) == 1


def test_what_an_evaluation_draws_leaves_no_trace() -> None:
    rng.seed(3)
    expected = (torch.rand(2).tolist(), random.random(), np.random.rand())
    rng.seed(3)
    with rng.preserved():
        torch.rand(5), random.random(), np.random.rand(7), np.random.randn()
    assert (torch.rand(2).tolist(), random.random(), np.random.rand()) == expected


def test_an_evaluation_weighs_by_count_and_leaves_the_mode_as_it_was() -> None:
    class Uneven(toy.Toy):
        def evaluate(self, model: torch.nn.Module) -> Any:
            assert not model.training and not torch.is_grad_enabled()
            yield {"val_loss": (torch.tensor(10.0), 1)}
            yield {"val_loss": (torch.tensor(2.0), 5), "empty": (0.0, 0)}

    trainer = runs.make(None, Uneven(), steps=1)
    trainer.resume(None)
    trainer.run()
    assert trainer.metrics["val_loss"] == 2.0 and math.isnan(trainer.metrics["empty"]) and trainer.task.model.training


def test_random_state_comes_back_from_a_checkpoint(tmp_path: Path) -> None:
    checkpoints = CheckpointManager(tmp_path)
    rng.seed(9)
    np.random.randn()
    checkpoints.save(1, {"random": rng.get_state()}, wait=True)
    expected = (torch.rand(3).tolist(), random.random(), np.random.randn(3).tolist())
    found = checkpoints.restore()
    checkpoints.close()
    assert found is not None
    rng.set_state(found.state["random"])
    assert (torch.rand(3).tolist(), random.random(), np.random.randn(3).tolist()) == expected


# --- metrics


def test_rows_are_in_the_log_in_lines_and_in_a_table(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    trainer = runs.make(tmp_path, toy.Toy())
    trainer.resume(None)
    trainer.run()
    lines = [json.loads(line) for line in (tmp_path / "metrics/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in lines if "train_loss" in row] == [4, 8, 12, 14]
    assert [row["step"] for row in lines if "val_loss" in row] == [5, 10, 14]
    with open(tmp_path / "metrics/metrics.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["step"] for row in table] == [str(row["step"]) for row in lines]
    assert {"train_loss", "val_loss", "lr", "grad_norm", "points_per_s", "memory_mb", "eta_s"} <= set(table[0])
    assert float(table[1]["val_loss"]) == lines[1]["val_loss"]
    out = capfd.readouterr().out
    assert "step=4 of=14 train_loss=" in out and out.count("train_loss=") == 4


def test_a_table_of_chosen_columns_is_where_it_was_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "elsewhere/training_log.csv"
    history = MetricsLogger(tmp_path / "metrics", csv_path=path, columns=["epoch", "val_loss"], tensorboard=False)
    history.start([{"step": 1, "epoch": 1, "lr": 0.1}], total_steps=3, step=1)
    history.add({"step": 2, "epoch": 1, "val_loss": 0.5})
    assert path.read_text().splitlines() == ["epoch,val_loss", "1,", "1,0.5"]


def test_metrics_that_cannot_be_written_do_not_end_the_run_and_the_log_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics").write_text("a file where the folder was to be")
    trainer = runs.make(tmp_path, toy.Toy())
    trainer.resume(None)
    trainer.run()
    found = capfd.readouterr()
    assert found.err.count("metrics are no longer written there") == 1
    assert found.out.count("train_loss=") == 4 and len(trainer.metrics_logger.rows) == 7


def test_numbers_that_are_none_are_strict_json(tmp_path: Path) -> None:
    history = MetricsLogger(tmp_path, tensorboard=False)
    history.start([], total_steps=1, step=0)
    history.add({"step": 1, "train_loss": float("nan"), "lr": float("inf")})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "train_loss": None, "lr": None}


def test_a_long_run_keeps_every_row_and_a_checkpoint_holds_them_compressed(tmp_path: Path) -> None:
    """Beyond 20,000 rows, a resume lost every second old one, and each save wrote all of them as JSON."""
    history = MetricsLogger(tmp_path / "first", tensorboard=False, columns=["step", "train_loss"])
    history.start([], total_steps=10**6, step=0)
    rows = [{"step": step, "train_loss": step / 3, "eta_s": None} for step in range(1, 21_502)]
    rows[5]["train_loss"] = float("nan")
    history.rows = [*rows]
    state = history.state()
    assert len(state["packed"]) == 20 and len(state["rows"]) == 1501 < 2 * PACKED_ROWS
    assert sum(packed.numel() for packed in state["packed"]) < 30 * len(rows)
    assert all(one is two for one, two in zip(state["packed"], history.state()["packed"], strict=True))  # packed once
    tensors, spec = tree_spec.flatten(state)
    again = rows_in(tree_spec.unflatten(json.loads(json.dumps(spec)), tensors.__getitem__))
    assert repr(again) == repr(rows)
    resumed = MetricsLogger(tmp_path / "second", tensorboard=False, columns=["step", "train_loss"])
    resumed.start(again, total_steps=10**6, step=21_501)
    lines = (tmp_path / "second/metrics.csv").read_text().splitlines()
    assert len(lines) == 1 + len(rows) and lines[1] == f"1,{1 / 3}"
    assert repr(rows_in([{"step": 1}])) == "[{'step': 1}]"  # as earlier versions saved them


def test_event_files_hold_every_row_once_after_a_resume(tmp_path: Path) -> None:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed here"
    )
    runs.attempt(tmp_path, ("micro", 9, 1), tensorboard=True)
    runs.attempt(tmp_path, tensorboard=True)
    events = accumulator.EventAccumulator(str(tmp_path / "metrics/tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train_loss")] == [4, 8, 12, 14]
    assert [event.step for event in events.Scalars("val_loss")] == [5, 10, 14]


def test_the_share_of_the_peak_is_units_times_work_over_what_the_devices_could_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    work = toy.Toy()
    work.flops_per_unit = 6e9
    monkeypatch.setattr("estiba.training.throughput.peak_flops", lambda *_: 1e12)
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    meter = ThroughputMeter(work, CPU, torch.bfloat16, 2)
    meter.start()
    for _ in range(4):
        meter.add(torch.tensor(30.0), torch.tensor(1.5), 25, 50)
    with meter.paused():
        clock[0] += 1000  # an evaluation is no training
    clock[0] += 2
    row = meter.row(DistContext())
    assert row["points_per_s"] == 100.0 and row["points"] == 200
    assert row["mfu"] == pytest.approx(100 * 6e9 / (2 * 1e12))
    assert row["train_loss"] == pytest.approx(30 / 25) and row["grad_norm"] == 1.5
    assert meter.seconds_per_step == 0.5 and meter.seconds_total == 2


def test_the_row_after_a_resume_counts_the_time_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    meters = [ThroughputMeter(toy.Toy(), CPU, torch.float32, 1) for _ in range(2)]
    meters[0].start()
    meters[0].add(torch.tensor(30.0), torch.tensor(1.5), 50, 50)
    clock[0] += 4
    state = meters[0].state_dict()
    clock[0] += 1000  # until the next host is there
    meters[1].load_state_dict(state)
    meters[1].start()
    meters[1].add(torch.tensor(30.0), torch.tensor(1.5), 50, 50)
    clock[0] += 1
    assert meters[1].row(DistContext())["points_per_s"] == 20.0 and meters[1].seconds_total == 5


def test_a_row_that_a_loss_left_out_is_that_of_an_undisturbed_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that lost others saves the state after a step whose row was not made yet."""
    clock = [10**6.0]  # the machine's uptime
    states: list[dict[str, Any]] = []
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def run(restored: Restored | None) -> tuple[list[dict[str, Any]], float]:
        trainer = runs.make(None, toy.Toy(), evaluate_every=None)

        def advance(step: int) -> None:
            clock[0] += 2
            if step == 4:
                states.append(copy.deepcopy(trainer.state()))

        monkeypatch.setattr(trainer.metrics_logger, "advance", advance)
        trainer.resume(restored)
        trainer.run()
        rows = [dict(row) for row in trainer.metrics_logger.rows]
        for row in rows:
            row.pop("memory_mb", None)
        return rows, trainer._meter.seconds_total

    expected = run(None)
    manifest = Manifest(step=4, kind="interrupt", ranks=1, metrics={}, files={})
    resumed = run(Restored(state=states[0], step=4, path=Path("step-00000004"), manifest=manifest))
    assert resumed == expected
    assert expected[0][0]["grad_norm"] > 0 and expected[0][0]["eta_s"] == 20 and expected[1] == 28


def test_the_loss_since_the_last_row_is_that_of_all_ranks_when_another_number_of_them_resumes() -> None:
    class Two(DistContext):
        def all_reduce_sum(self, *values: float) -> list[float]:
            return [value + other for value, other in zip(values, (90.0, 10.0), strict=True)]

    meters = [ThroughputMeter(toy.Toy(), CPU, torch.float32, 1) for _ in range(2)]
    meters[0].add(torch.tensor(30.0), torch.tensor(1.5), 50, 60)
    meters[1].load_state_dict(meters[0].state_dict(Two()), of_all=True)
    assert meters[1].row(DistContext())["train_loss"] == pytest.approx(120 / 60)


# --- batches ahead, numbers


def test_batches_come_in_order_and_not_more_than_a_few_ahead() -> None:
    made: list[int] = []

    def make(index: int) -> int:
        made.append(index)
        return index * 10

    ahead = Prefetcher(make, 3, 100, depth=2)
    time.sleep(0.2)
    assert made == [3, 4, 5]
    assert [ahead.next(index, lambda: False) for index in (3, 4, 5)] == [30, 40, 50]
    ahead.close()
    assert not any(thread.name == "estiba-batches" for thread in threading.enumerate())


def test_what_making_a_batch_raises_is_raised_where_it_is_asked_for() -> None:
    def make(index: int) -> int:
        if index == 1:
            raise DataError("shard 7 is torn")
        return index

    ahead = Prefetcher(make, 0, 5)
    assert ahead.next(0, lambda: False) == 0
    with pytest.raises(DataError, match="shard 7 is torn"):
        ahead.next(1, lambda: False)
    ahead.close()


def test_nested_batches_move_to_the_device_as_they_are() -> None:
    Pair = namedtuple("Pair", "ids mask")
    batch = {"a": [torch.ones(2), "text"], "b": Pair(torch.zeros(1), None), "c": (torch.ones(1), 3)}
    moved = to_device(batch, CPU)
    assert isinstance(moved["b"], Pair) and moved["a"][1] == "text" and moved["c"][1] == 3


def test_a_precision_that_the_device_has_not_is_refused() -> None:
    assert AmpContext("auto", CPU).name == "float32" and AmpContext("bfloat16", CPU).name == "bfloat16"
    with pytest.raises(ConfigError, match="float16"):
        AmpContext("float16", CPU)


def test_in_bfloat16_it_learns_too() -> None:
    trainer = runs.make(None, toy.Toy(), steps=120, precision="bfloat16", evaluate_every=60)
    trainer.resume(None)
    trainer.run()
    losses = [row["val_loss"] for row in trainer.metrics_logger.rows if "val_loss" in row]
    assert losses[-1] < 1.2 < math.log(toy.CLASSES)
