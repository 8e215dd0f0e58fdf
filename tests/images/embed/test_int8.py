"""`--dtype int8`: products in int8. They give other vectors, so nothing takes them for those of a better precision."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from kills import Killed, kill_at
from rehearsal import compare
from test_engines import alter, encoder, reversed_, vectors
from whole_job import run

from embed.config import EmbedConfig
from embed.model import Encoder, engines, int8, openvino
from embed.model.int8 import QuantizationFailed
from embed.model.peak import MatrixProducts
from embed.model.resolve import dtype_for
from estiba.errors import ConfigError

LEAST_COSINE = 0.97
INT8 = {"dtype": "int8"}


def test_vectors_point_about_where_those_of_float32_do(minilm, texts):
    config = EmbedConfig(model=str(minilm), device="cpu", **INT8)
    fast, exact = Encoder(config, texts), encoder(minilm, engine="torch")
    assert fast.computed_by["dtype"] == "int8"
    assert fast.identity["products"] == "int8" and fast.identity["dtype"] == "float32"
    found, expected = vectors(fast, texts), vectors(exact, texts)
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    cosines = (found * expected).sum(axis=1)
    assert cosines.min() >= LEAST_COSINE and cosines.max() < 0.99999  # or nothing would be in int8


def test_the_vector_of_a_text_does_not_depend_on_the_rest_of_its_batch(minilm, texts):
    one, all_of_them = (vectors(encoder(minilm, batch_size=size, **INT8), texts) for size in (1, 64))
    assert (one * all_of_them).sum(axis=1).min() > 0.9995  # rounding may differ with the padding


def test_a_cached_model_gives_the_bits_of_a_new_one_and_nncf_leaves_no_trace(
    minilm, texts, tmp_path, monkeypatch, capfd
):
    def bits(home: Path) -> bytes:
        monkeypatch.setattr(openvino.huggingface_hub.constants, "HF_HOME", str(home))
        return vectors(encoder(minilm, **INT8), texts).tobytes()

    first = bits(tmp_path / "home")
    assert len(list((tmp_path / "home/estiba-openvino").glob("*.xml"))) == 2  # float32 and int8
    monkeypatch.setattr(openvino, "quantized", lambda *_: pytest.fail("it was quantised again"))
    assert bits(tmp_path / "home") == first
    assert capfd.readouterr().out == ""
    assert "nncf" not in sys.modules and logging.getLoggerClass() is logging.Logger


def test_a_killed_job_ends_with_the_vectors_of_one_that_was_not_and_says_how_they_were_computed(
    root, inputs, minilm, texts, monkeypatch
):
    different = [f"{text} {number}" for number in range(3) for text in texts]
    pq.write_table(pa.table({"texto": different}), inputs / "a.parquet", row_group_size=20)
    options = {**INT8, "batch_size": 8}
    run(minilm, **options, output_path=str(root / "whole"), checkpoint_path=str(root / "other"))
    with monkeypatch.context() as patched:
        kill_at(patched, 4)
        with pytest.raises(Killed):
            run(minilm, **options)
    assert run(minilm, **options)["rows"]["resumed"] > 0
    assert compare(root / "whole", root / "output/data") == []
    metadata = pq.read_metadata(root / "output/data/a.parquet").metadata
    assert json.loads(metadata[b"estiba"])["products"] == "int8"
    assert json.loads(metadata[b"estiba.computed_by"])[0]["engines"][0]["dtype"] == "int8"


def test_work_in_int8_is_no_work_of_a_job_that_asks_for_another_precision(root, inputs, minilm, texts):
    pq.write_table(pa.table({"texto": texts}), inputs / "a.parquet")
    run(minilm, **INT8, output_path=str(root / "old"), no_checkpoint=True)
    for options, words in (
        ({}, "--dtype 'int8' there and not set here"),
        ({"dtype": "float32"}, "--dtype 'int8' there and 'float32' here"),
    ):
        with pytest.raises(ConfigError, match=words):
            run(minilm, reuse=str(root / "old"), **options)
    assert run(minilm, reuse=str(root / "old"), **INT8)["rows"]["computed_in_this_attempt"] == 0
    assert run(minilm, output_path=str(root / "other"))["rows"]["resumed"] == 0


def test_it_is_refused_where_it_cannot_be_computed(minilm, monkeypatch):
    with pytest.raises(ValueError, match="leave out --engine torch, or pass another --dtype"):
        encoder(minilm, engine="torch", **INT8)
    with pytest.raises(ConfigError, match=r"--dtype int8: it is for CPUs, and the device is cuda; pass --dtype auto"):
        dtype_for("int8", torch.device("cuda"))
    for package in ("openvino", "nncf"):
        with monkeypatch.context() as patched:
            patched.setattr(engines, "is_installed", lambda name="openvino", package=package: name != package)
            with pytest.raises(ConfigError, match=f"--dtype int8: the package {package} is not installed; pass"):
                encoder(minilm, **INT8)


def test_a_model_that_cannot_be_quantised_is_refused_with_the_reason(minilm, tmp_path, monkeypatch):
    monkeypatch.setattr(openvino.huggingface_hub.constants, "HF_HOME", str(tmp_path))

    def refuse(*_: object) -> None:
        raise QuantizationFailed("ValueError: no range")

    monkeypatch.setattr(openvino, "quantized", refuse)
    with pytest.raises(ConfigError, match=r"--dtype int8: its products cannot be quantised \(ValueError: no range\)"):
        encoder(minilm, **INT8)


def test_what_the_program_says_last_is_the_reason():
    graph = encoder_graph()
    with pytest.raises(QuantizationFailed, match=r"[Ii]nput"):
        int8.quantized(graph, [{"no_such_input": np.zeros((1, 4), np.float32)}])


def encoder_graph():
    ov = openvino.runtime()
    from openvino import opset13 as ops

    given = ops.parameter([-1, 4], ov.Type.f32, name="given")
    return ov.Model([ops.matmul(given, ops.constant(np.ones((4, 2), np.float32)), False, False)], [given], "graph")


def test_quite_other_vectors_are_not_used_and_that_is_told(minilm, texts, monkeypatch, caplog):
    plain = openvino.OpenVinoEngine.launch
    alter(monkeypatch, reversed_)
    altered = openvino.OpenVinoEngine.launch

    def launch(self, features, rows):
        return (altered if self.precision == "int8" else plain)(self, features, rows)

    monkeypatch.setattr(openvino.OpenVinoEngine, "launch", launch)
    with caplog.at_level(logging.WARNING):
        fallen = encoder(minilm, **INT8)
    assert "in int8 gives other vectors than torch in float32 (lowest cosine" in caplog.text
    assert fallen.computed_by["dtype"] == "float32" and fallen.computed_by["engine"].startswith("openvino")
    assert fallen.identity["products"] == "int8"  # a set of its own, whatever computed it


def test_the_rate_of_products_in_int8_can_be_measured():
    matrices = MatrixProducts([(32, 64), (64, 32)], 128, engine="openvino", precision="int8", device="cpu")
    assert matrices.flops_per_s(0.01) > 0
