"""A random model and a text for all tests of this image."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import tiny_model

WORDS = "el barco zarpa al alba con la bodega llena de trigo y vino hacia otro puerto".split()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.build(tmp_path_factory.mktemp("model"), "llama-tied")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    dice = random.Random(0)
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text("".join(" ".join(dice.choices(WORDS, k=10)) + ".\n" for _ in range(60)))
    return folder


@pytest.fixture
def arguments(model: Path, text: Path) -> list[str]:
    """Eight steps, a save every second one, and a batch that two and three ranks cannot divide evenly."""
    settings = {
        "model": model,
        "input-path": text,
        "validation-path": text / "a.txt",
        "max-sequence-length": 32,
        "global-batch-size": 7,
        "batch-size": 2,
        "learning-rate": 0.003,
        "max-steps": 8,
        "eval-steps": 4,
        "save-steps": 2,
        "log-interval": 1,
    }
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]
