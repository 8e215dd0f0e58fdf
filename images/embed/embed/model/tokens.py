"""Texts to token ids: exactly the ids that sentence-transformers computes, or the reason why a row has none.

`FastTokens` calls the model's (Rust) tokenizer once for a whole window, cuts long texts before tokenising them, and
keeps the ids. `ModelTokens` passes texts to the model's own `preprocess`; it is for models that do something else there
(static embeddings, word vectors, chat templates, custom code). `tokens_for` compares the two and chooses one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import InputModule, Router, Transformer
from transformers import PreTrainedTokenizerFast

from embed.data.chunks import Status
from embed.model.batches import padded_width
from embed.model.prefix import VISIBLE, can_cut, safe_cut
from estiba.errors import DataError

Features = dict[str, Any]

TASK = "document"
CALL_TEXTS, CALL_CHARS = 512, 2_000_000
"""Largest numbers of texts and characters in one tokenizer call; they bound the lists it returns."""
CHARS_PER_TOKEN = 6
"""First estimate of a prefix's length. If the prefix has too few tokens, a longer one is tried."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """A window of rows, tokenised. Rows keep their order; only rows with status OK have tokens."""

    status: np.ndarray
    """uint8[rows], a Status each."""
    n_tokens: np.ndarray
    """int32[rows], special tokens included, after truncation; 0 if not OK."""
    truncated: np.ndarray
    """bool[rows]: the text had more tokens than the model reads."""
    ids: np.ndarray
    """int32[sum of n_tokens], row after row; empty if the model does its own tokenising."""
    starts: np.ndarray
    """int64[rows + 1]: row i has ids[starts[i]:starts[i + 1]]."""
    unknown: dict[int, int]
    """The largest token id of each row with status UNKNOWN_TOKEN."""
    texts: list[str]
    """The texts by row; only if the model does its own tokenising."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One text, tokenised."""

    ids: Sequence[int]
    n_tokens: int
    truncated: bool
    largest_id: int


class Tokens(Protocol):
    """Tokenises texts, and turns rows of a window into the arguments of the model's forward."""

    keeps_texts: bool

    def rows(self, texts: Sequence[str]) -> list[Row | None]: ...  # None: special tokens only

    def features(self, window: Window, rows: np.ndarray, multiple: int) -> Features: ...


def read_window(tokens: Tokens, texts: Sequence[str | bytes | None], known_ids: int | None = None) -> Window:
    """Classify and tokenise a window of texts. Raises DataError on a value that is neither text, bytes nor None.

    A row with a token id of `known_ids` or more gets the status UNKNOWN_TOKEN: the model would fail on it.
    """
    count = len(texts)
    status = np.zeros(count, np.uint8)
    n_tokens = np.zeros(count, np.int32)
    truncated = np.zeros(count, bool)
    classified = [classify(text, row) for row, text in enumerate(texts)]
    good = [row for row, text in enumerate(classified) if isinstance(text, str)]
    for row, text in enumerate(classified):
        if not isinstance(text, str):
            status[row] = text
    ids: list[np.ndarray] = []
    unknown: dict[int, int] = {}
    for call in _calls(good, classified):
        for row, read in zip(call, tokens.rows([classified[row] for row in call]), strict=True):  # type: ignore[misc]
            if read is None:
                status[row] = Status.EMPTY
                continue
            if known_ids is not None and read.largest_id >= known_ids:
                status[row], unknown[row] = Status.UNKNOWN_TOKEN, read.largest_id
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
        unknown=unknown,
        texts=[text if isinstance(text, str) else "" for text in classified] if tokens.keeps_texts else [],
    )


def classify(text: str | bytes | None, row: int) -> str | Status:
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
        except UnicodeEncodeError:  # half a surrogate pair, which UTF-8 cannot express
            return Status.INVALID_UTF8
    return text if VISIBLE.search(text) else Status.EMPTY


def _calls(rows: list[int], texts: list[str | Status]) -> Iterator[list[int]]:
    call: list[int] = []
    chars = 0
    for row in rows:
        call.append(row)
        chars += len(texts[row])  # type: ignore[arg-type]
        if len(call) >= CALL_TEXTS or chars >= CALL_CHARS:
            yield call
            call, chars = [], 0
    if call:
        yield call


class FastTokens:
    """The model's tokenizer, called directly. Safe in any thread; calls run one at a time."""

    keeps_texts = False

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, prompt: str, max_length: int | None, limit: int | None, like: Features
    ) -> None:
        """`like` is an output of the model's own preprocess; its keys and its values that are not tensors are kept."""
        self._tokenizer = tokenizer
        self.prompt = prompt
        self._max_length = max_length
        self._limit = limit
        self._constants = {key: value for key, value in like.items() if not isinstance(value, torch.Tensor)}
        self._has_type_ids = "token_type_ids" in like
        self._specials = tokenizer.num_special_tokens_to_add(pair=False)
        self._prompt_tokens = len(self._call([prompt], add_special_tokens=False)["input_ids"][0]) if prompt else 0
        self.cuts = tokenizer.truncation_side == "right" and can_cut(tokenizer.backend_tokenizer)
        self._lock = threading.Lock()

    def _call(self, texts: list[str], **kwargs: Any) -> Any:
        return self._tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, verbose=False, **kwargs)

    def encodings(self, texts: list[str]) -> list[Any]:
        """The tokenizer's own objects, for whole texts without special tokens: ids, and where they are in the text."""
        with self._lock:
            return list(self._call(texts, add_special_tokens=False).encodings)

    def ids(self, text: str, *, add_special_tokens: bool) -> list[int]:
        with self._lock:
            return list(self._call([text], add_special_tokens=add_special_tokens)["input_ids"][0])

    def rows(self, texts: Sequence[str]) -> list[Row | None]:
        with self._lock:
            full = [self.prompt + text for text in texts]
            rows: list[Row | None] = [None] * len(full)
            reach = (self._max_length or 0) * CHARS_PER_TOKEN + len(self.prompt)
            todo = list(range(len(full)))
            while todo:
                cuts = [self._cut(full[row], reach) for row in todo]
                pieces = [full[row][:cut] for row, cut in zip(todo, cuts, strict=True)]
                again = []
                for row, cut, read in zip(todo, cuts, self._tokenise(pieces), strict=True):
                    # If a prefix overflows, its ids are those of the whole text, which is truncated as well.
                    if cut is not None and not read.truncated:
                        again.append(row)
                    else:
                        rows[row] = read
                todo, reach = again, reach * 4
            for row in self._maybe_empty(rows):
                if not self._call([texts[row]], add_special_tokens=False)["input_ids"][0]:
                    rows[row] = None
            return rows

    def _cut(self, text: str, reach: int) -> int | None:
        """Length of the prefix to tokenise; None to tokenise the whole text."""
        if not self.cuts or self._max_length is None:
            return None
        while len(text) > 2 * reach:
            if (cut := safe_cut(text, reach, max(reach // 2, len(self.prompt)))) is not None:
                return cut
            reach *= 2
        return None

    def _tokenise(self, texts: list[str]) -> list[Row]:
        cut = {"truncation": "longest_first", "max_length": self._max_length} if self._max_length else {}
        batch = self._call(texts, **cut)
        rows = []
        for ids, encoding in zip(batch["input_ids"], batch.encodings, strict=True):
            full = len(ids) == self._max_length and bool(encoding.overflowing)
            rows.append(Row(ids=ids, n_tokens=len(ids), truncated=full, largest_id=max(ids, default=0)))
        return rows

    def _maybe_empty(self, rows: list[Row | None]) -> list[int]:
        """Rows so short that the text may have no token of its own (it may have merged with the prompt's last one)."""
        max_tokens = self._specials + (self._prompt_tokens + 2 if self.prompt else 0)
        return [row for row, read in enumerate(rows) if read is not None and read.n_tokens <= max_tokens]

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
        if self._has_type_ids:
            features["token_type_ids"] = torch.zeros_like(features["input_ids"])
        return {**self._constants, **features}


class ModelTokens:
    """The model's own preprocess, called twice: on one text for its length, on a batch for the forward pass."""

    keeps_texts = True

    def __init__(self, model: SentenceTransformer, prompt: str, max_length: int | None) -> None:
        self._model = model
        self._prompt = prompt
        self._max_length = max_length
        self._lock = threading.Lock()

    def rows(self, texts: Sequence[str]) -> list[Row | None]:
        rows: list[Row | None] = []
        empty = self._read("")[0] if self._prompt else 0
        for text in texts:
            length, largest_id = self._read(text)
            # preprocess does not report truncation, so a row of the maximum length counts as truncated.
            is_cut = self._max_length is not None and length >= self._max_length
            read = Row(ids=(), n_tokens=length, truncated=is_cut, largest_id=largest_id)
            rows.append(read if length > empty else None)
        return rows

    def _read(self, text: str) -> tuple[int, int]:
        """The number of tokens and the largest token id; 1 and 0 if the model does not tell."""
        features = self._preprocess([text])
        ids, mask = features.get("input_ids"), features.get("attention_mask")
        largest = 0
        if isinstance(ids, torch.Tensor) and not ids.is_floating_point() and ids.numel():
            largest = int(ids.max())
        if isinstance(mask, torch.Tensor):
            return int(mask.sum()), largest
        return (int(ids.numel()), largest) if isinstance(ids, torch.Tensor) else (1, 0)

    def _preprocess(self, texts: list[str]) -> Features:
        with self._lock:
            return self._model.preprocess(texts, prompt=self._prompt, task=TASK)

    def features(self, window: Window, rows: np.ndarray, multiple: int) -> Features:  # noqa: ARG002 - preprocess pads
        return self._preprocess([window.texts[row] for row in rows])


def tokens_for(model: SentenceTransformer, prompt: str, max_length: int | None, limit: int | None) -> Tokens:
    """FastTokens if it gives the same tensors as the model's own preprocess on two sentences; otherwise ModelTokens."""
    tokenizer = _plain_tokenizer(model)
    if tokenizer is not None:
        trial = ["Hola.", "Zarpamos al alba, con la bodega bien estibada."]
        expected = model.preprocess(trial, prompt=prompt, task=TASK)
        fast = FastTokens(tokenizer, prompt, max_length, limit, expected)
        window = read_window(fast, trial)
        if not (window.status == Status.OK).all():
            return ModelTokens(model, prompt, max_length)
        actual = fast.features(window, np.arange(len(trial)), 1)
        if actual.keys() == expected.keys() and all(
            torch.equal(actual[key], expected[key])
            if isinstance(expected[key], torch.Tensor)
            else actual[key] == expected[key]
            for key in expected
        ):
            return fast
    return ModelTokens(model, prompt, max_length)


def first_module(model: SentenceTransformer) -> Any:
    """The module that reads a document's text: the first one, or the first one of a Router's document route."""
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
    kwargs = {**module.processing_kwargs.get("text", {}), **module.processing_kwargs.get("common", {})}
    kwargs.pop("max_length", None)  # `resolve` has applied it
    usual = {"truncation": "longest_first", "padding": True, "return_tensors": "pt"}
    if any(key not in usual or value != usual[key] for key, value in kwargs.items()):
        return None
    tokenizer = module.processor
    usable = isinstance(tokenizer, PreTrainedTokenizerFast) and tokenizer.is_fast and tokenizer.pad_token_id is not None
    return tokenizer if usable else None
