"""The parts of the image, and the whole job."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from estiba.errors import ConfigError, DataError
from new_image.config import TextConfig
from new_image.data import Text
from new_image.model import ByteModel

TEXT = "el barco zarpa al alba con la bodega llena de trigo\n" * 100
SETTINGS = "--steps 20 --batch-size 4 --seq-length 16 --hidden-size 16 --eval-steps 10 --device cpu".split()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "input/data/dataset").mkdir(parents=True)
    (tmp_path / "input/data/dataset/a.txt").write_text(TEXT)
    return tmp_path


def run(root: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(path for path in sys.path if path)
    environ = {**os.environ, "ESTIBA_ROOT": str(root), "PYTHONPATH": path}
    command = [sys.executable, "-m", "new_image", *SETTINGS, *flags]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=200)


def test_a_batch_follows_from_seed_step_and_rank(root: Path) -> None:
    text = Text(root / "input/data/dataset", seq_length=16, seed=1)
    batch = text.batch(3, rank=0, size=4)
    assert batch.shape == (4, 17)
    assert torch.equal(batch, text.batch(3, rank=0, size=4))
    others = [text.batch(4, rank=0, size=4), text.batch(3, rank=1, size=4)]
    others.append(Text(root / "input/data/dataset", seq_length=16, seed=2).batch(3, rank=0, size=4))
    assert not any(torch.equal(batch, other) for other in others)


def test_the_model_sees_only_earlier_bytes() -> None:
    torch.manual_seed(0)
    model = ByteModel(hidden_size=8, dropout=0.0)
    bytes_BT = torch.randint(256, (2, 10))
    changed_BT = bytes_BT.clone()
    changed_BT[:, 6:] = 0
    assert torch.equal(model(bytes_BT)[:, :6], model(changed_BT)[:, :6])


def test_training_lowers_the_loss_and_a_finished_run_is_not_repeated(root: Path) -> None:
    done = run(root, "--learning-rate", "0.01")
    assert done.returncode == 0, done.stderr
    state = torch.load(root / "model/model.pt", weights_only=True)
    assert state["head.weight"].shape == (256, 16)
    losses = [float(line.split("val_loss=")[1].split()[0]) for line in done.stdout.splitlines() if "val_loss=" in line]
    assert losses[-1] < losses[0] < 6
    again = run(root, "--learning-rate", "0.01")
    assert again.returncode == 0 and "resuming at step 20 of 20" in again.stderr
    assert all(torch.equal(state[name], tensor) for name, tensor in _model(root).items())


def test_other_settings_do_not_continue_a_run(root: Path) -> None:
    assert run(root).returncode == 0
    done = run(root, "--hidden-size", "24")
    assert done.returncode == 2 and "hidden_size: saved 16, now 24" in done.stderr


def test_too_little_text_is_refused_with_the_remedy(root: Path) -> None:
    with pytest.raises(DataError, match="--seq-length"):
        Text(root / "input/data/dataset", seq_length=10_000, seed=1)


def test_a_missing_input_is_refused_with_the_remedy(root: Path) -> None:
    with pytest.raises(ConfigError, match="--input-path"):
        TextConfig(input_path=str(root / "nothing")).preflight()


def _model(root: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(root / "model/model.pt", weights_only=True)
    return state
