"""The settings of a fine-tuning. Those of the fine-tuning document come first and keep their names."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from estiba.errors import ConfigError
from estiba.platform.contract import root_of
from estiba.training.config import MultiProcessTrainingConfig
from finetune.artifacts.gguf import find_converter
from finetune.data.settings import DataSettings

Method = Literal["lora", "qlora", "full"]
OptimizerName = Literal["adam", "adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit"]
DEFAULT_LEARNING_RATES: dict[Method, float] = {"lora": 2e-4, "qlora": 2e-4, "full": 2e-5}
"""The fine-tuning document's 1e-3 is five times what adapters of rank 16 usually bear."""
HIGH_LEARNING_RATE: dict[Method, float] = {"lora": 5e-4, "qlora": 5e-4, "full": 1e-4}


class FinetuneConfig(MultiProcessTrainingConfig, DataSettings):
    """Fine-tune a language model on any table or text. The same command resumes a run that was stopped."""

    see_also: ClassVar[str] = (
        "finetune check DATA reads the data and needs no model; finetune ask --model-dir DIR QUESTION"
    )

    base_model: str | None = None
    """Hub id, alias such as llama-2-7b, directory, or s3:// prefix; default is the channel `model`."""
    batch_size: Annotated[int, Field(ge=1)] = 4
    """Records per micro-batch on each GPU; a table row with several questions is one record."""
    epochs: Annotated[float, Field(gt=0)] = 3.0
    """Number of epochs."""
    max_sequence_length: Annotated[int, Field(ge=16)] = 2048
    """Longest sequence in tokens. A longer prompt is shortened in its middle; an answer is never cut."""
    optimizer: OptimizerName = "adam"
    """adam, adamw (decoupled weight decay), adamw8bit, paged_adamw, or paged_adamw8bit (bitsandbytes)."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Weight decay, of matrices only."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate; default is 2e-4 for adapters, 2e-5 for full fine-tuning."""

    input_path: str | None = None
    """Files or directory to train on; default is the channel `training`, else `dataset`."""
    output_dir: str = Field(default_factory=lambda: str(root_of() / "model"))
    """Directory or s3:// URL for the merged model, the adapter and the report."""
    method: Method = "lora"
    """lora, qlora (adapters on a 4-bit base), or full (all weights)."""
    lora_rank: Annotated[int, Field(ge=1)] = 16
    """Rank of the adapters."""
    lora_alpha: Annotated[float, Field(gt=0)] | None = None
    """Scale of the adapters; default is twice the rank."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout before the adapters."""
    lora_targets: tuple[str, ...] | None = None
    """Names of the linear layers that get adapters; default is all but the head."""
    rslora: bool = False
    """Scale adapters by alpha over the root of the rank (arXiv:2312.03732)."""
    dora: bool = False
    """Adapters that decompose weights into magnitude and direction (arXiv:2402.09353); slower."""
    double_quantization: bool = True
    """qlora: quantise the quantisation constants too."""
    gradient_accumulation_steps: Annotated[int, Field(ge=1)] = 4
    """Micro-batches per step on each GPU."""
    gradient_checkpointing: bool | None = None
    """Recompute activations to save memory; default is on for a GPU, off on a CPU."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Number of steps; replaces --epochs."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Fraction of the steps in which the learning rate rises."""
    lr_schedule: Literal["linear", "cosine", "wsd", "constant"] = "linear"
    """Learning-rate schedule after warm-up."""
    grad_clip: Annotated[float, Field(gt=0)] | None = 1.0
    """Max gradient norm; none turns clipping off."""
    neftune_alpha: Annotated[float, Field(gt=0)] | None = None
    """Add noise to embeddings while training (NEFTune, arXiv:2310.05914); 5 is usual."""
    chat_template: str | None = None
    """A Jinja file, or plain; default is the tokenizer's own, and plain where it has none."""
    share_trunks: bool = True
    """Compute what the questions on one table row share only once."""
    eval_steps: Annotated[int, Field(ge=1)] | None = None
    """Steps between evaluations; default is a quarter of the run."""
    eval_records: Annotated[int, Field(ge=1)] = 256
    """Held-out records per evaluation."""
    answer_questions: Annotated[int, Field(ge=0)] = 48
    """Held-out questions that the model answers before and after training, for the report."""
    gguf: Literal["f32", "f16", "bf16", "q8_0"] | None = None
    """Also write the merged model as model.gguf in this type; needs llama.cpp's convert_hf_to_gguf.py."""
    gguf_converter: str | None = None
    """Path of convert_hf_to_gguf.py; default is the one on the PATH."""
    log_interval: Annotated[int, Field(ge=1)] = 10
    """Steps between log lines."""

    def resolved_learning_rate(self) -> float:
        return self.learning_rate or DEFAULT_LEARNING_RATES[self.method]

    def checkpoints_activations(self, device: str) -> bool:
        return device == "cuda" if self.gradient_checkpointing is None else self.gradient_checkpointing

    def data_location(self) -> Path:
        """Return where the training data is. Raises ConfigError if there is none."""
        if self.input_path is not None:
            return Path(self.input_path)
        channels = root_of() / "input/data"
        for name in ("training", "train", "dataset"):
            folder = channels / name
            if folder.is_dir() and any(folder.iterdir()):
                return folder
        raise ConfigError(
            f"{channels}/training: no training data; mount a file or directory on it (-v "
            "DIR:/opt/ml/input/data/training), name "
            "the channel `training`, or pass --input-path"
        )

    def preflight(self) -> None:
        location = self.data_location()
        if not location.exists():
            raise ConfigError(f"--input-path {location}: no such file or directory")
        if self.gguf:
            find_converter(self.gguf_converter)
