"""The settings, applied to a loaded model: device, precision, prompt, length."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from transformers import PreTrainedTokenizerBase

from embed.config import EmbedConfig
from embed.model.tokens import TASK, first_module
from estiba.errors import ConfigError

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
NO_LIMIT = 10**9
"""Tokenizers without a limit report 1e30 tokens."""


def device_for(requested: str | None) -> torch.device:
    if requested is None:
        requested = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(requested)
    except RuntimeError as error:
        raise ConfigError(f"--device {requested!r}: unknown; pass cpu, cuda or cuda:N") from error
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ConfigError(
            f"--device {requested!r}: {count} CUDA devices are visible; pass --device cpu, or start the container "
            "with --gpus all"
        )
    return device


def dtype_for(requested: str, device: torch.device) -> torch.dtype:
    """Half precision on CUDA, where it is several times faster; a CPU without bf16 instructions is slower with it.

    Weights stay in float32 for products in int8. Raises ConfigError for those elsewhere than on a CPU.
    """
    if requested == "int8":
        if device.type != "cpu":
            raise ConfigError(f"--dtype int8: it is for CPUs, and the device is {device}; pass --dtype auto")
        return torch.float32
    if requested == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    return DTYPES[requested]


def prompt_for(model: SentenceTransformer, config: EmbedConfig) -> str:
    """The prompt that encode_document puts before a text: the configured one, else the model's own for documents."""
    if config.prompt is not None:
        return config.prompt
    name = config.prompt_name
    if name is None:
        candidates = ("document", "passage", "corpus")
        name = next((each for each in candidates if each in model.prompts), model.default_prompt_name)
        unused = [each for each in candidates if model.prompts.get(each)]
        if unused and not model.prompts.get(name or ""):  # sentence-transformers 6 always has a "document", often ""
            logger.info("encode_document does not use this model's prompt %r; pass --prompt-name to use it", unused[0])
    elif name not in model.prompts:
        available = ", ".join(sorted(model.prompts)) or "none"
        raise ConfigError(
            f"--prompt-name {name!r}: the model has no such prompt (it has {available}); pass --prompt TEXT"
        )
    return model.prompts.get(name or "") or ""


def position_limit(model: SentenceTransformer) -> int | None:
    """Number of positions the model has. RoBERTa and its relatives reserve the first padding_idx + 1 positions."""
    backbone = model.transformers_model
    if backbone is None:
        return None
    if (module := position_module(backbone)) is not None:
        padding = counted_from(module)
        return int(module.position_embeddings.num_embeddings) - (0 if padding is None else padding + 1)
    limit = getattr(backbone.config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def position_module(backbone: torch.nn.Module) -> Any | None:
    """The module with a learned table of positions, `position_embeddings`; None without one."""
    for module in backbone.modules():
        if isinstance(getattr(module, "position_embeddings", None), torch.nn.Embedding):
            return module
    return None


def counted_from(module: Any | None) -> int | None:
    """The padding's id, behind whose position those of RoBERTa and its relatives begin; None where they begin at 0."""
    padding = getattr(module, "padding_idx", None)
    return padding if isinstance(padding, int) else None


def known_ids(model: SentenceTransformer) -> int | None:
    """Rows of the embedding table: a token with a higher id ends the forward pass in an error. None without a table."""
    backbone = model.transformers_model
    table: Any = None
    if backbone is not None:
        with contextlib.suppress(NotImplementedError):
            table = backbone.get_input_embeddings()
    elif isinstance(first_module(model), StaticEmbedding):
        table = first_module(model).embedding
    rows = getattr(table, "num_embeddings", None)
    return rows if isinstance(rows, int) else None


def tokens_beyond(model: SentenceTransformer, known: int | None) -> dict[str, int]:
    """The tokens of the tokenizer that the embedding table lacks, with their ids, lowest first."""
    tokenizer = getattr(first_module(model), "tokenizer", None)
    if known is None or tokenizer is None:
        return {}
    vocabulary: dict[str, int] = getattr(tokenizer, "get_vocab", dict)()
    return dict(sorted(((token, id) for token, id in vocabulary.items() if id >= known), key=lambda item: item[1]))


def warn_of_tokens_beyond(tokens: dict[str, int], known: int | None) -> None:
    if tokens:
        names = ", ".join(f"{token!r} ({id})" for token, id in list(tokens.items())[:3])
        logger.warning(
            "the embedding table has %d rows, and %d tokens of the tokenizer lie beyond it: %s%s; a row with one of "
            "them gets no vector", known, len(tokens), names, ", ..." if len(tokens) > 3 else "",
        )  # fmt: skip


def refuse_unknown_words(model: SentenceTransformer, name: str, sentences: Sequence[str]) -> None:
    """Raise ConfigError if the tokenizer knows no word of any sentence: then all texts are the same to the model."""
    tokenizer = getattr(first_module(model), "tokenizer", None)
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or tokenizer.unk_token_id is None:
        return
    ids = {id for text in sentences for id in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]}
    if ids <= {tokenizer.unk_token_id}:
        raise ConfigError(
            f"model {name!r}: its tokenizer knows no word and reads only {tokenizer.unk_token}; its files "
            "(tokenizer.json, or vocab.txt and the like) are missing or another model's; copy them there"
        )


def refuse_long_prompt(model: SentenceTransformer, prompt: str, max_length: int) -> None:
    if prompt and (used := length_of(model, prompt)) >= max_length:
        raise ConfigError(
            f"the prompt {prompt!r:.80} uses {used} of {max_length} tokens and leaves none for the text; shorten "
            "--prompt or raise --max-length"
        )


def refuse_same_vectors(vectors_BD: np.ndarray, noise: float, name: str) -> None:
    """Raise ConfigError if the vectors of different sentences differ by noise only."""
    if len(vectors_BD) > 1 and np.ptp(vectors_BD, axis=0).max() <= noise * np.abs(vectors_BD).max():
        raise ConfigError(
            f"model {name!r}: gives different sentences the same vector; its tokenizer or its weights are not those it "
            "was trained with, download or save the model again"
        )


def set_max_length(model: SentenceTransformer, requested: int | None, limit: int | None) -> int | None:
    """Make the model read `requested` tokens (None: its own number, within its positions). Returns the number."""
    module = first_module(model)
    if requested is None:
        own = getattr(module, "max_seq_length", None)
        if isinstance(module, Transformer):
            text = module.processing_kwargs.get("text", {})
            own = text.get("max_length") or module.document_length or own
        length = int(min(own if own is not None else NO_LIMIT, limit or NO_LIMIT, NO_LIMIT))
        if length == NO_LIMIT:
            return None
        if own == length:
            return length
        requested = length
    if limit is not None and requested > limit:
        raise ConfigError(f"--max-length {requested}: the model reads at most {limit} tokens; pass {limit} or fewer")
    try:
        module.max_seq_length = requested
    except AttributeError as error:
        raise ConfigError(f"--max-length {requested}: this model has no limit that can be set; leave it out") from error
    if isinstance(module, Transformer):
        if module.document_length is not None:
            module.document_length = requested
        if "max_length" in module.processing_kwargs.get("text", {}):
            module.processing_kwargs["text"] = {**module.processing_kwargs["text"], "max_length": requested}
        tokenizer = module.tokenizer
        specials = tokenizer.num_special_tokens_to_add(pair=False) if tokenizer is not None else 0
        if requested <= specials:
            raise ConfigError(
                f"--max-length {requested}: the model adds {specials} tokens of its own; pass a larger number"
            )
    return requested


def length_of(model: SentenceTransformer, text: str) -> int:
    mask = model.preprocess([text], task=TASK).get("attention_mask")
    return int(mask.sum()) if isinstance(mask, torch.Tensor) else 0
