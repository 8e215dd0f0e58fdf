"""The whole job, from recordings to a decoder; stopped anywhere, it ends with the same bits."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch
import yaml
from rehearsal import StopPoint, config_at, job_at, outcome, recordings, run, start, steps_done, stopped_at

from brain_to_text.model import GRUDecoder
from brain_to_text.task import DecodingTask
from brain_to_text.train import train
from brain_to_text.weights import open_decoder
from estiba.errors import ConfigError, DataError, Interrupted
from estiba.platform.stop import Stop

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recordings(tmp_path_factory.mktemp("recordings"))


@pytest.fixture(scope="session")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    root = tmp_path_factory.mktemp("whole")
    run(root, data)
    return root


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# --- outputs -------------------------------------------------------------------------------------------------------


def test_a_run_writes_weights_log_predictions_rates_by_day_and_a_plot(whole: Path) -> None:
    names = set(outcome(whole, ignore=()))
    assert {"model/checkpoint/best_checkpoint", "model/checkpoint/args.yaml"} <= names
    assert {f"output/{name}" for name in ("training_log.csv", "val_predictions.csv", "val_per_by_day.csv", "per.png",
            "per_over_time.csv", "results.json", "final_metrics.json", "metrics/metrics.jsonl")} <= names  # fmt: skip
    assert (whole / "output/per.png").read_bytes()[:4] == b"\x89PNG"


def test_predictions_add_up_to_the_error_rate_of_the_best_evaluation(whole: Path) -> None:
    predictions = rows(whole / "output/val_predictions.csv")
    assert len(predictions) == 9
    per = sum(int(row["edits"]) for row in predictions) / sum(int(row["n_phonemes"]) for row in predictions)
    results = json.loads((whole / "output/results.json").read_text())
    assert per == pytest.approx(results["best_val_per"])
    evaluated = [float(row["val_per"]) for row in rows(whole / "output/training_log.csv") if row["val_per"]]
    assert len(evaluated) == 3
    assert min(evaluated) == pytest.approx(results["best_val_per"], abs=1e-3)
    days = {row["session"]: row for row in rows(whole / "output/val_per_by_day.csv")}
    assert float(days["all"]["per"]) == pytest.approx(per, abs=1e-6)
    assert len(days) == 4


def test_best_checkpoint_has_the_format_that_upstream_reads(whole: Path) -> None:
    content = torch.load(whole / "model/checkpoint/best_checkpoint", weights_only=True)
    assert {"model_state_dict", "val_PER", "val_loss"} <= set(content)
    args = yaml.safe_load((whole / "model/checkpoint/args.yaml").read_text())
    assert len(args["dataset"]["sessions"]) == 3
    assert args["model"]["n_units"] == 16
    assert args["model"]["input_network"]["input_layer_dropout"] == 0.2
    decoder = open_decoder(str(whole / "model"), CPU)
    assert decoder.sessions == args["dataset"]["sessions"]
    for name, tensor in decoder.model.state_dict().items():
        assert torch.equal(tensor, content["model_state_dict"][name])


def test_a_verified_checkpoint_opens_as_a_decoder_with_averaged_weights(whole: Path) -> None:
    decoder = open_decoder(str(whole / "checkpoints"), CPU)
    assert isinstance(decoder.model, GRUDecoder)
    assert not decoder.model.training
    best = json.loads((whole / "output/results.json").read_text())["best_step"]
    if best == 18:
        other = open_decoder(str(whole / "model"), CPU)
        assert torch.equal(decoder.model.out.weight, other.model.out.weight)


# --- stopped and resumed -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param(StopPoint(2), StopPoint(9, poll=1), id="in a step, then between two micro-batches"),
        pytest.param(StopPoint(6, in_evaluation=True), StopPoint(12, in_evaluation=True), id="in evaluations"),
        pytest.param(StopPoint(7), StopPoint(7), id="twice in the same step"),
    ],
)
def test_a_run_stopped_twice_ends_with_the_same_bits(
    first: StopPoint, second: StopPoint, whole: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each attempt runs on a new host, with only the checkpoint directory of the one before."""
    root = tmp_path / "0"
    for attempt, point in enumerate((first, second), start=1):
        error = stopped_at(point, root, data, monkeypatch)
        # A stop in the last of two micro-batches is noticed after the step.
        assert f"step {point.step + point.poll} is saved" in str(error), str(error)
        shutil.copytree(root / "checkpoints", tmp_path / str(attempt) / "checkpoints")
        root = tmp_path / str(attempt)
    run(root, data)
    assert outcome(root) == outcome(whole)


def test_a_killed_run_on_a_new_host_ends_with_the_same_bits(whole: Path, data: Path, tmp_path: Path) -> None:
    paths = {"model_dir": tmp_path / "1/model", "output_data_dir": tmp_path / "1/output"}
    process = start(tmp_path / "0", data)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "0").glob("checkpoints/step-*/manifest.json")):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.kill()
    process.wait()
    shutil.copytree(tmp_path / "0/checkpoints", tmp_path / "1/checkpoints")
    process = start(tmp_path / "1", data, **paths)
    out, _ = process.communicate(timeout=100)
    assert process.returncode == 0, out
    assert "resuming at step" in out
    assert outcome(tmp_path / "1") == outcome(whole)


def test_a_complete_run_only_writes_its_outputs_again(whole: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "checkpoints", tmp_path / "checkpoints")
    run(tmp_path, data)
    assert outcome(tmp_path) == outcome(whole)


def test_a_resume_with_changed_settings_is_refused_by_name_and_accepted_on_request(
    whole: Path, data: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole / "checkpoints", tmp_path / "checkpoints")
    with pytest.raises(ConfigError, match=r"other settings: config.*--accept-changed-plan"):
        run(tmp_path, data, white_noise_std=0.5)
    run(tmp_path, data, white_noise_std=0.5, accept_changed_plan=True)


def test_a_stop_while_trials_are_being_read_saves_a_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from brain_to_text.data.dataset import TrialDataset

    stop, original, original_batches = Stop(), TrialDataset.batch, DecodingTask.batches

    def batches(self: DecodingTask, step: int) -> Any:
        while step == 5 and steps_done(self) < 5:  # until the trainer waits for it
            time.sleep(0.01)
        return original_batches(self, step)

    def batch(self: TrialDataset, step: int) -> Any:
        if step == 5:
            stop.request("the test")
            raise stop.interrupted("trials were being read")
        return original(self, step)

    monkeypatch.setattr(TrialDataset, "batch", batch)
    monkeypatch.setattr(DecodingTask, "batches", batches)
    with pytest.raises(Interrupted, match=r"step 5 is saved"):
        run(tmp_path, data, stop)


def test_caching_on_the_device_changes_no_bit_and_may_change_between_attempts(
    whole: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped_at(StopPoint(step=7), tmp_path, data, monkeypatch, device_cache_gb=0.1)
    run(tmp_path, data)
    assert outcome(tmp_path) == outcome(whole)
    with pytest.raises(ConfigError, match=r"--device-cache-dtype float16: cpu has 0\.0 GB"):
        run(tmp_path / "half", data, device_cache_dtype="float16")


# --- accuracy and options ------------------------------------------------------------------------------------------


def test_day_layers_have_their_own_learning_rates(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[tuple[str, float]] = []

    def record(_: DecodingTask, optimizer: torch.optim.Optimizer, *__: Any) -> None:
        rates.extend((group["group_type"], group["lr"]) for group in optimizer.param_groups)

    monkeypatch.setattr(DecodingTask, "_average", record)
    run(tmp_path, data, num_training_batches=4)
    assert rates[:3] == [("bias", 0.0), ("day_layer", 0.0), ("other", 0.0)]  # upstream's warm-up starts at 0
    assert rates[9:12] == [("bias", 0.01), ("day_layer", 0.005), ("other", 0.01)]


def test_early_stopping_completes_a_run_for_good(data: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "early_stopping": True, "early_stopping_val_steps": 2, "batches_per_val_step": 2, "lr_max": 1e-9,
        "lr_max_day": 1e-9, "lr_min": 0.0, "ema_decay": None,
    }  # fmt: skip
    run(tmp_path, data, **changes)
    results = json.loads((tmp_path / "output/results.json").read_text())
    assert results["steps"] < 18
    assert (tmp_path / f"checkpoints/step-{results['steps']:08d}").exists()
    before = outcome(tmp_path)
    run(tmp_path, data, **changes)
    assert outcome(tmp_path) == before


def test_diphones_are_trained_with_phonemes_and_evaluated_as_both(tmp_path: Path) -> None:
    data = recordings(tmp_path / "data", labels="diphone")
    run(tmp_path, data, n_classes=1681, use_composite_loss=True, use_alpha_schedule=True,
        alpha_schedule_step_interval=3, num_training_batches=7)  # fmt: skip
    log = rows(tmp_path / "output/training_log.csv")
    evaluations = [row for row in log if row["val_per"]]
    assert all(row["val_der"] for row in evaluations)
    alphas = [json.loads(line).get("alpha") for line in (tmp_path / "output/metrics/metrics.jsonl").open()]
    assert 0.1 in alphas and 0.2 in alphas


def test_a_new_run_can_start_from_the_weights_of_another(whole: Path, data: Path, tmp_path: Path) -> None:
    run(tmp_path, data, num_training_batches=1, init_from_checkpoint=True, init_checkpoint_path=str(whole / "model"),
        lr_max=1e-9, lr_max_day=1e-9, lr_min=0.0, ema_decay=None)  # fmt: skip
    old = torch.load(whole / "model/checkpoint/best_checkpoint", weights_only=True)["model_state_dict"]
    new = torch.load(tmp_path / "model/checkpoint/best_checkpoint", weights_only=True)["model_state_dict"]
    assert torch.allclose(old["out.weight"], new["out.weight"], atol=1e-6)


def test_a_model_without_day_layers_has_one_for_all_days(data: Path, tmp_path: Path) -> None:
    run(tmp_path, data, day_layers=False, num_training_batches=2)
    weights = torch.load(tmp_path / "model/checkpoint/best_checkpoint", weights_only=True)["model_state_dict"]
    assert sum(name.startswith("day_weights") for name in weights) == 1


def test_frozen_layers_do_not_change(data: Path, tmp_path: Path) -> None:
    run(tmp_path, data, input_trainable=False, num_training_batches=3)
    weights = torch.load(tmp_path / "model/checkpoint/best_checkpoint", weights_only=True)["model_state_dict"]
    assert torch.equal(weights["day_weights.1"], torch.eye(12))


def test_diphone_classes_on_phoneme_data_are_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"phonemes.*--n-classes 41"):
        run(tmp_path, data, n_classes=1681)


def test_a_trial_too_short_for_its_labels_ends_the_run_or_is_skipped_by_name(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    path = min((tmp_path / "data").glob("*/data_train.hdf5"))
    with h5py.File(path, "r+") as file:
        file["trial_0001"].attrs["n_time_steps"] = 30
    with pytest.raises(DataError, match=r"trial_0001: its 30 bins .* labels need \d+; lower --patch-stride"):
        run(tmp_path / "a", tmp_path / "data")
    assert not list((tmp_path / "a").rglob("metrics.jsonl")), "it is told before the first step"
    run(tmp_path / "b", tmp_path / "data", on_bad_trial="skip", num_training_batches=2)
    results = json.loads((tmp_path / "b/output/results.json").read_text())
    assert [line.partition(": ")[0] for line in results["trials_left_out"]] == [f"{path.parent.name}/trial_0001"]
    assert results["skipped_steps"] == 0


def test_several_hosts_are_refused(data: Path, tmp_path: Path) -> None:
    job = dataclasses.replace(job_at(tmp_path), hosts=("algo-1", "algo-2"))
    with pytest.raises(ConfigError, match="InstanceCount to 1"):
        train(config_at(tmp_path, data), job, Stop())
