"""Texts to the bytes of their ids, many times faster than one by one where the tokenizer's rules allow it.

A few thousand words make up most of a language. The byte-level tokenizers of today never join a letter, a space and
another letter in one token, so a text can be cut before such a space and each piece looked up. Only rules that are
known here are trusted with that; other tokenizers encode every text whole. The ids are the same: a test holds them so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from aura.tokenizer import SPANISH_WORDS, backend_from

MOST_WORDS = 2**18
"""Kept at a time: some 50 MB."""
LONGEST_WORD = 48
"""Characters; what is longer seldom comes again."""

WORDS_AT_ONCE = 256
BATCH_CHARACTERS = 2**20

# A space between two visible characters of Latin scripts, about which no two regex libraries disagree.
_LATIN = "!-~¡-¬®-ɏ"
_CUT = re.compile(f"(?<=[{_LATIN}]) (?=[{_LATIN}])")
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
    """Texts to ids, as little-endian bytes."""

    def __init__(self, *, backend_json: str, eos_id: int, eos_text: str, dtype: np.dtype) -> None:
        self._backend = backend_from(backend_json)
        self._eos_id, self._eos_text, self._dtype = eos_id, eos_text, dtype
        self.is_by_word = parts_at_spaces(json.loads(backend_json))
        self._first: dict[str, bytes] = {}
        self._after_space: dict[str, bytes] = {}

    def encode(self, texts: list[str]) -> list[bytes]:
        """Ids of each text, without special tokens. A text that spells out the end of documents does not end there."""
        encode = self._by_word if self.is_by_word else self._whole
        return [ids for batch in _batches(texts) for ids in encode(batch)]

    def _by_word(self, texts: list[str]) -> list[bytes]:
        cut = [_CUT.split(text) for text in texts]
        heads = [words[0] for words in cut]
        firsts, after = set(heads), {""}
        for words in cut:
            words[0] = ""
            after.update(words)
        first, rest = self._first, self._after_space
        if len(first) + len(rest) > MOST_WORDS:
            first.clear()
            rest.clear()
        self._learn_first(firsts)
        self._learn_after_space(after)
        rest[""] = b""
        found = [first[head] + b"".join(map(rest.__getitem__, words)) for head, words in zip(heads, cut, strict=True)]
        self._forget(first, firsts)
        self._forget(rest, after)
        return found

    def _learn_first(self, words: Iterable[str]) -> None:
        new = [word for word in words if word not in self._first]
        self._first.update(zip(new, self._whole(new), strict=True))

    def _learn_after_space(self, words: Iterable[str]) -> None:
        """Encode unknown words many at a time, since one by one costs ten times as much, and tell them by offsets."""
        known = self._after_space
        together: list[str] = []
        alone: list[str] = []
        for word in words:
            if word not in known:
                (together if word and word[-1] in _VISIBLE and self._eos_text not in word else alone).append(word)
        known.update(zip(alone, self._whole([f" {word}" for word in alone]), strict=True))
        groups = [together[at : at + WORDS_AT_ONCE] for at in range(0, len(together), WORDS_AT_ONCE)]
        texts = [" " + " ".join(group) for group in groups]
        size = self._dtype.itemsize
        for group, encoding in zip(groups, self._backend.encode_batch(texts, add_special_tokens=False), strict=True):
            ids = self._bytes(encoding.ids)
            lengths = np.fromiter(map(len, group), dtype=np.int64, count=len(group)) + 1
            begins = np.fromiter((begin for begin, _ in encoding.offsets), dtype=np.int64, count=len(encoding))
            ends = (np.searchsorted(begins, np.cumsum(lengths)) * size).tolist()
            known.update(zip(group, (ids[a:b] for a, b in zip([0, *ends], ends, strict=False)), strict=True))

    @staticmethod
    def _forget(known: dict[str, bytes], words: Iterable[str]) -> None:
        for word in words:
            if len(word) > LONGEST_WORD:
                del known[word]

    def _whole(self, texts: list[str]) -> list[bytes]:
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        found = [self._bytes(encoding.ids) for encoding in encodings]
        mark = self._eos_text
        for index, text in enumerate(texts):
            if mark in text and self._eos_id in encodings[index].ids:  # some models find it among their pieces
                between = text.split(mark)
                begins = ["", *[mark[1:]] * (len(between) - 1)]
                ends = [*[mark[:1]] * (len(between) - 1), ""]
                parts = ["".join(part) for part in zip(begins, between, ends, strict=True)]
                again = self._backend.encode_batch_fast(parts, add_special_tokens=False)
                found[index] = b"".join(self._bytes(part.ids) for part in again)
        return found

    def _bytes(self, ids: list[int]) -> bytes:
        return np.array(ids, dtype=self._dtype).tobytes()


def _batches(texts: list[str]) -> Iterator[list[str]]:
    """What is worked on at once takes fifty times a text's memory, and one document may be a hundred megabytes."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def parts_at_spaces(backend: dict[str, Any]) -> bool:
    """Whether a tokenizer.json begins a new word at every space between two visible characters."""
    model = backend["model"]
    if model["type"] != "BPE" or any(
        model.get(name) for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    ):
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
    if last["use_regex"]:  # GPT-2's words
        return all(step["type"] == "Digits" for step in before)
    return len(before) == 1 and _is_known(before[0])


def _is_known(step: dict[str, Any]) -> bool:
    return (
        step["type"] == "Split"
        and step["behavior"] == "Isolated"
        and not step["invert"]
        and step["pattern"].get("Regex") in _KNOWN_WORDS
    )


def _steps(part: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer as the list of what it does."""
    if part is None:
        return []
    return list(part[name]) if part["type"] == "Sequence" else [part]
