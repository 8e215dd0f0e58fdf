"""Whole jobs with --chunk: the mean of a row's chunks, or a row for each; the same bytes after kills."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from kills import Killed, after_batches
from rehearsal import WORDS, compare, make_input
from whole_job import outputs, run, write

from embed import job, saving
from embed.artifacts import passage_rows
from embed.config import EmbedConfig
from embed.data import precision
from embed.data.chunks import ModelInfo
from embed.job import chunks_identity, embed, output_identity
from embed.model import Encoder, passages
from embed.model.forward import Engine
from estiba.errors import ConfigError, DataError, Interrupted
from estiba.platform.contract import Job
from estiba.platform.stop import Stop
from estiba.progress import Progress

MODES = pytest.mark.parametrize("mode", ["mean", "rows"])


def words(count: int, seed: int = 1) -> str:
    dice = np.random.default_rng(seed)
    return " ".join(f"{word}." if number % 9 == 8 else word for number, word in enumerate(dice.choice(WORDS, count)))


def documents(rows: int) -> list[str | None]:
    texts: list[str | None] = [words(3 + 37 * index % 400, seed=index) for index in range(rows)]
    texts[3], texts[5] = None, " "
    return texts


def vectors_of(table: pa.Table) -> np.ndarray:
    return np.array(table["embeddings"].combine_chunks().flatten()).reshape(-1, 32)


def test_each_chunk_is_a_row_with_the_vector_of_its_text(root, inputs, tiny_model):
    from sentence_transformers import SentenceTransformer

    texts = documents(30)
    write(inputs / "a.parquet", texts, id=list(range(30)), nested=[[{"x": index}] for index in range(30)])
    results = run(tiny_model, chunk=48, chunk_overlap=8, chunk_output="rows", n_tokens=True, truncated=True)
    out = outputs(root)
    assert out.schema.names == [
        "texto", "id", "nested", "embeddings", "status", "n_tokens", "truncated", "chunk", "chunk_start", "chunk_end"
    ]  # fmt: skip
    assert out.schema.field("chunk").type == out.schema.field("chunk_start").type == pa.int32()
    assert results["chunks"] == out.num_rows > 150 and results["rows"]["total"] == 30
    assert results["rows"]["without_vector"] == {"empty": 1, "null": 1} and results["rows"]["embedded"] == 28
    rows = out.to_pylist()
    assert [row["id"] for row in rows] == sorted(row["id"] for row in rows)
    assert all(row["nested"] == [{"x": row["id"]}] and row["texto"] == texts[row["id"]] for row in rows)
    for index in range(30):
        assert [row["chunk"] for row in rows if row["id"] == index] == list(range(sum(r["id"] == index for r in rows)))
    assert not any(row["truncated"] for row in rows) and max(row["n_tokens"] for row in rows) <= 48
    assert [(row["id"], row["status"], row["chunk_start"]) for row in rows if row["embeddings"] is None] == [
        (3, "null", None), (5, "empty", None)
    ]  # fmt: skip
    found = [row for row in rows if row["embeddings"] is not None]
    ours = np.array([row["embeddings"] for row in found], np.float32)
    cut = [row["texto"][row["chunk_start"] : row["chunk_end"]] for row in found]
    theirs = SentenceTransformer(str(tiny_model), device="cpu").encode(cut)
    assert (ours * theirs).sum(axis=1).min() >= 0.9999
    assert results["tokens"]["total"] == sum(row["n_tokens"] for row in rows)


def test_a_row_has_the_mean_of_its_chunks_by_their_tokens(root, inputs, tiny_model):
    write(inputs / "a.parquet", documents(30))
    options = {"chunk": 48, "chunk_overlap": 8, "n_tokens": True, "truncated": True}
    run(tiny_model, **options, chunk_output="rows", output_path=str(root / "rows"))
    chunks = pq.read_table(root / "rows/a.parquet").to_pylist()
    results = run(tiny_model, **options)
    out = outputs(root)
    assert out.num_rows == 30 and out.schema.names == ["texto", "embeddings", "status", "n_tokens", "truncated"]
    assert "chunks" not in results and results["rows"]["truncated"] == 0
    for row in out.to_pylist():
        own = [each for each in chunks if each["texto"] == row["texto"]]
        assert row["n_tokens"] == sum(each["n_tokens"] for each in own) and row["status"] == own[0]["status"]
        if row["embeddings"] is None:
            continue
        mean = sum(np.array(each["embeddings"], np.float64) * (each["n_tokens"] - 2) for each in own)
        assert np.allclose(row["embeddings"], mean / np.linalg.norm(mean), atol=1e-6)
    provenance = json.loads(out.schema.metadata[b"estiba"])
    assert (provenance["chunk"], provenance["chunk_overlap"], provenance["chunk_output"]) == ("48", "8", "mean")


def test_chunks_of_the_models_own_length_and_without_normalization(root, inputs, tiny_model):
    write(inputs / "a.parquet", [words(600), "el mar"])
    results = run(tiny_model, chunk=0, normalize=False, chunk_output="rows")
    assert results["model"]["chunk"] == "256" and results["chunks"] == 4
    chunks = vectors_of(outputs(root))
    run(tiny_model, chunk=0, normalize=False, output_path=str(root / "mean"))
    mean = vectors_of(pq.read_table(root / "mean/a.parquet"))
    assert 0.1 < np.linalg.norm(mean[0]) < 0.9999
    assert mean[1].tobytes() == chunks[-1].tobytes()


def test_short_texts_have_the_vectors_of_a_job_without_chunks(root, inputs, tiny_model):
    texts = [f"{word} {index}" for index, word in enumerate(WORDS)]
    write(inputs / "a.parquet", texts)
    run(tiny_model, output_path=str(root / "plain"))
    run(tiny_model, chunk=64)
    assert vectors_of(outputs(root)).tobytes() == vectors_of(pq.read_table(root / "plain/a.parquet")).tobytes()


def test_a_job_without_chunks_keeps_the_identities_of_earlier_versions():
    identity = {
        "digest": "xxh3-128:1", "dtype": "float32", "pooling": "Transformer > Pooling(mean)", "prompt": "",
        "max_length": "256", "dimensions": "32", "normalize": "true",
    }  # fmt: skip
    info = {"dimensions": 32, "device": "cpu", "dtype": "float32", "token_budget": 1536}
    config = EmbedConfig(model="m", input_path="/a", output_path="/b", checkpoint_path="/c")
    own = chunks_identity(config, ModelInfo(identity=identity, **info))
    assert (own, output_identity(config, own)) == ("686d69b19a0abfbb", "8060e43b8bd9d820")
    for more in ({"chunk": "64"}, {"chunk": "64", "chunk_overlap": "3"}):
        assert chunks_identity(config, ModelInfo(identity=identity | more, **info)) != own


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk": 257}, r"--chunk 257: the model allows 256 tokens; pass 256 or fewer, or 0"),
        ({"chunk": 65, "max_length": 64}, r"--chunk 65: --max-length allows 64 tokens"),
        ({"chunk": 2}, r"--chunk 2 leaves 0 tokens for text"),
        ({"chunk": 32, "chunk_overlap": 32}, r"--chunk-overlap 32 can be at most half of that"),
        ({"chunk": 8, "prompt": "el barco zarpa al alba: "}, r"--chunk 8 leaves 0 tokens for text"),
    ],
)
def test_chunks_that_cannot_be_are_refused_by_name(root, inputs, tiny_model, options, message):
    write(inputs / "a.parquet", ["hola"])
    with pytest.raises(ConfigError, match=message):
        run(tiny_model, **options)


@pytest.mark.parametrize("options", [{"chunk_overlap": 4}, {"chunk_output": "rows"}, {"chunk": -1}])
def test_settings_of_chunks_without_chunks_are_refused(options):
    with pytest.raises(ValueError, match="chunk"):
        EmbedConfig(model="m", **options)


def test_a_model_with_a_tokenizer_of_its_own_is_refused(root, inputs, tiny_model, monkeypatch):
    from embed.model import tokens

    monkeypatch.setattr(tokens, "_plain_tokenizer", lambda _: None)
    write(inputs / "a.parquet", ["hola"])
    with pytest.raises(ConfigError, match=r"--chunk 64: model .*by its own code.*leave out --chunk"):
        run(tiny_model, chunk=64)


def test_columns_of_every_kind_are_repeated(root, inputs, tiny_model):
    table = pa.table(
        {
            "texto": pa.array([words(200), "el mar"], pa.string_view()),
            "dictionary": pa.array(["uno", "dos"]).dictionary_encode(),
            "view": pa.array([b"x" * 40, None], pa.binary_view()),
            "nested": pa.array([[{"a": "b" * 40}], None], pa.list_(pa.struct([("a", pa.string())]))),
            "list_view": pa.array([[1], None], pa.list_view(pa.int32())),
            "uuid": pa.array([b"0123456789abcdef", None], pa.uuid()),
            "map": pa.array([[(1, "a")], None], pa.map_(pa.int32(), pa.string())),
        }
    )
    pq.write_table(table, inputs / "a.parquet")
    expected = pq.read_table(inputs / "a.parquet")
    run(tiny_model, chunk=64, chunk_output="rows")
    out = outputs(root)
    assert out.num_rows > 3
    for name in expected.schema.names:
        first, second = expected[name].to_pylist()
        assert out[name].to_pylist() == [first] * (out.num_rows - 1) + [second]
        assert out[name].type == expected[name].type


@pytest.mark.parametrize("kind", [pa.string_view(), pa.dictionary(pa.int32(), pa.string()), pa.string()], ids=str)
def test_a_repeated_row_takes_its_own_size_and_not_that_of_its_neighbours(kind):
    texts = [f"{number:04d}" * 100 for number in range(1000)]
    column = pa.array(texts).dictionary_encode() if pa.types.is_dictionary(kind) else pa.array(texts, kind)
    batch = pa.record_batch({"id": pa.array(range(1000)), "texto": column})
    assert passage_rows._row_bytes(batch).max() < 1000
    rows = np.repeat(np.arange(400, 420), 3)
    repeated = passage_rows.repeat(batch, rows)
    assert repeated[1].type == kind and repeated[1].to_pylist() == [texts[row] for row in rows]
    assert pa.types.is_dictionary(kind) or repeated[1].nbytes < 60 * 500


@MODES
def test_the_stored_precision_is_that_of_the_mean_or_of_each_chunk(root, inputs, tiny_model, monkeypatch, mode):
    monkeypatch.setattr(passages, "WINDOW_PASSAGES", 20)
    write(inputs / "a.parquet", [words(1000), "el mar"])
    options = {"chunk": 32, "chunk_output": mode}
    run(tiny_model, **options, output_path=str(root / "exact"))
    exact = vectors_of(pq.read_table(root / "exact/a.parquet"))
    run(tiny_model, **options, embedding_dtype="int8")
    found = outputs(root)["embeddings"].combine_chunks()
    assert found.type == pa.list_(pa.int8(), 32)
    assert np.array(found.flatten()).reshape(-1, 32).tolist() == precision.stored(exact, "int8").tolist()


def test_an_input_column_with_the_name_of_an_added_one_is_refused(root, inputs, tiny_model):
    write(inputs / "a.parquet", ["hola"], chunk=[1])
    with pytest.raises(ConfigError, match="already has a column 'chunk'"):
        run(tiny_model, chunk=64, chunk_output="rows")
    assert run(tiny_model, chunk=64)["rows"]["embedded"] == 1


def test_a_row_that_would_be_repeated_beyond_all_measure_is_refused_with_the_remedy(
    root, inputs, tiny_model, monkeypatch
):
    monkeypatch.setattr(passage_rows, "MAX_REPEATED_BYTES", 20_000)
    write(inputs / "a.parquet", ["el mar", words(1000)], id=[1, 2])
    write(inputs / "b.parquet", ["el mar"], id=[1])
    with pytest.raises(DataError, match=r"a\.parquet: a row of \d+ bytes has more than .*--columns"):
        run(tiny_model, chunk=64, chunk_output="rows")
    results = run(tiny_model, chunk=64, chunk_output="rows", columns=["id"])
    assert results["rows"]["computed_in_this_attempt"] == 0 and results["chunks"] > 15


# --- interruptions -------------------------------------------------------------------------------------------------


@MODES
@pytest.mark.parametrize("limit", [8192, 20], ids=["one window", "several windows in a range"])
def test_a_job_that_is_killed_again_and_again_ends_with_the_same_bytes(
    root, inputs, tiny_model, monkeypatch, mode, limit
):
    pq.write_table(pa.table({"texto": [*documents(40), words(2500)]}), inputs / "a.parquet", row_group_size=30)
    options = {"chunk": 32, "chunk_overlap": 6, "chunk_output": mode, "batch_size": 8}
    monkeypatch.setattr(passages, "WINDOW_PASSAGES", limit)
    run(tiny_model, **options, output_path=str(root / "whole"), checkpoint_path=str(root / "other"))

    def kill() -> None:
        raise Killed

    kills = 0
    for count in (2, 5, 12, 24):
        with monkeypatch.context() as patched:
            patched.setattr(saving, "PARTIAL_S", 0.0)
            patched.setattr(saving.Saver, "close", lambda saver: saver._thread.shutdown(wait=True))  # no process dies
            after_batches(patched, count, kill)
            try:
                run(tiny_model, **options)
            except Killed:
                kills += 1
    results = run(tiny_model, **options)
    assert kills >= 3
    assert compare(root / "whole", root / "output/data") == []
    assert results["rows"]["total"] == 41
    assert not list((root / "checkpoints").rglob("*-partial*"))


@MODES
def test_a_stop_keeps_the_finished_batches_of_a_window(root, inputs, tiny_model, monkeypatch, mode):
    write(inputs / "a.parquet", documents(40))
    options = {"chunk": 32, "chunk_output": mode, "batch_size": 8}
    run(tiny_model, **options, output_path=str(root / "whole"), checkpoint_path=str(root / "other"))
    stop = Stop()
    with monkeypatch.context() as patched:
        sizes = after_batches(patched, 12, lambda: stop.request("SIGTERM", signum=15))
        with pytest.raises(Interrupted, match=r"(\d+) of 40 rows are saved") as caught:
            embed(EmbedConfig(model=str(tiny_model), **options), Job.read(), stop)
    saved = int(str(caught.value).split(" of 40 rows")[0].rsplit(" ", 1)[1])
    assert 0 < saved < 38
    again = after_batches(monkeypatch, -1, lambda: None)
    results = run(tiny_model, **options)
    assert sum(sizes) + sum(again) == total_chunks(root, inputs, tiny_model)
    assert results["rows"]["resumed"] == saved and results["rows"]["computed_in_this_attempt"] == 40 - saved
    assert compare(root / "whole", root / "output/data") == []


def total_chunks(root: Path, inputs: Path, model: Path) -> int:
    encoder = Encoder(EmbedConfig(model=str(model), chunk=32))
    texts = pq.read_table(inputs / "a.parquet")["texto"].to_pylist()
    return sum(int((window.status == 0).sum()) for window, _ in encoder.windows(texts))


@MODES
def test_partial_work_that_outlived_its_replacement_is_not_counted_again(root, inputs, tiny_model, monkeypatch, mode):
    monkeypatch.setattr(passages, "WINDOW_PASSAGES", 20)
    write(inputs / "a.parquet", documents(40))
    options = {"chunk": 32, "chunk_output": mode, "batch_size": 8}
    stop = Stop()
    with monkeypatch.context() as patched:
        after_batches(patched, 12, lambda: stop.request("SIGTERM", signum=15))
        with pytest.raises(Interrupted):
            embed(EmbedConfig(model=str(tiny_model), **options), Job.read(), stop)
    left = {path: path.read_bytes() for path in (root / "checkpoints").rglob("*-partial.*.piece")}
    assert len(left) > 2
    run(tiny_model, **options)
    for path, content in left.items():
        path.write_bytes(content)
    (root / "output/data/a.parquet").unlink()
    counted: list[float] = []
    monkeypatch.setattr(job, "Progress", lambda **given: counted.append(given["done"]) or Progress(**given))
    run(tiny_model, **options)
    assert counted == [40]
    assert not list((root / "checkpoints").rglob("*-partial.*.piece"))


def test_a_chunk_without_a_finite_vector_costs_its_window_no_other_work(root, inputs, tiny_model, monkeypatch):
    monkeypatch.setattr(passages, "WINDOW_PASSAGES", 20)
    write(inputs / "a.parquet", [words(600)])
    encoder = Encoder(EmbedConfig(model=str(tiny_model), chunk=16))
    windows = [window for window, _ in encoder.windows([words(600)])]
    first = torch.from_numpy(windows[0].ids[:8])
    original = Engine.launch

    def launch(self, features, rows):
        launched = original(self, features, rows)
        beginnings = features["input_ids"][:, : len(first)]
        bad = (beginnings == first[: beginnings.shape[1]]).all(dim=1)
        with torch.inference_mode():
            launched.vectors_BD[bad] = float("nan")
        return launched

    monkeypatch.setattr(Engine, "launch", launch)
    options = {"chunk": 16, "chunk_output": "rows", "batch_size": 4, "engine": "torch"}
    stop = Stop()
    with monkeypatch.context() as patched:
        sizes = after_batches(patched, 8, lambda: stop.request("SIGTERM", signum=15))
        with pytest.raises(Interrupted):
            embed(EmbedConfig(model=str(tiny_model), **options), Job.read(), stop)
    again = after_batches(monkeypatch, -1, lambda: None)
    run(tiny_model, **options)
    assert outputs(root)["status"].to_pylist().count("not finite") == 1
    assert sum(sizes) + sum(again) == sum(len(window.status) for window in windows) + 4  # its batch, once more


@MODES
def test_a_damaged_chunk_is_computed_again(root, inputs, tiny_model, monkeypatch, mode):
    monkeypatch.setattr(passages, "WINDOW_PASSAGES", 20)
    pq.write_table(pa.table({"texto": documents(60)}), inputs / "a.parquet", row_group_size=20)
    options = {"chunk": 32, "chunk_output": mode}
    run(tiny_model, **options)
    before = (root / "output/data/a.parquet").read_bytes()
    pieces = sorted((root / "checkpoints").rglob("pieces/*/*.piece"))
    assert len(pieces) > 20 if mode == "rows" else len(pieces) == 3
    for damaged in (pieces[0], pieces[len(pieces) // 2]):
        (root / "output/data/a.parquet").unlink()
        raw = bytearray(damaged.read_bytes())
        raw[len(raw) // 2] ^= 1
        damaged.write_bytes(raw)
        results = run(tiny_model, **options)
        assert results["rows"]["total"] == 60
        assert (root / "output/data/a.parquet").read_bytes() == before


def test_two_workers_give_the_rows_of_one_for_ranges_of_several_windows_too(root, inputs, tiny_model):
    make_input(inputs, files=4, rows=40, seed=1)
    write(inputs / "largo.parquet", ["el mar", words(60_000), "fin"], id=[1, 2, 3])
    options = {"chunk": 8, "chunk_output": "rows", "columns": ["id"], "engine": "torch"}
    results = run(tiny_model, **options, output_path=str(root / "one"), checkpoint_path=str(root / "other"))
    assert len(list((root / "other").rglob("*-000000.*.piece"))) == 1  # the first window of the long text
    assert run(tiny_model, **options, workers=2)["chunks"] == results["chunks"] > 10_000
    for path in (root / "one").rglob("*.parquet"):
        one, two = pq.read_table(path), pq.read_table(root / "output/data" / path.relative_to(root / "one"))
        assert one.drop(["embeddings"]).equals(two.drop(["embeddings"]))
        one, two = (vectors_of(each.filter(each["embeddings"].is_valid())) for each in (one, two))
        assert np.allclose(one, two, atol=1e-6)


def test_a_row_of_a_million_tokens_is_read_in_bounded_windows(root, inputs, tiny_model, monkeypatch):
    monkeypatch.setattr(passages, "WINDOW_PASSAGES", 1000)
    text = words(900_000)
    write(inputs / "a.parquet", ["el mar", text, "fin"])
    windows: list[int] = []
    original = Encoder.encode

    def encode(self, window, *rest, **more):
        windows.append(len(window.status))
        return original(self, window, *rest, **more)

    monkeypatch.setattr(Encoder, "encode", encode)
    results = run(tiny_model, chunk=0, n_tokens=True)
    (row,) = outputs(root).slice(1, 1).to_pylist()
    assert row["n_tokens"] >= 1_000_000 and results["rows"]["truncated"] == 0
    assert len(windows) >= 5 and max(windows) == 1000 and sum(windows) > 3900
    assert np.isclose(np.linalg.norm(row["embeddings"]), 1, atol=1e-5)
