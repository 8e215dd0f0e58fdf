"""Every kind of tokenizer works behind one interface, and encoding by word gives the ids of the whole text."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sailors import lines, paragraphs
from tokenizers import Regex, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from aura.data.encoder import Encoder, splits_at_spaces
from aura.tokenizer.loading import SPANISH_WORDS, Tokenizer, load_tokenizer
from aura.tokenizer.training import _limited, train_tokenizer, trained_once
from estiba.errors import ConfigError

PROBE = "¿Cuántos nudos hacía la goleta en 1909?\n\nNo lo sé: «</s>» <pad> pingüino 🚢  fin."


@pytest.fixture(scope="module")
def spanish(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Path]:
    folder = tmp_path_factory.mktemp("tokenizer") / "es"
    return train_tokenizer(lines(3000), vocab_size=600, folder=folder), folder


def test_the_spanish_tokenizer_loses_no_character_and_splits_digits(spanish: tuple[Tokenizer, Path]) -> None:
    tokenizer, _ = spanish
    ids = tokenizer.encode(PROBE)
    assert tokenizer.decode(ids) == PROBE
    assert len(tokenizer.encode("1909")) == 4
    assert tokenizer.encode("e\u0301") == tokenizer.encode("é")  # NFC
    assert max(ids) < tokenizer.vocab_size == 600


def test_special_tokens_in_a_text_are_plain_characters(spanish: tuple[Tokenizer, Path]) -> None:
    tokenizer, _ = spanish
    assert not {tokenizer.eos_id, tokenizer.pad_id} & set(tokenizer.encode(PROBE))


def test_a_saved_tokenizer_loads_here_and_in_transformers(spanish: tuple[Tokenizer, Path]) -> None:
    from transformers import AutoTokenizer

    tokenizer, folder = spanish
    theirs = AutoTokenizer.from_pretrained(folder)
    plain = PROBE.replace("</s>", "").replace("<pad>", "")
    assert theirs(plain, add_special_tokens=False)["input_ids"] == tokenizer.encode(plain)
    assert theirs.eos_token_id == tokenizer.eos_id and theirs.pad_token_id == tokenizer.pad_id != tokenizer.eos_id
    again = load_tokenizer(str(folder))
    assert again.identity == tokenizer.identity
    assert load_tokenizer(str(folder / "tokenizer.json")).identity == tokenizer.identity


def test_training_gives_the_same_bytes_in_another_process(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from aura.tokenizer.training import train_tokenizer\n"
        "from sailors import lines\n"
        "train_tokenizer(lines(800), vocab_size=450, folder=Path(sys.argv[1]))"
    )
    for name in ("one", "two"):
        subprocess.run([sys.executable, "-c", program, str(tmp_path / name)], check=True, env={
            "PYTHONPATH": ":".join(sys.path), "RAYON_NUM_THREADS": "1" if name == "one" else "3",
            "PYTHONHASHSEED": "random", "HOME": str(tmp_path),
        })  # fmt: skip
    assert (tmp_path / "one/tokenizer.json").read_bytes() == (tmp_path / "two/tokenizer.json").read_bytes()


def test_saved_truncation_and_padding_are_turned_off(spanish: tuple[Tokenizer, Path], tmp_path: Path) -> None:
    backend = Backend.from_file(str(spanish[1] / "tokenizer.json"))
    backend.enable_truncation(8)
    backend.enable_padding(length=8, pad_id=0, pad_token="<pad>")
    backend.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert [len(ids) > 8 for ids in loaded.encode_batch([PROBE, "a"])] == [True, False]
    assert loaded.encode("a") == spanish[0].encode("a")
    assert loaded.identity == spanish[0].identity


@pytest.mark.parametrize("missing", ["pad", "eos", "both", "same"])
def test_end_of_text_and_padding_always_exist_and_differ(
    spanish: tuple[Tokenizer, Path], tmp_path: Path, missing: str
) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((spanish[1] / name).read_text("utf-8"), "utf-8")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text("utf-8"))
    if missing in ("pad", "both"):
        config.pop("pad_token")
    if missing in ("eos", "both"):
        config.pop("eos_token")
    if missing == "same":
        config["pad_token"] = config["eos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.pad_id != tokenizer.eos_id
    assert {tokenizer.pad_id, tokenizer.eos_id} == {spanish[0].pad_id, spanish[0].eos_id}


def test_a_tokenizer_without_special_tokens_gets_both(tmp_path: Path) -> None:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.train_from_iterator(lines(200), trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    ))  # fmt: skip
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert {tokenizer.eos_id, tokenizer.pad_id} == {300, 301}
    assert tokenizer.vocab_size == 302


@pytest.mark.parametrize("kind", ["unigram", "bpe", "plain"])
def test_a_sentencepiece_model_gives_sentencepieces_own_ids(tmp_path: Path, kind: str) -> None:
    spm = pytest.importorskip("sentencepiece", reason="no SentencePiece to compare with")
    (tmp_path / "text.txt").write_text("\n".join(lines(3000)), "utf-8")
    extra: dict[str, object] = {"bpe": {"byte_fallback": True}, "plain": {
        "normalization_rule_name": "identity", "remove_extra_whitespaces": False, "add_dummy_prefix": False,
        "byte_fallback": True, "user_defined_symbols": ["\n", "<|uno|>"], "split_digits": True,
    }}.get(kind, {})  # fmt: skip
    spm.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=400,
        model_type="bpe" if kind == "bpe" else "unigram", minloglevel=2, **extra,
    )  # fmt: skip
    theirs = spm.SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
    text = paragraphs(60_000, seed=5)
    chance = random.Random(3)
    blocks = [text[at : at + chance.randrange(1, 300)] for at in chance.sample(range(len(text)), 400)]
    blocks += ["".join(chance.choices(" \n\tabñáE1/ 中🚢", k=chance.randrange(30))) for _ in range(400)]
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/tokenizer.model").write_bytes((tmp_path / "tokenizer.model").read_bytes())
    ours = load_tokenizer(str(tmp_path / "folder"))
    assert ours.encode_batch(blocks) == [theirs.encode(block) for block in blocks]
    assert ours.eos_id == theirs.eos_id() and ours.pad_id != ours.eos_id
    ours.save(tmp_path / "saved")
    again = load_tokenizer(str(tmp_path / "saved"))
    assert again.encode_batch(blocks) == ours.encode_batch(blocks) and again.pad_id == ours.pad_id


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda _: None, "no such file or directory"),
        (lambda path: path.mkdir(), "no tokenizer.json and no .model in it (found nothing)"),
        (lambda path: path.write_text("hola"), "is not a SentencePiece model"),
        (lambda path: path.write_bytes(b""), "is not a SentencePiece model"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_an_error_with_a_remedy(tmp_path: Path, make, message: str) -> None:  # type: ignore[no-untyped-def]
    make(tmp_path / "cosa")
    with pytest.raises(ConfigError) as caught:
        load_tokenizer(str(tmp_path / "cosa"))
    assert message in str(caught.value) and str(tmp_path / "cosa") in str(caught.value)


def test_a_vocabulary_that_is_too_small_or_too_large_for_the_text_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vocab_size 200"):
        train_tokenizer(["hola"], vocab_size=200, folder=tmp_path)
    with pytest.raises(ConfigError, match="these texts give only"):
        train_tokenizer(["hola hola"], vocab_size=32_000, folder=tmp_path)


# --- ids by word ---------------------------------------------------------------------------------------------------


def _byte_level(pattern: str | None, *, digits: bool = False) -> Backend:
    backend = Backend(models.BPE())
    steps = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    if pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(pattern), "isolated"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)]
    )
    backend.normalizer = normalizers.NFC()
    backend.train_from_iterator(lines(1500), trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<pad>", "</s>"], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    ))  # fmt: skip
    return backend


_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
BACKENDS = {
    "ours": lambda: _byte_level(SPANISH_WORDS),
    "gpt2": lambda: _byte_level(None),
    "digits": lambda: _byte_level(None, digits=True),
    "llama3": lambda: _byte_level(_LLAMA3),
    "qwen": lambda: _byte_level(_LLAMA3.replace("{1,3}", "")),
}
_ODD = "\u00a0 \u2003 \u0301 \u0085 \u180e \ufeff \x1c ǅ · ´ « — ¿ 🚢 中文".split(" ")
PIECES = st.sampled_from(
    [" ", " ", " ", "  ", "\n", "\n\n", "\t", "\r\n", "a", "Ñandú", "e\u0301", "1909", "12", ",", ".", "'s", "'S",
     "</s>", "<pad>", "x" * 60, *_ODD]
)  # fmt: skip


@pytest.fixture(scope="module", params=BACKENDS)
def encoder(request: pytest.FixtureRequest) -> Encoder:
    text = BACKENDS[request.param]().to_str()
    return Encoder(backend_json=text, specials=[(1, "</s>")], dtype=np.dtype("<u2"))


def _whole(encoder: Encoder, texts: list[str]) -> list[list[int]]:
    return [found.ids for found in encoder._backend.encode_batch(texts, add_special_tokens=False)]


def _by_word(encoder: Encoder, texts: list[str]) -> list[list[int]]:
    assert encoder.is_by_word
    return [np.frombuffer(ids, "<u2").tolist() for ids in encoder.encode(texts)]


@settings(max_examples=400, deadline=None)
@given(texts=st.lists(st.lists(PIECES | st.text(max_size=6), max_size=25).map("".join), min_size=1, max_size=4))
def test_ids_by_word_equal_ids_of_the_whole_text(encoder: Encoder, texts: list[str]) -> None:
    assert _by_word(encoder, texts) == _whole(encoder, texts)


def test_ids_by_word_stay_the_same_when_the_cache_overflows(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    text = paragraphs(300_000)
    blocks = [text[at : at + 3000] for at in range(0, len(text), 3000)]
    expected = _whole(encoder, blocks)
    assert _by_word(encoder, blocks) == expected
    monkeypatch.setattr("aura.data.encoder.MAX_CACHED_WORDS", 50)
    for at in range(0, len(blocks), 7):
        assert _by_word(encoder, blocks[at : at + 7]) == expected[at : at + 7]
    assert all(len(word) <= 48 for word in encoder._after_space)


def test_a_tokenizer_with_unknown_rules_is_not_encoded_by_word() -> None:
    known = json.loads(BACKENDS["ours"]().to_str())
    assert splits_at_spaces(known)
    for change in (
        {"normalizer": {"type": "NFKC"}},
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}},
        {"model": known["model"] | {"dropout": 0.1}},
        {"model": {"type": "Unigram"}},
        {
            "added_tokens": [
                {"content": "a b", "special": False, "lstrip": False, "rstrip": False, "single_word": False}
            ]
        },
    ):
        assert not splits_at_spaces(known | change), change
    other = json.loads(json.dumps(known))
    other["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\w+ \w+|."
    assert not splits_at_spaces(other)


def test_a_unigram_model_with_an_end_of_text_piece_does_not_end_a_document(tmp_path: Path) -> None:
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((letter, -5.0) for letter in "</s>abc ")]
    backend = Backend(models.Unigram(pieces, unk_id=0))
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    encoder = Encoder(
        backend_json=tokenizer.backend_json(),
        specials=[(tokenizer.eos_id, tokenizer.eos_text)],
        dtype=np.dtype("<u2"),
    )
    assert tokenizer.eos_id in tokenizer.encode("ab</s>c")  # what the library gives
    (ids,) = encoder.encode(["ab</s>c</s>"])
    found = np.frombuffer(ids, "<u2").tolist()
    assert tokenizer.eos_id not in found
    assert "".join(tokenizer._backend.id_to_token(id_) for id_ in found) == "ab</s>c</s>"


def _with_bos() -> Backend:
    """A BPE as converted from SentencePiece: merges lead to <s>, and a rule puts it before every text."""
    letters = ["<unk>", "<s>", "</s>", "<pad>", *"<s>/abc", "<s"]
    vocabulary = {token: at for at, token in enumerate(dict.fromkeys(letters))}
    backend = Backend(models.BPE(vocabulary, [("<", "s"), ("<s", ">")], unk_token="<unk>"))
    backend.add_special_tokens(["<s>", "</s>", "<pad>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    return backend


def test_a_special_token_that_a_text_spells_out_never_becomes_one_though_merges_lead_to_it(tmp_path: Path) -> None:
    _with_bos().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    ))  # fmt: skip
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.bos_id in tokenizer.encode("ab<s>c")  # what the library gives
    encoder = Encoder(backend_json=tokenizer.backend_json(), specials=tokenizer.specials, dtype=np.dtype("<u2"))
    for text in ("ab<s>c", "<s>", "<s><s>a<s>"):
        found = np.frombuffer(encoder.encode([text])[0], "<u2").tolist()
        assert tokenizer.bos_id not in found
        assert "".join(tokenizer._backend.id_to_token(id_) for id_ in found) == text


def test_a_saved_tokenizer_adds_no_bos_that_training_never_saw(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    _with_bos().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    ))  # fmt: skip
    tokenizer = load_tokenizer(str(tmp_path))
    tokenizer.save(tmp_path / "saved")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert theirs("abc")["input_ids"] == tokenizer.encode("abc")
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == ("<s>", "</s>", "<pad>")


# --- trained on the text -------------------------------------------------------------------------------------------


def test_a_tokenizer_of_another_text_is_not_used_for_this_one(tmp_path: Path) -> None:
    """A run that was killed before its first step left one: 6.04 tokens a word instead of 1.51."""
    first, second = lines(400, seed=1), [line.upper() for line in lines(400, seed=2)]
    of_first = trained_once(lambda: first, vocab_size=400, folder=tmp_path)
    of_second = trained_once(lambda: second, vocab_size=400, folder=tmp_path)
    assert of_second.identity == train_tokenizer(second, vocab_size=400, folder=tmp_path / "new").identity
    assert of_second.identity != of_first.identity
    before = {path.name: path.stat().st_ino for path in tmp_path.glob("tokenizer-400-*")}
    assert len(before) == 2
    assert trained_once(lambda: first, vocab_size=400, folder=tmp_path).identity == of_first.identity
    assert {path.name: path.stat().st_ino for path in tmp_path.glob("tokenizer-400-*")} == before


def test_very_long_words_do_not_slow_training_down_and_ordinary_text_gives_the_same_tokenizer(tmp_path: Path) -> None:
    """Twenty words of 200 KB took 150 seconds; the work is counted by the longest word that reaches the library."""
    dice = random.Random(0)
    huge = ["".join(dice.choices("abcdefgh", k=200_000)), "-" * 200_000, " " * 200_000 + "x", "a" * 999]
    parts = list(_limited([f"hola {word} mar" for word in huge]))
    assert max(len(word) for part in parts for word in re.findall(r"\S+|\s+", part)) <= 1001
    assert "".join(parts[0].split("\n")) == f"hola {huge[0]} mar"  # cut, not dropped
    ordinary = lines(300)
    assert list(_limited(ordinary)) == ordinary
