"""--embedding-dtype: what is stored of a vector, how a reader gets it back, and why a resume stores the same."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from kills import run_killed
from rehearsal import WORDS, compare
from whole_job import outputs, run, write

import embed
from embed.artifacts.outputs import writer_options
from embed.config import EmbedConfig
from embed.data.chunks import Encoded, Status, from_bytes, partial_to_bytes, to_bytes
from embed.data.precision import stored, vector_fields
from estiba.config import load
from estiba.errors import ConfigError

DTYPES = ["float32", "float16", "int8", "binary"]
TYPES = {
    "float32": pa.list_(pa.float32(), 32),
    "float16": pa.list_(pa.float16(), 32),
    "int8": pa.list_(pa.int8(), 32),
    "binary": pa.list_(pa.uint8(), 4),
}


def unit_vectors(rows: int, dimensions: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((rows, dimensions)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def encoded_of(vectors: np.ndarray) -> Encoded:
    rows = len(vectors)
    return Encoded(
        vectors=vectors,
        status=np.zeros(rows, np.uint8),
        n_tokens=np.ones(rows, np.int32),
        truncated=np.zeros(rows, bool),
        padded_tokens=0,
    )


def many_rows(inputs: Path, rows: int = 300) -> None:
    texts: list[str | None] = [" ".join(WORDS[index % 7 : 8 + index % 30]) + f" {index}" for index in range(rows)]
    texts[3], texts[rows // 2] = None, " "
    pq.write_table(pa.table({"texto": texts}), inputs / "a.parquet")


def test_int8_keeps_the_direction_with_the_largest_value_at_127():
    vectors = unit_vectors(50, 384)
    values = stored(vectors, "int8")
    assert values.dtype == np.int8 and (np.abs(values.astype(int)).max(axis=1) == 127).all()
    decoded = values / np.linalg.norm(values.astype(np.float32), axis=1, keepdims=True)
    assert (decoded * vectors).sum(axis=1).min() > 0.9999
    assert not stored(np.zeros((2, 8), np.float32), "int8").any()


def test_binary_keeps_the_signs_as_packbits_packs_them():
    vectors = unit_vectors(50, 64)
    assert np.array_equal(stored(vectors, "binary"), np.packbits(vectors > 0, axis=1))
    assert np.array_equal(np.unpackbits(stored(vectors, "binary"), axis=1).astype(bool), vectors > 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_stored_of_a_vector_depends_on_that_vector_alone(dtype):
    vectors = unit_vectors(20, 32)
    alone = np.concatenate([stored(vectors[row : row + 1], dtype) for row in range(20)])
    assert np.array_equal(stored(vectors, dtype), alone)
    assert np.array_equal(stored(vectors[::-1], dtype), alone[::-1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_precision_is_read_back_and_rows_without_text_stay_null(root, inputs, tiny_model, dtype):
    texts = ["el barco zarpa", None, "mar", " ", "trigo y vino"]
    write(inputs / "a.parquet", texts)
    run(tiny_model, output_path=str(root / "exact"), checkpoint_path=str(root / "other"))
    run(tiny_model, embedding_dtype=dtype)
    column, exact = outputs(root)["embeddings"], pq.read_table(root / "exact/a.parquet")["embeddings"]
    assert column.type == TYPES[dtype]
    assert column.is_null().to_pylist() == [False, True, False, True, False]
    assert outputs(root)["status"].to_pylist() == ["ok", "null", "ok", "empty", "ok"]
    values = np.array(column.drop_null().to_pylist()).astype(column.type.value_type.to_pandas_dtype())
    assert np.array_equal(values, stored(np.array(exact.drop_null().to_pylist(), np.float32), dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_pandas_reads_each_precision(root, inputs, tiny_model, dtype):
    pandas = pytest.importorskip("pandas", reason="pandas is not part of the image")
    write(inputs / "a.parquet", ["el barco zarpa", None, "mar"])
    run(tiny_model, embedding_dtype=dtype)
    frame = pandas.read_parquet(root / "output/data/a.parquet")
    assert len(frame["embeddings"][0]) == TYPES[dtype].list_size and frame["embeddings"][1] is None


@pytest.mark.parametrize("dtype", ["int8", "binary"])
def test_the_file_says_how_to_decode_and_the_readme_shows_it(root, inputs, tiny_model, dtype):
    write(inputs / "a.parquet", ["el barco zarpa", None, "mar"])
    run(tiny_model, output_path=str(root / "exact"), checkpoint_path=str(root / "other"))
    run(tiny_model, embedding_dtype=dtype)
    schema = pq.read_schema(root / "output/data/a.parquet")
    provenance = json.loads(schema.metadata[b"estiba"])
    assert provenance["embedding_dtype"] == dtype and provenance["dimensions"] == "32"
    of_field = json.loads(schema.field("embeddings").metadata[b"estiba"])
    assert of_field == {"embedding_dtype": dtype, "embedding_decode": provenance["embedding_decode"]}
    readme = Path(inspect.getfile(embed)).parents[1] / "README.md"
    if not readme.is_file():
        pytest.skip("the README is not in the image")
    example = next(code for code in re.findall(r"```python\n(.*?)```", readme.read_text(), re.DOTALL) if "int8" in code)
    found: dict[str, np.ndarray] = {}
    exec(example.replace("out/a.parquet", str(root / "output/data/a.parquet")), found)  # noqa: S102 - the README's own
    exact = np.array(pq.read_table(root / "exact/a.parquet")["embeddings"].drop_null().to_pylist(), np.float32)
    if dtype == "int8":
        assert np.allclose((found["vectors"] * exact).sum(axis=1), 1, atol=1e-4)
    else:
        assert np.array_equal(found["vectors"] > 0, exact > 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_killed_job_ends_with_the_same_bytes_in_each_precision(root, inputs, tiny_model, monkeypatch, dtype):
    many_rows(inputs)
    options = {"embedding_dtype": dtype, "batch_size": 16}
    run(tiny_model, **options, output_path=str(root / "whole"), checkpoint_path=str(root / "other"))

    run_killed(monkeypatch, tiny_model, 5, **options)
    assert run(tiny_model, **options)["rows"]["resumed"] > 0
    assert compare(root / "whole", root / "output/data") == []


def test_each_precision_has_chunks_of_its_own(root, inputs, tiny_model):
    write(inputs / "a.parquet", ["hola", "mar"])
    for dtype in DTYPES:
        assert run(tiny_model, embedding_dtype=dtype)["rows"]["computed_in_this_attempt"] == 2
    for dtype in DTYPES:
        assert run(tiny_model, embedding_dtype=dtype)["rows"]["computed_in_this_attempt"] == 0


def test_int8_without_normalizing_is_refused_and_binary_is_not(root, inputs, tiny_model):
    argv = ["--embedding-dtype", "int8", "--normalize", "false"]
    with pytest.raises(ConfigError, match=r"--embedding-dtype int8 keeps the direction.*--normalize false.*float16"):
        load(EmbedConfig, argv=argv, environ={}, hyperparameters={})
    write(inputs / "a.parquet", ["el barco zarpa", "mar"])
    run(tiny_model, embedding_dtype="binary", output_path=str(root / "unit"))
    run(tiny_model, embedding_dtype="binary", normalize=False)
    assert outputs(root)["embeddings"].equals(pq.read_table(root / "unit/a.parquet")["embeddings"])


def test_binary_vectors_that_do_not_fill_their_bytes_are_refused(root, inputs, tiny_model):
    write(inputs / "a.parquet", ["hola"])
    with pytest.raises(ConfigError, match=r"--embedding-dtype binary.*a vector has 30.*--dimensions 24"):
        run(tiny_model, embedding_dtype="binary", dimensions=30)
    assert not list(root.rglob("output/data/*.parquet"))
    run(tiny_model, embedding_dtype="binary", dimensions=24)
    assert outputs(root)["embeddings"].type == pa.list_(pa.uint8(), 3)


def column_of(vectors: np.ndarray, dtype: str, **options: object) -> pq.ColumnChunkMetaData:
    """The column as it is written to parquet, by default as the job does it."""
    config = EmbedConfig(embedding_dtype=dtype)
    schema = pa.schema(vector_fields(config, vectors.shape[1], 0))
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, schema, **(options or writer_options(schema, config))) as writer:
        batch = from_bytes(to_bytes(encoded_of(vectors), dtype))
        writer.write_table(pa.table([batch.column("vectors")], schema=schema))
    return pq.read_metadata(pa.BufferReader(sink.getvalue())).row_group(0).column(0)


def test_floats_are_split_by_byte_and_each_precision_takes_less_than_the_one_before():
    vectors = unit_vectors(2000, 384)
    columns = {dtype: column_of(vectors, dtype) for dtype in DTYPES}
    plain = column_of(vectors, "float32", use_dictionary=False, compression="zstd")
    assert {dtype: "BYTE_STREAM_SPLIT" in column.encodings for dtype, column in columns.items()} == {
        "float32": True, "float16": True, "int8": False, "binary": False,
    }  # fmt: skip
    assert {column.compression for column in columns.values()} == {"ZSTD"}
    bytes_per_value = {dtype: column.total_compressed_size / vectors.size for dtype, column in columns.items()}
    assert plain.total_compressed_size / vectors.size > bytes_per_value["float32"]
    assert bytes_per_value["float32"] < 3.6 and bytes_per_value["float16"] < 1.95
    assert bytes_per_value["int8"] < 1.05 and bytes_per_value["binary"] < 0.15


def test_vectors_go_into_a_chunk_and_out_of_it_as_arrays():
    """A Python list of their values would cost more time than the model does on a GPU."""
    vectors = unit_vectors(64, 32)
    array = from_bytes(data := to_bytes(encoded_of(vectors), "float32")).column("vectors").values
    begin = np.frombuffer(data, np.uint8).ctypes.data
    assert begin <= array.buffers()[1].address < begin + len(data)  # not copied when it is read
    assert stored(vectors, "float32") is vectors  # nor before it is written


def test_a_partial_chunk_keeps_the_vectors_as_computed():
    vectors = unit_vectors(3, 32)
    encoded = encoded_of(vectors)
    encoded.status[1] = Status.NULL
    batch = from_bytes(partial_to_bytes(encoded))
    assert np.array_equal(batch.column("vectors").values.to_numpy().reshape(-1, 32), vectors)
    assert batch.column("vectors").is_null().to_pylist() == [False, True, False]
