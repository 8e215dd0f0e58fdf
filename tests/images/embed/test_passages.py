"""Passages of long texts: every token is in one, borders are where a reader would cut, and memory is bounded."""

from __future__ import annotations

import unicodedata
from typing import Any

import numpy as np
import pytest
from conftest import SENTENCES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_tokens import CUTTABLE, LONG, TEXTS, WHOLE, bert, bpe, fast_tokens
from tokenizers import AddedToken, pre_tokenizers

from embed.data.chunks import Encoded, Status
from embed.data.passages import Passages, mean_of
from embed.model import passages
from embed.model.passages import PassageCutter
from embed.model.prefix import VISIBLE
from embed.model.tokens import Window, read_window
from estiba.errors import ConfigError

LENGTH = 24


@pytest.fixture(scope="module")
def tokenizers(minilm) -> dict[str, Any]:
    built = {name: make() for name, make in (CUTTABLE | WHOLE).items()}
    spanning = bpe(pre_tokenizers.ByteLevel())
    spanning.add_tokens([AddedToken("la mar")])
    return built | {"bert": bert(minilm), "token with a space": spanning}


def cut(tokenizer, text: str, length: int = LENGTH, overlap: int = 0, prompt: str = "") -> tuple[Window, Passages]:
    """All passages of one text, as one window."""
    windows = list(PassageCutter(fast_tokens(tokenizer, 512, prompt), length, overlap).windows([text], None))
    assert len(windows) == 1
    return windows[0]


def ids_of(window: Window) -> list[list[int]]:
    return [window.ids[first:last].tolist() for first, last in zip(window.starts, window.starts[1:], strict=False)]


def without(ids: list[int], tokenizer, prompt: str) -> list[int]:
    """Without the special tokens and the prompt's."""
    left, right = passages._special_ids(fast_tokens(tokenizer))
    own = passages._prompt_ids(fast_tokens(tokenizer, prompt=prompt))
    assert ids[: len(left)] == left.tolist() and ids[len(ids) - len(right) :] == right.tolist()
    inner = ids[len(left) : len(ids) - len(right)]
    assert inner[: len(own)] == own.tolist()
    return inner[len(own) :]


def assert_complete(tokenizer, text: str, overlap: int, prompt: str) -> None:
    """The passages are the text's tokens in order. Invisible ones may be missing; no more are repeated than may be."""
    window, found = cut(tokenizer, text, overlap=overlap, prompt=prompt)
    full = tokenizer([prompt + text], verbose=False)["input_ids"][0]
    assert window.n_tokens.max(initial=0) <= LENGTH and not window.truncated.any()
    if window.status[0] != Status.OK:
        assert window.status.tolist() == [Status.EMPTY] and found.start.tolist() == [-1]
        assert not tokenizer([text], add_special_tokens=False)["input_ids"][0] or not VISIBLE.search(text)
        return
    if len(full) <= LENGTH:
        assert ids_of(window) == [full]
        return
    encoding = tokenizer([prompt + text], add_special_tokens=False, verbose=False).encodings[0]
    ends = np.maximum.accumulate([end for _, end in encoding.offsets])
    tokens = [id for id, end in zip(encoding.ids, ends, strict=True) if end > len(prompt) or not prompt]
    spans = [(max(0, first - len(prompt)), max(0, last - len(prompt))) for first, last in encoding.offsets]
    spans = spans[len(spans) - len(tokens) :]
    is_visible = [VISIBLE.search(text, first, last) is not None for first, last in spans]
    until = [
        next((at for at in range(first, len(tokens)) if is_visible[at]), len(tokens))
        for first in range(len(tokens) + 1)
    ]
    covered = {0}  # several numbers, since a text may repeat itself
    for ids in ids_of(window):
        inner = without(ids, tokenizer, prompt)
        covered = {
            at + len(inner)
            for before in covered
            for at in range(max(0, before - overlap), until[before] + 1)
            if tokens[at : at + len(inner)] == inner and at + len(inner) > before
        }
        assert covered, "a token is missing, or more are repeated than may be"
    assert any(until[each] == len(tokens) for each in covered)
    assert (found.start < found.end).all()
    assert (np.diff(found.start) >= 0).all() and (np.diff(found.end) >= 0).all()
    assert found.end.max() <= len(text) and found.start.min() >= 0


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=TEXTS, overlap=st.sampled_from([0, 1, 5]), prompt=st.sampled_from(["", "passage: ", "consulta "]))
def test_every_token_of_a_text_is_in_a_passage(tokenizers, text, overlap, prompt):
    if any("\ud800" <= char <= "\udfff" for char in text):
        return
    for tokenizer in tokenizers.values():
        assert_complete(tokenizer, text, overlap, prompt)


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("overlap", [0, 5])
def test_long_texts_of_every_kind_are_complete(tokenizers, name, overlap):
    for tokenizer in tokenizers.values():
        assert_complete(tokenizer, LONG[name][:6000], overlap, "")


def test_the_text_of_a_span_has_the_tokens_of_its_passage(tokenizers):
    """Where borders are at spaces: then the vector is that of the text that a reader cuts out."""
    text = "\n\n".join(" ".join(SENTENCES[index:] + SENTENCES[:index]) for index in range(5))
    for name in ("bert", "xlm-roberta"):
        window, found = cut(tokenizers[name], text, 40, overlap=8, prompt="passage: ")
        assert len(found.row) > 10
        for ids, start, end in zip(ids_of(window), found.start, found.end, strict=True):
            assert ids == tokenizers[name](["passage: " + text[start:end]])["input_ids"][0]


def test_a_passage_ends_at_a_paragraph_or_a_sentence_in_its_last_quarter_else_at_a_space(tokenizers):
    def spans(text: str, fits: str) -> list[str]:
        """The passages of as many tokens as `fits` has."""
        length = len(tokenizers["bert"](fits)["input_ids"])
        _, found = cut(tokenizers["bert"], text, length)
        return [text[start:end] for start, end in zip(found.start, found.end, strict=True)]

    text = "one two three four five six seven eight nine ten. Then one more and the end"
    assert spans(text, text[: text.index(" more")])[0] == text[: text.index(" Then")]
    words = spans(text, "one two three four")
    assert len(words) > 3 and " ".join(words) == text
    text = "one two. three four five six seven eight nine ten\n\none. two three four"
    assert spans(text, text[: text.index(" two three")])[0] == text[: text.index("\n")]


@pytest.mark.parametrize("name", ["bert", *CUTTABLE])
def test_no_passage_ends_within_a_character_or_a_short_word(tokenizers, name):
    text = "¿Zarpó el ñandú? " + " ".join(f"barco{index} 🚢👩‍✈️🇪🇸 船は夜明けに。" for index in range(60))
    text = unicodedata.normalize("NFD", text)
    _, found = cut(tokenizers[name], text, length=60)
    for start, end in zip(found.start[1:], found.end, strict=False):
        assert start >= end, "two passages share a character"
        assert not unicodedata.combining(text[start]) and text[start] not in "\u200d\ufe0f"
        assert not (text[start].isalnum() and text[end - 1].isalnum() and text[start].isascii() and start == end)


def test_a_word_longer_than_a_passage_is_cut_and_nothing_is_lost(tokenizers):
    for word in ("z" * 3000, "船" * 3000, "👩‍✈️" * 800):
        for name in ("gpt2", "xlm-roberta", "qwen"):
            window, found = cut(tokenizers[name], f"la mar {word} y fin", overlap=6)
            assert (window.status == Status.OK).all()
            assert found.start[0] == 0 and found.end[-1] == len(word) + 13
            assert (found.start[1:] <= found.end[:-1] + 1).all()


@pytest.mark.parametrize("name", ["bert", *CUTTABLE])
def test_a_text_that_is_tokenised_in_segments_gives_the_same_passages(tokenizers, name, monkeypatch):
    text = "\n".join(" ".join(SENTENCES[index % 7 :]) for index in range(30))
    whole, spans = cut(tokenizers[name], text, overlap=6)
    monkeypatch.setattr(passages, "SEGMENT_CHARS", 300)
    parts, more = cut(tokenizers[name], text, overlap=6)
    assert len(whole.n_tokens) > 50
    assert ids_of(parts) == ids_of(whole)
    assert more.start.tolist() == spans.start.tolist() and more.end.tolist() == spans.end.tolist()


@pytest.mark.parametrize("name", [*CUTTABLE, *WHOLE])
def test_segments_of_a_text_without_spaces_lose_nothing(tokenizers, name, monkeypatch):
    monkeypatch.setattr(passages, "SEGMENT_CHARS", 200)
    for text in ("zarpó" * 900, "船は夜明けに出航した。" * 300, "👩‍✈️" * 500, "\u200b" * 900 + "mar " * 300):
        window, found = cut(tokenizers[name], text)
        has_text = window.status == Status.OK
        assert has_text.all()
        visible = [index for index, char in enumerate(text) if char.isalnum()]
        spans = np.zeros(len(text) + 1, np.int64)
        np.add.at(spans, found.start, 1)
        np.add.at(spans, found.end, -1)
        assert (np.cumsum(spans)[visible] > 0).all()


def test_a_range_with_many_passages_has_several_windows(tokenizers, monkeypatch):
    texts = ["hola", None, " ".join(SENTENCES * 20), "", b"\xff", "adiós"]
    cutter = PassageCutter(fast_tokens(tokenizers["bert"], 512), LENGTH, 4)
    ((window, found),) = cutter.windows(texts, None)
    assert window.status[[0, 1, -3, -2, -1]].tolist() == [0, Status.NULL, Status.EMPTY, Status.INVALID_UTF8, 0]
    assert np.unique(found.row).tolist() == [0, 1, 2, 3, 4, 5] and found.is_last and found.part == 0
    for name, limit in (("WINDOW_PASSAGES", 7), ("WINDOW_TOKENS", 100)):
        with monkeypatch.context() as patched:
            patched.setattr(passages, name, limit)
            windows = list(cutter.windows(texts, None))
        assert [part.part for _, part in windows] == list(range(len(windows))) and len(windows) > 5
        assert [part.is_last for _, part in windows] == [False] * (len(windows) - 1) + [True]
        assert max(len(each.status) for each, _ in windows) <= 7
        assert [ids for each, _ in windows for ids in ids_of(each)] == ids_of(window)
        assert np.concatenate([part.row for _, part in windows]).tolist() == found.row.tolist()
        assert sum(part.rows_done(len(part.row)) for _, part in windows) == found.rows_done(len(found.row)) == 3


def test_texts_that_fit_have_the_windows_ids_of_a_job_without_chunks(tokenizers):
    texts = [*SENTENCES, None, " ", "🙂"]
    for tokenizer in tokenizers.values():
        tokens = fast_tokens(tokenizer, 512, "passage: ")
        ((window, _),) = PassageCutter(tokens, 512, 10).windows(texts, None)
        plain = read_window(tokens, texts)
        assert ids_of(window) == ids_of(plain) and window.status.tolist() == plain.status.tolist()


def test_a_token_beyond_the_embedding_table_costs_its_passage(tokenizers):
    text = " ".join(SENTENCES * 3)
    window, _ = cut(tokenizers["bert"], text)
    largest = [max(ids) for ids in ids_of(window)]
    cutter = PassageCutter(fast_tokens(tokenizers["bert"], 512), LENGTH, 0)
    ((window, _),) = cutter.windows([text], max(largest))
    worst = [index for index, id in enumerate(largest) if id == max(largest)]
    assert list(window.unknown) == worst and 0 < len(worst) < len(largest)
    assert np.flatnonzero(window.status == Status.UNKNOWN_TOKEN).tolist() == worst


def test_chunks_too_small_for_prompt_and_overlap_are_refused(tokenizers):
    with pytest.raises(ConfigError, match=r"--chunk 5 leaves 0 tokens for text.*larger chunks"):
        PassageCutter(fast_tokens(tokenizers["bert"], 512, "passage: una"), 5, 0)
    with pytest.raises(ConfigError, match=r"--chunk 20 leaves 18 tokens.*--chunk-overlap 10 can be at most half"):
        PassageCutter(fast_tokens(tokenizers["bert"], 512), 20, 10)
    PassageCutter(fast_tokens(tokenizers["bert"], 512), 20, 9)


# --- the mean ------------------------------------------------------------------------------------------------------


def window_of(vectors: list[list[float]], rows: list[int], tokens: list[int], status: list[int] | None = None):
    count = len(rows)
    encoded = Encoded(
        vectors=np.asarray(vectors, np.float32),
        status=np.asarray(status or [0] * count, np.uint8),
        n_tokens=np.asarray(tokens, np.int32) + 2,
        truncated=np.zeros(count, bool),
        padded_tokens=0,
    )
    spans = np.zeros(count, np.int32)
    found = Passages(
        row=np.asarray(rows, np.int32), start=spans, end=spans + 1, text_tokens=np.asarray(tokens, np.int32), part=0,
        is_last=True,
    )  # fmt: skip
    return encoded, found


def test_a_rows_vector_is_the_mean_of_its_passages_by_their_tokens():
    parts = [window_of([[1, 0], [0, 1], [0.6, 0.8]], [0, 0, 1], [3, 1, 5])]
    mean = mean_of(parts, 2, normalize=True)
    assert np.allclose(mean.vectors[0], np.array([3, 1]) / np.sqrt(10)) and mean.n_tokens.tolist() == [8, 7]
    assert mean.vectors[1].tobytes() == parts[0][0].vectors[2].tobytes()
    assert np.allclose(mean_of(parts, 2, normalize=False).vectors[0], [0.75, 0.25])


def test_a_mean_does_not_depend_on_the_windows_it_comes_from():
    dice = np.random.default_rng(3)
    vectors, tokens = dice.normal(size=(50, 8)), dice.integers(1, 500, 50).tolist()
    rows = sorted(dice.integers(0, 3, 50).tolist())
    whole = mean_of([window_of(vectors, rows, tokens)], 3, normalize=True)
    pieces = [window_of(vectors[i : i + 7], rows[i : i + 7], tokens[i : i + 7]) for i in range(0, 50, 7)]
    assert mean_of(pieces, 3, normalize=True).vectors.tobytes() == whole.vectors.tobytes()


def test_a_row_with_a_passage_without_vector_or_with_a_mean_of_zero_has_none():
    parts = [window_of([[1, 0], [0, 0], [1, 0], [-1, 0]], [0, 0, 1, 1], [2, 2, 4, 4], [0, Status.UNKNOWN_TOKEN, 0, 0])]
    mean = mean_of(parts, 2, normalize=True)
    assert mean.status.tolist() == [Status.UNKNOWN_TOKEN, Status.NOT_FINITE]
    assert not mean.vectors.any() and not mean.n_tokens.any()
    assert mean_of(parts, 2, normalize=False).status.tolist() == [Status.UNKNOWN_TOKEN, Status.OK]
