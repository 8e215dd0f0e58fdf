"""What was asked for, and what it means for the model at hand: device, prompt, length."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer

from embed.tokens import TASK, first_module
from estiba.errors import ConfigError

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
NO_LIMIT = 10**9  # tokenizers without a limit name 1e30 tokens


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """How to embed. Every wrong value is a ConfigError from Encoder()."""

    model: str
    """A directory, or a hub id. s3:// is copied to a directory by the caller."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    device: str | None = None
    """"cpu", "cuda", "cuda:1"; None takes CUDA where there is one."""
    dtype: str = "auto"
    """float32, float16, bfloat16; auto is float16 on CUDA (float32 if the model overflows in it), else float32."""
    batch_size: int = 0
    """Most rows in a batch; 0 leaves it to the token budget."""
    token_budget: int | None = None
    """Most padded tokens in a batch; None chooses for the device. One longer row is a batch of its own."""
    max_length: int | None = None
    """Tokens of a text that are read, special tokens included; None is the model's own."""
    normalize: bool = True
    """Scale every vector to unit length."""
    prompt: str | None = None
    """Put before every text. None with no prompt_name: what encode_document would use."""
    prompt_name: str | None = None
    """One of the model's own prompts."""
    dimensions: int | None = None
    """Keep the first so many dimensions (Matryoshka), then scale to unit length; None keeps what the model says."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""


def check(config: EncoderConfig) -> None:
    if config.dtype not in ("auto", *DTYPES):
        raise ConfigError(f"--dtype {config.dtype!r}: unknown; pass one of auto, {', '.join(DTYPES)}")
    if config.batch_size < 0:
        raise ConfigError(f"--batch-size {config.batch_size}: pass a number of rows, or 0 to choose for this device")
    for name in ("token_budget", "max_length", "dimensions"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: pass a positive number, or leave it out")
    if config.prompt is not None and config.prompt_name is not None:
        raise ConfigError(f"--prompt {config.prompt!r} and --prompt-name {config.prompt_name!r}: pass one of the two")


def device_for(asked: str | None) -> torch.device:
    if asked is None:
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(asked)
    except RuntimeError as error:
        raise ConfigError(f"--device {asked!r}: unknown; pass cpu, cuda or cuda:N") from error
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ConfigError(
            f"--device {asked!r}: this machine shows {count} CUDA devices; pass --device cpu, or start the container "
            "with --gpus all"
        )
    return device


def dtype_for(asked: str, device: torch.device) -> torch.dtype:
    """Half precision on CUDA, where it is several times faster; CPUs without bf16 instructions are slower in it."""
    if asked == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    return DTYPES[asked]


def prompt_for(model: SentenceTransformer, config: EncoderConfig) -> str:
    """What encode_document puts before a text: as asked, else the model's document, passage or corpus prompt."""
    if config.prompt is not None:
        return config.prompt
    name = config.prompt_name
    if name is None:
        candidates = ("document", "passage", "corpus")
        name = next((each for each in candidates if each in model.prompts), model.default_prompt_name)
        unused = [each for each in candidates if model.prompts.get(each)]
        if unused and not model.prompts.get(name or ""):  # sentence-transformers 6 always has a "document", often ""
            logger.info("encode_document does not use this model's prompt %r; --prompt-name does", unused[0])
    elif name not in model.prompts:
        named = ", ".join(sorted(model.prompts)) or "none"
        raise ConfigError(f"--prompt-name {name!r}: the model has no such prompt (it has {named}); pass --prompt TEXT")
    return model.prompts.get(name or "") or ""


def position_limit(model: SentenceTransformer) -> int | None:
    """Tokens that the position table holds. RoBERTa's kin lose padding_idx + 1 of it to their own counting."""
    backbone = model.transformers_model
    if backbone is None:
        return None
    for module in backbone.modules():
        if isinstance(table := getattr(module, "position_embeddings", None), torch.nn.Embedding):
            first = getattr(module, "padding_idx", None)
            return table.num_embeddings - (first + 1 if isinstance(first, int) else 0)
    limit = getattr(backbone.config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def set_max_length(model: SentenceTransformer, asked: int | None, limit: int | None) -> int | None:
    """Make the model read `asked` tokens (None: its own, but no more than it has positions); returns the number."""
    module = first_module(model)
    if asked is None:
        own = getattr(module, "max_seq_length", None)
        if isinstance(module, Transformer):
            text = module.processing_kwargs.get("text", {})
            own = text.get("max_length") or module.document_length or own
        length = int(min(own if own is not None else NO_LIMIT, limit or NO_LIMIT, NO_LIMIT))
        if length == NO_LIMIT:
            return None
        if own == length:
            return length
        asked = length
    if limit is not None and asked > limit:
        raise ConfigError(f"--max-length {asked}: the model reads at most {limit} tokens; pass {limit} or fewer")
    try:
        module.max_seq_length = asked
    except AttributeError as error:
        raise ConfigError(f"--max-length {asked}: this model has no limit that can be set; leave it out") from error
    if isinstance(module, Transformer):
        if module.document_length is not None:
            module.document_length = asked
        if "max_length" in module.processing_kwargs.get("text", {}):
            module.processing_kwargs["text"] = {**module.processing_kwargs["text"], "max_length": asked}
        tokenizer = module.tokenizer
        specials = tokenizer.num_special_tokens_to_add(pair=False) if tokenizer is not None else 0
        if asked <= specials:
            raise ConfigError(f"--max-length {asked}: the model adds {specials} tokens of its own; pass more than that")
    return asked


def length_of(model: SentenceTransformer, text: str) -> int:
    mask = model.preprocess([text], task=TASK).get("attention_mask")
    return int(mask.sum()) if isinstance(mask, torch.Tensor) else 0
