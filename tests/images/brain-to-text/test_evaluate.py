"""Trained decoders are evaluated: predictions, error rates, averages; and the commands run as processes."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rehearsal import outcome, recordings, run

from brain_to_text.config import BrainConfig
from brain_to_text.evaluate import evaluate, mean_outputs
from brain_to_text.evaluate_config import EvaluateConfig
from brain_to_text.weights import initial_weights, open_decoder, write
from estiba.checkpoint.exports import write_digest
from estiba.errors import CheckpointError, ConfigError
from estiba.platform.stop import Stop

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recordings(tmp_path_factory.mktemp("recordings"))


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs with different seeds."""
    roots = [tmp_path_factory.mktemp("run") for _ in range(2)]
    for seed, root in enumerate(roots):
        run(root, data, seed=seed, num_training_batches=12, ema_decay=None)
    return roots


def evaluated(models: list[Any], data: Path, output: Path, **changes: Any) -> dict[str, Any]:
    settings = {"model": [str(model) for model in models], "dataset_dir": str(data), "output_dir": str(output)}
    return evaluate(EvaluateConfig(**{**settings, **changes}), Stop())


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_evaluate_reports_what_training_reported_for_the_best_weights(
    trained: list[Path], data: Path, tmp_path: Path
) -> None:
    results = evaluated([trained[0] / "model"], data, tmp_path)
    assert results["per"] == json.loads((trained[0] / "output/results.json").read_text())["best_val_per"]
    assert (tmp_path / "predictions.csv").read_bytes() == (trained[0] / "output/val_predictions.csv").read_bytes()
    assert (tmp_path / "per_by_day.csv").read_bytes() == (trained[0] / "output/val_per_by_day.csv").read_bytes()


def test_the_test_split_has_predictions_and_no_rates(trained: list[Path], data: Path, tmp_path: Path) -> None:
    results = evaluated([trained[0] / "model"], data, tmp_path, split="test")
    predictions = rows(tmp_path / "predictions.csv")
    assert len(predictions) == results["n_trials"] == 9
    assert results["per"] is None
    assert all(row["true_phonemes"] == "" and row["edits"] == "" for row in predictions)
    assert not (tmp_path / "per_by_day.csv").exists()


def test_a_session_is_decoded_the_same_alone_and_with_others(trained: list[Path], data: Path, tmp_path: Path) -> None:
    evaluated([trained[0] / "model"], data, tmp_path / "all")
    last = sorted({row["session"] for row in rows(tmp_path / "all/predictions.csv")})[-1]
    evaluated([trained[0] / "model"], data, tmp_path / "one", sessions=[last])
    expected = [row for row in rows(tmp_path / "all/predictions.csv") if row["session"] == last]
    assert rows(tmp_path / "one/predictions.csv") == expected
    with pytest.raises(ConfigError, match=r"t15\.1999\.01\.01: .* no input layer for these days"):
        evaluated([trained[0] / "model"], data, tmp_path, sessions=["t15.1999.01.01"])


def test_the_average_of_a_decoder_with_itself_is_that_decoder(trained: list[Path], data: Path, tmp_path: Path) -> None:
    alone = evaluated([trained[0] / "model"], data, tmp_path / "1")
    twice = evaluated([trained[0] / "model"] * 2, data, tmp_path / "2")
    weights = evaluated([trained[0] / "model"] * 2, data, tmp_path / "3", average="weights")
    assert alone["per"] == twice["per"] == weights["per"]
    assert twice["average"] == "outputs" and alone["average"] is None


def test_outputs_are_averaged_as_probabilities() -> None:
    first, second = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    expected = (first.softmax(-1) + second.softmax(-1)) / 2
    torch.testing.assert_close(mean_outputs([first, second]).exp(), expected)


def test_two_decoders_are_averaged(trained: list[Path], data: Path, tmp_path: Path) -> None:
    results = evaluated([root / "model" for root in trained], data, tmp_path)
    assert len(results["models"]) == 2
    assert results["n_trials"] == 9


def test_decoders_with_different_settings_are_not_averaged(trained: list[Path], data: Path, tmp_path: Path) -> None:
    run(tmp_path, data, patch_stride=5, num_training_batches=1, ema_decay=None)
    with pytest.raises(ConfigError, match=r"differ in patch_stride \(4 and 5\)"):
        evaluated([trained[0] / "model", tmp_path / "model"], data, tmp_path / "out")


def test_a_checkpoint_from_upstream_is_evaluated_with_its_own_args(
    trained: list[Path], data: Path, tmp_path: Path
) -> None:
    """It has parameter names of a compiled model, losses as numpy scalars, and an optimizer state."""
    import numpy as np

    decoder = open_decoder(str(trained[0] / "model"), CPU)
    folder = tmp_path / "checkpoint"
    shutil.copytree(trained[0] / "model/checkpoint", folder)
    weights = {f"_orig_mod.{name}": tensor for name, tensor in decoder.model.state_dict().items()}
    content = {"model_state_dict": weights, "optimizer_state_dict": {}, "scheduler_state_dict": {}, "val_PER": 0.1}
    torch.save({**content, "val_loss": np.float32(1.5)}, folder / "best_checkpoint")
    with pytest.raises(CheckpointError, match=r"if it was replaced on purpose, remove best_checkpoint\.xxh128"):
        evaluated([folder], data, tmp_path / "out")
    (folder / "best_checkpoint.xxh128").unlink()
    assert evaluated([folder], data, tmp_path / "out") == {
        **evaluated([trained[0] / "model"], data, tmp_path / "same"),
        "models": [str(folder / "best_checkpoint")],
    }


def test_weights_without_args_are_refused(trained: list[Path], data: Path, tmp_path: Path) -> None:
    shutil.copy(trained[0] / "model/checkpoint/best_checkpoint", tmp_path / "best_checkpoint")
    with pytest.raises(ConfigError, match=r"has no args\.yaml next to it"):
        evaluated([tmp_path], data, tmp_path / "out")
    with pytest.raises(ConfigError, match="has no weights"):
        evaluated([tmp_path / "nothing"], data, tmp_path / "out")


def test_written_weights_can_be_opened(trained: list[Path], tmp_path: Path) -> None:
    decoder = open_decoder(str(trained[0] / "model"), CPU)
    write(tmp_path, "best_checkpoint", decoder.model.state_dict(), config=decoder.config, sessions=decoder.sessions,
          metrics={"step": 3, "val_per": 0.5, "val_loss": 1.0})  # fmt: skip
    again = open_decoder(str(tmp_path), CPU)
    assert again.model.shape == decoder.model.shape
    assert outcome(tmp_path) == {}


# --- processes -----------------------------------------------------------------------------------------------------


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "brain_to_text", *arguments], capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("name", ["final_checkpoint", "mine.pt"])
def test_weights_may_have_any_name_beside_their_digest_and_args(name: str, trained: list[Path], tmp_path: Path) -> None:
    best = trained[0] / "model/checkpoint/best_checkpoint"
    shutil.copy(best, tmp_path / name)
    write_digest(tmp_path / name)
    shutil.copy(best.with_name("args.yaml"), tmp_path)
    found = initial_weights(BrainConfig(init_from_checkpoint=True, init_checkpoint_path=str(tmp_path)))
    assert found is not None and found[0].startswith(f"{name} ")
    assert open_decoder(str(tmp_path), torch.device("cpu")).sessions


def test_evaluate_is_a_command(trained: list[Path], data: Path, tmp_path: Path) -> None:
    done = command(
        "evaluate", "--model", f"{trained[0]}/model", "--dataset-dir", str(data), "--output-dir", str(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    assert "PER" in done.stderr
    assert (tmp_path / "predictions.csv").exists()


def test_a_wrong_command_line_ends_in_one_message() -> None:
    done = command("evaluate", "--model", "/nowhere")
    assert done.returncode == 2
    assert done.stderr.count("error:") == 1 and "Traceback" not in done.stderr
    done = command("evalate")
    assert done.returncode == 2
    assert "available: brain-to-text evaluate" in done.stderr


def test_config_file_accepts_the_output_of_show_config(tmp_path: Path) -> None:
    done = command("show-config", "--config-file", "rnn_args_diphone_sagemaker.yaml", "--n-units", "99")
    assert done.returncode == 0, done.stderr
    path = tmp_path / "own.yaml"
    path.write_text(done.stdout)
    again = command("show-config", "--config-file", str(path))
    assert again.stdout == done.stdout
    assert "n_units: 99" in again.stdout and "n_classes: 1681" in again.stdout


def test_the_guides_entry_point_accepts_the_guides_flags() -> None:
    script = Path(__file__).resolve().parents[3] / "images/brain-to-text/train_model_sagemaker.py"
    if not script.exists():  # in the image it is elsewhere
        pytest.skip("not a checkout")
    done = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for flag in ("--s3-bucket", "--s3-data-prefix", "--config-file", "--num-training-batches", "--batch-size",
                 "--gpu-number", "--model-dir", "--output-data-dir", "--num-dataloader-workers"):  # fmt: skip
        assert flag in done.stdout
