"""Attention over many sequences in one row, where no sequence sees another and a shared trunk is computed once.

A row is a concatenation of segments. The queries of a segment see the keys of its trunk, if it has one, and causally
those of their own segment. That covers packed sequences (no trunks) and several questions on one table row (the known
part is the trunk, each question with its answer a segment on it).

On a CPU a short record, or a segment of a long one, is one call of scaled-dot-product attention. On a GPU that
supports it, all segments are one call of `torch.nn.attention.varlen`; elsewhere one call with a dense mask. `self_test`
decides which, by comparing logits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "estiba_packed"
BLOCK_TOKENS = 256
"""Up to this length a record is computed whole under a mask: what the mask hides costs less than more calls."""
NO_MASK = torch.zeros(1, 1, 1, 1)
"""A mask of four dimensions is passed through by transformers, so that it builds none of its own."""


@dataclass(frozen=True)
class Segment:
    """Queries at [start, end), whose keys are those at [trunk_start, trunk_end) and their own."""

    start: int
    end: int
    trunk_start: int = 0
    trunk_end: int = 0

    @property
    def trunk_length(self) -> int:
        return self.trunk_end - self.trunk_start

    def is_on(self, trunk: Segment) -> bool:
        return self.trunk_length > 0 and (self.trunk_start, self.trunk_end) == (trunk.start, trunk.end)


@dataclass(frozen=True)
class Block:
    """Consecutive segments that one call of attention computes."""

    items: tuple[Segment, ...]
    trunk: int | None = None
    """The index of the block that holds the trunk, where it is another one."""

    @property
    def length(self) -> int:
        return self.items[-1].end - self.items[0].start

    @property
    def relative(self) -> tuple[Segment, ...]:
        """The segments counted from the block's start."""
        first = self.items[0].start
        return tuple(
            Segment(
                item.start - first, item.end - first, max(0, item.trunk_start - first), max(0, item.trunk_end - first)
            )
            for item in self.items
        )


@dataclass(eq=False)
class Segments:
    """The segments of one row, in order and without gaps, and what is derived from them once."""

    items: tuple[Segment, ...]
    use_varlen: bool = False
    """One call of varlen_attn, for half precision on a GPU."""
    _derived: dict[Any, Any] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return self.items[-1].end

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """What one call each computes: a short record whole, a long one segment by segment."""
        found: list[Block] = []
        start = 0
        while start < len(self.items):
            first, end = self.items[start], start + 1
            while end < len(self.items) and self.items[end].is_on(first):
                end += 1
            record = self.items[start:end]
            if record[-1].end - first.start <= BLOCK_TOKENS:
                found.append(Block(record))
            else:
                trunk = len(found)
                found += [Block((item,), trunk if item.trunk_length else None) for item in record]
            start = end
        return tuple(found)

    def mask(self, device: torch.device, window: int | None) -> torch.Tensor:
        """Return bool[T, T]: which key (column) each query (row) sees."""
        key = ("mask", device, window)
        if key not in self._derived:
            mask = torch.zeros(len(self), len(self), dtype=torch.bool)
            for item in self.items:
                seen = _lower_right(item.end - item.start, item.trunk_length, window)
                mask[item.start : item.end, item.trunk_start : item.trunk_end] = seen[:, : item.trunk_length]
                mask[item.start : item.end, item.start : item.end] = seen[:, item.trunk_length :]
            self._derived[key] = mask.to(device)
        return self._derived[key]

    def block_mask(self, block: Block, device: torch.device, window: int | None) -> torch.Tensor | None:
        """Return the mask of one block's call, or None where plain causal attention is the same."""
        item, length = block.items[0], block.length
        is_whole = len(block.items) > 1
        if not is_whole and not item.trunk_length and (window is None or length <= window):
            return None
        key = (block.relative if is_whole else (length, item.trunk_length), device, window)
        if key not in self._derived:
            self._derived[key] = (
                Segments(block.relative).mask(device, window)
                if is_whole
                else _lower_right(length, item.trunk_length, window).to(device)
            )
        return self._derived[key]

    def varlen(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, int]:
        """Return (key index, cumulative query lengths, cumulative key lengths, longest query, longest key)."""
        key = ("varlen", device)
        if key not in self._derived:
            index, queries, keys = [], [0], [0]
            for item in self.items:
                index += [*range(item.trunk_start, item.trunk_end), *range(item.start, item.end)]
                queries.append(item.end)
                keys.append(len(index))
            longest_query = max(item.end - item.start for item in self.items)
            longest_key = max(item.end - item.start + item.trunk_length for item in self.items)
            self._derived[key] = (
                torch.tensor(index, device=device),
                torch.tensor(queries, dtype=torch.int32, device=device),
                torch.tensor(keys, dtype=torch.int32, device=device),
                longest_query,
                longest_key,
            )
        return self._derived[key]


def _lower_right(length: int, trunk_length: int, window: int | None) -> torch.Tensor:
    """bool[length, trunk_length + length]: causal, aligned at the last query and the last key."""
    queries = torch.arange(trunk_length, trunk_length + length)[:, None]
    keys = torch.arange(trunk_length + length)[None, :]
    seen = keys <= queries
    return seen if window is None else seen & (queries - keys < window)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: Segments | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that transformers calls. query [1, H, T, D], key and value [1, G, T, D] -> [1, T, H, D].

    Without `segments` (evaluation of a prompt, generation) it is transformers' own for scaled-dot-product attention.
    """
    if segments is None:
        result: tuple[torch.Tensor, None] = ALL_ATTENTION_FUNCTIONS["sdpa"](
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, softcap=softcap,
            sliding_window=sliding_window, **kwargs,
        )  # fmt: skip
        return result
    if segments.use_varlen and softcap is None and dropout == 0.0:
        return _by_varlen(query, key, value, segments, scaling, sliding_window), None
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if query.device.type == "cpu" or softcap is not None:  # with a cap the scores are in memory
        lengths = [block.length for block in segments.blocks]
        # Not slices: the gradient of each slice is a tensor of the whole row.
        queries, keys, values = (torch.split(one, lengths, dim=2) for one in (query, key, value))
        parts = []
        for number, block in enumerate(segments.blocks):
            seen_keys, seen_values = keys[number], values[number]
            if block.trunk is not None:
                seen_keys, seen_values = (torch.cat((one[block.trunk], one[number]), dim=2) for one in (keys, values))
            mask = segments.block_mask(block, query.device, sliding_window)
            parts.append(_attend(queries[number], seen_keys, seen_values, mask, scaling, dropout, softcap))
        output = torch.cat(parts, dim=2)
    else:
        mask = segments.mask(query.device, sliding_window)
        output = _attend(query, key, value, mask, scaling, dropout, softcap)
    return output.transpose(1, 2), None


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
) -> torch.Tensor:
    if softcap is None:
        return scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling
        )
    scores = query @ key.transpose(2, 3) * (scaling or 1 / math.sqrt(query.shape[-1]))
    scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = _lower_right(query.shape[2], 0, None).to(query.device)
    scores = scores.masked_fill(~mask, float("-inf"))
    weights = torch.nn.functional.dropout(scores.float().softmax(-1).to(value.dtype), dropout)
    return weights @ value


def _by_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    index, queries, keys, longest_query, longest_key = segments.varlen(query.device)
    if torch.is_autocast_enabled(query.device.type):  # which does not know this function
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    key_TGD, value_TGD = (both[0].transpose(0, 1).index_select(0, index) for both in (key, value))
    # A window of W keys includes the query's own; varlen_attn counts those to its left.
    left = -1 if window is None else window - 1
    output_THD: torch.Tensor = varlen_attn(
        query[0].transpose(0, 1).contiguous(), key_TGD, value_TGD, queries, keys, longest_query, longest_key,
        scale=scaling, window_size=(left, 0), enable_gqa=True,
    )  # fmt: skip
    return output_THD[None]


def register() -> None:
    """Make `attn_implementation=NAME` known to transformers."""
    ALL_ATTENTION_FUNCTIONS.register(NAME, packed_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
