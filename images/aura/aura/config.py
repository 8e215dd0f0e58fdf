"""What a training run can be asked for. Names are the guide's; what it does not have stands after them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from estiba.config import Config
from estiba.contract import checkpoint_dir, root_of


class AuraConfig(Config):
    """Train a Spanish language model from scratch. Run again after a stop, it goes on where it was."""

    dataset_path: str = Field(default_factory=lambda: str(root_of() / "input/data/dataset"))
    """Text: a .txt (running text, or a document a line), a .jsonl with `text`, a directory or glob of them, or s3://."""
    output_dir: str = Field(default_factory=lambda: str(root_of() / "model"))
    """Where the finished model, the log and the plot go: a directory or s3://."""
    tokenizer_name_or_path: str | None = None
    """Hugging Face directory or id, tokenizer.json, or SentencePiece model; default is one trained on the data."""
    epochs: Annotated[float, Field(gt=0)] = 1.0
    """Times the whole of the data is seen."""
    model_preset: Literal[
        "auto", "aura-72h-max", "aura-72h-extended", "aura-large", "aura-medium", "aura-tiny", "manual"
    ] = "auto"
    """auto (by the GPU's memory), aura-72h-max, aura-72h-extended, aura-large, aura-medium, aura-tiny, or manual."""
    embed_size: Annotated[int, Field(ge=1)] | None = None
    """Width of the model; default is the preset's."""
    num_layers: Annotated[int, Field(ge=1)] | None = None
    """Layers; default is the preset's."""
    num_heads: Annotated[int, Field(ge=1)] | None = None
    """Attention heads; default is the preset's."""
    seq_length: Annotated[int, Field(ge=2)] | None = None
    """Tokens of context; default is the preset's."""
    batch_size: Annotated[int, Field(ge=1)] | None = None
    """Sequences in a micro-batch of one device; default is the preset's."""
    gradient_accumulation_steps: Annotated[int, Field(ge=1)] | None = None
    """Micro-batches in a step; default is the preset's."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate; default is the preset's."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Steps in which it rises; default is 3% of all, at least 10."""
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """Of matrices; default is the preset's."""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Default is the preset's."""
    grad_clip: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest norm of the gradients; none does not clip."""
    gradient_checkpointing: bool | None = None
    """Compute activations again instead of keeping them; default is where the memory asks for it, and no more."""
    checkpoint_segments: Annotated[int, Field(ge=1)] | None = None
    """With --gradient-checkpointing: keep the borders of so many runs of layers; default is of each layer."""
    validation_split: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Share of the documents that is held out."""
    log_interval: Annotated[int, Field(ge=1)] = 10
    """Steps between lines of the log."""
    save_steps: Annotated[int, Field(ge=1)] | None = None
    """Steps between checkpoints; default is the preset's."""
    resume_from: str | None = None
    """Begin with a checkpoint: its directory, a directory of them, or a .pt file. Not needed after a stop: a run goes
    on by itself from what is in --checkpoint-path."""
    num_workers: Annotated[int, Field(ge=0)] = 0
    """Processes that turn text into tokens; 0 is one a core."""
    seed: int = 42
    """Of the first weights, the order of the data and dropout."""

    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Steps to train, instead of --epochs."""
    checkpoint_path: str = Field(default_factory=lambda: str(checkpoint_dir()))
    """Directory for checkpoints and for the text as tokens; or s3://. It outlives a spot host, the output does not."""
    checkpoint_upload: str | None = None
    """An s3:// prefix that every checkpoint is also copied to, and restored from where the directory has none."""
    save_every_s: Annotated[float, Field(gt=0)] | None = 600.0
    """Seconds between checkpoints, beside --save-steps; none saves by steps alone."""
    keep_last: Annotated[int, Field(ge=2)] = 3
    """Newest checkpoints that are kept."""
    keep_every: Annotated[int, Field(ge=1)] | None = None
    """Also keep the checkpoints of every so many steps."""
    keep_best: Annotated[int, Field(ge=0)] = 0
    """Also keep so many with the best validation loss."""
    accept_changed_plan: bool = False
    """Go on from a checkpoint though schedule, data, batch or seed are other than they were."""
    text_format: Literal["auto", "running", "lines"] = "auto"
    """Whether a .txt is running text or has a document on each line; auto looks."""
    vocab_size: Annotated[int, Field(ge=300)] | None = None
    """Of a tokenizer that is trained here; default is 32768, or 4096 for aura-tiny."""
    tie_embeddings: bool | None = None
    """One matrix for tokens in and out; default is the preset's."""
    lr_schedule: Literal["linear", "cosine", "wsd", "constant"] = "linear"
    """Course of the learning rate after warm-up."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """adamw8bit keeps its states in 8 bits, those of the embeddings in 32 (bitsandbytes)."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto is bfloat16 where the GPU has it, else float16 with a scaled loss; float32 on a CPU."""
    compile: bool = False
    """torch.compile: a minute or more at the start, faster steps."""
    eval_steps: Annotated[int, Field(ge=1)] | None = None
    """Steps between evaluations and samples; default is --save-steps."""
    eval_batches: Annotated[int, Field(ge=1)] = 100
    """Most batches of an evaluation; always the same ones."""
    sample_prompt: str = "El barco"
    """What a sample at each evaluation begins with; empty makes none."""
    sample_tokens: Annotated[int, Field(ge=1)] = 60
    """Most tokens of a sample."""
    device: str | None = None
    """Torch device; default is the GPU if there is one, else the CPU."""
    processes: Annotated[int, Field(ge=0)] = 0
    """Processes that train together on this box; 0 is one a GPU, or one."""
    deterministic: bool = False
    """On a GPU, only operations that give the same bits every time; slower. A CPU always does."""
