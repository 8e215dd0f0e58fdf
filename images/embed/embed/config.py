"""The settings of the embed job."""

from __future__ import annotations

import errno
import os
import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from estiba.config import Config
from estiba.platform.contract import checkpoint_dir, root_of


class EmbedConfig(Config):
    """Embed a text column of parquet files: one output file per input file, same rows, same order, plus the vectors."""

    input_path: str = Field(default_factory=lambda: str(root_of() / "input/data/dataset"))
    """Directory, file or s3:// prefix of parquet files."""
    output_path: str = Field(default_factory=lambda: str(root_of() / "output/data"))
    """Directory or s3:// prefix; each output keeps its input's relative path. S3 is written directly."""
    checkpoint_path: str = Field(default_factory=lambda: str(checkpoint_dir()))
    """Directory or s3:// prefix for chunks of finished work. It outlives a spot host; the output directory does not.
    The default is the job's CheckpointConfig; where there is no /opt/ml, a folder beside the output."""
    no_checkpoint: bool = False
    """Save no chunks and use none: everything is computed in one attempt."""
    checkpoint_every: Annotated[int, Field(ge=1)] = 5
    """Finished files between two updates of the ledger. Chunks are always durable at once."""

    reuse: str | None = None
    """Outputs of an earlier run, a directory or s3:// prefix: a row that the model reads as one of theirs gets that
    row's vector, and is not computed. Their settings must be those of this job."""

    model: str = "pablosi/bge-m3-trained-2"
    """Sentence-transformers model: a directory, an s3:// prefix, or a name on the model hub."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off, since that code can do anything."""
    prompt: str | None = None
    """Text put before every row."""
    prompt_name: str | None = None
    """One of the model's own prompts; the default is its prompt for documents, if it has one."""
    max_length: Annotated[int, Field(ge=3)] | None = None
    """Tokens read of a row, special ones included; the default is the model's own."""
    chunk: Annotated[int, Field(ge=0)] | None = None
    """Read all of a long text, in chunks of at most this number of tokens, special ones and prompt included; 0 is the
    most that the model reads. The default reads the beginning only."""
    chunk_overlap: Annotated[int, Field(ge=0)] = 0
    """Most tokens of a chunk that the next one repeats; at most half of a chunk's text."""
    chunk_output: Literal["mean", "rows"] = "mean"
    """What a row gives: the mean of its chunks' vectors, weighted by their tokens, or a row of the output for each."""
    dimensions: Annotated[int, Field(ge=1)] | None = None
    """Keep only the first dimensions (Matryoshka models), scaled to unit length again; the default keeps all."""
    normalize: bool = True
    """Scale vectors to unit length."""

    text_column: str = "texto"
    """The column to embed; a dotted name selects a field of a struct."""
    binary_as_text: bool = False
    """Read a text column of binary values as UTF-8. Columns annotated as ENUM or JSON are read without this flag."""
    embedding_column: str = "embeddings"
    """Name of the added vector column."""
    embedding_dtype: Literal["float32", "float16", "int8", "binary"] = "float32"
    """Stored precision of the vectors: int8 keeps their direction, binary one bit for each value."""
    sparse: bool = False
    """Add a column sparse: the weight of each token of the text, by BGE-M3's sparse head."""
    multi_vector: bool = False
    """Add a column colbert: a vector for each token of the text, by BGE-M3's multi-vector head."""
    status_column: str = "status"
    """Name of the added column that holds ok, null, empty, invalid utf-8 or not finite."""
    columns: list[str] | None = None
    """Input columns to keep, separated by commas; the default keeps all."""
    n_tokens: bool = False
    """Add a column n_tokens: the number of tokens that the model read."""
    truncated: bool = False
    """Add a column truncated: whether the row had more tokens."""

    batch_size: Annotated[int, Field(ge=0)] = 0
    """Largest number of rows in a batch; 0 leaves it to the token budget."""
    token_budget: Annotated[int, Field(ge=1)] | None = None
    """Largest number of tokens in a batch, padding included; the default depends on the device."""
    dtype: Literal["auto", "float32", "float16", "bfloat16", "int8"] = "auto"
    """Precision of the model: auto is float32 on a CPU, float16 on a GPU. Rows that overflow are redone in float32.
    int8, for CPUs, multiplies faster and gives other vectors: cosine 0.998 to those of float32 (MiniLM-L6)."""
    engine: Literal["auto", "torch", "openvino"] = "auto"
    """What computes the vectors: auto is OpenVINO on a CPU where its vectors agree with torch's, otherwise torch."""
    device: str | None = None
    """Torch device, such as cpu or cuda:1; the default is all GPUs, or the CPU."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Processes; 0 is one per GPU, or one."""
    stale_outputs: Literal["keep", "remove", "refuse"] = "keep"
    """What to do with outputs of earlier runs whose input no longer exists or can no longer be embedded: name them,
    remove them at the end, or refuse to start. Outputs of another model are refused, unless they are to be removed."""
    metrics_format: Literal["jsonl", "prometheus", "emf"] = "jsonl"
    """Form of the progress numbers: a file of JSON lines or for Prometheus' textfile collector, both in a local
    checkpoint directory, or lines on standard output in CloudWatch's embedded metric format."""
    on_bad_row: Literal["fail", "skip"] = "fail"
    """Whether a row with a token that the model's embedding table lacks fails the job (exit status 1, after all other
    rows are done) or only warns. It gets no vector in either case."""
    on_bad_file: Literal["fail", "skip"] = "fail"
    """Whether a corrupt or non-parquet file fails the job (exit status 1, after all others are done) or only warns."""

    @model_validator(mode="before")
    @classmethod
    def _checkpoints_beside_the_output(cls, values: Any) -> Any:
        """Without /opt/ml nothing preserves /opt/ml/checkpoints, and an ordinary user cannot write there."""
        output = values.get("output_path") if isinstance(values, dict) else None
        if not output or "checkpoint_path" in values or root_of().is_dir():
            return values
        if output.rstrip("/").rpartition("/")[2] in (".", ".."):
            output = os.path.abspath(output)
        if re.fullmatch(r"/*|s3://[^/]*/*|file:/*", output, re.IGNORECASE):  # there is no place beside a whole bucket
            return values
        return {**values, "checkpoint_path": f"{output.rstrip('/')}-checkpoints"}

    @field_validator(
        "input_path", "output_path", "checkpoint_path", "reuse", "model", "text_column", "embedding_column",
        "status_column",
    )  # fmt: skip
    @classmethod
    def _not_empty(cls, value: str | None) -> str | None:
        if value is not None and not value.strip():
            raise ValueError("is empty")
        return value

    @field_validator("columns")
    @classmethod
    def _some_columns(cls, value: list[str] | None) -> list[str] | None:
        if value is not None and not [name for name in value if name]:
            raise ValueError("is empty; name the columns to keep, or none for all")
        if value is not None and (twice := next((name for name in value if value.count(name) > 1), None)):
            raise ValueError(f"names {twice!r} twice; name each column once")
        return value

    @field_validator("input_path", "output_path", "checkpoint_path", "reuse", "model")
    @classmethod
    def _whole_address(cls, value: str | None) -> str | None:
        if value is None:
            return None
        if "\0" in value:
            raise ValueError("holds a NUL character, which no path has")
        if match := re.match(r"(s3|s3a|s3n|file)(?::|(?=//))/*(.*)", value, re.IGNORECASE):
            scheme, rest = match[1].lower(), match[2]
            scheme = "file" if scheme == "file" else "s3"
            right = f"{scheme}://{rest}" if scheme == "s3" else f"{scheme}:///{rest}"
            if not value.lower().startswith(f"{scheme}://"):
                raise ValueError(f"is no address; write {right}")
            if scheme == "s3" and not re.match(r"[^/]", value[len("s3://") :]):
                raise ValueError("names no bucket; write s3://BUCKET/PREFIX")
            return scheme + value[len(scheme) :]
        try:
            os.stat(value)
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                raise ValueError("is longer than a path can be") from None
        return value

    @field_validator("device")
    @classmethod
    def _known_device(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", value):
            raise ValueError("is no device of this image; pass cpu, cuda or cuda:N")
        return value

    @model_validator(mode="after")
    def _chunks_are_asked_for(self) -> EmbedConfig:
        flag = "--chunk-output rows" if self.chunk_output == "rows" else "--chunk-overlap"
        if self.chunk is None and (self.chunk_overlap or self.chunk_output == "rows"):
            raise ValueError(f"{flag} needs --chunk: the number of tokens of a chunk, or 0 for the model's own limit")
        if self.chunk is not None and (self.sparse or self.multi_vector):
            flag = "--sparse" if self.sparse else "--multi-vector"
            raise ValueError(f"{flag} is for texts that are read at once; leave it or --chunk out")
        return self

    @model_validator(mode="after")
    def _length_is_stored(self) -> EmbedConfig:
        if self.embedding_dtype == "int8" and not self.normalize:
            raise ValueError(
                "--embedding-dtype int8 keeps the direction of a vector and not its length, which --normalize false "
                "asks for; pass --embedding-dtype float16, or leave out --normalize false"
            )
        return self

    @model_validator(mode="after")
    def _engine_of_the_precision(self) -> EmbedConfig:
        if self.dtype == "int8" and self.engine == "torch":
            raise ValueError("--dtype int8 is computed by OpenVINO; leave out --engine torch, or pass another --dtype")
        return self

    @model_validator(mode="after")
    def _reuse_of_vectors_of_whole_texts(self) -> EmbedConfig:
        if self.reuse is not None and (self.sparse or self.multi_vector):
            raise ValueError("--reuse takes dense vectors only; leave out --sparse and --multi-vector, or --reuse")
        if self.reuse is not None and self.chunk is not None:
            raise ValueError(
                "--reuse takes the vectors of whole texts, and --chunk cuts them; leave out one of the two"
            )
        return self

    @model_validator(mode="after")
    def _one_prompt(self) -> EmbedConfig:
        if self.prompt is not None and self.prompt_name is not None:
            raise ValueError(f"--prompt {self.prompt!r} and --prompt-name {self.prompt_name!r}: pass one of the two")
        return self

    @model_validator(mode="after")
    def _place_for_metrics(self) -> EmbedConfig:
        if self.metrics_format == "prometheus" and (self.no_checkpoint or self.checkpoint_path.startswith("s3://")):
            given = "--no-checkpoint" if self.no_checkpoint else f"--checkpoint-path {self.checkpoint_path}"
            raise ValueError(
                f"--metrics-format prometheus with {given}: the file is kept in a local checkpoint directory; "
                "pass one, or --metrics-format emf"
            )
        return self
