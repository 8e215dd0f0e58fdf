"""Columns of every type are carried over bit for bit, or refused by name."""

from __future__ import annotations

import datetime as dt
import uuid
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from whole_job import outputs, run

from estiba.errors import ConfigError

D = Decimal
US_PER_DAY = 86_400_000_000


def int96(path: Path, *, nanoseconds: bool = False, far: bool = True, nested: bool = False) -> pa.Table:
    """A file as Spark writes it by default: INT96, no arrow schema. Returns what it holds, in microseconds."""
    last = dt.datetime(9999, 12, 31, 23, 59, 59, 999999) if far else dt.datetime(2262, 4, 11)
    first = dt.datetime(1, 1, 1) if far else dt.datetime(1677, 9, 22)
    times = pa.array([last, None, first, dt.datetime(2026, 11, 29, 1, 2, 3, 4)], pa.timestamp("us"))
    columns = {"texto": ["uno", "dos", "tres", "mar"], "t": times}
    if nested:
        columns["l"] = pa.array([[last, None], None, [], [first]], pa.list_(pa.timestamp("us")))
        columns["s"] = pa.array([{"a": {"t": last}}, None, {"a": None}, {"a": {"t": first}}])
        columns["m"] = pa.array([[("k", last)], None, [], [("k", None)]], pa.map_(pa.string(), pa.timestamp("us")))
    table = pa.table(columns)
    written = table
    if nanoseconds:
        written = table.append_column("ns", pa.array([1, None, 1001, 999], pa.timestamp("ns")))
    pq.write_table(written, path, use_deprecated_int96_timestamps=True, store_schema=False, row_group_size=2)
    return table


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
def test_int96_timestamps_up_to_the_year_9999_are_carried_over(root, inputs, tiny_model, nested):
    expected = int96(inputs / "a.parquet", nested=nested)
    run(tiny_model)
    found = outputs(root)
    for name in expected.schema.names:
        assert found[name].to_pylist() == expected[name].to_pylist()
    assert found["t"].type == pa.timestamp("us")
    assert found["t"].cast(pa.int64())[0].as_py() == 253_402_300_799_999_999


def test_int96_timestamps_keep_their_nanoseconds(root, inputs, tiny_model):
    int96(inputs / "a.parquet", far=False, nanoseconds=True)
    run(tiny_model)
    assert outputs(root)["ns"].cast(pa.int64()).to_pylist() == [1, None, 1001, 999]
    expected = pq.read_table(inputs / "a.parquet")
    assert outputs(root).select(expected.schema.names).equals(expected)


def test_int96_timestamps_that_fit_no_unit_are_refused_by_name_before_a_row_is_embedded(root, inputs, tiny_model):
    int96(inputs / "a.parquet", nanoseconds=True)
    pq.write_table(pa.table({"texto": ["hola"], "t": pa.array([0], pa.timestamp("us"))}), inputs / "b.parquet")
    results = run(tiny_model, on_bad_file="skip")
    (bad,) = results["files"]["bad"]
    assert "'t'" in bad["reason"] and "'ns'" in bad["reason"] and "--columns" in bad["reason"]
    assert results["rows"]["computed_in_this_attempt"] == 1
    assert not (root / "output/data/a.parquet").exists()
    kept = run(tiny_model, columns=["texto", "t"], output_path=str(root / "kept"))
    assert kept["rows"]["total"] == 5


def test_what_pyarrow_reads_is_what_the_output_holds_metadata_of_fields_included(root, inputs, tiny_model):
    moment = [dt.datetime(2026, 1, 1), None]
    columns = {
        "texto": pa.array(["hola", "mar"]),
        "d32": pa.array([D("1.5"), None], pa.decimal32(5, 2)),
        "d64": pa.array([D("1.5"), None], pa.decimal64(15, 2)),
        "d256": pa.array([D("1" * 70 + ".25"), None], pa.decimal256(76, 2)),
        "d256_small": pa.array([D("1.5"), None], pa.decimal256(20, 2)),
        "dictionary_of_int": pa.array([1, 2]).dictionary_encode(),
        "dictionary_ordered": pa.DictionaryArray.from_arrays(pa.array([0, 1], pa.int8()), ["a", "b"], ordered=True),
        "dictionary_large": pa.DictionaryArray.from_arrays(
            pa.array([0, None], pa.int16()), pa.array(["a", "b"], pa.large_string())
        ),
        "dictionary_nested": pa.array([["a"], None], pa.list_(pa.dictionary(pa.int8(), pa.string()))),
        "large_binary": pa.array([b"\x00\xff", None], pa.large_binary()),
        "binary_view": pa.array([b"a", None], pa.binary_view()),
        "date64": pa.array([dt.date(9999, 12, 31), None], pa.date64()),
        **{f"t_{unit}": pa.array(moment, pa.timestamp(unit, "UTC")) for unit in ("s", "ms", "us", "ns")},
        "year_one": pa.array([dt.datetime(1, 1, 1), dt.datetime(9999, 12, 31)], pa.timestamp("us")),
        "time32": pa.array([1, None], pa.time32("s")),
        "time64": pa.array([1, None], pa.time64("ns")),
        "duration": pa.array([1, None], pa.duration("ns")),
        "half": pa.array([1.5, None], pa.float16()),
        "nan": pa.array(np.array([0x7FF8DEADBEEF0001, 0x7FF0000000000000], np.uint64).view(np.float64)),
        "u64": pa.array([2**64 - 1, None], pa.uint64()),
        "uuid": pa.array([uuid.UUID(int=7).bytes, None], pa.uuid()),
        "json": pa.array(["{}", None], pa.json_()),
        "list_view": pa.array([[1], None], pa.list_view(pa.int32())),
        "large_list": pa.array([["a"], None], pa.large_list(pa.string())),
        "map": pa.array([[(1, "a")], None], pa.map_(pa.int32(), pa.string(), keys_sorted=True)),
        "hondo": pa.array([{"a": [{"b": [None, "x"]}]}, None]),
        "not_null": pa.array([[1], []], pa.list_(pa.field("x", pa.int32(), nullable=False, metadata={"k": "v"}))),
    }
    fields = [
        pa.field(name, value.type, metadata={"nota": name, "PARQUET:field_id": str(index + 100)})
        for index, (name, value) in enumerate(columns.items())
    ]
    schema = pa.schema(fields, metadata={"origen": "prueba"})
    pq.write_table(pa.table(list(columns.values()), schema=schema), inputs / "a.parquet", row_group_size=1)
    pq.write_table(pa.table(list(columns.values()), schema=schema), inputs / "b.parquet", store_schema=False)
    run(tiny_model)
    for name in ("a.parquet", "b.parquet"):
        expected, found = pq.read_table(inputs / name), outputs(root, name)
        for column in expected.schema.names:
            assert found.schema.field(column).equals(expected.schema.field(column), check_metadata=True), column
            if column == "nan":
                bits = [pa.concat_arrays(table[column].chunks).view(pa.int64()) for table in (found, expected)]
                assert bits[0].equals(bits[1])
            else:
                assert found[column].equals(expected[column]), column


def test_a_column_that_no_output_can_hold_is_refused_by_name(root, inputs, tiny_model, monkeypatch):
    """pyarrow keeps every type it reads today; the check is that of an output that would come back otherwise."""
    from embed.artifacts import outputs as module

    pq.write_table(pa.table({"texto": ["hola"], "t": pa.array([1], pa.timestamp("ns"))}), inputs / "a.parquet")
    read = pq.read_schema

    def read_schema(source, **more):
        schema = read(source, **more)
        return schema.set(schema.get_field_index("t"), pa.field("t", pa.timestamp("us")))

    monkeypatch.setattr(module.pq, "read_schema", read_schema)
    with pytest.raises(ConfigError, match=r"column 't' is timestamp\[ns\] and would become timestamp\[us\].*--columns"):
        run(tiny_model)


def test_a_column_annotated_as_enum_is_read_as_text(root, inputs, tiny_model):
    """pyarrow writes no ENUM: the annotation of a STRING is changed in the footer."""
    pq.write_table(pa.table({"texto": ["hola", None, "mar"]}), inputs / "a.parquet", store_schema=False)
    raw = (inputs / "a.parquet").read_bytes()
    footer = len(raw) - 8 - int.from_bytes(raw[-8:-4], "little")
    head, tail = raw[:footer], raw[footer:]
    at = tail.index(b"texto") + 5
    # after the name: converted_type (field 6, i32) UTF8=0, then logicalType (field 10): struct with field 1 (STRING)
    assert tail[at : at + 6] == b"\x25\x00\x4c\x1c\x00\x00", tail[at : at + 8]
    (inputs / "a.parquet").write_bytes(head + tail[:at] + b"\x25\x08\x4c\x4c\x00\x00" + tail[at + 6 :])
    assert pq.ParquetFile(inputs / "a.parquet").schema.column(0).logical_type.type == "ENUM"
    assert pq.read_schema(inputs / "a.parquet").field("texto").type == pa.binary()
    run(tiny_model)
    assert outputs(root)["status"].to_pylist() == ["ok", "null", "ok"]
    assert outputs(root)["texto"].to_pylist() == [b"hola", None, b"mar"]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()], ids=str)
def test_binary_text_is_read_by_flag_and_what_is_not_utf8_says_so(root, inputs, tiny_model, kind):
    values = [b"hola", None, b"\xff\xfe", "ñandú".encode()]
    pq.write_table(pa.table({"texto": pa.array(values, kind)}), inputs / "a.parquet")
    with pytest.raises(ConfigError, match="--binary-as-text"):
        run(tiny_model)
    run(tiny_model, binary_as_text=True)
    assert outputs(root)["status"].to_pylist() == ["ok", "null", "invalid utf-8", "ok"]
    assert outputs(root)["texto"].to_pylist() == values
    pq.write_table(pa.table({"texto": ["hola", None, None, "ñandú"]}), inputs / "b.parquet")
    run(tiny_model, binary_as_text=True)
    assert outputs(root)["embeddings"][3].equals(outputs(root, "b.parquet")["embeddings"][3])
