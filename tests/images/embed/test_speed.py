"""How the job reports its speed: results.json and the progress numbers."""

from __future__ import annotations

import json
import re

import pytest
from rehearsal import WORDS
from whole_job import run, write

from embed.artifacts import speed
from embed.config import EmbedConfig
from embed.data.chunks import ModelInfo
from embed.model.forward import products_of
from embed.model.peak import MatrixProducts
from estiba.platform.contract import Job

TEXTS = [" ".join(WORDS[: 1 + index % 40]) for index in range(60)]
BERT = ((384, 384), (384, 384), (384, 384), (384, 384), (384, 1536), (1536, 384))
"""The matrices of a layer of MiniLM."""


def info(**changes: object) -> ModelInfo:
    given = {"device": "cpu", "dtype": "float32", "token_budget": 256, "engine": "torch 2.13.0, float32"}
    return ModelInfo(identity={}, dimensions=384, **{**given, "products": BERT * 6, **changes})  # type: ignore[arg-type]


def test_the_matrices_of_a_model_are_those_that_every_token_passes(minilm):
    from sentence_transformers import SentenceTransformer

    assert products_of(SentenceTransformer(str(minilm), device="cpu")) == BERT * 6  # without the pooler's


@pytest.mark.parametrize("engine", ["torch", "openvino"])
@pytest.mark.parametrize(
    "products",
    [BERT, ((64, 32), (64, 32), (32, 64)), ((64, 96), (64, 96), (96, 64))],
    ids=["a chain", "two narrow branches", "a gate and what it multiplies"],
)
def test_every_matrix_counts_in_the_rate_of_products(engine, products):
    if engine == "openvino":
        pytest.importorskip("openvino")
    matrices = MatrixProducts(products, 128, engine=engine, precision="float32", device="cpu")
    assert matrices.flops_per_token == 2 * sum(inputs * outputs for inputs, outputs in products)
    assert matrices.tokens >= 128
    assert matrices.flops_per_s(0.01) > 1e7


def test_a_large_model_is_measured_by_one_matrix_of_each_shape():
    matrices = MatrixProducts(
        [(4096, 4096), (4096, 4096), (4096, 4096)], 1, engine="torch", precision="float32", device="cpu"
    )
    assert matrices.flops_per_token == 2 * 4096 * 4096


def test_speed_is_told_against_the_machines_products_and_in_dollars(monkeypatch):
    monkeypatch.setenv("ESTIBA_PRICE_USD_PER_H", "0.36")
    found = speed.speed_of(
        EmbedConfig(), Job.read(), info(), tokens=40_000, padded_tokens=41_000, seconds=speed.LEAST_S
    )
    assert (found["tokens_per_s"], found["padding_ratio"]) == (2000.0, 1.025)
    assert found["matrix_gflops"] == pytest.approx(2000 * 6 * 24 * 384**2 / 1e9, abs=0.1)
    assert found["matrix_gflops_peak"] > 1
    assert found["share_of_peak"] == pytest.approx(found["matrix_gflops"] / found["matrix_gflops_peak"], rel=0.02)
    assert found["usd_per_million_tokens"] == 0.05  # 500 s at 0.0001 dollars a second


def test_a_short_attempt_is_not_followed_by_a_measurement(monkeypatch):
    monkeypatch.delenv("ESTIBA_PRICE_USD_PER_H", raising=False)
    monkeypatch.setattr(speed, "_peak", lambda *_: pytest.fail("measured"))
    found = speed.speed_of(EmbedConfig(), Job.read(), info(), tokens=100, padded_tokens=100, seconds=1.0)
    assert found["tokens_per_s"] == 100.0
    assert (found["share_of_peak"], found["usd_per_million_tokens"]) == (None, None)


def test_a_huge_token_budget_does_not_become_a_huge_product(monkeypatch):
    measured: list[int] = []
    monkeypatch.setattr(MatrixProducts, "flops_per_s", lambda self, _: measured.append(self.tokens) or 1e9)
    model = info(token_budget=10**9)
    found = speed.speed_of(EmbedConfig(), Job.read(), model, tokens=1000, padded_tokens=1000, seconds=60.0)
    assert found["matrix_gflops_peak"] == 1.0 and measured == [4096]


def test_an_engine_that_cannot_be_measured_ends_no_job(caplog):
    model = info(engine="abacus 1, float32", device="cuda:99")
    found = speed.speed_of(EmbedConfig(), Job.read(), model, tokens=1000, padded_tokens=1000, seconds=60.0)
    assert found["share_of_peak"] is None


def test_prometheus_finds_the_speed_of_a_finished_job(root, inputs, tiny_model):
    write(inputs / "a.parquet", TEXTS)
    results = run(tiny_model, metrics_format="prometheus")
    text = (root / "checkpoints/metrics-algo-1.prom").read_text()
    numbers = dict(re.findall(r'^estiba_embed_(\w+)\{host="algo-1"\} (.+)$', text, re.MULTILINE))
    assert numbers["rows"] == "60"
    assert float(numbers["tokens_per_s"]) == results["speed"]["tokens_per_s"] == results["tokens_per_s"]
    assert not list((root / "checkpoints").glob("*.jsonl"))


def test_emf_prints_the_speed_on_standard_output(root, inputs, tiny_model, capsys):
    write(inputs / "a.parquet", TEXTS)
    results = run(tiny_model, metrics_format="emf", no_checkpoint=True)
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["_aws"]["CloudWatchMetrics"][0]["Namespace"] == "Estiba/embed"
    assert (line["rows"], line["Host"]) == (60, "algo-1")
    assert line["tokens_per_s"] == results["tokens_per_s"]


@pytest.mark.parametrize("setting", [{"no_checkpoint": True}, {"checkpoint_path": "s3://bucket/saved"}])
def test_prometheus_needs_a_directory_to_read_from(setting):
    with pytest.raises(ValueError, match=r"--metrics-format prometheus with --.*pass one, or --metrics-format emf"):
        EmbedConfig(metrics_format="prometheus", **setting)


def test_json_lines_stay_where_they_were_and_end_with_the_speed(root, inputs, tiny_model):
    write(inputs / "a.parquet", TEXTS)
    results = run(tiny_model)
    last = json.loads((root / "checkpoints/metrics-algo-1.jsonl").read_text().splitlines()[-1])
    assert (last["rows"], last["of"], last["tokens_per_s"]) == (60, 60, results["tokens_per_s"])
