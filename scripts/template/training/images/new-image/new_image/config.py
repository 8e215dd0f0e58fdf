"""The settings of the image. Each is a flag, an environment variable and a hyperparameter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from estiba.errors import ConfigError
from estiba.platform.contract import root_of
from estiba.training.config import MultiProcessTrainingConfig


class TextConfig(MultiProcessTrainingConfig):
    """Train a small language model on the bytes of text files."""

    input_path: str = Field(default_factory=lambda: str(root_of() / "input/data/dataset"))
    """Directory of text files."""
    output_dir: str = Field(default_factory=lambda: str(root_of() / "model"))
    """Directory for the model and its metrics."""

    steps: Annotated[int, Field(ge=1)] = 1000
    """Steps to train."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Sequences in a step, on each GPU."""
    seq_length: Annotated[int, Field(ge=1)] = 128
    """Bytes in a sequence."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Learning rate after the warm-up."""
    eval_steps: Annotated[int, Field(ge=1)] = 100
    """Steps between evaluations."""
    hidden_size: Annotated[int, Field(ge=1)] = 256
    """Width of the model."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Dropout before the last layer."""

    def preflight(self) -> None:
        if not Path(self.input_path).exists():
            raise ConfigError(
                f"{self.input_path}: no input files; mount a directory of text files on it "
                "(-v DIR:/opt/ml/input/data/dataset), name the channel `dataset`, or pass --input-path"
            )
