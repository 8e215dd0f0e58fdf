"""Token ids: those of the model's own tokenizer for any text, even if only a prefix is tokenised."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SENTENCES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from embed.data.chunks import Status
from embed.model.prefix import VISIBLE, can_cut, safe_cut
from embed.model.tokens import FastTokens, Row, read_window

MAX_LENGTH = 12
LIKE = {"input_ids": torch.zeros(1, 1), "attention_mask": torch.zeros(1, 1), "modality": "text"}
SPECIALS = ["<s>", "</s>", "<pad>", "<unk>", "<mask>"]
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def trained(
    model: models.Model, trainer: trainers.Trainer, normalizer: Any, pre_tokenizer: Any
) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    first, last = (tokenizer.token_to_id(token) for token in ("<s>", "</s>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", first), ("</s>", last)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def bpe(pre_tokenizer: Any, normalizer: Any = None) -> PreTrainedTokenizerFast:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    return trained(models.BPE(unk_token="<unk>"), trainer, normalizer, pre_tokenizer)


def unigram(pre_tokenizer: Any, normalizer: Any) -> PreTrainedTokenizerFast:
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False)
    return trained(models.Unigram(), trainer, normalizer, pre_tokenizer)


def like_xlm_roberta() -> PreTrainedTokenizerFast:
    squeeze = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer = unigram(
        pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]), squeeze
    )
    # XLM-R has this one: it strips the whitespace before it.
    tokenizer.add_special_tokens({"mask_token": AddedToken("<mask>", lstrip=True, special=True)})
    return tokenizer


def like_qwen() -> PreTrainedTokenizerFast:
    split = pre_tokenizers.Split(Regex(QWEN), "isolated")
    return bpe(
        pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]),
        normalizers.NFC(),
    )


def like_modernbert() -> PreTrainedTokenizerFast:
    tokenizer = bpe(pre_tokenizers.ByteLevel(add_prefix_space=False), normalizers.NFC())
    tokenizer.add_tokens([AddedToken(" " * spaces, normalized=True) for spaces in (2, 3, 4)])
    return tokenizer


def bert(minilm: Path, **options: str) -> PreTrainedTokenizerFast:
    tokenizer: Any = AutoTokenizer.from_pretrained(minilm, **options)
    return tokenizer


CUTTABLE: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "gpt2": lambda: bpe(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "metaspace": lambda: unigram(pre_tokenizers.Metaspace(), normalizers.NFKC()),
    "modernbert": like_modernbert,
    "qwen": like_qwen,
    "xlm-roberta": like_xlm_roberta,
}
# These do not split at whitespace, or a rule or token spans it.
WHOLE: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "no pre-tokenizer": lambda: unigram(None, normalizers.NFKC()),
    "metaspace unsplit": lambda: unigram(pre_tokenizers.Metaspace(split=False), normalizers.NFKC()),
    "unknown pattern": lambda: bpe(pre_tokenizers.Split(Regex(r"\w+ \w+"), "isolated")),
    "unknown normalizer": lambda: bpe(pre_tokenizers.ByteLevel(), normalizers.Replace(" de ", "_")),
}


@pytest.fixture(scope="module")
def tokenizers(minilm: Path) -> dict[str, PreTrainedTokenizerFast]:
    built = {name: make() for name, make in (CUTTABLE | WHOLE).items()}
    spanning = bpe(pre_tokenizers.ByteLevel())
    spanning.add_tokens([AddedToken("la mar")])
    return built | {"bert": bert(minilm), "token with a space": spanning}


def fast_tokens(tokenizer: PreTrainedTokenizerFast, max_length: int = MAX_LENGTH, prompt: str = "") -> FastTokens:
    return FastTokens(tokenizer, prompt, max_length, None, LIKE)


def assert_same_ids(
    tokenizer: PreTrainedTokenizerFast, text: str, max_length: int = MAX_LENGTH, prompt: str = ""
) -> None:
    """FastTokens returns the ids that the tokenizer returns for the whole text."""
    full = tokenizer([prompt + text], verbose=False)["input_ids"][0]
    cut = tokenizer([prompt + text], truncation="longest_first", max_length=max_length)["input_ids"][0]
    (row,) = fast_tokens(tokenizer, max_length, prompt).rows([text])
    if row is None:
        assert not tokenizer([text], add_special_tokens=False)["input_ids"][0]
        return
    assert list(row.ids) == cut
    assert row.truncated == (len(full) > max_length)


PIECES = st.one_of(
    st.sampled_from(
        ["mar", "Zarpó", unicodedata.normalize("NFD", "habló ñandú"), "船は夜明けに", "سفينة", "\u0600", "\u06dd١",
         "שלום",
         "🚢👩‍✈️", "🇪🇸", "\u200b", "\u200d", "\ufeff", "\u0301", "ﬁn", "\ufdfa", "ẛ̣", "한국", "\u3164", "\u0d4e", "\xad",
         "<mask>", "<s>", "[SEP]", "don't", "12,40", "¿", "...", "´", "la mar", "x" * 120, "\x00", "\x85", "A\u030a"]
    ),
    st.text(max_size=12),
)  # fmt: skip
GAPS = st.sampled_from([" ", " ", " ", "  ", "    ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "", " \u0301", "\n "])
TEXTS = st.lists(st.tuples(PIECES, GAPS), min_size=1, max_size=120).map(
    lambda parts: "".join(piece + gap for piece, gap in parts)
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=TEXTS, prompt=st.sampled_from(["", "passage: ", "consulta "]))
def test_a_prefix_gives_the_ids_of_the_whole_text(
    tokenizers: dict[str, PreTrainedTokenizerFast], text: str, prompt: str
) -> None:
    if any("\ud800" <= char <= "\udfff" for char in text):
        return
    for tokenizer in tokenizers.values():
        assert_same_ids(tokenizer, text, prompt=prompt)


LONG = {
    "no whitespace": "zarpó" * 4_000,
    "one space far in": "z" * 8_000 + " mar " + "z" * 8_000,
    "only spaces at first": " " * 8_000 + "mar " * 2_000,
    "invisible at first": "\u200b " * 8_000 + "mar " * 2_000,
    "one token in 150 characters": ("x" * 150 + " ") * 500,
    "few tokens, much that is dropped": ("a" + "\u200b" * 90 + "a ") * 500,
    "chinese": "船は夜明けに出航した。" * 1_000,
    "decomposed": unicodedata.normalize("NFD", "Habló el ñandú. ") * 1_000,
    "composed": unicodedata.normalize("NFC", "Habló el ñandú. ") * 1_000,
    "arabic": "أبحرت السفينة عند الفجر \u0600 ١٢ " * 1_000,
    "emoji": "🚢👩‍✈️🇪🇸 " * 2_000,
    "zero width between": "la\u200bmar\u200b " * 2_000,
}


@pytest.mark.parametrize("name", LONG)
def test_long_texts_of_every_kind_keep_their_ids(tokenizers: dict[str, PreTrainedTokenizerFast], name: str) -> None:
    for tokenizer in tokenizers.values():
        assert_same_ids(tokenizer, LONG[name], 24)


@pytest.mark.parametrize("name", ["bert", *CUTTABLE])
def test_a_long_document_is_tokenised_only_as_far_as_the_model_reads(
    tokenizers: dict[str, PreTrainedTokenizerFast], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = fast_tokens(tokenizers[name], 256)
    lengths: list[int] = []
    real = tokens._tokenise

    def recorded(texts: list[str]) -> list[Row]:
        lengths.extend(map(len, texts))
        return real(texts)

    monkeypatch.setattr(tokens, "_tokenise", recorded)
    document = " ".join(SENTENCES * 600)
    assert len(document) > 350_000
    (row,) = tokens.rows([document])
    assert row is not None
    assert row.truncated
    assert max(lengths) < 10_000
    assert list(row.ids) == tokenizers[name]([document], truncation=True, max_length=256)["input_ids"][0]


@pytest.mark.parametrize("name", [*WHOLE, "token with a space"])
def test_a_tokenizer_that_does_not_split_at_whitespace_gets_the_whole_text(
    tokenizers: dict[str, PreTrainedTokenizerFast], name: str
) -> None:
    assert not can_cut(tokenizers[name].backend_tokenizer)
    assert not fast_tokens(tokenizers[name]).cuts


def test_left_truncation_reads_the_end_of_the_whole_text(minilm: Path) -> None:
    tokenizer = bert(minilm, truncation_side="left")
    assert_same_ids(tokenizer, " ".join(SENTENCES) * 50 + " fin")


@given(text=TEXTS, max_chars=st.integers(0, 400))
def test_a_cut_is_before_a_space_and_after_a_visible_character(text: str, max_chars: int) -> None:
    cut = safe_cut(text, max_chars, 0)
    if cut is not None:
        assert 0 < cut <= max_chars
        assert text[cut] == " "
        assert VISIBLE.match(text[cut - 1])


@pytest.mark.parametrize(
    "text", ["", " \t\n", "\u00a0\u3000\u2028", "\u200b\u200d\ufeff", "\x00\x07", "\u3164", "\ufe0f"]
)
def test_invisible_text_is_empty(minilm: Path, text: str) -> None:
    tokens = fast_tokens(bert(minilm))
    assert read_window(tokens, [text]).status.tolist() == [Status.EMPTY]
    assert read_window(tokens, [text.encode()]).status.tolist() == [Status.EMPTY]


@pytest.mark.parametrize("prompt", ["", "passage: "])
def test_a_text_without_tokens_is_empty_even_with_a_prompt(minilm: Path, prompt: str) -> None:
    private = "\ue000\ue001"  # private use: BERT's normalizer drops it
    window = read_window(fast_tokens(bert(minilm), prompt=prompt), [private, "mar", "🙂"])
    assert window.status.tolist() == [Status.EMPTY, Status.OK, Status.OK]
    assert window.n_tokens[0] == 0


def test_rows_are_padded_on_the_tokenizers_side(minilm: Path) -> None:
    for side, mask in (("right", [[1, 1, 1, 0], [1, 1, 1, 1]]), ("left", [[0, 1, 1, 1], [1, 1, 1, 1]])):
        tokens = fast_tokens(bert(minilm, padding_side=side))
        features = tokens.features(read_window(tokens, ["mar", None, "mar mar"]), np.array([0, 2]), 1)
        assert features["attention_mask"].tolist() == mask
        assert features["modality"] == "text"
        assert tokens.features(read_window(tokens, ["mar"]), np.array([0]), 8)["input_ids"].shape == (1, 8)
