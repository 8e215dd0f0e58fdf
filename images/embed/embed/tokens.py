"""Texts to token ids: exactly the ones sentence-transformers would feed the model, and why a row has none.

`OwnTokens` calls the model's own (Rust) tokenizer once for a whole window, cuts what is too long before tokenising it
and keeps the ids; `ModelTokens` hands the texts to the model's own `preprocess` and is for models that do something
else there (static embeddings, word vectors, chat templates, custom code). `tokens_for` chooses, and checks its choice.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Protocol

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import InputModule, Router, Transformer
from transformers import PreTrainedTokenizerFast

from embed.batches import padded_width
from embed.cuts import VISIBLE, can_cut, safe_cut
from estiba.errors import DataError

Features = dict[str, Any]

TASK = "document"
CHUNK_TEXTS, CHUNK_CHARS = 512, 2_000_000  # texts and characters in one call of a tokenizer: bounds its lists
CHARS_PER_TOKEN = 6  # first guess of a prefix; one that gives too few tokens is tried again, longer


class Status(IntEnum):
    """What became of a row. The column in the output holds `STATUS_WORDS[status]`."""

    OK = 0
    NULL = 1
    EMPTY = 2
    INVALID_UTF8 = 3
    NOT_FINITE = 4


STATUS_WORDS: dict[Status, str] = {
    Status.OK: "ok",
    Status.NULL: "null",
    Status.EMPTY: "empty",
    Status.INVALID_UTF8: "invalid utf-8",
    Status.NOT_FINITE: "not finite",
}


@dataclass(frozen=True, kw_only=True)
class Window:
    """The rows of one window, tokenised. Rows keep their order; only rows with status OK have tokens."""

    status: np.ndarray
    """uint8[rows], a Status each."""
    n_tokens: np.ndarray
    """int32[rows], special tokens included, after truncation; 0 where not OK."""
    truncated: np.ndarray
    """bool[rows]: the text had more tokens than the model reads."""
    ids: np.ndarray
    """int32[sum of n_tokens], row after row; empty where the model does its own tokenising."""
    starts: np.ndarray
    """int64[rows + 1]: row i has ids[starts[i]:starts[i + 1]]."""
    texts: list[str]
    """The texts by row, only where the model does its own tokenising."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One text, tokenised."""

    ids: Sequence[int]
    n_tokens: int
    truncated: bool


class Tokens(Protocol):
    """Texts to rows, and rows of a window to what the model's forward takes."""

    keeps_texts: bool

    def rows(self, texts: Sequence[str]) -> list[Row | None]: ...  # None: nothing but special tokens

    def features(self, window: Window, rows: np.ndarray, multiple: int) -> Features: ...


def read_window(tokens: Tokens, texts: Sequence[str | bytes | None]) -> Window:
    """Judge and tokenise a window of texts. Raises DataError on a value that is neither text, bytes nor None."""
    count = len(texts)
    status = np.zeros(count, np.uint8)
    n_tokens = np.zeros(count, np.int32)
    truncated = np.zeros(count, bool)
    judged = [_judge(text, row) for row, text in enumerate(texts)]
    good = [row for row, text in enumerate(judged) if isinstance(text, str)]
    for row, text in enumerate(judged):
        if not isinstance(text, str):
            status[row] = text
    ids: list[np.ndarray] = []
    for chunk in _chunks(good, judged):
        for row, read in zip(chunk, tokens.rows([judged[row] for row in chunk]), strict=True):  # type: ignore[misc]
            if read is None:
                status[row] = Status.EMPTY
                continue
            n_tokens[row], truncated[row] = read.n_tokens, read.truncated
            ids.append(np.asarray(read.ids, np.int32))
    starts = np.zeros(count + 1, np.int64)
    if not tokens.keeps_texts:
        np.cumsum(n_tokens, out=starts[1:])
    return Window(
        status=status,
        n_tokens=n_tokens,
        truncated=truncated,
        ids=np.concatenate(ids) if ids else np.zeros(0, np.int32),
        starts=starts,
        texts=[text if isinstance(text, str) else "" for text in judged] if tokens.keeps_texts else [],
    )


def _judge(text: str | bytes | None, row: int) -> str | Status:
    if text is None:
        return Status.NULL
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError:
            return Status.INVALID_UTF8
    if not isinstance(text, str):
        raise DataError(
            f"row {row} of a window holds {type(text).__name__} {text!r:.60}, not text; "
            "name a column of strings with --text-column"
        )
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:  # half of a surrogate pair: there is no such text in UTF-8
            return Status.INVALID_UTF8
    return text if VISIBLE.search(text) else Status.EMPTY


def _chunks(rows: list[int], texts: list[str | Status]) -> Iterator[list[int]]:
    chunk: list[int] = []
    chars = 0
    for row in rows:
        chunk.append(row)
        chars += len(texts[row])  # type: ignore[arg-type]
        if len(chunk) >= CHUNK_TEXTS or chars >= CHUNK_CHARS:
            yield chunk
            chunk, chars = [], 0
    if chunk:
        yield chunk


class OwnTokens:
    """The model's tokenizer, called directly. Safe from any thread; calls are taken one at a time."""

    keeps_texts = False

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, prompt: str, max_length: int | None, limit: int | None, like: Features
    ) -> None:
        """`like` is what the model's own preprocess gave: its keys, and the values that are not tensors, are kept."""
        self._tokenizer = tokenizer
        self._prompt = prompt
        self._max_length = max_length
        self._limit = limit
        self._constants = {key: value for key, value in like.items() if not isinstance(value, torch.Tensor)}
        self._wants_types = "token_type_ids" in like
        self._specials = tokenizer.num_special_tokens_to_add(pair=False)
        self._prompt_tokens = len(self._call([prompt], add_special_tokens=False)["input_ids"][0]) if prompt else 0
        self.cuts = tokenizer.truncation_side == "right" and can_cut(tokenizer.backend_tokenizer)
        self._lock = threading.Lock()

    def _call(self, texts: list[str], **how: Any) -> Any:
        return self._tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, verbose=False, **how)

    def rows(self, texts: Sequence[str]) -> list[Row | None]:
        with self._lock:
            full = [self._prompt + text for text in texts]
            rows: list[Row | None] = [None] * len(full)
            reach = (self._max_length or 0) * CHARS_PER_TOKEN + len(self._prompt)
            todo = list(range(len(full)))
            while todo:
                cuts = [self._cut(full[row], reach) for row in todo]
                pieces = [full[row][:cut] for row, cut in zip(todo, cuts, strict=True)]
                again = []
                for row, cut, read in zip(todo, cuts, self._tokenise(pieces), strict=True):
                    # A prefix has to overflow: then its ids are the text's, and the text is truncated like it.
                    if cut is not None and not read.truncated:
                        again.append(row)
                    else:
                        rows[row] = read
                todo, reach = again, reach * 4
            for row in self._wordless(rows):
                if not self._call([texts[row]], add_special_tokens=False)["input_ids"][0]:
                    rows[row] = None
            return rows

    def _cut(self, text: str, reach: int) -> int | None:
        """Length of the prefix to tokenise; None for the whole text."""
        if not self.cuts or self._max_length is None:
            return None
        while len(text) > 2 * reach:
            if (cut := safe_cut(text, reach, max(reach // 2, len(self._prompt)))) is not None:
                return cut
            reach *= 2
        return None

    def _tokenise(self, texts: list[str]) -> list[Row]:
        cut = {"truncation": "longest_first", "max_length": self._max_length} if self._max_length else {}
        batch = self._call(texts, **cut)
        rows = []
        for ids, encoding in zip(batch["input_ids"], batch.encodings, strict=True):
            full = len(ids) == self._max_length and bool(encoding.overflowing)
            rows.append(Row(ids=ids, n_tokens=len(ids), truncated=full))
        return rows

    def _wordless(self, rows: list[Row | None]) -> list[int]:
        """Rows so short that the text may have given no token of its own (the prompt's last may have merged)."""
        most = self._specials + (self._prompt_tokens + 2 if self._prompt else 0)
        return [row for row, read in enumerate(rows) if read is not None and read.n_tokens <= most]

    def features(self, window: Window, rows: np.ndarray, multiple: int) -> Features:
        """int64[len(rows), width] tensors, padded on the tokenizer's side."""
        lengths = window.n_tokens[rows]
        width = padded_width(int(lengths.max()), multiple, self._limit)
        columns = np.arange(width)
        if self._tokenizer.padding_side == "left":
            mask = columns >= width - lengths[:, None]
        else:
            mask = columns < lengths[:, None]
        ids = np.full((len(rows), width), self._tokenizer.pad_token_id, np.int64)
        ids[mask] = np.concatenate([window.ids[window.starts[row] : window.starts[row + 1]] for row in rows])
        features = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask.astype(np.int64))}
        if self._wants_types:
            features["token_type_ids"] = torch.zeros_like(features["input_ids"])
        return {**self._constants, **features}


class ModelTokens:
    """The model's own preprocess, asked twice: alone for a text's length, in a batch for the forward pass."""

    keeps_texts = True

    def __init__(self, model: SentenceTransformer, prompt: str, max_length: int | None) -> None:
        self._model = model
        self._prompt = prompt
        self._max_length = max_length
        self._lock = threading.Lock()

    def rows(self, texts: Sequence[str]) -> list[Row | None]:
        rows: list[Row | None] = []
        empty = self._length("") if self._prompt else 0
        for text in texts:
            length = self._length(text)
            # Whether the model cut the text is not told; a row as long as may be counts as cut.
            read = Row(ids=(), n_tokens=length, truncated=self._max_length is not None and length >= self._max_length)
            rows.append(read if length > empty else None)
        return rows

    def _length(self, text: str) -> int:
        features = self._preprocess([text])
        if isinstance(mask := features.get("attention_mask"), torch.Tensor):
            return int(mask.sum())
        return int(ids.numel()) if isinstance(ids := features.get("input_ids"), torch.Tensor) else 1

    def _preprocess(self, texts: list[str]) -> Features:
        with self._lock:
            return self._model.preprocess(texts, prompt=self._prompt, task=TASK)

    def features(self, window: Window, rows: np.ndarray, multiple: int) -> Features:  # noqa: ARG002 - pads as it likes
        return self._preprocess([window.texts[row] for row in rows])


def tokens_for(model: SentenceTransformer, prompt: str, max_length: int | None, limit: int | None) -> Tokens:
    """OwnTokens where it gives, on trial, the very tensors the model's own preprocess gives; else ModelTokens."""
    tokenizer = _plain_tokenizer(model)
    if tokenizer is not None:
        trial = ["Hola.", "Zarpamos al alba, con la bodega bien estibada."]
        theirs = model.preprocess(trial, prompt=prompt, task=TASK)
        own = OwnTokens(tokenizer, prompt, max_length, limit, theirs)
        window = read_window(own, trial)
        if not (window.status == Status.OK).all():
            return ModelTokens(model, prompt, max_length)
        ours = own.features(window, np.arange(len(trial)), 1)
        if ours.keys() == theirs.keys() and all(
            torch.equal(ours[key], theirs[key]) if isinstance(theirs[key], torch.Tensor) else ours[key] == theirs[key]
            for key in theirs
        ):
            return own
    return ModelTokens(model, prompt, max_length)


def first_module(model: SentenceTransformer) -> Any:
    """The module that reads a document's text: the first, or the first of a Router's document route."""
    module = model[0]
    if isinstance(module, Router):
        route: Any = module.sub_modules[module._resolve_route(task=TASK, modality="text") or ""]
        module = route[0]
    return module


def _plain_tokenizer(model: SentenceTransformer) -> PreTrainedTokenizerFast | None:
    module = first_module(model)
    if (
        not isinstance(module, Transformer)
        or type(module).preprocess is not Transformer.preprocess
        or type(module).tokenize is not InputModule.tokenize
        or module.transformer_task != "feature-extraction"
        or "message" in module.modality_config
        or module.can_flatten_inputs
    ):
        return None
    how = {**module.processing_kwargs.get("text", {}), **module.processing_kwargs.get("common", {})}
    how.pop("max_length", None)  # the caller has read it
    usual = {"truncation": "longest_first", "padding": True, "return_tensors": "pt"}
    if any(key not in usual or value != usual[key] for key, value in how.items()):
        return None
    tokenizer = module.processor
    usable = isinstance(tokenizer, PreTrainedTokenizerFast) and tokenizer.is_fast and tokenizer.pad_token_id is not None
    return tokenizer if usable else None
