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
from embed.data.rows import COMPARED_TEXTS
from embed.model import Encoder, engines, int8, openvino, samples
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


def test_the_vector_of_a_text_does_not_depend_on_the_rest_of_its_batch(tiny, texts):
    one, all_of_them = (vectors(encoder(tiny, batch_size=size, **INT8), texts) for size in (1, 64))
    assert (one * all_of_them).sum(axis=1).min() > 0.9995  # rounding may differ with the padding


def test_a_cached_model_gives_the_bits_of_a_new_one_and_nncf_leaves_no_trace(tiny, texts, tmp_path, monkeypatch, capfd):
    def bits(home: Path) -> bytes:
        monkeypatch.setattr(openvino.huggingface_hub.constants, "HF_HOME", str(home))
        return vectors(encoder(tiny, **INT8), texts).tobytes()

    first = bits(tmp_path / "home")
    assert len(list((tmp_path / "home/estiba-openvino").glob("*.xml"))) == 2  # float32 and int8
    monkeypatch.setattr(openvino, "quantized", lambda *_: pytest.fail("it was quantised again"))
    assert bits(tmp_path / "home") == first
    monkeypatch.undo()
    monkeypatch.setattr(openvino.huggingface_hub.constants, "HF_HOME", str(tmp_path / "home"))
    Encoder(EmbedConfig(model=str(tiny), device="cpu", **INT8), texts)  # other ranges take the place of the first
    assert len(list((tmp_path / "home/estiba-openvino").glob("*-int8-*.xml"))) == 1
    assert not list((tmp_path / "home/estiba-openvino").glob("*.new"))
    assert capfd.readouterr().out == ""
    assert "nncf" not in sys.modules and logging.getLoggerClass() is logging.Logger


def test_two_machines_set_the_same_ranges(tiny, texts, tmp_path, monkeypatch):
    """Where nothing is kept, as on a new spot host and where the cache cannot be written."""
    (tmp_path / "file").write_text("")
    found = []
    for home in (tmp_path / "one", tmp_path / "two", tmp_path / "file/below"):
        monkeypatch.setattr(openvino.huggingface_hub.constants, "HF_HOME", str(home))
        made = Encoder(EmbedConfig(model=str(tiny), device="cpu", **INT8), texts)
        assert made.computed_by["dtype"] == "int8"
        found.append((made.computed_by["ranges"], vectors(made, texts).tobytes()))
    assert found[0] == found[1] == found[2]


def test_ranges_are_set_on_texts_that_are_not_compared_and_on_the_beginning_of_long_ones(minilm):
    plain = encoder(minilm, engine="torch")
    long = ["barco " * 1000] * 20
    for texts, most in ((long, 512), (["hola"] * 16 + long, 512), (["hola"] * 20, 20)):
        batches = samples.calibration(plain._tokens, None, texts)
        assert max(batch["input_ids"].shape[1] for batch in batches) <= most
    rows = sum(len(batch["input_ids"]) for batch in samples.calibration(plain._tokens, None, ["hola"] * 80))
    assert rows == 80 - COMPARED_TEXTS + len(samples.SENTENCES)


def test_without_memory_for_another_engine_torch_takes_the_place_of_int8(tiny, monkeypatch):
    original = openvino.OpenVinoEngine.__init__

    def init(self, reference, sample, digest, precision, calibration):
        if precision != "int8":
            raise openvino.NotConvertible("it needs about 180 MiB, and 1 are free")
        original(self, reference, sample, digest, precision, calibration)

    monkeypatch.setattr(openvino.OpenVinoEngine, "__init__", init)
    alter(monkeypatch, reversed_)
    assert encoder(tiny, **INT8).computed_by["engine"].startswith("torch ")


def test_a_killed_job_ends_with_the_vectors_of_one_that_was_not_and_says_how_they_were_computed(
    root, inputs, tiny, texts, monkeypatch
):
    different = [f"{text} {number}" for number in range(3) for text in texts]
    pq.write_table(pa.table({"texto": different}), inputs / "a.parquet", row_group_size=20)
    options = {**INT8, "batch_size": 8}
    run(tiny, **options, output_path=str(root / "whole"), checkpoint_path=str(root / "other"))
    with monkeypatch.context() as patched:
        kill_at(patched, 4, after_a_save=True)
        with pytest.raises(Killed):
            run(tiny, **options)
    assert run(tiny, **options)["rows"]["resumed"] > 0
    assert compare(root / "whole", root / "output/data") == []
    metadata = pq.read_metadata(root / "output/data/a.parquet").metadata
    assert json.loads(metadata[b"estiba"])["products"] == "int8"
    assert json.loads(metadata[b"estiba.computed_by"])[0]["engines"][0]["dtype"] == "int8"


def test_work_in_int8_is_no_work_of_a_job_that_asks_for_another_precision(root, inputs, tiny, texts):
    pq.write_table(pa.table({"texto": texts}), inputs / "a.parquet")
    run(tiny, **INT8, output_path=str(root / "old"), no_checkpoint=True)
    for options, words in (
        ({}, "--dtype 'int8' there and not set here"),
        ({"dtype": "float32"}, "--dtype 'int8' there and 'float32' here"),
    ):
        with pytest.raises(ConfigError, match=words):
            run(tiny, reuse=str(root / "old"), **options)
    assert run(tiny, reuse=str(root / "old"), **INT8)["rows"]["computed_in_this_attempt"] == 0
    assert run(tiny, output_path=str(root / "other"))["rows"]["resumed"] == 0


def test_it_is_refused_where_it_cannot_be_computed(tiny, monkeypatch):
    with pytest.raises(ValueError, match="leave out --engine torch, or pass another --dtype"):
        encoder(tiny, engine="torch", **INT8)
    with pytest.raises(ConfigError, match=r"--dtype int8: it is for CPUs, and the device is cuda; pass --dtype auto"):
        dtype_for("int8", torch.device("cuda"))
    for package in ("openvino", "nncf"):
        with monkeypatch.context() as patched:
            patched.setattr(engines, "is_installed", lambda name="openvino", package=package: name != package)
            with pytest.raises(ConfigError, match=f"--dtype int8: the package {package} is not installed; pass"):
                encoder(tiny, **INT8)


def test_a_model_that_cannot_be_quantised_is_refused_with_the_reason(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(openvino.huggingface_hub.constants, "HF_HOME", str(tmp_path))

    def refuse(*_: object) -> None:
        raise QuantizationFailed("ValueError: no range")

    monkeypatch.setattr(openvino, "quantized", refuse)
    with pytest.raises(ConfigError, match=r"--dtype int8: its products cannot be quantised \(ValueError: no range\)"):
        encoder(tiny, **INT8)


def test_what_the_program_says_last_is_the_reason(tmp_path, monkeypatch):
    graph, batches = encoder_graph(), [{"no_such_input": np.zeros((1, 4), np.float32)}]
    with pytest.raises(QuantizationFailed, match=r"[Ii]nput"):
        int8.quantized(graph, batches, tmp_path)
    monkeypatch.setattr(int8, "__file__", str(tmp_path / "killed.py"))
    (tmp_path / "killed.py").write_text("import os; print('INFO:nncf:36 nodes', flush=True); os.kill(os.getpid(), 9)")
    with pytest.raises(QuantizationFailed, match=r"^NNCF was killed, likely out of memory; give the container more$"):
        int8.quantized(graph, batches, tmp_path)


def encoder_graph():
    ov = openvino.runtime()
    from openvino import opset13 as ops

    given = ops.parameter([-1, 4], ov.Type.f32, name="given")
    return ov.Model([ops.matmul(given, ops.constant(np.ones((4, 2), np.float32)), False, False)], [given], "graph")


def test_quite_other_vectors_are_not_used_and_that_is_told(tiny, texts, monkeypatch, caplog):
    plain = openvino.OpenVinoEngine.launch
    alter(monkeypatch, reversed_)
    altered = openvino.OpenVinoEngine.launch

    def launch(self, features, rows):
        return (altered if self.precision == "int8" else plain)(self, features, rows)

    monkeypatch.setattr(openvino.OpenVinoEngine, "launch", launch)
    with caplog.at_level(logging.WARNING):
        fallen = encoder(tiny, **INT8)
    assert "in int8 gives other vectors than torch in float32 (lowest cosine" in caplog.text
    assert fallen.computed_by["dtype"] == "float32" and fallen.computed_by["engine"].startswith("openvino")
    assert fallen.identity["products"] == "int8"  # a set of its own, whatever computed it


def test_the_rate_of_products_in_int8_can_be_measured():
    matrices = MatrixProducts([(32, 64), (64, 32)], 128, engine="openvino", precision="int8", device="cpu")
    assert matrices.flops_per_s(0.01) > 0
