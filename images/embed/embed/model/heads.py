"""BGE-M3's heads for sparse and multi-vector search, as FlagEmbedding computes them (M3Embedder).

Sparse: the weight of a token is relu(sparse_linear(hidden)). Multi-vector: the vector of a token is
colbert_linear(hidden), scaled to unit length. `TokenOutputs` holds both for a window.

Shapes: B rows, T tokens per row, N tokens of a batch without padding, H hidden width, W width of a token's vector.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from embed.config import EmbedConfig
from embed.data.token_outputs import TokenOutputs
from embed.model.tokens import FastTokens, Features, Tokens, Window, first_module
from estiba.errors import ConfigError

FILES = {"sparse": "sparse_linear", "multi_vector": "colbert_linear"}
"""The name of a head's file, without its suffix, by setting."""
SUFFIXES = (".pt", ".safetensors")
SPECIAL_TOKENS = ("cls_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "pad_token_id", "unk_token_id")
"""Tokens that get no weight, since they say nothing about a text."""


@dataclass(frozen=True, kw_only=True)
class BatchTokens:
    """What the heads give for the tokens of a batch, row after row, without padding."""

    weights_N: torch.Tensor | None
    vectors_NW: torch.Tensor | None

    def map(self, copy: Callable[[torch.Tensor], torch.Tensor]) -> BatchTokens:
        return BatchTokens(
            weights_N=None if self.weights_N is None else copy(self.weights_N),
            vectors_NW=None if self.vectors_NW is None else copy(self.vectors_NW),
        )

    def put_into(self, window: TokenOutputs, rows: np.ndarray, is_fresh: np.ndarray) -> np.ndarray:
        """Copy the values of the batch's rows that are fresh. Returns bool[B]: one of a row's values is not finite."""
        lengths = np.diff(window.starts)[rows]
        is_bad = np.zeros(int(lengths.sum()), bool)
        weights = vectors = None
        if self.weights_N is not None:
            weights = self.weights_N.numpy()
            is_bad |= ~np.isfinite(weights)
        if self.vectors_NW is not None:
            vectors = self.vectors_NW.numpy()
            is_bad |= ~np.isfinite(vectors).all(axis=1)
        of_fresh = np.repeat(is_fresh, lengths)
        window.put(
            rows[is_fresh],
            None if weights is None else weights[of_fresh],
            None if vectors is None else vectors[of_fresh],
        )
        return np.logical_or.reduceat(is_bad, np.cumsum(lengths) - lengths)


@dataclass(frozen=True, kw_only=True)
class Linear:
    weight: torch.Tensor
    bias: torch.Tensor

    def __call__(self, hidden_NH: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(hidden_NH, self.weight, self.bias)

    def on(self, device: torch.device, dtype: torch.dtype) -> Linear:
        return Linear(weight=self.weight.to(device, dtype), bias=self.bias.to(device, dtype))


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Those of the heads that the settings ask for, which may be none."""

    sparse: Linear | None = None
    multi_vector: Linear | None = None
    digests: dict[str, str] = field(default_factory=dict)
    """The digest of each head's file, by setting."""
    special_ids: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    @property
    def flags(self) -> str:
        return " and ".join(_flag(setting) for setting in self.digests)

    @property
    def vector_width(self) -> int:
        return 0 if self.multi_vector is None else len(self.multi_vector.weight)

    def of(self, model: SentenceTransformer, device: torch.device, dtype: torch.dtype) -> Heads:
        """The heads for a model, where and as precise as it is. Raises ConfigError if they do not fit it."""
        if not self.digests:
            return self
        config = getattr(model.transformers_model, "config", None)
        width = getattr(config, "hidden_size", None)
        for setting in self.digests:
            expected = getattr(self, setting).weight.shape[1]
            if width is not None and expected != width:
                raise ConfigError(
                    f"{_flag(setting)}: {FILES[setting]} takes {expected} values of a token, and the model gives "
                    f"{width}; the file belongs to another model"
                )
        tokenizer = getattr(first_module(model), "tokenizer", None)
        ids = {getattr(tokenizer, name, None) for name in SPECIAL_TOKENS}
        return replace(
            self,
            sparse=None if self.sparse is None else self.sparse.on(device, dtype),
            multi_vector=None if self.multi_vector is None else self.multi_vector.on(device, dtype),
            special_ids=torch.tensor(sorted(id for id in ids if id is not None), dtype=torch.int64),
        )

    def of_batch(self, output: Features, features: Features, *, normalize: bool) -> BatchTokens | None:
        """`output` is the model's; `features` lie in host memory, where their values can be read without a wait."""
        if not self.digests:
            return None
        if "token_embeddings" not in output:
            raise ConfigError(f"{self.flags}: the model gives no hidden state of its tokens; leave it out")
        hidden_BTH = output["token_embeddings"]
        at_N = features["attention_mask"].reshape(-1).nonzero()[:, 0]
        hidden_NH = hidden_BTH.reshape(-1, hidden_BTH.shape[-1])[at_N.to(hidden_BTH.device)]
        weights_N = vectors_NW = None
        if self.sparse is not None:
            is_special_N = torch.isin(features["input_ids"].reshape(-1)[at_N], self.special_ids)
            weights_N = torch.relu(self.sparse(hidden_NH)).float()[:, 0]
            weights_N = weights_N.masked_fill(is_special_N.to(weights_N.device), 0)
        if self.multi_vector is not None:
            vectors_NW = self.multi_vector(hidden_NH).float()
            if normalize:
                vectors_NW = torch.nn.functional.normalize(vectors_NW, p=2, dim=1)
        return BatchTokens(weights_N=weights_N, vectors_NW=vectors_NW)

    def of_window(self, window: Window) -> TokenOutputs | None:
        """Room for a window's values."""
        if not self.digests:
            return None
        return TokenOutputs.zeros(
            window.starts, window.ids, has_weights=self.sparse is not None, vector_width=self.vector_width
        )

    def check_tokens(self, tokens: Tokens) -> None:
        """Raise ConfigError if the ids of a row's tokens are not known."""
        if self.digests and not isinstance(tokens, FastTokens):
            raise ConfigError(f"{self.flags}: the model has a tokenizer of its own, whose ids are not kept; drop it")


def file_names(config: EmbedConfig) -> list[str]:
    """The files that the settings need, with each suffix that they may have."""
    return [name + suffix for setting, name in FILES.items() if getattr(config, setting) for suffix in SUFFIXES]


def load(directory: Path, config: EmbedConfig) -> Heads:
    """The heads that the settings ask for. Raises ConfigError if a file is missing or cannot be used."""
    found = {setting: _load(directory, setting, config.model) for setting in FILES if getattr(config, setting)}
    linears: dict[str, Any] = {setting: linear for setting, (linear, _) in found.items()}
    return Heads(**linears, digests={setting: digest for setting, (_, digest) in found.items()})


def _load(directory: Path, setting: str, model: str) -> tuple[Linear, str]:
    flag, name = _flag(setting), FILES[setting]
    path = next((directory / (name + each) for each in SUFFIXES if (directory / (name + each)).is_file()), None)
    if path is None:
        raise ConfigError(
            f"{flag}: the model {model!r} has no {name}.pt or {name}.safetensors; copy it there from the BGE-M3 that "
            f"it was made from, or leave out {flag}"
        )
    try:
        is_pickle = path.suffix == ".pt"
        weights = torch.load(path, map_location="cpu", weights_only=True) if is_pickle else load_file(path)
        linear = Linear(weight=weights["weight"].float(), bias=weights["bias"].float())
    except Exception as error:  # untrusted files, read by two libraries
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ConfigError(f"{flag}: {path} holds no weight and bias ({reason}); download the model again") from error
    weight, bias = tuple(linear.weight.shape), tuple(linear.bias.shape)
    if len(weight) != 2 or bias != weight[:1] or (setting == "sparse" and weight[0] != 1):
        outputs = "1" if setting == "sparse" else "W"
        raise ConfigError(
            f"{flag}: {path} holds a weight of shape {weight} and a bias of {bias}; ({outputs}, hidden width) and "
            f"({outputs},) are needed, take the file of BGE-M3"
        )
    if not (linear.weight.isfinite().all() and linear.bias.isfinite().all()):
        raise ConfigError(f"{flag}: {path} holds values that are not finite; download the model again")
    return linear, f"xxh3-128:{xxhash.xxh3_128_hexdigest(path.read_bytes())}"


def _flag(setting: str) -> str:
    return f"--{setting.replace('_', '-')}"
