"""The settings of a training run. Those from the guide come first and keep their names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from estiba.errors import ConfigError
from estiba.platform.contract import checkpoint_dir, root_of
from estiba.training.config import MultiProcessTrainingConfig

STEP_FILE = re.compile(r"checkpoint-step-(\d+)\.pt")
"""The guide's name for the checkpoint of a step."""


class AuraConfig(MultiProcessTrainingConfig):
    """Train a Spanish language model from scratch. The same command resumes a run that was stopped."""

    dataset_path: str = Field(default_factory=lambda: str(root_of() / "input/data/dataset"))
    """Text: a .txt (running text, or one document per line), .jsonl with `text`, a directory or glob, or s3://."""
    output_dir: str = Field(default_factory=lambda: str(root_of() / "model"))
    """Output directory or s3:// URL for the finished model, the log and the plot."""
    tokenizer_name_or_path: str | None = None
    """Hugging Face directory or id, tokenizer.json, or SentencePiece model; default is to train one on the data."""
    epochs: Annotated[float, Field(gt=0)] = 1.0
    """Number of epochs."""
    model_preset: Literal[
        "auto", "aura-72h-max", "aura-72h-extended", "aura-large", "aura-medium", "aura-tiny", "manual"
    ] = "auto"
    """auto (chosen by GPU memory), aura-72h-max, aura-72h-extended, aura-large, aura-medium, aura-tiny, or manual."""
    embed_size: Annotated[int, Field(ge=1)] | None = None
    """Model width; default is the preset's."""
    num_layers: Annotated[int, Field(ge=1)] | None = None
    """Number of layers; default is the preset's."""
    num_heads: Annotated[int, Field(ge=1)] | None = None
    """Number of attention heads; default is the preset's."""
    seq_length: Annotated[int, Field(ge=2)] | None = None
    """Context length in tokens; default is the preset's."""
    batch_size: Annotated[int, Field(ge=1)] | None = None
    """Sequences per micro-batch on each GPU; default is the preset's."""
    gradient_accumulation_steps: Annotated[int, Field(ge=1)] | None = None
    """Micro-batches per step on each GPU; default is the preset's."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate; default is the preset's."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Warm-up steps; default is 3% of all steps, at least 10."""
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """Weight decay, of matrices only; default is the preset's."""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Dropout; default is the preset's."""
    grad_clip: Annotated[float, Field(gt=0)] | None = 1.0
    """Max gradient norm; none turns clipping off."""
    gradient_checkpointing: bool | None = None
    """Recompute activations instead of keeping them; default is only as much as GPU memory requires."""
    checkpoint_segments: Annotated[int, Field(ge=1)] | None = None
    """With --gradient-checkpointing: keep only the inputs of this many segments of layers; default is one per layer."""
    validation_split: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Fraction of the documents to hold out."""
    log_interval: Annotated[int, Field(ge=1)] = 10
    """Steps between log lines."""
    save_steps: Annotated[int, Field(ge=1)] | None = None
    """Steps between checkpoints; default is the preset's."""
    resume_from: str | None = None
    """Start from a checkpoint: its directory, a directory of checkpoints, or a .pt file; checkpoint-step-N.pt is
    the checkpoint of step N. Not needed after an interruption: a run resumes from --checkpoint-path by itself."""
    num_workers: Annotated[int, Field(ge=0)] = 0
    """Processes that tokenize text; 0 means one per core."""

    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Number of steps; replaces --epochs."""
    text_format: Literal["auto", "running", "lines"] = "auto"
    """Whether a .txt is running text or has one document per line; auto detects it."""
    vocab_size: Annotated[int, Field(ge=300)] | None = None
    """Vocabulary size of a tokenizer trained on the data; default is 32768, or 4096 for aura-tiny."""
    tie_embeddings: bool | None = None
    """Use one matrix for input and output embeddings; default is the preset's."""
    lr_schedule: Literal["linear", "cosine", "wsd", "constant"] = "linear"
    """Learning-rate schedule after warm-up."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """adamw8bit (bitsandbytes) keeps its states in 8 bits, except 32 for embeddings."""
    eval_steps: Annotated[int, Field(ge=1)] | None = None
    """Steps between evaluations and samples; default is --save-steps."""
    eval_batches: Annotated[int, Field(ge=1)] = 100
    """Maximum number of batches of 8 windows per evaluation; always the same ones, whatever the batch size."""
    sample_prompt: str = "El barco"
    """Prompt of the sample at each evaluation; empty turns samples off."""
    sample_tokens: Annotated[int, Field(ge=1)] = 60
    """Maximum number of tokens in a sample."""
    checkpoint_path: str = Field(default_factory=lambda: str(checkpoint_dir()))
    """Directory for checkpoints and the tokenized text, or s3://. On a spot host it survives an interruption; the
    outputs do not. Where it is not mounted and --output-dir is given, the default is OUTPUT_DIR/checkpoints."""

    def preflight(self) -> None:
        """Check the input before the slow import of torch. Raises ConfigError, DataError."""
        from aura.data.sources import check_reachable, find_sources

        check_reachable(self.dataset_path)
        find_sources(self.dataset_path)
        location = self.resume_from
        is_step = location is not None and STEP_FILE.fullmatch(location.rpartition("/")[2])
        if location is not None and not is_step and "://" not in location and not Path(location).exists():
            raise ConfigError(
                f"--resume-from {self.resume_from}: no such file or directory; give a checkpoint or a .pt file"
            )
