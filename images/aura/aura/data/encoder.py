"""Encode texts to the bytes of their token ids, with a cache of words if the tokenizer's rules allow it.

A few thousand words make up most of a text. Today's byte-level tokenizers never join a letter, a space and another
letter in one token, so a text can be split before such a space and each word looked up, which is several times faster.
This applies only to tokenizers with known rules; others encode every text whole. The ids are the same either way.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np

from aura.tokenizer.loading import SPANISH_WORDS, backend_from

MAX_CACHED_WORDS = 2**18
"""About 50 MB."""
MAX_WORD_CHARACTERS = 48
"""Longer words seldom repeat and are not cached."""

WORDS_PER_TEXT = 256
BATCH_CHARACTERS = 2**20
"""Encoding takes fifty times the memory of the text, and a single document may be a hundred megabytes."""
T = TypeVar("T")

# A space between two visible characters of Latin scripts, on which all regex libraries agree.
_LATIN = "!-~¡-¬®-ɏ"
_SPLIT = re.compile(f"(?<=[{_LATIN}]) (?=[{_LATIN}])")
_VISIBLE = frozenset(re.findall(f"[{_LATIN}]", "".join(map(chr, range(0x250)))))

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_CL100K = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_KNOWN_WORDS = frozenset(
    (
        SPANISH_WORDS,
        _CONTRACTIONS + _CL100K % "{1,3}",  # Llama 3
        _CONTRACTIONS + _CL100K % "",  # Qwen 2 and 3
    )
)


class Encoder:
    """Encodes texts to ids as little-endian bytes."""

    def __init__(self, *, backend_json: str, specials: Sequence[tuple[int, str]], dtype: np.dtype) -> None:
        """`specials` are the ids and texts of special tokens."""
        self._backend = backend_from(backend_json)
        self._special_ids, self._dtype = {id_ for id_, _ in specials}, dtype
        texts = sorted({re.escape(text) for _, text in specials if len(text) > 1}, key=len, reverse=True)
        self._marks = re.compile("|".join(texts) or "(?!)")
        self.is_by_word = splits_at_spaces(json.loads(backend_json))
        self._first: dict[str, bytes] = {}
        self._after_space: dict[str, bytes] = {}

    def encode(self, texts: list[str]) -> list[bytes]:
        """Return each text's ids, without special tokens, even where the text spells one out."""
        encode = self._by_word if self.is_by_word else self._whole
        return [ids for batch in batched(texts, len, BATCH_CHARACTERS) for ids in encode(batch)]

    def _by_word(self, texts: list[str]) -> list[bytes]:
        split = [_SPLIT.split(text) for text in texts]
        heads = [words[0] for words in split]
        firsts, after = set(heads), {""}
        for words in split:
            words[0] = ""
            after.update(words)
        first, rest = self._first, self._after_space
        if len(first) + len(rest) > MAX_CACHED_WORDS:
            first.clear()
            rest.clear()
        new = [word for word in firsts if word not in first]
        first.update(zip(new, self._whole(new), strict=True))
        self._encode_after_space(after)
        rest[""] = b""
        encoded = [
            first[head] + b"".join(map(rest.__getitem__, words)) for head, words in zip(heads, split, strict=True)
        ]
        for cache, used in ((first, firsts), (rest, after)):
            for word in used:
                if len(word) > MAX_WORD_CHARACTERS:
                    del cache[word]
        return encoded

    def _encode_after_space(self, words: Iterable[str]) -> None:
        """Encode new words many to a text, ten times as fast as one by one, and split the ids by offsets."""
        known = self._after_space
        together: list[str] = []
        alone: list[str] = []
        for word in words:
            if word not in known:
                (together if word and word[-1] in _VISIBLE and not self._marks.search(word) else alone).append(word)
        known.update(zip(alone, self._whole([f" {word}" for word in alone]), strict=True))
        groups = [together[at : at + WORDS_PER_TEXT] for at in range(0, len(together), WORDS_PER_TEXT)]
        texts = [" " + " ".join(group) for group in groups]
        size = self._dtype.itemsize
        for group, encoding in zip(groups, self._backend.encode_batch(texts, add_special_tokens=False), strict=True):
            ids = self._bytes(encoding.ids)
            lengths = np.fromiter(map(len, group), dtype=np.int64, count=len(group)) + 1
            begins = np.fromiter((begin for begin, _ in encoding.offsets), dtype=np.int64, count=len(encoding))
            ends = (np.searchsorted(begins, np.cumsum(lengths)) * size).tolist()
            known.update(zip(group, (ids[a:b] for a, b in zip([0, *ends], ends, strict=False)), strict=True))

    def _whole(self, texts: list[str]) -> list[bytes]:
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        encoded = [self._bytes(encoding.ids) for encoding in encodings]
        for index, text in enumerate(texts):
            # Some models have special tokens as normal ones too, with merges that lead to them.
            if self._marks.search(text) and self._special_ids.intersection(encodings[index].ids):
                cuts = [0, *(mark.start() + 1 for mark in self._marks.finditer(text)), len(text)]
                parts = [text[start:end] for start, end in pairwise(cuts)]
                again = self._backend.encode_batch_fast(parts, add_special_tokens=False)
                encoded[index] = b"".join(self._bytes(part.ids) for part in again)
        return encoded

    def _bytes(self, ids: list[int]) -> bytes:
        return np.array(ids, dtype=self._dtype).tobytes()


def batched(items: Iterable[T], size_of: Callable[[T], int], size: int) -> Iterator[list[T]]:
    """Yield lists of items, each ending with the item that brings its total to `size` or more."""
    batch: list[T] = []
    total = 0
    for item in items:
        batch.append(item)
        total += size_of(item)
        if total >= size:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def splits_at_spaces(backend: dict[str, Any]) -> bool:
    """Return whether a tokenizer.json starts a new word at every space between two visible characters."""
    model = backend["model"]
    special_rules = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    if model["type"] != "BPE" or any(model.get(name) for name in special_rules):
        return False
    for token in backend["added_tokens"]:
        if not token["special"] and (
            re.search(r"\s", token["content"]) or token["lstrip"] or token["rstrip"] or token["single_word"]
        ):
            return False
    if any(step["type"] != "NFC" for step in _steps(backend["normalizer"], "normalizers")):
        return False
    *before, last = _steps(backend["pre_tokenizer"], "pretokenizers") or [{"type": None}]
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return False
    if last["use_regex"]:  # GPT-2's rule for words
        return all(step["type"] == "Digits" for step in before)
    if len(before) != 1 or before[0]["type"] != "Split" or before[0]["behavior"] != "Isolated" or before[0]["invert"]:
        return False
    return before[0]["pattern"].get("Regex") in _KNOWN_WORDS


def _steps(part: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    """Return the steps of a normalizer or pre-tokenizer."""
    if part is None:
        return []
    return list(part[name]) if part["type"] == "Sequence" else [part]
