"""Rows without padding, as a GPU computes them: the same vectors, or padded rows and the reason.

The kernels exist on GPUs only. Here torch's own attention, a row at a time, takes their place.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import bge_m3
import numpy as np
import pytest
import torch
import transformers
from torch.nn.functional import scaled_dot_product_attention

from embed.config import EmbedConfig
from embed.model import Encoder, engines, varlen
from embed.model.varlen import attention_here

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
SMALL = {
    "vocab_size": 30522,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 600,
}
GROUPED = SMALL | {"num_key_value_heads": 2}


def by_rows(query, key, value, starts, longest, scale, is_causal):
    found = []
    for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        assert end - start <= longest
        parts = (each[start:end].transpose(0, 1)[None] for each in (query, key, value))
        found.append(scaled_dot_product_attention(*parts, scale=scale, is_causal=is_causal)[0].transpose(0, 1))
    return torch.cat(found)


def across_rows(query, key, value, starts, longest, scale, is_causal):
    whole = torch.tensor([0, len(query)], dtype=torch.int32)
    return by_rows(query, key, value, whole, len(query), scale, is_causal)


def model_of(minilm: Path, folder: Path, kind: str) -> Path:
    """A small model with random weights and MiniLM's tokenizer."""
    torch.manual_seed(1)
    config, model = {
        "bert": (transformers.BertConfig(**SMALL), transformers.BertModel),
        "xlm-roberta": (transformers.XLMRobertaConfig(**SMALL, pad_token_id=0), transformers.XLMRobertaModel),
        "distilbert": (
            transformers.DistilBertConfig(vocab_size=30522, dim=32, n_layers=2, n_heads=4, hidden_dim=64),
            transformers.DistilBertModel,
        ),
        "mpnet": (transformers.MPNetConfig(**SMALL), transformers.MPNetModel),
        "qwen2": (transformers.Qwen2Config(**GROUPED), transformers.Qwen2Model),
        "modernbert": (
            transformers.ModernBertConfig(**SMALL, local_attention=16, pad_token_id=0),
            transformers.ModernBertModel,
        ),
    }[kind]
    model(config).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(minilm / name, folder)
    return folder


def encoder(model: Path, monkeypatch: pytest.MonkeyPatch, attention=None, **options: object) -> Encoder:
    with monkeypatch.context() as patch:
        patch.setattr(engines, "attention_here", lambda *_: attention and (attention, "row by row"))
        engine = "torch" if attention is None else "auto"
        patch.setattr(engines, "is_installed", lambda *_: False)  # no OpenVINO, as on a GPU
        return Encoder(EmbedConfig(model=str(model), device="cpu", engine=engine, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["minilm", "tiny_model", "bert", "xlm-roberta", "distilbert", "qwen2"])
@pytest.mark.parametrize("options", [{}, {"batch_size": 3, "dimensions": 16, "normalize": False}, {"prompt": "a: "}])
def test_vectors_are_those_of_padded_rows(request, texts, minilm, tmp_path, monkeypatch, kind, options):
    fixtures = ("minilm", "tiny_model")
    model = request.getfixturevalue(kind) if kind in fixtures else model_of(minilm, tmp_path / kind, kind)
    unpadded = encoder(model, monkeypatch, by_rows, **options)
    padded = encoder(model, monkeypatch, **options)
    assert unpadded.computed_by["engine"] == f"torch-varlen {torch.__version__} (row by row)"
    assert padded.computed_by["engine"].startswith("torch 2")
    found, expected = (each.encode(each.tokenize(texts)) for each in (unpadded, padded))
    assert (found.status == expected.status).all()
    assert np.allclose(found.vectors, expected.vectors, atol=2e-6, rtol=1e-4)
    assert unpadded.identity == padded.identity  # so that either finishes the work of the other


def test_the_outputs_of_every_token_are_those_of_padded_rows(texts, tmp_path, monkeypatch):
    model = bge_m3.build(tmp_path / "bge")
    options = {"sparse": True, "multi_vector": True}
    unpadded, padded = encoder(model, monkeypatch, by_rows, **options), encoder(model, monkeypatch, **options)
    assert unpadded.computed_by["engine"].startswith("torch-varlen ")
    found, expected = (each.encode(each.tokenize(texts)).tokens for each in (unpadded, padded))
    assert np.allclose(found.weights, expected.weights, atol=2e-6, rtol=1e-4)
    assert np.allclose(found.vectors, expected.vectors, atol=2e-6, rtol=1e-4)


def test_the_padding_token_inside_a_text_has_the_position_that_the_model_gives_it(tmp_path, monkeypatch):
    """RoBERTa does not count it."""
    model = bge_m3.build(tmp_path / "bge")
    texts = ["hola <pad> mundo <pad> a b c", "<pad>", "<pad> <pad> a", "a b c d e f g h"]
    unpadded, padded = encoder(model, monkeypatch, by_rows), encoder(model, monkeypatch)
    found, expected = (each.encode(each.tokenize(texts)) for each in (unpadded, padded))
    assert 1 in unpadded.tokenize(texts).ids  # the id of <pad>
    assert np.allclose(found.vectors, expected.vectors, atol=2e-6, rtol=1e-4)


def test_padding_that_is_not_computed_is_not_counted(texts, tiny_model, monkeypatch):
    unpadded, padded = encoder(tiny_model, monkeypatch, by_rows), encoder(tiny_model, monkeypatch)
    found, expected = (each.encode(each.tokenize(texts)) for each in (unpadded, padded))
    assert found.padded_tokens == found.n_tokens[found.origin == 0].sum() < expected.padded_tokens


def test_kernels_with_other_vectors_are_not_used_and_that_is_told(texts, minilm, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    found, padded = encoder(minilm, monkeypatch, across_rows), encoder(minilm, monkeypatch)
    assert found.computed_by == padded.computed_by
    assert "torch-varlen" in caplog.text and "gives other vectors than torch in float32" in caplog.text
    assert (found.encode(found.tokenize(texts)).vectors == padded.encode(padded.tokenize(texts)).vectors).all()


def no_kernel(*_, **__):
    raise RuntimeError("no kernel image is available for execution on the device")


@pytest.mark.parametrize(
    ("kind", "attention", "reason"),
    [
        ("modernbert", by_rows, "its attention has a window"),
        ("bert", no_kernel, "RuntimeError: no kernel image is available"),
        ("mpnet", by_rows, "has an attention of its own"),
    ],
)
def test_what_cannot_be_computed_without_padding_is_padded_and_that_is_told(
    texts, minilm, tmp_path, monkeypatch, caplog, kind, attention, reason
):
    caplog.set_level(logging.INFO)
    model = model_of(minilm, tmp_path / kind, kind)
    found, padded = encoder(model, monkeypatch, attention), encoder(model, monkeypatch)
    assert found.computed_by == padded.computed_by
    assert "rows are padded on cpu: " in caplog.text and reason in caplog.text
    assert (found.encode(found.tokenize(texts)).vectors == padded.encode(padded.tokenize(texts)).vectors).all()


def of_torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    return {"is_causal": is_causal}


def of_torch_2_13(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    return {"scale": scale, "window_size": window_size}


def test_each_release_of_torch_gets_the_arguments_that_it_has():
    query = torch.zeros(3, 2, 4)
    old, new = (varlen._by_torch(kernel) for kernel in (of_torch_2_10, of_torch_2_13))
    starts = torch.tensor([0, 3], dtype=torch.int32)
    assert old(query, query, query, starts, 3, 0.5, True) == {"is_causal": True}  # 0.5 is 1 / sqrt(4), as usual
    assert old(query, query, query, starts, 3, None, False) == {"is_causal": False}
    assert new(query, query, query, starts, 3, 0.25, True) == {"scale": 0.25, "window_size": (-1, 0)}


def test_rows_are_padded_on_a_cpu_and_in_float32():
    assert attention_here(torch.device("cpu"), torch.bfloat16) is None
    assert attention_here(torch.device("cuda"), torch.float32) is None
