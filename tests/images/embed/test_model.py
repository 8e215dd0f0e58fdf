"""Encoder: the vectors of sentence-transformers, a reason for every row without one, and every failure handled."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_tiny
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer
from transformers import RobertaConfig, RobertaModel

import embed
from embed.config import EmbedConfig
from embed.model import STATUS_WORDS, Encoder, Status, Stopped, resolve
from embed.model.forward import Engine, InFlight
from embed.model.tokens import FastTokens, Features, ModelTokens
from estiba.config import load
from estiba.errors import ConfigError, DataError

NOT_TEXT: list[Any] = [None, "", " \t\u3000", "\u200b", b"\xff\xfe", "a\ud800b"]
REASONS = [Status.NULL, Status.EMPTY, Status.EMPTY, Status.EMPTY, Status.INVALID_UTF8, Status.INVALID_UTF8]


def encoder_of(model: Path, **config: Any) -> Encoder:
    return Encoder(EmbedConfig(model=str(model), device="cpu", **config))


def vectors_of(encoder: Encoder, texts: list[Any]) -> np.ndarray:
    encoded = encoder.encode(encoder.tokenize(texts))
    assert (encoded.status == Status.OK).all()
    return encoded.vectors


def peer(model: Path, **options: Any) -> SentenceTransformer:
    return SentenceTransformer(str(model), device="cpu", local_files_only=True, **options)


def assert_same_directions(ours: np.ndarray, theirs: np.ndarray, least: float = 0.9999) -> None:
    theirs = theirs / np.linalg.norm(theirs, axis=1, keepdims=True)
    ours = ours / np.linalg.norm(ours, axis=1, keepdims=True)
    cosines = (ours * theirs).sum(axis=1)
    assert ours.shape == theirs.shape
    assert cosines.min() >= least, f"row {cosines.argmin()}: cosine {cosines.min()}"


@pytest.fixture(scope="module")
def encoder(minilm: Path) -> Encoder:
    return encoder_of(minilm)


@pytest.fixture(scope="module")
def small(tiny: Path) -> Encoder:
    return encoder_of(tiny)


# Agreement with sentence-transformers


def test_vectors_agree_with_sentence_transformers_row_by_row(encoder: Encoder, minilm: Path, texts: list[str]) -> None:
    ours = vectors_of(encoder, texts)
    assert_same_directions(ours, peer(minilm).encode_document(texts))
    assert np.allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-5)
    assert ours.dtype == np.float32
    assert (encoder.dimensions, encoder.max_length, encoder.device, encoder.dtype) == (384, 256, "cpu", "float32")


def test_a_plain_transformers_directory_is_mean_pooled(small: Encoder, tiny: Path, texts: list[str]) -> None:
    assert small.identity["pooling"] == "Transformer > Pooling(mean)"
    assert_same_directions(vectors_of(small, texts), peer(tiny).encode_document(texts))


def test_without_normalizing_vectors_keep_the_models_length(tiny: Path, texts: list[str]) -> None:
    ours = vectors_of(encoder_of(tiny, normalize=False), texts)
    theirs = peer(tiny).encode_document(texts)
    assert np.allclose(ours, theirs, atol=1e-5)
    assert np.abs(np.linalg.norm(theirs, axis=1) - 1).min() > 0.1


def test_dimensions_are_cut_and_then_scaled_to_unit_length(minilm: Path, texts: list[str]) -> None:
    encoder = encoder_of(minilm, dimensions=64)
    ours = vectors_of(encoder, texts)
    theirs = peer(minilm).encode_document(texts, truncate_dim=64, normalize_embeddings=True)
    assert encoder.dimensions == 64
    assert np.allclose(ours, theirs, atol=1e-5)


def test_a_models_own_truncate_dim_is_used(minilm: Path, texts: list[str], copy_of: Callable[..., Path]) -> None:
    model = copy_of(minilm, {"config_sentence_transformers.json": json.dumps({"truncate_dim": 32})})
    assert vectors_of(encoder_of(model), texts).shape == (len(texts), 32)


def test_a_shorter_max_length_reads_what_sentence_transformers_reads(minilm: Path, texts: list[str]) -> None:
    reference = peer(minilm)
    reference.max_seq_length = 16
    encoder = encoder_of(minilm, max_length=16)
    assert_same_directions(vectors_of(encoder, texts), reference.encode_document(texts))
    assert encoder.tokenize(texts).n_tokens.max() == 16


def test_bfloat16_keeps_the_direction(minilm: Path, texts: list[str]) -> None:
    encoder = encoder_of(minilm, dtype="bfloat16")
    assert encoder.dtype == "bfloat16"
    assert_same_directions(vectors_of(encoder, texts), peer(minilm).encode_document(texts), least=0.999)


@pytest.mark.parametrize(
    ("saved", "config", "include_prompt"),
    [
        ({"prompts": {"document": "pasaje: ", "query": "consulta: "}}, {}, True),
        ({"prompts": {"document": "pasaje: ", "query": "consulta: "}}, {}, False),
        ({"prompts": {"corpus": "corpus: ", "passage": "pasaje: "}}, {}, True),
        ({"prompts": {"corpus": "corpus: ", "passage": "pasaje: "}}, {"prompt_name": "passage"}, False),
        ({"prompts": {"tema": "tema: "}, "default_prompt_name": "tema"}, {}, True),
        ({"prompts": {"document": "pasaje: "}}, {"prompt": "resume: "}, False),
        ({"prompts": {"document": "pasaje: "}}, {"prompt": ""}, True),
    ],
)
def test_prompts_are_those_of_encode_document(
    minilm: Path,
    texts: list[str],
    copy_of: Callable[..., Path],
    saved: dict[str, Any],
    config: dict[str, str],
    include_prompt: bool,
) -> None:
    pooling = {"embedding_dimension": 384, "pooling_mode": "mean", "include_prompt": include_prompt}
    change = {"config_sentence_transformers.json": json.dumps(saved), "1_Pooling/config.json": json.dumps(pooling)}
    model = copy_of(minilm, change)
    encoder = encoder_of(model, **config)
    assert isinstance(encoder._tokens, FastTokens)
    some = [*texts[:6], texts[13]]
    theirs = peer(model).encode_document(some, **config)  # type: ignore[call-overload]
    assert_same_directions(vectors_of(encoder, some), theirs)


def test_static_embeddings_and_routers_work_through_the_models_own_preprocess(
    minilm: Path, tiny: Path, texts: list[str], tmp_path: Path
) -> None:
    tokenizer = Tokenizer.from_file(str(minilm / "tokenizer.json"))
    tokenizer.no_truncation()
    static = StaticEmbedding(tokenizer, embedding_weights=np.random.default_rng(0).normal(size=(30522, 32)))
    SentenceTransformer(modules=[static], device="cpu").save(str(tmp_path / "static"))
    document: list[Any] = list(peer(tiny).children())
    routed = Router.for_query_document([static], document)
    SentenceTransformer(modules=[routed], device="cpu").save(str(tmp_path / "router"))
    for name, kind in (("static", ModelTokens), ("router", FastTokens)):
        encoder = encoder_of(tmp_path / name)
        assert isinstance(encoder._tokens, kind)
        assert_same_directions(vectors_of(encoder, texts), peer(tmp_path / name).encode_document(texts))
        encoded = encoder.encode(encoder.tokenize([*NOT_TEXT, "mar"]))
        assert encoded.status.tolist() == [*REASONS, Status.OK]


def test_robertas_reserved_positions_are_not_used_for_tokens(minilm: Path, tmp_path: Path) -> None:
    config = RobertaConfig(
        vocab_size=30522,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=66,
        pad_token_id=0,
    )
    RobertaModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(minilm / name, tmp_path / name)
    encoder = encoder_of(tmp_path)  # the tokenizer alone would let 66 through, which is an index error
    assert encoder.max_length == 65
    encoded = encoder.encode(encoder.tokenize(["mar " * 500, "mar"]))
    assert encoded.n_tokens.tolist() == [65, 3]
    assert encoded.status.tolist() == [Status.OK, Status.OK]
    with pytest.raises(ConfigError, match="at most 65 tokens"):
        encoder_of(tmp_path, max_length=66)


# Rows without a vector


def test_rows_without_text_get_a_reason_and_zeros(small: Encoder) -> None:
    encoded = small.encode(small.tokenize([*NOT_TEXT, "mar"]))
    assert encoded.status.tolist() == [*REASONS, Status.OK]
    assert not encoded.vectors[:-1].any()
    assert encoded.vectors[-1].any()
    assert encoded.n_tokens.tolist() == [0] * len(NOT_TEXT) + [3]
    assert not encoded.truncated.any()
    assert {STATUS_WORDS[Status(status)] for status in encoded.status} == {"ok", "null", "empty", "invalid utf-8"}


def test_bad_rows_do_not_change_the_vectors_of_good_rows(small: Encoder, texts: list[str]) -> None:
    mixed: list[Any] = []
    for row, text in enumerate(texts):
        mixed += [text, NOT_TEXT[row % len(NOT_TEXT)]]
    encoded = small.encode(small.tokenize(mixed))
    assert encoded.vectors[::2].tobytes() == vectors_of(small, texts).tobytes()
    assert not encoded.vectors[1::2].any()


def test_bytes_are_decoded_as_text(small: Encoder, texts: list[str]) -> None:
    assert vectors_of(small, [text.encode() for text in texts]).tobytes() == vectors_of(small, texts).tobytes()


@pytest.mark.parametrize("rows", [[], [None, None]])
def test_a_window_without_text_is_encoded_without_error(small: Encoder, rows: list[None]) -> None:
    encoded = small.encode(small.tokenize(rows))
    assert encoded.vectors.shape == (len(rows), 32)
    assert encoded.padded_tokens == 0


def test_a_number_instead_of_a_text_is_refused(small: Encoder) -> None:
    with pytest.raises(DataError, match=r"row 1 .* float 3\.5.*--text-column"):
        small.tokenize(["mar", 3.5])  # type: ignore[list-item]


def test_truncated_marks_the_texts_that_were_not_read_to_the_end(small: Encoder) -> None:
    room = small.max_length - 2  # [CLS] and [SEP]
    encoded = small.encode(small.tokenize(["mar " * room, "mar " * (room + 1), "mar", "mar " * 90_000, None]))
    assert encoded.truncated.tolist() == [False, True, False, True, False]
    assert encoded.n_tokens.tolist() == [room + 2, room + 2, 3, room + 2, 0]


# Determinism


def test_a_window_gives_the_same_bits_every_time(tiny: Path, small: Encoder, texts: list[str]) -> None:
    first = vectors_of(small, texts).tobytes()
    assert vectors_of(small, texts).tobytes() == first
    assert vectors_of(encoder_of(tiny), texts).tobytes() == first


def test_vectors_come_back_in_the_order_of_the_rows(small: Encoder, texts: list[str]) -> None:
    order = np.random.default_rng(1).permutation(len(texts))
    shuffled = vectors_of(small, [texts[row] for row in order])
    assert np.allclose(shuffled, vectors_of(small, texts)[order], atol=1e-5)


@pytest.mark.parametrize(
    "config", [{"batch_size": 1}, {"batch_size": 3}, {"token_budget": 20}, {"token_budget": 9_999}]
)
def test_batch_limits_do_not_change_the_vectors(
    tiny: Path, small: Encoder, texts: list[str], config: dict[str, int]
) -> None:
    assert np.allclose(vectors_of(encoder_of(tiny, **config), texts), vectors_of(small, texts), atol=1e-5)


def test_batch_size_and_token_budget_bound_every_batch(
    tiny: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = encoder_of(tiny, batch_size=4, token_budget=300)
    shapes = spy(monkeypatch, encoder._engine)
    encoded = encoder.encode(encoder.tokenize(texts))
    assert max(rows for rows, _ in shapes) == 4
    assert all(rows == 1 or rows * width <= 300 for rows, width in shapes)
    assert encoded.padded_tokens == sum(rows * width for rows, width in shapes)
    assert shapes[0][1] == encoded.n_tokens.max()


def test_one_thread_may_tokenize_while_another_encodes(small: Encoder, texts: list[str]) -> None:
    expected = vectors_of(small, texts).tobytes()
    windows: list[Any] = []
    thread = threading.Thread(target=lambda: windows.extend(small.tokenize(texts) for _ in range(20)))
    thread.start()
    while thread.is_alive():
        assert vectors_of(small, texts).tobytes() == expected
    thread.join()
    assert len(windows) == 20
    assert small.encode(windows[-1]).vectors.tobytes() == expected


def test_a_stop_takes_effect_between_batches(tiny: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = encoder_of(tiny, batch_size=2)
    shapes = spy(monkeypatch, encoder._engine)
    with pytest.raises(Stopped):
        encoder.encode(encoder.tokenize(texts), should_stop=lambda: len(shapes) >= 3)
    assert len(shapes) == 3


def spy(monkeypatch: pytest.MonkeyPatch, engine: Engine) -> list[tuple[int, int]]:
    """Record the (rows, width) of every batch from now on."""
    shapes: list[tuple[int, int]] = []
    launch = engine.launch

    def spied(features: Features, rows: np.ndarray) -> InFlight:
        shapes.append(tuple(features["input_ids"].shape))
        return launch(features, rows)

    monkeypatch.setattr(engine, "launch", spied)
    return shapes


# Out of memory


def small_memory(monkeypatch: pytest.MonkeyPatch, engine: Engine, holds_tokens: int) -> list[tuple[int, int]]:
    """Let `engine` run out of memory above `holds_tokens` padded tokens. Returns the shapes that were tried."""
    tried: list[tuple[int, int]] = []
    launch, device = engine.launch, torch.device("cpu")

    def launched(features: Features, rows: np.ndarray) -> InFlight:
        tried.append(tuple(features["input_ids"].shape))
        if features["input_ids"].numel() > holds_tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        named, engine.device = engine.device, device  # compute on the CPU, whatever device it claims to be
        try:
            return launch(features, rows)
        finally:
            engine.device = named

    monkeypatch.setattr(engine, "launch", launched)
    return tried


def test_only_the_batch_that_does_not_fit_is_split_and_later_ones_are_smaller(
    tiny: Path, small: Encoder, texts: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    many = texts * 8
    encoder = encoder_of(tiny, token_budget=8_000)
    tried = small_memory(monkeypatch, encoder._engine, 4_100)
    assert np.allclose(vectors_of(encoder, many), vectors_of(small, many), atol=1e-5)
    failed = [rows * width for rows, width in tried if rows * width > 4_100]
    assert len(failed) == 1
    assert encoder.token_budget == failed[0] // 2
    assert tried[1][0] + tried[2][0] == tried[0][0]
    assert "out of memory" in capfd.readouterr().err
    tried.clear()
    vectors_of(encoder, many)
    assert max(rows * width for rows, width in tried) <= 4_100


def test_a_batch_is_halved_down_to_single_rows(
    tiny: Path, small: Encoder, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = encoder_of(tiny)
    tried = small_memory(monkeypatch, encoder._engine, 512)
    same = [texts[14]] * 5
    long = ["mar " * 600, "pan " * 600, "sol " * 600]
    assert np.allclose(vectors_of(encoder, long + same), vectors_of(small, long + same), atol=1e-5)
    assert tried[0] == (3, 512)
    assert tried.count((1, 512)) == 3


def test_a_row_that_does_not_fit_alone_is_computed_on_the_cpu(
    tiny: Path, small: Encoder, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    encoder = encoder_of(tiny, dtype="bfloat16")
    small_memory(monkeypatch, encoder._engine, 100)
    monkeypatch.setattr(encoder._engine, "device", torch.device("cuda"))
    texts = ["mar " * 300, "El viento cambia."]
    ours = vectors_of(encoder, texts)
    assert np.allclose(ours[0], vectors_of(small, texts)[0], atol=1e-5)  # float32, on the CPU
    assert_same_directions(ours, vectors_of(small, texts), least=0.999)
    assert "302 tokens does not fit on cuda" in capfd.readouterr().err


def test_a_row_that_does_not_fit_on_the_cpu_ends_with_a_remedy(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = encoder_of(tiny)
    small_memory(monkeypatch, encoder._engine, 100)
    with pytest.raises(DataError, match=r"row 1 .* 302 tokens; lower --max-length \(now 512\)"):
        encoder.encode(encoder.tokenize(["mar", "mar " * 300]))


def test_the_memory_of_a_failed_batch_is_freed_before_the_next_try(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = encoder_of(tiny)
    held: list[weakref.ref[torch.Tensor]] = []
    launch = encoder._engine.launch

    def launched(features: Features, rows: np.ndarray) -> InFlight:
        assert all(tensor() is None for tensor in held)
        if len(rows) > 1:
            activations = torch.zeros(4)
            held.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return launch(features, rows)

    monkeypatch.setattr(encoder._engine, "launch", launched)
    gc.disable()
    try:
        vectors_of(encoder, ["mar", "sal", "sol"])
    finally:
        gc.enable()
    assert len(held) == 2


def test_other_runtime_errors_are_not_treated_as_out_of_memory(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = encoder_of(tiny)

    def broken(features: Features, rows: np.ndarray) -> InFlight:
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(encoder._engine, "launch", broken)
    with pytest.raises(RuntimeError, match="device-side assert"):
        encoder.encode(encoder.tokenize(["mar"]))


# Invalid vectors


def overflow_in_half_precision(model: Any) -> None:
    model.encoder.layer[-1].output.LayerNorm.weight.mul_(3e5)  # float16 ends at 65,504


def test_rows_that_overflow_in_half_precision_are_computed_in_float32(
    minilm: Path, tmp_path: Path, texts: list[str]
) -> None:
    model = make_tiny(minilm, tmp_path / "loud", overflow_in_half_precision)
    encoder = encoder_of(model, dtype="float16")
    assert encoder.dtype == "float16"
    assert_same_directions(vectors_of(encoder, texts), peer(model).encode_document(texts))


def test_rows_of_two_batches_that_overflow_share_none_in_float32(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed job does not compute saved rows, and so does not learn which of them overflowed."""
    encoder = encoder_of(tiny, dtype="float16", batch_size=2)
    break_rows(monkeypatch, (torch.float16,), float("inf"), [0, 2])
    launch, batches = Engine.launch, []

    def launched(engine: Engine, features: Features, batch: np.ndarray) -> InFlight:
        if engine.dtype == torch.float32:
            batches.append(batch.tolist())
        return launch(engine, features, batch)

    monkeypatch.setattr(Engine, "launch", launched)
    window = encoder.tokenize(["barco " * count for count in (40, 30, 20, 10)])
    whole = encoder.encode(window)
    resumed = encoder.encode(window, not_needed=np.array([True, True, False, False]))
    assert batches == [[0], [2], [2]]
    assert np.array_equal(whole.vectors[2:], resumed.vectors[2:])


def test_auto_uses_float32_for_a_model_that_overflows_in_half_precision(
    minilm: Path, tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resolve, "dtype_for", lambda *_: torch.float16)
    model = make_tiny(minilm, tmp_path / "loud", overflow_in_half_precision)
    encoder = encoder_of(model)
    assert encoder.dtype == encoder.identity["dtype"] == "float32"
    assert encoder.token_budget == 1_536
    assert_same_directions(vectors_of(encoder, texts), peer(model).encode_document(texts))


def break_rows(monkeypatch: pytest.MonkeyPatch, dtypes: tuple[torch.dtype, ...], value: float, rows: list[int]) -> None:
    launch = Engine.launch

    def launched(engine: Engine, features: Features, batch: np.ndarray) -> InFlight:
        in_flight = launch(engine, features, batch)
        if engine.dtype in dtypes:
            with torch.inference_mode():
                in_flight.vectors_BD[torch.from_numpy(np.isin(batch, rows))] = value
        return in_flight

    monkeypatch.setattr(Engine, "launch", launched)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_only_broken_rows_are_computed_again(
    tiny: Path, small: Encoder, texts: list[str], monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    encoder = encoder_of(tiny, dtype="bfloat16")
    unharmed = vectors_of(encoder, texts)
    expected = vectors_of(small, texts)
    break_rows(monkeypatch, (torch.bfloat16,), value, [2, 7])
    ours = vectors_of(encoder, texts)
    assert np.allclose(ours[[2, 7]], expected[[2, 7]], atol=1e-5)
    others = np.setdiff1d(np.arange(len(texts)), [2, 7])
    assert ours[others].tobytes() == unharmed[others].tobytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("value", [float("nan"), 0.0])
def test_a_row_broken_in_float32_too_gets_zeros_and_the_reason(
    tiny: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch, dtype: str, value: float
) -> None:
    encoder = encoder_of(tiny, dtype=dtype, engine="torch")
    break_rows(monkeypatch, (torch.bfloat16, torch.float32), value, [3])
    encoded = encoder.encode(encoder.tokenize(texts))
    assert np.flatnonzero(encoded.status).tolist() == [3]
    assert encoded.status[3] == Status.NOT_FINITE
    assert STATUS_WORDS[Status.NOT_FINITE] == "not finite"
    assert not encoded.vectors[3].any()
    assert encoded.n_tokens[3] == 0
    assert np.isfinite(encoded.vectors).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_unnormalized_vectors_are_checked_for_being_finite(
    tiny: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    encoder = encoder_of(tiny, normalize=False, engine="torch")
    break_rows(monkeypatch, (torch.float32,), value, [5])
    encoded = encoder.encode(encoder.tokenize(texts))
    assert np.flatnonzero(encoded.status == Status.NOT_FINITE).tolist() == [5]
    assert np.isfinite(encoded.vectors).all()


def test_a_pooled_zero_is_not_turned_into_nan(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = encoder_of(tiny, engine="torch")
    hook = encoder._engine.model[-1].register_forward_hook(
        lambda _module, _given, features: {**features, "sentence_embedding": features["sentence_embedding"] * 0}
    )
    encoded = encoder.encode(encoder.tokenize(["mar"]))
    hook.remove()
    assert encoded.status.tolist() == [Status.NOT_FINITE]
    assert (encoded.vectors == 0).all()


def test_damaged_weights_are_refused_at_the_start(minilm: Path, tmp_path: Path) -> None:
    def damage(model: Any) -> None:
        model.encoder.layer[0].output.dense.weight.fill_(float("nan"))

    model = make_tiny(minilm, tmp_path / "nan", damage)
    for dtype in ("float32", "float16"):
        with pytest.raises(ConfigError, match=r"not finite.*weights are damaged"):
            encoder_of(model, dtype=dtype)


# Configuration mistakes


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"device": "tpu-please"}, r"--device is 'tpu-please'.*pass cpu, cuda"),
        ({"dtype": "int4"}, r"--dtype is 'int4'.*float16"),
        ({"prompt_name": "nada"}, r"--prompt-name 'nada'.*document, query.*--prompt TEXT"),
        ({"prompt": "a", "prompt_name": "query"}, r"pass one of the two"),
        ({"prompt": "mar " * 600}, r"uses 512 of 512 tokens"),
        ({"dimensions": 4096}, r"--dimensions 4096: the model has 32"),
        ({"dimensions": 0}, r"--dimensions is '0'.*greater than or equal to 1"),
        ({"max_length": 513}, r"--max-length 513: .* at most 512"),
        ({"max_length": 2}, r"--max-length is '2'.*greater than or equal to 3"),
        ({"batch_size": -1}, r"--batch-size is '-1'"),
        ({"token_budget": 0}, r"--token-budget is '0'"),
    ],
)
def test_a_wrong_setting_is_refused_with_the_remedy(tiny: Path, config: dict[str, Any], message: str) -> None:
    """Values that are wrong by themselves, and values that are wrong for this model."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in {"device": "cpu", **config}.items()]
    with pytest.raises(ConfigError, match=message):
        Encoder(load(EmbedConfig, argv=[f"--model={tiny}", *flags], environ={}, hyperparameters={}))


def test_a_max_length_that_leaves_only_special_tokens_is_refused(tiny: Path) -> None:
    config = EmbedConfig(model=str(tiny), device="cpu").model_copy(update={"max_length": 2})
    with pytest.raises(ConfigError, match=r"--max-length 2: .*2 tokens of its own"):
        Encoder(config)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_is_refused_with_the_remedy(tiny: Path) -> None:
    with pytest.raises(ConfigError, match=r"0 CUDA devices are visible.*--gpus all"):
        Encoder(EmbedConfig(model=str(tiny), device="cuda"))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("/nowhere/at/all", "no such directory"),
        ("./nowhere", "no such directory"),
        ("s3://bucket/model", "copy it to a directory"),
        ("nobody/nothing", "hub cannot provide it.*--model DIRECTORY"),
        ("not a name", "hub cannot provide it"),
    ],
)
def test_a_missing_model_is_refused_with_the_remedy(model: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Encoder(EmbedConfig(model=model))


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "datos.parquet").touch()
    with pytest.raises(ConfigError, match=r"neither modules\.json nor config\.json \(found datos\.parquet\)"):
        encoder_of(tmp_path)


def test_a_directory_without_weights_is_refused(tiny: Path, copy_of: Callable[..., Path]) -> None:
    model = copy_of(tiny)
    (model / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="cannot be loaded"):
        encoder_of(model)


def test_a_truncated_weights_file_is_refused(tiny: Path, copy_of: Callable[..., Path]) -> None:
    model = copy_of(tiny)
    weights = model / "model.safetensors"
    half = weights.read_bytes()[:100_000]
    weights.unlink()
    weights.write_bytes(half)
    with pytest.raises(ConfigError, match="cannot be loaded"):
        encoder_of(model)


def test_a_model_that_would_be_partly_random_is_refused(tiny: Path, copy_of: Callable[..., Path]) -> None:
    model = copy_of(tiny)
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    kept = {name: tensor for name, tensor in weights.items() if "layer.1." not in name}
    save_file(kept, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"16 weights are missing \(encoder\.layer\.1"):
        encoder_of(model)


def test_code_that_comes_with_a_model_is_not_run_unasked(minilm: Path, copy_of: Callable[..., Path]) -> None:
    modules = [{"idx": 0, "name": "0", "path": "", "type": "mine.Reader"}]
    model = copy_of(minilm, {"modules.json": json.dumps(modules)})
    (model / "mine.py").write_text(f"open({str(model / 'ran')!r}, 'w')\n")
    with pytest.raises(ConfigError, match="--trust-remote-code if you trust it"):
        encoder_of(model)
    assert not (model / "ran").exists()


def test_pickled_weights_work_and_pickled_code_does_not_run(
    tiny: Path, small: Encoder, copy_of: Callable[..., Path]
) -> None:
    model = copy_of(tiny)
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save(weights, model / "pytorch_model.bin")
    assert np.allclose(vectors_of(encoder_of(model), ["mar"]), vectors_of(small, ["mar"]), atol=1e-6)

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (model / "ran",)

    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ConfigError, match="cannot be loaded"):
        encoder_of(model)
    assert not (model / "ran").exists()


# Identity


def test_identity_depends_on_the_content_and_not_on_the_location(
    small: Encoder, tiny: Path, minilm: Path, tmp_path: Path, copy_of: Callable[..., Path]
) -> None:
    assert small.identity["digest"].startswith("xxh3-128:")
    elsewhere = copy_of(tiny, {"README.md": "No part of the model."}, "elsewhere")
    assert encoder_of(elsewhere).identity == small.identity
    assert str(tmp_path) not in json.dumps(small.identity)

    def nudge(model: Any) -> None:
        model.encoder.layer[0].output.dense.bias[0] += 1e-3

    digests = {
        small.identity["digest"],
        encoder_of(make_tiny(minilm, tmp_path / "nudged", nudge)).identity["digest"],
        encoder_of(copy_of(tiny, {"vocab.txt": None}, "no-vocab")).identity["digest"],
        encoder_of(copy_of(tiny, {"special_tokens_map.json": "{}"}, "map")).identity["digest"],
    }
    assert len(digests) == 4
    assert encoder_of(tiny, prompt="pasaje: ").identity != small.identity


def test_a_model_in_the_hubs_cache_loads_offline_and_its_commit_is_known(
    tiny: Path, small: Encoder, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "models--estiba--tiny"
    shutil.copytree(tiny, folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    encoder = Encoder(EmbedConfig(model="estiba/tiny", device="cpu"))
    assert (encoder.identity["model"], encoder.identity["commit"]) == ("estiba/tiny", commit)
    assert encoder.identity["digest"] == small.identity["digest"]
    assert vectors_of(encoder, texts).tobytes() == vectors_of(small, texts).tobytes()
    with pytest.raises(ConfigError, match="at revision 'v9'"):
        Encoder(EmbedConfig(model="estiba/tiny", revision="v9"))


QUIET = """
import socket, sys
def refuse(*_): raise SystemExit("the model is a directory, but the network was used")
socket.socket.connect = socket.getaddrinfo = refuse
from embed.config import EmbedConfig
from embed.model import Encoder
for model in sys.argv[1:]:
    encoder = Encoder(EmbedConfig(model=model, device="cpu"))
    encoder.encode(encoder.tokenize(["Zarpamos al alba. " * 500, None, "mar"]))
"""


def test_a_healthy_run_prints_nothing_and_needs_no_network(minilm: Path, tiny: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    package = str(Path(next(iter(embed.__path__))).parent)
    environ["PYTHONPATH"] = os.pathsep.join([package, *(path for path in sys.path if path)])
    done = subprocess.run(
        [sys.executable, "-c", QUIET, minilm, tiny], env=environ, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_libraries_log_again_after_a_load(tiny: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(ConfigError):
        encoder_of(tiny.parent / "nowhere")
    encoder_of(tiny)
    peer(tiny)
    assert "Loading weights" in capfd.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_half_precision_on_a_gpu_agrees_with_the_cpu(minilm: Path, encoder: Encoder, texts: list[str]) -> None:
    on_gpu = Encoder(EmbedConfig(model=str(minilm), device="cuda"))
    assert on_gpu.dtype == "float16"
    assert_same_directions(vectors_of(on_gpu, texts), vectors_of(encoder, texts), least=0.999)
