"""Where a text may be cut so that the tokens before the cut cannot change.

A 400,000 character document that is truncated to 512 tokens needs only its first few thousand characters tokenised (53
times faster). That is correct only if *tokens(text) = tokens(prefix) + tokens(rest)* is guaranteed. It is if

1. the cut is before a U+0020 that follows a visible letter, digit or ASCII punctuation mark. That is a boundary for
   Unicode normalisation (a space never composes with the character before it) and for grapheme clusters (the
   preceding character is not a Prepend character, UAX #29 rule GB9b);
2. the normalizer respects such a boundary: the steps listed below do, others are not trusted;
3. the pre-tokenizer always splits there: at whitespace, or by a known pattern that never matches U+0020 after a
   character that is not whitespace. Models (WordPiece, BPE, Unigram) then tokenise each piece by itself;
4. no added token crosses it: none contains whitespace after another character.

If a tokenizer's configuration does not show this, its texts are tokenised whole.
"""

from __future__ import annotations

import json
import re
import string
from typing import Any

# Not whitespace, not a control, not a Default_Ignorable_Code_Point of Unicode: visible to a reader.
VISIBLE = re.compile(
    r"[^\s\x00-\x1f\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f"
    r"\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)

# Grapheme_Cluster_Break=Prepend (Unicode 16): these attach to the next character, even to a space.
_PREPEND = re.compile(
    "[\u0600-\u0605\u06dd\u070f\u0890\u0891\u08e2\u0d4e\U000110bd\U000110cd\U000111c2\U000111c3\U000113d1\U0001193f"
    "\U00011941\U00011a3a\U00011a84-\U00011a89\U00011d46\U00011f02]"
)

# Split patterns of Llama 3 / cl100k (numbers by three) and of Qwen 2 (one by one). GPT-2's is built into ByteLevel.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS_AND_SPACE = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_KNOWN_PATTERNS = frozenset(f"{_WORDS}|{number}|{_SIGNS_AND_SPACE}" for number in (r"\p{N}", r"\p{N}{1,3}"))
_UNICODE_FORMS = ("NFC", "NFD", "NFKC", "NFKD", "StripAccents", "Lowercase")
_LOCAL_NORMALIZERS = frozenset((*_UNICODE_FORMS, "BertNormalizer", "Nmt", "Precompiled", "Prepend", "Strip"))
_SPLITTING = frozenset(("BertPreTokenizer", "Whitespace", "WhitespaceSplit"))
_LOCAL_PIECES = frozenset(("Digits", "Punctuation"))
_MODELS = frozenset(("WordPiece", "BPE", "Unigram", "WordLevel"))


def can_cut(backend: Any) -> bool:
    """True if `backend` (a tokenizers.Tokenizer) provably gives a prefix the same tokens; see the module docstring."""
    model = backend.model
    return (
        type(model).__name__ in _MODELS
        and not getattr(model, "dropout", None)
        and _normalizer_is_local(_state(backend.normalizer))
        and _splits_at_space(_state(backend.pre_tokenizer))
        and not any(re.search(r"\S\s", token.content) for token in backend.get_added_tokens_decoder().values())
    )


def safe_cut(text: str, max_chars: int, min_chars: int) -> int | None:
    """The last safe cut in text[min_chars:max_chars + 1], as the length of the prefix; None if there is none."""
    position = text.rfind(" ", min_chars, max_chars + 1)
    while position > min_chars:
        before = text[position - 1]
        is_letter = before.isalnum() and VISIBLE.match(before) and not _PREPEND.match(before)
        if is_letter or before in string.punctuation:
            return position
        position = text.rfind(" ", min_chars, position)
    return None


def _state(component: Any) -> dict[str, Any] | None:
    return None if component is None else json.loads(component.__getstate__())


def _normalizer_is_local(state: dict[str, Any] | None) -> bool:
    if state is None:
        return True
    kind = state["type"]
    if kind == "Sequence":
        return all(_normalizer_is_local(step) for step in state["normalizers"])
    if kind == "Replace":
        pattern, content = state["pattern"], state["content"]
        if pattern == {"Regex": " {2,}"}:  # a run of spaces is on one side of the cut
            return True
        literal = pattern.get("String", " ")
        return bool(content) and not re.search(r"\s", literal + content)
    return kind in _LOCAL_NORMALIZERS


def _splits_at_space(state: dict[str, Any] | None) -> bool:
    if state is None:
        return False
    steps = state["pretokenizers"] if state["type"] == "Sequence" else [state]
    kinds = [_piece_kind(step) for step in steps]
    return "splits" in kinds and "unknown" not in kinds


def _piece_kind(step: dict[str, Any]) -> str:
    kind = step["type"]
    if kind in _SPLITTING:
        return "splits"
    if kind == "Metaspace":
        return "splits" if step.get("split", True) else "unknown"
    if kind == "ByteLevel":
        return "splits" if step.get("use_regex", True) else "local"
    if kind == "Split":
        isolates = step["behavior"] == "Isolated" and not step["invert"]
        return "splits" if isolates and step["pattern"].get("Regex") in _KNOWN_PATTERNS else "unknown"
    return "local" if kind in _LOCAL_PIECES else "unknown"
