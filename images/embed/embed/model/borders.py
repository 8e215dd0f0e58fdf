"""The tokens of a text with their places in it, and what lies between two of them: how good a place for a cut it is."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

INSIDE_CHARACTER, CHARACTER, WORD, SPACE, SENTENCE, PARAGRAPH = range(6)
"""What lies between two tokens."""

_IS_SPACE = np.array([chr(code).isspace() for code in range(0x3001)] + [False])
"""By code point; no higher one is a space."""
_LINE_ENDS = re.compile(r"\n\s*")
# The space behind a sentence, or nothing. A full stop ends one before a space only ("12.40"), a Chinese one always.
_SENTENCE_ENDS = re.compile(r"(?:[.!?…][\"'”’»)\]]*(?=\s)|[。！？｡][\"'”’»」』）]*)(\s*)")
_EXTENDERS = re.compile(
    "[\u0300-\u036f\u1ab0-\u1aff\u20d0-\u20ff\ufe00-\ufe0f\u200d\U0001f3fb-\U0001f3ff\U000e0020-\U000e007f]"
)
_JOINER = "\u200d"
_CONTEXT_CHARS = 8


@dataclass(frozen=True, kw_only=True)
class PlacedTokens:
    """Consecutive tokens of a text."""

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    """Half-open spans of the text, in characters."""
    borders: np.ndarray
    """uint8, what lies before each token."""

    def __len__(self) -> int:
        return len(self.ids)

    def __add__(self, more: PlacedTokens) -> PlacedTokens:
        return self._each(lambda mine, theirs: np.concatenate([mine, theirs]), more)

    def since(self, first: int) -> PlacedTokens:
        return self._each(lambda mine, _: mine[first:], self)

    def _each(self, function: Callable[[np.ndarray, np.ndarray], np.ndarray], other: PlacedTokens) -> PlacedTokens:
        return PlacedTokens(**{name: function(getattr(self, name), getattr(other, name)) for name in vars(self)})


def tokens_of(text: str, encoding: Any, start: int, end: int, prompt_chars: int) -> PlacedTokens:
    """The tokens of text[start:end], whose encoding begins with a prompt of `prompt_chars` characters."""
    spans = np.fromiter(chain.from_iterable(encoding.offsets), np.int64).reshape(-1, 2) - prompt_chars
    # Normalizers that add or reorder characters may leave spans out of order.
    ends = np.maximum.accumulate(spans[:, 1]) if len(spans) else spans[:, 1]
    starts = np.minimum(np.minimum.accumulate(spans[::-1, 0])[::-1], ends) if len(spans) else spans[:, 0]
    words = np.asarray([-1 if word is None else word for word in encoding.word_ids], np.int64)
    own = int(np.searchsorted(ends, 0, side="right")) if prompt_chars else 0  # tokens of the prompt alone
    starts, ends, words = np.maximum(starts[own:], 0) + start, ends[own:] + start, words[own:]
    ids = np.asarray(encoding.ids, np.int32)[own:]
    return PlacedTokens(ids=ids, starts=starts, ends=ends, borders=_borders(text, start, end, starts, ends, words))


def _borders(text: str, start: int, end: int, starts: np.ndarray, ends: np.ndarray, words: np.ndarray) -> np.ndarray:
    borders = np.full(len(starts), CHARACTER, np.uint8)
    if not len(starts):
        return borders
    borders[1:][words[1:] != words[:-1]] = WORD
    before = max(0, start - _CONTEXT_CHARS)
    codes = np.frombuffer(text[before:end].encode("utf-32-le"), np.uint32)
    is_space = np.append(_IS_SPACE[np.minimum(codes, len(_IS_SPACE) - 1)], False)
    borders[is_space[starts - before] | is_space[np.maximum(starts - before, 1) - 1]] = SPACE
    gaps = [(*match.span(), _lines_between(match[0])) for match in _LINE_ENDS.finditer(text, start, end)]
    gaps += [(*match.span(1), SENTENCE) for match in _SENTENCE_ENDS.finditer(text, before, end)]
    for kind in (SENTENCE, PARAGRAPH):
        found = np.asarray(sorted(gap[:2] for gap in gaps if gap[2] == kind), np.int64).reshape(-1, 2)
        if len(found):  # the token after a gap begins in it, or where it ends
            nearest = np.searchsorted(found[:, 0], starts, side="right") - 1
            borders[(nearest >= 0) & (starts <= found[nearest, 1])] = kind
    is_inside = np.zeros(len(starts), bool)
    is_inside[1:] = starts[1:] < ends[:-1]
    joined = {position for match in _EXTENDERS.finditer(text, start, end)
              for position in (match.start(), match.end() if match[0] == _JOINER else match.start())}  # fmt: skip
    if joined:
        is_inside |= np.isin(starts, list(joined))
    borders[is_inside] = INSIDE_CHARACTER
    return borders


def _lines_between(space: str) -> int:
    return PARAGRAPH if space.count("\n") > 1 else SENTENCE


def is_inside_character(text: str, position: int) -> bool:
    """Whether a mark or an emoji's part at `position` belongs to the character before it."""
    return (
        unicodedata.category(text[position]).startswith("M")
        or _EXTENDERS.match(text[position]) is not None
        or text[position - 1] == _JOINER
    )
