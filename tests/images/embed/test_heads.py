"""--sparse and --multi-vector: BGE-M3's other two outputs, with the guarantees of the vectors."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import bge_m3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from kills import after_batches, run_killed
from rehearsal import WORDS, compare
from safetensors.torch import save_file
from test_partial_chunks import engines_of
from whole_job import outputs, run, write

from embed.artifacts import outputs as output_files
from embed.artifacts import vector_rows
from embed.config import EmbedConfig
from embed.data import windows
from embed.data.chunks import PENDING, ModelInfo
from embed.data.token_outputs import TokenOutputs
from embed.job import chunks_identity, embed, output_identity
from embed.model import Encoder, Status, loading
from estiba.errors import ConfigError, Interrupted
from estiba.platform.contract import Job
from estiba.platform.stop import Stop

BOTH = {"sparse": True, "multi_vector": True}
TEXTS = [
    "el barco zarpa al alba con la bodega llena de trigo",
    None,
    "mar mar mar puerto mar",
    "",
    "ola",
    " ".join(WORDS * 4),  # more than the 64 tokens that the model reads
    "€ ☃",  # unknown tokens only
    "viento norte",
]


@pytest.fixture(scope="session")
def m3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bge_m3.build(tmp_path_factory.mktemp("m3") / "model")


@pytest.fixture
def copied(m3: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(m3, tmp_path / "copied"))


def many_rows(inputs: Path, rows: int = 300) -> None:
    texts: list[str | None] = [" ".join(WORDS[index % 7 : 8 + index % 30]) + f" {index}" for index in range(rows)]
    texts[3], texts[rows // 2] = None, " "
    pq.write_table(pa.table({"texto": texts}), inputs / "a.parquet", row_group_size=rows)


def test_weights_and_token_vectors_are_those_of_flagembedding(root, inputs, m3):
    write(inputs / "a.parquet", TEXTS)
    run(m3, **BOTH)
    out = outputs(root)
    assert out.schema.names == ["texto", "embeddings", "status", "sparse", "colbert"]
    assert out.schema.field("sparse").type == pa.map_(pa.int32(), pa.float32())
    assert out.schema.field("colbert").type == pa.list_(pa.list_(pa.float32(), bge_m3.TOKEN_WIDTH))
    for text, sparse, colbert in zip(TEXTS, out["sparse"].to_pylist(), out["colbert"].to_pylist(), strict=True):
        if not text:
            assert sparse is None and colbert is None
            continue
        weights, vectors = bge_m3.reference(m3, text)
        assert [token for token, _ in sparse] == sorted(weights)
        assert np.allclose([weight for _, weight in sparse], [weights[token] for token, _ in sparse], atol=1e-5)
        assert np.array(colbert).shape == vectors.shape and np.allclose(colbert, vectors, atol=1e-5)
    assert len(out["sparse"][2].as_py()) <= 2 and len(out["colbert"][2].as_py()) == 6  # five words and </s>
    assert out["sparse"][6].as_py() == []
    assert {len(out["colbert"][row].as_py()) for row in (5,)} == {63}


def test_equal_rows_share_weights_and_token_vectors(root, inputs, m3):
    write(inputs / "a.parquet", ["viento norte", *TEXTS, *TEXTS])
    results = run(m3, **BOTH)
    found = outputs(root).select(["embeddings", "sparse", "colbert"]).to_pylist()
    count = len(TEXTS)
    assert results["rows"]["copied"] == 1 + count - 2  # without the null and the empty one
    assert found[1 : 1 + count] == found[1 + count :] and found[0] == found[count]
    assert found[1]["sparse"] and found[1]["colbert"]


def test_the_embeddings_are_the_same_with_and_without_the_heads(root, inputs, m3):
    many_rows(inputs)
    run(m3, engine="torch", output_path=str(root / "plain"))
    run(m3, **BOTH)
    assert outputs(root)["embeddings"].equals(pq.read_table(root / "plain/a.parquet")["embeddings"])


@pytest.mark.parametrize("flag", ["sparse", "multi_vector"])
def test_each_head_works_alone_and_gives_the_same_values(root, inputs, m3, flag):
    write(inputs / "a.parquet", TEXTS)
    run(m3, **BOTH, output_path=str(root / "both"))
    run(m3, **{flag: True})
    name = {"sparse": "sparse", "multi_vector": "colbert"}[flag]
    out = outputs(root)
    assert out.schema.names == ["texto", "embeddings", "status", name]
    assert out[name].equals(pq.read_table(root / "both/a.parquet")[name])


def test_heads_in_safetensors_are_read_too(root, inputs, m3, copied):
    write(inputs / "a.parquet", TEXTS)
    run(m3, **BOTH, output_path=str(root / "pt"))
    for name in ("sparse_linear", "colbert_linear"):
        save_file(torch.load(copied / f"{name}.pt"), copied / f"{name}.safetensors")
        (copied / f"{name}.pt").unlink()
    run(copied, **BOTH)
    expected = pq.read_table(root / "pt/a.parquet")
    assert outputs(root)["sparse"].equals(expected["sparse"]) and outputs(root)["colbert"].equals(expected["colbert"])


@pytest.mark.parametrize(("flag", "file"), [("sparse", "sparse_linear.pt"), ("multi_vector", "colbert_linear.pt")])
def test_a_model_without_a_head_is_refused_by_the_name_of_the_file(root, inputs, copied, flag, file):
    write(inputs / "a.parquet", ["hola"])
    (copied / file).unlink()
    option = "--" + flag.replace("_", "-")
    with pytest.raises(ConfigError, match=rf"{option}: .*{file}.*leave out {option}") as failure:
        run(copied, **{flag: True})
    assert failure.value.exit_code == 2
    assert not list(root.rglob("output/data/*.parquet"))
    (copied / file).write_bytes(b"PK no es un modelo")
    with pytest.raises(ConfigError, match=rf"{file} holds no weight and bias.*download"):
        run(copied, **{flag: True})


@pytest.mark.parametrize(
    ("weight", "bias", "words"),
    [
        (torch.zeros(2, bge_m3.HIDDEN), torch.zeros(2), r"\(2, 32\).*\(1, hidden width\)"),
        (torch.zeros(1, bge_m3.HIDDEN), torch.zeros(3), r"bias of \(3,\)"),
        (torch.zeros(1, 48), torch.zeros(1), "takes 48 values of a token, and the model gives 32"),
        (torch.full((1, bge_m3.HIDDEN), torch.nan), torch.zeros(1), "not finite"),
    ],
)
def test_a_head_that_does_not_fit_the_model_is_refused(root, inputs, copied, weight, bias, words):
    write(inputs / "a.parquet", ["hola"])
    bge_m3.save_head(copied, "sparse_linear", weight, bias)
    with pytest.raises(ConfigError, match=words):
        run(copied, sparse=True)


def test_code_in_a_heads_pickle_is_not_run(root, inputs, copied, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    write(inputs / "a.parquet", ["hola"])
    torch.save({"weight": Bomb(), "bias": Bomb()}, copied / "sparse_linear.pt")
    with pytest.raises(ConfigError, match="holds no weight and bias"):
        run(copied, sparse=True)
    assert not (tmp_path / "ran").exists()


def test_a_model_with_a_tokenizer_of_its_own_is_refused(root, inputs, m3, copied, monkeypatch):
    from embed.model import encoder as module
    from embed.model.tokens import ModelTokens

    write(inputs / "a.parquet", ["hola"])
    monkeypatch.setattr(module, "tokens_for", lambda model, prompt, length, _: ModelTokens(model, prompt, length))
    with pytest.raises(ConfigError, match="--sparse and --multi-vector: the model has a tokenizer of its own"):
        run(m3, **BOTH)


def test_torch_computes_the_heads_and_openvino_is_refused_by_name(root, inputs, m3):
    write(inputs / "a.parquet", TEXTS)
    with pytest.raises(ConfigError, match=r"--engine openvino: it does not compute --sparse; .*--engine auto or torch"):
        run(m3, sparse=True, engine="openvino")
    results = run(m3, **BOTH, engine="auto")
    assert results["engine"].startswith("torch")
    assert [engine["engine"].split()[0] for engine in engines_of(root, [0, 1])] == ["torch"]


def test_a_kill_or_a_stop_in_the_middle_of_a_row_range_ends_with_the_same_bytes(root, inputs, m3, monkeypatch):
    many_rows(inputs)
    options = {**BOTH, "batch_size": 16}
    run(m3, **options, output_path=str(root / "whole"), checkpoint_path=str(root / "other"))

    run_killed(monkeypatch, m3, 4, **options)
    stop = Stop()
    with monkeypatch.context() as patched:
        after_batches(patched, 3, lambda: stop.request("SIGTERM", signum=15))
        with pytest.raises(Interrupted):
            embed(EmbedConfig(model=str(m3), **options), Job.read(), stop)
    results = run(m3, **options)
    assert results["rows"]["resumed"] >= 3 * 16
    assert compare(root / "whole", root / "output/data") == []


def test_only_the_checkpoint_directory_is_needed_to_write_the_heads_columns_again(root, inputs, m3):
    many_rows(inputs)
    run(m3, **BOTH)
    shutil.copytree(root / "output/data", root / "kept")
    shutil.rmtree(root / "output")
    assert run(m3, **BOTH)["rows"]["computed_in_this_attempt"] == 0
    assert compare(root / "kept", root / "output/data") == []


def test_another_head_or_another_choice_of_heads_is_computed_again(root, inputs, m3, copied):
    write(inputs / "a.parquet", ["hola", "mar"])
    assert run(m3)["rows"]["computed_in_this_attempt"] == 2
    assert run(m3, sparse=True)["rows"]["computed_in_this_attempt"] == 2
    assert run(m3, **BOTH)["rows"]["computed_in_this_attempt"] == 2
    assert run(m3, sparse=True)["rows"]["computed_in_this_attempt"] == 0
    bge_m3.save_head(copied, "sparse_linear", torch.ones(1, bge_m3.HIDDEN), torch.zeros(1))
    assert run(copied, sparse=True)["rows"]["computed_in_this_attempt"] == 2
    provenance = json.loads(pq.read_metadata(root / "output/data/a.parquet").metadata[b"estiba"])
    assert provenance["sparse"].startswith("xxh3-128:") and "multi_vector" not in provenance


def test_work_and_outputs_of_jobs_without_heads_keep_their_identity():
    names = ("digest", "dtype", "pooling", "prompt", "max_length", "dimensions", "normalize")
    model = ModelInfo(
        identity={name: name for name in names}, dimensions=3, device="cpu", dtype="float32", token_budget=1
    )
    config = EmbedConfig()
    assert chunks_identity(config, model) == "405f748d99d432fc"
    assert output_identity(config, "x") == "9c414f10ffc66d7e"


def test_a_row_whose_weight_overflows_in_half_precision_is_computed_again_in_float32(root, inputs, copied):
    write(inputs / "a.parquet", TEXTS)
    head = torch.load(copied / "sparse_linear.pt")
    bge_m3.save_head(copied, "sparse_linear", head["weight"] * 1e5, head["bias"])
    encoder = Encoder(EmbedConfig(model=str(copied), dtype="float16", device="cpu", sparse=True))
    encoded = encoder.encode(encoder.tokenize(TEXTS[:1]))
    assert encoded.status[0] == Status.OK and np.isfinite(encoded.tokens.weights).all()
    assert encoded.tokens.weights.max() > np.finfo(np.float16).max


def test_a_row_whose_weight_is_not_finite_in_float32_gets_no_vector(root, inputs, copied):
    write(inputs / "a.parquet", TEXTS)
    bge_m3.save_head(copied, "sparse_linear", torch.full((1, bge_m3.HIDDEN), 3e38), torch.zeros(1))
    run(copied, **BOTH)
    out = outputs(root)
    lost = out["status"].to_pylist().index("not finite")
    assert out["embeddings"][lost].as_py() is out["sparse"][lost].as_py() is out["colbert"][lost].as_py() is None


@pytest.mark.parametrize(("dtype", "kind", "width"), [("float16", pa.float16(), 16), ("int8", pa.int8(), 16)])
def test_token_vectors_have_the_stored_precision_of_the_embeddings(root, inputs, m3, dtype, kind, width):
    write(inputs / "a.parquet", TEXTS)
    run(m3, **BOTH, output_path=str(root / "exact"))
    run(m3, **BOTH, embedding_dtype=dtype)
    assert outputs(root).schema.field("colbert").type == pa.list_(pa.list_(kind, width))
    exact = np.array(pq.read_table(root / "exact/a.parquet")["colbert"][0].as_py(), np.float32)
    found = np.array(outputs(root)["colbert"][0].as_py(), np.float32)
    assert (found * exact).sum(axis=1) / np.linalg.norm(found, axis=1) == pytest.approx(1, abs=1e-4)


def test_token_vectors_can_be_binary(root, inputs, m3):
    write(inputs / "a.parquet", TEXTS)
    run(m3, **BOTH, output_path=str(root / "exact"))
    run(m3, **BOTH, embedding_dtype="binary")
    exact = np.array(pq.read_table(root / "exact/a.parquet")["colbert"][0].as_py(), np.float32)
    assert np.array_equal(outputs(root)["colbert"][0].as_py(), np.packbits(exact > 0, axis=1))


def test_row_ranges_are_smaller_where_each_token_has_a_vector(root, inputs, m3, monkeypatch):
    many_rows(inputs)
    monkeypatch.setattr(windows, "CPU_TOKEN_VECTOR_BYTES", 1000 * 4 * bge_m3.TOKEN_WIDTH)
    few = run(m3, sparse=True)["checkpoint"]["pieces_saved"]
    many = run(m3, multi_vector=True)["checkpoint"]["pieces_saved"]
    assert few == 2 and many > 10


def test_an_output_with_token_vectors_is_joined_and_written_in_small_pieces(root, inputs, m3, monkeypatch):
    many_rows(inputs)
    run(m3, **BOTH, output_path=str(root / "whole"), checkpoint_path=str(root / "other"))
    monkeypatch.setattr(vector_rows, "PIECE_BYTES", 2**14)
    monkeypatch.setattr(output_files, "GROUP_BYTES", 2**16)
    run(m3, **BOTH)
    found = pq.ParquetFile(root / "output/data/a.parquet").metadata
    assert max(found.row_group(index).num_rows for index in range(found.num_row_groups)) < 100
    assert outputs(root).equals(pq.read_table(root / "whole/a.parquet"))


def test_the_pieces_of_an_output_do_not_depend_on_its_chunks():
    lengths = [3, 0, 4200, 2, 2, 5000, 1, 1]  # of 4 KiB
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(sum(lengths) * 1024, np.float32)), 1024)
    starts = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    batch = pa.record_batch({"row": pa.array(range(8)), "colbert": pa.ListArray.from_arrays(starts, vectors)})
    for cuts in ([8], [1, 2, 3, 4, 5, 6, 7, 8], [3, 8], [2, 6, 8]):
        parts = (batch.slice(first, last - first) for first, last in zip([0, *cuts], cuts, strict=False))
        pieces = [piece["row"].to_pylist() for piece in vector_rows.VectorReader._bounded(parts)]
        assert pieces == [[0, 1, 2], [3, 4, 5], [6, 7]]


def test_an_input_column_with_the_name_of_a_heads_column_is_refused(root, inputs, m3):
    write(inputs / "a.parquet", ["hola"], colbert=[1])
    with pytest.raises(ConfigError, match=r"already has a column 'colbert'.*--columns"):
        run(m3, multi_vector=True)


def test_the_heads_files_of_a_hub_model_are_fetched_only_when_they_are_needed(m3, monkeypatch):
    asked: list[str] = []

    def snapshot_download(name, *, allow_patterns=(), **_):
        asked.extend(allow_patterns)
        return str(m3)

    monkeypatch.setattr(loading.huggingface_hub, "snapshot_download", snapshot_download)
    Encoder(EmbedConfig(model="BAAI/bge-m3", device="cpu"))
    assert not [name for name in asked if "linear" in name]
    Encoder(EmbedConfig(model="BAAI/bge-m3", device="cpu", sparse=True))
    assert asked[-2:] == ["sparse_linear.pt", "sparse_linear.safetensors"]


def test_rows_that_an_earlier_attempt_saved_keep_their_values_when_their_batch_is_computed_again(m3):
    encoder = Encoder(EmbedConfig(model=str(m3), device="cpu", engine="torch", **BOTH))
    window = encoder.tokenize(["el barco zarpa", "mar y puerto"])
    whole = encoder.encode(window)
    saved = TokenOutputs(
        starts=whole.tokens.starts,
        ids=whole.tokens.ids,
        weights=whole.tokens.weights + 1,
        vectors=whole.tokens.vectors + 1,
    )
    prior = replace(whole, status=np.array([Status.OK, PENDING], np.uint8), tokens=saved)
    resumed = encoder.encode(window, prior=prior).tokens
    first = slice(0, int(window.n_tokens[0]))
    rest = slice(first.stop, None)
    assert np.array_equal(resumed.vectors[first], saved.vectors[first])
    assert np.array_equal(resumed.weights[first], saved.weights[first])
    assert np.array_equal(resumed.vectors[rest], whole.tokens.vectors[rest])


def test_rows_of_a_partial_chunk_are_found_again_whatever_rows_are_taken_from_it():
    outputs = TokenOutputs.zeros(np.array([0, 2, 2, 5]), np.arange(5, dtype=np.int32), has_weights=True, vector_width=3)
    outputs.put(np.array([2, 0]), np.arange(5, dtype=np.float32), np.arange(15, dtype=np.float32).reshape(5, 3))
    batch = pa.record_batch(outputs.partial_columns())
    assert np.array_equal(TokenOutputs.of_partial(batch).vectors, outputs.vectors)
    taken = pa.concat_batches([batch.slice(2), batch]).take(pa.array([3, None, 0], pa.int64()))
    back, expected = TokenOutputs.of_partial(taken), outputs.of_rows(np.array([2, 1, 2]))
    assert np.array_equal(back.starts, expected.starts) and np.array_equal(back.ids, expected.ids)
    assert np.array_equal(back.weights, expected.weights) and np.array_equal(back.vectors, expected.vectors)


@pytest.mark.slow
def test_two_workers_write_the_same_heads_as_one(root, inputs, m3, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    write(inputs / "a.parquet", TEXTS)
    write(inputs / "b.parquet", TEXTS[::-1])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run(m3, **BOTH, output_path=str(root / "one"), checkpoint_path=str(root / "other"))
    finally:
        torch.set_num_threads(threads)
    run(m3, **BOTH, workers=2)
    assert compare(root / "one", root / "output/data") == []
