"""The settings of `brain-to-text evaluate`, apart from the command so that --help need not import torch."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt

from estiba.config import Config
from estiba.training.config import Precision


class EvaluateConfig(Config):
    """Decode every trial of a split, and write predictions and the phoneme error rate of each day."""

    model: list[str]
    """Trained decoders: best_checkpoint files, directories that contain one, or directories of verified checkpoints.
    Several, separated by commas, are averaged."""
    average: Literal["outputs", "weights"] = "outputs"
    """With several decoders: average their output probabilities, or their weights (only of one and the same run)."""
    dataset_dir: str | None = None
    """Where the sessions are; default is --s3-bucket, or the channel `dataset`."""
    s3_bucket: str | None = None
    """Bucket that holds the sessions."""
    s3_data_prefix: str | None = None
    """Prefix of the sessions in --s3-bucket."""
    sessions: list[str] | None = None
    """Sessions to evaluate; default is all that the decoder was trained on."""
    split: Literal["val", "test", "train"] = "val"
    """Which trials to decode. `test` has no labels, so only predictions are written."""
    output_dir: str = "evaluation"
    """Output directory for predictions.csv, per_by_day.csv and results.json."""
    batch_size: PositiveInt | None = None
    """Trials per batch; default is the batch size used in training."""
    precision: Precision = "auto"
    """auto is bfloat16 if the GPU supports it, and float32 on a CPU."""
    device: str | None = None
    """Torch device."""
    index_path: str | None = None
    """Where to keep the byte index; default is next to the data on S3, or a local cache directory."""
    on_bad_trial: Literal["fail", "skip"] = "fail"
    """What to do with a trial that cannot be read: end the command, or skip it and list it in results.json."""
