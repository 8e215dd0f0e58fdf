"""The settings of the default script. Each is a flag, an environment variable and a hyperparameter."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from estiba.errors import ConfigError
from estiba.platform.contract import Job, root_of
from estiba.training.config import MultiProcessTrainingConfig

TRAINING_CHANNELS = ("training", "train", "dataset")
VALIDATION_CHANNELS = ("validation", "val", "eval")


class MultinodeConfig(MultiProcessTrainingConfig):
    """Train all parameters of a Hugging Face causal language model on one host or several (FSDP2)."""

    spans_hosts: ClassVar[bool] = True
    see_also: ClassVar[str] = "multinode convert FILE.gguf --out DIR writes a GGUF file as safetensors"

    model: str | None = None
    """Directory or s3:// prefix with config.json and safetensors; default is the channel `model`."""
    input_path: str | None = None
    """Text, JSONL (`text`) or parquet (`text`) files; default is the channel `training`, `train` or `dataset`."""
    validation_path: str | None = None
    """The same for the validation loss; default is the channel `validation`, `val` or `eval`, if there is one."""
    text_column: str = "text"
    """The column of parquet files, or the field of JSON lines, that holds the text."""
    output_dir: str = Field(default_factory=lambda: str(root_of() / "model"))
    """Directory for the trained model and its metrics; the main host writes it."""

    batch_size: Annotated[int, Field(ge=1)] = 1
    """Sequences in a micro-batch, on each GPU."""
    global_batch_size: Annotated[int, Field(ge=1)] = 32
    """Sequences in a step over all hosts. The number of hosts does not change it, nor the loss."""
    max_sequence_length: Annotated[int, Field(ge=8)] = 2048
    """Tokens in a sequence. Documents are packed one after another."""
    epochs: Annotated[float, Field(gt=0)] = 1.0
    """Number of epochs."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Number of steps; replaces --epochs."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    """Peak learning rate."""
    lr_schedule: Literal["linear", "cosine", "wsd", "constant"] = "cosine"
    """Learning-rate schedule after warm-up."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Fraction of the steps in which the learning rate rises."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """AdamW's weight decay, of matrices only."""
    beta2: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """AdamW's second decay rate."""
    grad_clip: Annotated[float, Field(gt=0)] | None = 1.0
    """Max gradient norm; none turns clipping off."""
    eval_steps: Annotated[int, Field(ge=1)] | None = None
    """Steps between evaluations; default is a quarter of the run."""
    log_interval: Annotated[int, Field(ge=1)] = 10
    """Steps between lines of metrics."""

    replicas: Annotated[int, Field(ge=1)] = 1
    """Copies of the model (HSDP): each is sharded over 1/replicas of all ranks. 1 shards it over all of them."""
    activation_checkpointing: Literal["auto", "on", "off"] = "auto"
    """Recompute activations in the backward pass; auto does where they would not fit into the GPU's memory."""
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the final weights; auto is the base model's."""

    def model_location(self) -> str:
        """Return the base model's directory or URL. Raises ConfigError."""
        location = self.model or str(root_of() / "input/data/model")
        if "://" not in location and not Path(location).is_dir():
            raise ConfigError(
                f"{location}: no base model; pass --model DIR or s3://..., or give the job a channel named `model`"
            )
        return location

    def data_location(self) -> str:
        """Return where the text is. Raises ConfigError."""
        location = self.input_path or _channel(TRAINING_CHANNELS)
        if location is None:
            raise ConfigError(
                f"{root_of() / 'input/data/training'}: no input files; mount a directory of text, JSONL or parquet "
                "files on it (-v DIR:/opt/ml/input/data/training), name the channel `training`, or pass --input-path"
            )
        if "://" not in location and not Path(location).exists():
            raise ConfigError(f"--input-path {location}: no such file or directory; give one that exists")
        return location

    def validation_location(self) -> str | None:
        """Return where the text for the validation loss is, if there is any."""
        if self.validation_path and "://" not in self.validation_path and not Path(self.validation_path).exists():
            raise ConfigError(
                f"--validation-path {self.validation_path}: no such file or directory; give one that exists"
            )
        return self.validation_path or _channel(VALIDATION_CHANNELS)

    def preflight(self) -> None:
        if self.precision == "float16":
            raise ConfigError(
                "--precision float16: sharded training needs no scaled loss here; use bfloat16 or float32"
            )
        self.data_location()
        self.validation_location()
        self.model_location()
        sharded = [channel.name for channel in Job.read(os.environ).channels.values() if channel.is_sharded]
        if sharded:
            raise ConfigError(
                f"channel {sharded[0]!r} is ShardedByS3Key, so each host has other files; every host needs all of them "
                "for one order of the data: use FullyReplicated, or FastFile mode, which copies nothing"
            )


def _channel(names: tuple[str, ...]) -> str | None:
    """Return the directory of the first channel that exists; `train123` counts as `train`."""
    folder = root_of() / "input/data"
    present = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    for name in names:
        for path in present:
            if path.name == name or path.name.rstrip("0123456789") == name:
                return str(path)
    return None
