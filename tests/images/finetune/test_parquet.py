"""Every type of parquet becomes the text that a person would write."""

from __future__ import annotations

import datetime as dt
import decimal
import io
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune.data.parquet import parse_parquet
from finetune.data.rows import as_text


def texts(array: pa.Array) -> list[str]:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"cell": array}), buffer)
    return [as_text(row.cells["cell"]) for row in parse_parquet("t.parquet", buffer.getvalue()).rows]


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (pa.array(["007", "", None]), ["007", "", ""]),
        (pa.array(["a", "b", "a"]).dictionary_encode(), ["a", "b", "a"]),
        (pa.array(["a", None], pa.large_string()), ["a", ""]),
        (pa.array([1, None, 2**63 - 1]), ["1", "", "9223372036854775807"]),
        (pa.array([1.5, 2.0, None, float("nan")]), ["1.5", "2.0", "", ""]),
        (pa.array([1.0, 2.0, None]), ["1", "2", ""]),
        (pa.array([0.1, 0.25], pa.float32()), ["0.1", "0.25"]),
        (pa.array([decimal.Decimal("1.10"), None]), ["1.10", ""]),
        (pa.array([True, False, None]), ["true", "false", ""]),
        (pa.array([dt.date(2024, 1, 31), None]), ["2024-01-31", ""]),
        (pa.array([dt.datetime(2024, 1, 31), dt.datetime(2024, 1, 31, 12, 30)]), ["2024-01-31", "2024-01-31 12:30:00"]),
        (pa.array([dt.time(12, 30)]), ["12:30:00"]),
        (pa.array([[1, 2], [], None]), ["[1, 2]", "[]", ""]),
        (pa.array([{"a": 1, "b": "é"}, {"a": None, "b": "x"}]), ['{"a": 1, "b": "é"}', '{"b": "x"}']),
        (pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())), ['{"k": 1}']),
        (pa.array([b"text", b"\xff\x00"]), ["text", "/wA="]),
        (pa.array([None, None]), ["", ""]),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else "",
)
def test_a_type_becomes_text(array: Any, expected: list[str]) -> None:
    assert texts(array) == expected


def test_text_that_is_not_utf8_is_a_bad_row() -> None:
    buffer = io.BytesIO()
    array = pa.Array.from_buffers(pa.string(), 2, pa.array([b"ok", b"\xff!"]).buffers())
    pq.write_table(pa.table({"text": array}), buffer)
    parsed = parse_parquet("t.parquet", buffer.getvalue())
    assert [row.line for row in parsed.rows] == [1]
    assert [(row.line, row.reason) for row in parsed.bad] == [(2, "not UTF-8")]


def test_an_index_of_pandas_is_no_column() -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": ["a"], "__index_level_0__": [7]}), buffer)
    assert parse_parquet("t.parquet", buffer.getvalue()).columns == ["text"]
