"""The forward pass without padding on a GPU: the rows of a batch one after another, and attention within each.

Attention over padded rows needs a mask, and with a mask torch does not choose its fastest kernel; the other layers
compute the padding too. The model's modules are the same, so vectors differ in the last bits only.

Shapes: B rows, T tokens of the longest, N tokens of all rows, H heads, D width.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from embed.model.forward import Engine
from embed.model.resolve import counted_from, position_module
from embed.model.tokens import Features

NAME = "estiba_varlen"
NO_MASK = torch.zeros(1, 1, 1, 1)
"""transformers passes a mask of four dimensions through and builds none of its own."""
BY_TOKEN = ("input_ids", "token_type_ids")
MAX_HEAD_WIDTH = 256
"""Of the flash-attention kernels."""


class NotVarlen(Exception):
    """Why a model cannot be computed without padding."""


Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, float | None, bool], torch.Tensor]
"""(query, key, value, starts, longest, scale, is_causal) -> [N, H, D]: query, key and value are [N, H, D], of rows that
begin at `starts` (int32[B + 1]) and of which the longest has so many tokens."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Where the rows of the batch begin that is being computed."""

    starts: torch.Tensor
    longest: int
    attention: Attention


_rows: ContextVar[Rows | None] = ContextVar("_rows", default=None)


class VarlenEngine(Engine):
    """The modules of a torch engine, with its weights, over rows that are not padded."""

    kind = "torch-varlen"

    def __init__(self, torch_engine: Engine, attention: Attention, name: str) -> None:
        """`name` says whose kernels `attention` uses. Raises NotVarlen."""
        super().__init__(torch_engine.model, torch_engine.device, torch_engine.dtype, **torch_engine.settings)
        self.attention = attention
        self.multiple = 1
        self.version = f"{self.kind} {torch.__version__} ({name})"
        self._reader = _reader_of(self.model)
        self._padding_id = counted_from(position_module(self._reader.model))
        self._no_mask = NO_MASK.to(self.device, self.dtype)  # here, since the copy waits for the device

    def to_device(self, features: Features) -> Features:
        """The rows one after another, without padding. `features` lie in host memory, where a length costs no wait."""
        padded_BT = features["attention_mask"]
        lengths_B = padded_BT.sum(dim=1)
        starts = torch.zeros(len(lengths_B) + 1, dtype=torch.int32)
        torch.cumsum(lengths_B, dim=0, out=starts[1:])
        at_N = padded_BT.reshape(-1).nonzero()[:, 0]
        flat = {name: features[name].reshape(-1)[at_N][None] for name in BY_TOKEN if name in features}
        positions_N = _positions(flat["input_ids"][0], starts, lengths_B, self._padding_id)
        flat |= {"position_ids": positions_N[None], "starts": starts, "at": at_N, "padded": padded_BT}
        rest = {name: value for name, value in features.items() if name not in (*BY_TOKEN, "attention_mask")}
        on_device = {name: self._on_device(value) for name, value in {**rest, **flat}.items()}
        return on_device | {"longest": int(lengths_B.max())}

    def computed_tokens(self, features: Features) -> int:
        return int(features["attention_mask"].sum())

    def forward(self, features: Features) -> Features:
        features = dict(features)
        starts, at_N, padded_BT, longest = (features.pop(name) for name in ("starts", "at", "padded", "longest"))
        with _attending(self._reader, Rows(starts=starts, longest=longest, attention=self.attention)):
            output = self._reader({**features, "attention_mask": self._no_mask})
        if "all_layer_embeddings" in output:
            raise NotVarlen("a module reads the states of all layers")
        hidden_ND = output["token_embeddings"][0]
        hidden_BTD = hidden_ND.new_zeros(padded_BT.numel(), hidden_ND.shape[-1]).index_copy_(0, at_N, hidden_ND)
        output |= {"token_embeddings": hidden_BTD.view(*padded_BT.shape, -1), "attention_mask": padded_BT}
        for module in list(self.model)[1:]:
            output = module(output)
        return output


def attention_here(device: torch.device, dtype: torch.dtype) -> tuple[Attention, str] | None:
    """The attention of this device (Ampere and later, in half precision), and whose it is; None if there is none."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return None
    if torch.cuda.get_device_capability(device) < (8, 0):
        return None
    with contextlib.suppress(ImportError):
        from torch.nn.attention.varlen import varlen_attn

        return _by_torch(varlen_attn), "torch.nn.attention.varlen"
    with contextlib.suppress(ImportError):
        return _by_flash_attn(importlib.import_module("flash_attn").flash_attn_varlen_func), "flash-attn"
    return None


def _by_torch(kernel: Callable[..., torch.Tensor]) -> Attention:
    # torch 2.10 has the one argument, later ones have the other.
    has_window = "window_size" in inspect.signature(kernel).parameters
    causal: dict[str, Any] = {"window_size": (-1, 0)} if has_window else {"is_causal": True}

    def unusual(width: int, scale: float | None, is_causal: bool) -> dict[str, Any]:
        is_usual = scale is None or abs(scale * width**0.5 - 1) < 1e-6
        return ({} if is_usual else {"scale": scale}) | (causal if is_causal else {})

    return lambda query, key, value, starts, longest, scale, is_causal: kernel(
        query, key, value, starts, starts, longest, longest, **unusual(query.shape[-1], scale, is_causal)
    )


def _by_flash_attn(kernel: Callable[..., torch.Tensor]) -> Attention:
    return lambda query, key, value, starts, longest, scale, is_causal: kernel(
        query, key, value, starts, starts, longest, longest, softmax_scale=scale, causal=is_causal
    )


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001 - transformers passes it by position
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The function that transformers calls. query [1, H, N, D], key and value [1, G, N, D] -> [1, N, H, D]."""
    rows = _rows.get()
    if rows is None:
        raise NotVarlen("the model computes attention outside of its forward pass")
    if kwargs.get("sliding_window") or kwargs.get("softcap") or kwargs.get("position_bias") is not None or dropout:
        raise NotVarlen("its attention has a window, a cap, a bias of its own or dropout")
    if query.shape[-1] > MAX_HEAD_WIDTH:
        raise NotVarlen(f"its heads are wider than {MAX_HEAD_WIDTH}")
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    is_causal = kwargs.get("is_causal")
    causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
    query_NHD, key_NHD, value_NHD = (each[0].transpose(0, 1).contiguous() for each in (query, key, value))
    output_NHD = rows.attention(query_NHD, key_NHD, value_NHD, rows.starts, rows.longest, scaling, causal)
    return output_NHD[None], None


ALL_ATTENTION_FUNCTIONS.register(NAME, _attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


@contextlib.contextmanager
def _attending(reader: Transformer, rows: Rows) -> Iterator[None]:
    """Attention by `rows`; before and after it the same model computes padded batches."""
    config = reader.model.config
    before = config._attn_implementation
    token = _rows.set(rows)
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        _rows.reset(token)


def _reader_of(model: SentenceTransformer) -> Transformer:
    """The module that reads tokens. Raises NotVarlen if it cannot take rows one after another."""
    reader = model[0]
    if type(reader) is not Transformer or reader.transformer_task != "feature-extraction":
        raise NotVarlen(f"its first module is {type(reader).__name__}")
    if not getattr(reader.model, "is_backend_compatible", lambda: False)():
        raise NotVarlen(f"{type(reader.model).__name__} has an attention of its own")
    params = reader.model_forward_params
    if params is not None and "position_ids" not in params:
        raise NotVarlen(f"{type(reader.model).__name__} takes no positions")
    return reader


def _positions(
    ids_N: torch.Tensor, starts: torch.Tensor, lengths_B: torch.Tensor, padding_id: int | None
) -> torch.Tensor:
    """int64[N], counted in each row. With a `padding_id` such a token in a text is not counted and has its position."""
    counted_N = torch.ones_like(ids_N) if padding_id is None else (ids_N != padding_id).long()
    before_N = torch.cumsum(counted_N, dim=0) - counted_N
    in_row_N = before_N - before_N[starts[:-1].long()].repeat_interleave(lengths_B)
    return in_row_N if padding_id is None else (in_row_N + 1) * counted_N + padding_id
