"""What the embed job can be asked for."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from estiba.config import Config
from estiba.contract import checkpoint_dir, root_of


class EmbedConfig(Config):
    """Embed a text column of parquet files: one output file per input file, same rows, same order, plus the vectors."""

    input_path: str = Field(default_factory=lambda: str(root_of() / "input/data/dataset"))
    """Directory, file or s3:// prefix of parquet files."""
    output_path: str = Field(default_factory=lambda: str(root_of() / "output/data"))
    """Directory or s3:// prefix; each output has its input's relative path. S3 is written directly."""
    checkpoint_path: str = Field(default_factory=lambda: str(checkpoint_dir()))
    """Directory or s3:// prefix for finished pieces of work. It outlives a spot host; the output directory does not.
    The default is the job's CheckpointConfig."""
    no_checkpoint: bool = False
    """Keep no finished work and use none: everything is computed, in one go."""
    checkpoint_every: Annotated[int, Field(ge=1)] = 5
    """Finished files between two writings of the ledger. Finished pieces are durable at once, whatever this says."""

    model: str = "pablosi/bge-m3-trained-2"
    """Sentence-transformers model: a directory, an s3:// prefix, or a name on the model hub."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off, as that code can do anything."""
    prompt: str | None = None
    """Text put before every row."""
    prompt_name: str | None = None
    """One of the model's own prompts; default is the one it names for documents, if any."""
    max_length: Annotated[int, Field(ge=3)] | None = None
    """Tokens kept of a row, special ones included; default is the model's own."""
    dimensions: Annotated[int, Field(ge=1)] | None = None
    """Keep the first so many (Matryoshka models), scaled to unit length again; default is all."""
    normalize: bool = True
    """Scale vectors to unit length."""

    text_column: str = "texto"
    """The column to embed; a dotted name reaches into a struct."""
    embedding_column: str = "embeddings"
    """Name of the added vector column."""
    embedding_dtype: Literal["float32", "float16"] = "float32"
    """Stored precision of the vectors."""
    status_column: str = "status"
    """Name of the added column that says ok, null, empty, invalid utf-8 or not finite."""
    columns: list[str] | None = None
    """Input columns to keep, separated by commas; default is all."""
    n_tokens: bool = False
    """Add a column n_tokens: what the model saw of the row."""
    truncated: bool = False
    """Add a column truncated: whether the row had more."""

    batch_size: Annotated[int, Field(ge=0)] = 0
    """Most rows in a batch; 0 lets the token budget of this device decide."""
    token_budget: Annotated[int, Field(ge=1)] | None = None
    """Most tokens in a batch, padding included; default by device."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """Precision of the model: auto is float32 on a CPU, float16 on a GPU. Rows that overflow are redone in float32."""
    device: str | None = None
    """Torch device, such as cpu or cuda:1; default is every GPU there is, else the CPU."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Processes; 0 is one per GPU, or one."""
    on_bad_file: Literal["fail", "skip"] = "fail"
    """What a corrupt or non-parquet file does to the exit status once all others are done: 1, or a warning."""
