"""Long texts cut into passages of at most N tokens (`--chunk`).

A text is tokenised whole, and its tokens are cut, so that each visible one is in at least one passage. A passage ends
where a reader would cut: at a paragraph or sentence in its last quarter, else at a space. A text that fits in one
passage has the ids that it has without `--chunk`. A text of more than `SEGMENT_CHARS` characters is tokenised in
segments, cut at a space where there is one, so that memory does not grow with it.

Peers: Hugging Face tokenizers cut every N tokens, wherever that is (`return_overflowing_tokens`, `stride`). OpenAI's
vector stores allow an overlap of at most half a chunk, as here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from embed.config import EmbedConfig
from embed.data.chunks import Status
from embed.data.passages import Passages
from embed.model.borders import (
    CHARACTER,
    PARAGRAPH,
    SENTENCE,
    SPACE,
    WORD,
    PlacedTokens,
    is_inside_character,
    tokens_of,
)
from embed.model.prefix import VISIBLE, safe_cut
from embed.model.tokens import CALL_TEXTS, FastTokens, Tokens, Window, classify
from estiba.errors import ConfigError

SEGMENT_CHARS = 2**18
WINDOW_PASSAGES, WINDOW_TOKENS = 8192, 2**21
"""Largest window. Only a range with a very long text, or with very short passages, has more than one."""
SENTENCE_SHARE, WORD_SHARE = 4, 2
"""A passage ends at a sentence or paragraph in its last quarter, or else between two words in its last half."""


@dataclass(frozen=True, kw_only=True)
class Passage:
    ids: np.ndarray
    """int32, special tokens and prompt included."""
    start: int
    end: int
    """Half-open span of the text, in characters."""
    text_tokens: int


class PassageCutter:
    """Cuts texts into passages of at most `length` tokens, of which the next one repeats at most `overlap`."""

    def __init__(self, tokens: FastTokens, length: int, overlap: int) -> None:
        """Raises ConfigError if prompt and special tokens leave too little of `length`."""
        self._tokens, self.length, self._overlap = tokens, length, overlap
        self._left, self._right = _special_ids(tokens)
        self._prompt_ids = _prompt_ids(tokens)
        self._room = length - len(self._left) - len(self._right) - len(self._prompt_ids)
        if self._room < max(1, 2 * overlap):
            own = length - self._room
            raise ConfigError(
                f"--chunk {length} leaves {max(0, self._room)} tokens for text, beside {own} of the prompt and the "
                "model's own"
                + (f"; --chunk-overlap {overlap} can be at most half of that" if self._room > 0 else "")
                + "; pass larger chunks"
                + (", or less overlap" if overlap else "")
            )

    def windows(self, texts: Sequence[str | bytes | None], known_ids: int | None) -> Iterator[tuple[Window, Passages]]:
        """The passages of a row range, in order, in windows of bounded size. A row without text is one passage.

        A passage with a token id of `known_ids` or more gets the status UNKNOWN_TOKEN.
        """
        window = _WindowBuilder(known_ids)
        for row, passage in self._rows([classify(text, row) for row, text in enumerate(texts)]):
            if window.is_full:
                yield window.take(is_last=False)
            window.add(row, passage)
        yield window.take(is_last=True)

    def _rows(self, texts: Sequence[str | Status]) -> Iterator[tuple[int, Passage | Status]]:
        ready: dict[int, Any] = {}
        for row, text in enumerate(texts):
            if not isinstance(text, str):
                yield row, text
                continue
            if row not in ready:
                ready = self._tokenise_first_segments(texts, row)
            is_empty = True
            for passage in self._cut(text, ready.pop(row)):
                is_empty = False
                yield row, passage
            if is_empty:
                yield row, Status.EMPTY

    def _tokenise_first_segments(self, texts: Sequence[str | Status], first: int) -> dict[int, Any]:
        """As many rows from `first` on as one call of the tokenizer may take."""
        segments: dict[int, str] = {}
        chars = 0
        for row in range(first, len(texts)):
            if isinstance(text := texts[row], str):
                segment = text[: self._segment_end(text, 0)]
                chars += len(segment)
                if segments and (chars > SEGMENT_CHARS or len(segments) >= CALL_TEXTS):
                    break
                segments[row] = self._tokens.prompt + segment
        return dict(zip(segments, self._tokens.encodings(list(segments.values())), strict=True))

    def _cut(self, text: str, first: Any) -> Iterator[Passage]:
        """`first` is the encoding of the prompt and the first segment."""
        segments = self._segments(text, first)
        tokens, has_ended = next(segments)
        if has_ended and len(first.ids) + len(self._left) + len(self._right) <= self.length:
            if len(tokens):
                yield self._passage(text, tokens, 0, len(tokens), np.asarray(first.ids, np.int32))
            return
        begin = covered = 0
        while True:
            while len(tokens) - begin <= self._room and not has_ended:
                more, has_ended = next(segments)
                tokens, covered, begin = tokens.since(begin) + more, covered - begin, 0
            if not len(tokens):
                return
            if len(tokens) - begin <= self._room:
                end = len(tokens)
            else:
                end = self._end(tokens.borders, begin, covered)
            ids = np.concatenate([self._prompt_ids, tokens.ids[begin:end]])
            passage = self._passage(text, tokens, begin, end, ids)
            if VISIBLE.search(text, passage.start, passage.end):  # a thousand empty lines are no passage
                yield passage
            if end == len(tokens):
                return
            begin, covered = self._next_begin(tokens.borders, begin, end), end

    def _passage(self, text: str, tokens: PlacedTokens, begin: int, end: int, ids: np.ndarray) -> Passage:
        first, last = int(tokens.starts[begin]), int(tokens.ends[end - 1])
        while first < last and text[first].isspace():  # some tokens begin with the space before a word
            first += 1
        while first < last and text[last - 1].isspace():
            last -= 1
        ids = np.concatenate([self._left, ids, self._right])
        return Passage(ids=ids, start=first, end=last, text_tokens=end - begin)

    def _end(self, borders: np.ndarray, begin: int, covered: int) -> int:
        """The end of a passage that begins at `begin`: the best border, behind what the passage before covers."""
        furthest = begin + self._room
        for least, share in ((PARAGRAPH, SENTENCE_SHARE), (SENTENCE, SENTENCE_SHARE), (SPACE, WORD_SHARE),
                             (WORD, WORD_SHARE), (CHARACTER, 1)):  # fmt: skip
            first = max(covered, furthest - self._room // share) + 1
            found = np.flatnonzero(borders[first : furthest + 1] >= least)
            if len(found):
                return first + int(found[-1])
        return furthest  # one character of more tokens than a passage has

    def _next_begin(self, borders: np.ndarray, begin: int, end: int) -> int:
        """Where the next passage begins: at most `overlap` tokens before `end`, where a word begins if possible."""
        first = max(end - self._overlap, begin + 1)
        middle = end - self._overlap // 2
        for least, until in ((SPACE, middle), (WORD, middle), (SPACE, end - 1), (CHARACTER, end)):
            found = np.flatnonzero(borders[first : until + 1] >= least)
            if len(found):
                return first + int(found[0])
        return end

    # --- segments ----------------------------------------------------------------------------------------------

    def _segments(self, text: str, encoding: Any) -> Iterator[tuple[PlacedTokens, bool]]:
        """The text's tokens by segment, and whether the text ends there."""
        start, prompt_chars = 0, len(self._tokens.prompt)
        while True:
            end = self._segment_end(text, start)
            yield tokens_of(text, encoding, start, end, prompt_chars), end == len(text)
            start, prompt_chars = end, 0
            if start == len(text):
                return
            (encoding,) = self._tokens.encodings([text[start : self._segment_end(text, start)]])

    def _segment_end(self, text: str, start: int) -> int:
        first, last = start + SEGMENT_CHARS // 2, start + SEGMENT_CHARS
        if len(text) <= last:
            return len(text)
        if (cut := safe_cut(text, last, first)) is not None:
            return cut
        for position in range(last, first, -1):
            if text[position].isspace() or text[position - 1] in "。！？｡":
                return position
        while last > first and is_inside_character(text, last):
            last -= 1
        return last


def cutter_for(tokens: Tokens, config: EmbedConfig, most_tokens: int | None) -> PassageCutter | None:
    """None without --chunk. Raises ConfigError if the model's text cannot be cut, or not into such chunks."""
    if config.chunk is None:
        return None
    if not isinstance(tokens, FastTokens):
        raise ConfigError(
            f"--chunk {config.chunk}: model {config.model!r} turns text into tokens by its own code, which does not "
            "say where in the text a token lies; leave out --chunk"
        )
    if config.chunk == 0 and most_tokens is None:
        raise ConfigError("--chunk 0: the model reads texts of any length; pass a number of tokens")
    if most_tokens is not None and config.chunk > most_tokens:
        limit = "--max-length" if config.max_length else "the model"
        raise ConfigError(
            f"--chunk {config.chunk}: {limit} allows {most_tokens} tokens; pass {most_tokens} or fewer, or 0 for that"
        )
    return PassageCutter(tokens, config.chunk or most_tokens or 0, config.chunk_overlap)


class _WindowBuilder:
    def __init__(self, known_ids: int | None) -> None:
        self._known_ids = known_ids
        self._part = 0
        self._clear()

    def _clear(self) -> None:
        self._rows: list[int] = []
        self._passages: list[Passage | Status] = []
        self._tokens = 0

    @property
    def is_full(self) -> bool:
        return len(self._rows) >= WINDOW_PASSAGES or self._tokens >= WINDOW_TOKENS

    def add(self, row: int, passage: Passage | Status) -> None:
        self._rows.append(row)
        self._passages.append(passage)
        self._tokens += len(passage.ids) if isinstance(passage, Passage) else 0

    def take(self, *, is_last: bool) -> tuple[Window, Passages]:
        count = len(self._rows)
        status, n_tokens = np.zeros(count, np.uint8), np.zeros(count, np.int32)
        spans, text_tokens = np.full((2, count), -1, np.int32), np.zeros(count, np.int32)
        ids: list[np.ndarray] = []
        unknown: dict[int, int] = {}
        for index, passage in enumerate(self._passages):
            if isinstance(passage, Status):
                status[index] = passage
                continue
            spans[:, index], text_tokens[index] = (passage.start, passage.end), passage.text_tokens
            largest = int(passage.ids.max())
            if self._known_ids is not None and largest >= self._known_ids:
                status[index], unknown[index] = Status.UNKNOWN_TOKEN, largest
                continue
            n_tokens[index] = len(passage.ids)
            ids.append(passage.ids)
        starts = np.zeros(count + 1, np.int64)
        np.cumsum(n_tokens, out=starts[1:])
        window = Window(
            status=status,
            n_tokens=n_tokens,
            truncated=np.zeros(count, bool),
            ids=np.concatenate(ids) if ids else np.zeros(0, np.int32),
            starts=starts,
            unknown=unknown,
            texts=[],
        )
        passages = Passages(
            row=np.asarray(self._rows, np.int32),
            start=spans[0],
            end=spans[1],
            text_tokens=text_tokens,
            part=self._part,
            is_last=is_last,
        )
        self._part += 1
        self._clear()
        return window, passages


def _special_ids(tokens: FastTokens) -> tuple[np.ndarray, np.ndarray]:
    """The model's own tokens before and after every text."""
    bare, full = (list(tokens.ids("Hola.", add_special_tokens=special)) for special in (False, True))
    for left in range(len(full) - len(bare) + 1):
        if full[left : left + len(bare)] == bare:
            return np.asarray(full[:left], np.int32), np.asarray(full[left + len(bare) :], np.int32)
    raise ConfigError(
        "--chunk: this model's tokenizer reads a text with its special tokens in another way than without; leave out "
        "--chunk"
    )


def _prompt_ids(tokens: FastTokens) -> np.ndarray:
    """The prompt's tokens as they are before a text, whose first word takes the space at the prompt's end."""
    prompt = tokens.prompt
    (encoding,) = tokens.encodings([prompt + "Hola."])
    own = [id for id, (_, end) in zip(encoding.ids, encoding.offsets, strict=True) if end <= len(prompt)]
    until = max((end for _, end in encoding.offsets if end <= len(prompt)), default=0)
    if until < len(prompt.rstrip()):  # the prompt's last word would be one with the text's first
        own = tokens.ids(prompt, add_special_tokens=False)
    return np.asarray(own, np.int32)
