"""One bad file or name costs that file and nothing else, and is named before the first row is embedded where it can."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from whole_job import outputs, run, write

from embed.config import EmbedConfig
from embed.data import rows
from embed.job import embed
from estiba.errors import ConfigError, DataError
from estiba.platform.contract import Job
from estiba.platform.stop import Stop


def shorten(path: Path, column: str, rows: int) -> None:
    """Write in the first page header of a column that the page holds `rows` of its five rows."""
    metadata = pq.read_metadata(path).row_group(0)
    chunk = next(chunk for index in range(9) if (chunk := metadata.column(index)).path_in_schema == column)
    raw = bytearray(path.read_bytes())
    at = raw.index(b"\x2c\x15\x0a", chunk.data_page_offset)  # thrift: data_page_header, num_values 5
    raw[at + 2] = 2 * rows
    path.write_bytes(raw)


@pytest.mark.parametrize("kept", [None, ["id"], ["texto"]], ids=str)
@pytest.mark.parametrize("column", ["id", "texto"])
def test_column_chunks_with_different_numbers_of_rows_cost_that_file_only(root, inputs, tiny_model, column, kept):
    if (column, kept) == ("id", ["texto"]):
        pytest.skip("the damaged column is neither embedded nor kept")
    plain = {"compression": "none", "use_dictionary": False}
    pq.write_table(pa.table({"id": range(5), "texto": list("abcde")}), inputs / "a.parquet", **plain)
    shorten(inputs / "a.parquet", column, 2)
    write(inputs / "b.parquet", ["hola"] * 3, id=[1, 2, 3])
    results = run(tiny_model, on_bad_file="skip", columns=kept)
    assert [item["path"] for item in results["files"]["bad"]] == ["a.parquet"]
    assert results["rows"]["embedded"] == 3
    assert sorted(path.name for path in (root / "output/data").iterdir()) == ["b.parquet", "results.json"]


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("x"), MemoryError("x"), OverflowError()], ids=repr)
@pytest.mark.parametrize("columns", [["texto"], ["id", "texto"]], ids=["while embedding", "while joining"])
def test_whatever_a_reader_raises_is_that_files_fault(root, inputs, tiny_model, monkeypatch, error, columns):
    for name in ("a.parquet", "b.parquet"):
        pq.write_table(pa.table({"id": range(300), "texto": ["hola"] * 300}), inputs / name)
    original = pq.ParquetFile.iter_batches

    def iter_batches(self, **options):
        batches = original(self, **options)
        yield next(batches)
        if self.metadata.num_rows == 300 and options["columns"] == columns:
            raise error
        yield from batches

    pq.write_table(pa.table({"id": range(7), "texto": ["mar"] * 7}), inputs / "c.parquet")
    monkeypatch.setattr(rows.pq.ParquetFile, "iter_batches", iter_batches)
    results = run(tiny_model, on_bad_file="skip")
    assert [item["path"] for item in results["files"]["bad"]] == ["a.parquet", "b.parquet"]
    assert sorted(path.name for path in (root / "output/data").iterdir()) == ["c.parquet", "results.json"]


def test_a_fault_behind_the_last_row_takes_the_output_back(root, inputs, tiny_model, monkeypatch):
    """The text has more rows than the footer says, and all that the footer knows are embedded by then."""
    pq.write_table(pa.table({"id": range(5), "texto": list("abcde")}), inputs / "a.parquet")
    write(inputs / "b.parquet", ["hola"])
    original = pq.ParquetFile.iter_batches

    def iter_batches(self, **options):
        yield from original(self, **options)
        if self.metadata.num_rows == 5 and options["columns"] == ["texto"]:
            yield from original(self, **options)

    monkeypatch.setattr(rows.pq.ParquetFile, "iter_batches", iter_batches)
    results = run(tiny_model, on_bad_file="skip")
    (bad,) = results["files"]["bad"]
    assert bad["path"] == "a.parquet" and "more than 5 rows" in bad["reason"]
    assert not (root / "output/data/a.parquet").exists()


def test_a_text_column_that_occurs_twice_is_named(root, inputs, tiny_model):
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["texto", "texto"])
    pq.write_table(twice, inputs / "a.parquet")
    write(inputs / "b.parquet", ["hola"])
    with pytest.raises(DataError, match=r"a\.parquet: has 2 columns 'texto'"):
        run(tiny_model)
    assert outputs(root, "b.parquet").num_rows == 1


@pytest.mark.parametrize("name", ["embeddings.model", "embeddings.list.element", "embeddings.", "a.b", "status.x", ""])
def test_columns_with_dots_in_their_names_are_carried_over(root, inputs, tiny_model, name):
    write(inputs / "a.parquet", ["hola", "mar"], **{name: ["m1", None]}, otro=[{"list": {"element": 1}}, None])
    run(tiny_model)
    assert outputs(root)[name].to_pylist() == ["m1", None]
    assert [len(vector) for vector in outputs(root)["embeddings"].to_pylist()] == [32, 32]


def test_names_are_checked_in_every_file_before_the_first_row_is_embedded(root, inputs, tiny_model, monkeypatch):
    from embed.model import Encoder

    write(inputs / "a.parquet", ["hola"])
    write(inputs / "b.parquet", ["hola"], status=["x"])
    write(inputs / "c.parquet", ["hola"], embeddings=["x"])
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array([1]), pa.array([2])], names=["texto", "id", "id"])
    pq.write_table(twice, inputs / "d.parquet")
    write(inputs / "results.json", ["hola"])
    monkeypatch.setattr(Encoder, "encode", lambda *_: pytest.fail("embedded"))
    (inputs / "a.parquet").unlink()
    with pytest.raises(ConfigError) as caught:
        run(tiny_model)
    assert "more files" in str(caught.value)
    monkeypatch.undo()
    monkeypatch.setenv("ESTIBA_ROOT", str(root))
    write(inputs / "a.parquet", ["hola"])
    results = run(tiny_model, on_bad_file="skip")
    reasons = {item["path"]: item["reason"] for item in results["files"]["bad"]}
    assert sorted(reasons) == ["b.parquet", "c.parquet", "d.parquet", "results.json"]
    for name, word in zip(sorted(reasons), ("'status'", "'embeddings'", "'id'", "name"), strict=True):
        assert word in reasons[name]


@pytest.mark.parametrize("length", [243, 244, 250, 255])
def test_file_names_of_any_length_that_the_file_system_takes_are_published(root, inputs, tiny_model, length):
    name = "ñ" + "x" * (length - 10) + ".parquet"
    assert len(name.encode()) == length
    write(inputs / name, ["hola"])
    assert run(tiny_model)["rows"]["embedded"] == 1
    assert outputs(root, name).num_rows == 1


def test_a_key_that_is_too_long_for_a_local_output_is_named_before_a_row_is_embedded(root, inputs, tiny_model, s3):
    write(root / "a.parquet", ["hola"])
    client = s3.client()
    for key in ("in/" + "x" * 260, "in/a.parquet"):
        client.upload_file(str(root / "a.parquet"), s3.bucket, key)
    results = run(tiny_model, input_path=f"s3://{s3.bucket}/in", on_bad_file="skip")
    (bad,) = results["files"]["bad"]
    assert bad["path"] == "x" * 260 and "255 bytes" in bad["reason"]
    assert results["rows"]["computed_in_this_attempt"] == 1


def encrypted(path: Path, *, columns: str, plaintext_footer: bool) -> None:
    import pyarrow.parquet.encryption as encryption

    class Kms(encryption.KmsClient):
        def __init__(self, _config):
            encryption.KmsClient.__init__(self)

        def wrap_key(self, key, _name):
            return base64.b64encode(key)

        def unwrap_key(self, key, _name):
            return base64.b64decode(key)

    properties = encryption.CryptoFactory(Kms).file_encryption_properties(
        encryption.KmsConnectionConfig(),
        encryption.EncryptionConfiguration(
            footer_key="f", column_keys={"c": [columns]}, plaintext_footer=plaintext_footer
        ),
    )
    table = pa.table({"texto": ["hola", "mar"], "id": [1, 2]})
    with pq.ParquetWriter(path, table.schema, encryption_properties=properties) as writer:
        writer.write_table(table)


def test_an_encrypted_file_is_called_encrypted(root, inputs, tiny_model):
    write(inputs / "a.parquet", ["hola"])
    encrypted(inputs / "whole.parquet", columns="texto", plaintext_footer=False)
    encrypted(inputs / "text.parquet", columns="texto", plaintext_footer=True)
    encrypted(inputs / "other.parquet", columns="id", plaintext_footer=True)
    results = run(tiny_model, on_bad_file="skip")
    reasons = {item["path"]: item["reason"] for item in results["files"]["bad"]}
    assert sorted(reasons) == ["other.parquet", "text.parquet", "whole.parquet"]
    for reason in reasons.values():
        assert "encrypted" in reason and "keys are not supported" in reason and "not a parquet file" not in reason
    assert "--columns" in reasons["other.parquet"]
    kept = run(tiny_model, on_bad_file="skip", columns=["texto"], output_path=str(root / "kept"))
    assert kept["rows"]["total"] == 3


def test_one_full_stop_ends_a_sentence(root, inputs, tiny_model):
    write(inputs / "a.parquet", ["hola"])
    (inputs / "b.parquet").write_bytes(b"PAR1" + bytes(100) + b"PAR1")
    with pytest.raises(DataError) as caught:
        embed(EmbedConfig(model=str(tiny_model)), Job.read(), Stop())
    results = json.loads((root / "output/data/results.json").read_text())
    for text in (str(caught.value), results["files"]["bad"][0]["reason"]):
        assert ".." not in text and ".;" not in text
