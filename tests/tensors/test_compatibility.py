"""Checkpoints that earlier versions wrote."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from estiba.checkpoint import format as ckpt_format
from estiba.checkpoint.manager import load
from tensors import runs, states

FIXTURES = Path(__file__).parent / "fixtures"
NAME = "step-00000009"
"""Version 0.1.0 (d5ab662) wrote it when `runs.attempt(folder, ("micro", 8, 1))` was stopped."""


def test_a_checkpoint_of_the_version_before_restores_and_continues_to_the_same_bits(tmp_path: Path) -> None:
    whole, undisturbed = runs.attempt(tmp_path / "whole")
    shutil.copytree(FIXTURES / NAME, tmp_path / "run/checkpoints" / NAME)

    starts: list[int] = []
    digest, resumed = runs.attempt(tmp_path / "run", on_start=starts.append)
    assert starts == [9] and resumed.step == runs.STEPS
    torch.testing.assert_close(dict(resumed.task.model.state_dict()), dict(undisturbed.task.model.state_dict()))
    rows = resumed.metrics_logger.rows
    assert [row["step"] for row in rows if "train_loss" in row] == [4, 8, 12, 14]  # 4 and 8 come from the checkpoint
    if computes_the_same_bits(tmp_path / "other"):
        assert digest == whole


def computes_the_same_bits(folder: Path) -> bool:
    """Whether this CPU's nine steps lead to the fixture's bits; one with other vector units may round differently."""
    runs.attempt(folder, ("micro", 8, 1))
    newest = folder / "checkpoints" / ckpt_format.checkpoint_names(folder / "checkpoints")[0]
    assert newest.name == NAME
    own, fixture = load(newest).state, load(FIXTURES / NAME).state
    assert set(own) == set(fixture)
    return all(states.is_same(own[name], fixture[name]) for name in ("model", "optimizer", "random"))
