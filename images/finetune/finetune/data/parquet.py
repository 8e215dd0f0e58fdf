"""Parquet to rows. Every type becomes the text that a person would write; nested values become JSON."""

from __future__ import annotations

import base64
import io
import re
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from estiba.errors import DataError
from finetune.data.rows import BadRow, Number, ParsedFile, Row, unique_names

_FRACTION = re.compile(r"(?<=:\d\d)\.(\d*?)0+(?=Z|$)")
_INFINITE = {"inf": "Infinity", "-inf": "-Infinity"}
_EXACT = 2**53
"""Whole numbers below it are exact in a float64."""
MAX_ROWS = 50_000_000


def parse_parquet(name: str, data: bytes) -> ParsedFile:
    """Return the rows of a parquet file. Raises DataError if it is damaged or has no rows."""
    try:
        file = pq.ParquetFile(io.BytesIO(data))
        if file.metadata.num_rows > MAX_ROWS:
            raise DataError(f"{name}: has {file.metadata.num_rows:,} rows, more than {MAX_ROWS:,}; split it")
        table = file.read(use_threads=False)
        columns = {
            column: _cells(table.column(index))
            for index, column in enumerate(unique_names([field.strip() for field in table.column_names]))
            if not (column.startswith("__index_level_") and column.endswith("__"))  # written by pandas
        }
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split())[:160]
        raise DataError(f"{name}: is a damaged parquet file ({reason}); copy or export it again") from error
    if not table.num_rows:
        raise DataError(f"{name}: has the columns {', '.join(columns)[:80] or 'none'} and no rows; restore its content")
    parsed = ParsedFile(format="parquet", columns=list(columns), row_count=table.num_rows, unit="row")
    for number, cells in enumerate(zip(*columns.values(), strict=True), start=1):
        broken = next((cell for cell in cells if isinstance(cell, UnicodeDecodeError)), None)
        if broken is not None:
            byte = broken.object[broken.start]
            parsed.bad.append(BadRow(number, "not UTF-8", f"byte 0x{byte:02X} is not valid UTF-8; repair the row"))
        else:
            parsed.rows.append(Row(number, dict(zip(columns, cells, strict=True))))
    return parsed


def _cells(column: pa.ChunkedArray) -> list[Any]:
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.cast(kind.value_type)
        kind = column.type
    if isinstance(kind, pa.BaseExtensionType):
        column = pa.chunked_array([chunk.storage for chunk in column.chunks], kind.storage_type)
        kind = column.type
    if any(is_text(kind) for is_text in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)):
        return [_text(value) for value in column.cast(pa.large_binary()).to_pylist()]
    if any(is_number(kind) for is_number in (pa.types.is_integer, pa.types.is_decimal)):
        return _numbers(column)
    if pa.types.is_floating(kind):
        # repr of a float64 would show digits that a float32 does not have
        texts = [_float_text(text) for text in pc.cast(column, pa.string()).to_pylist()]
        # pandas stores integers as floats when one is missing; in any other column a whole number is 2.0
        are_whole = all(text is None or text.lstrip("-").isdigit() for text in texts if text not in _INFINITE.values())
        suffix = "" if are_whole else ".0"
        return [
            None if text is None else Number(text + suffix if text.lstrip("-").isdigit() else text) for text in texts
        ]
    if pa.types.is_temporal(kind) and not pa.types.is_duration(kind):
        return [None if text is None else _date(str(text)) for text in pc.cast(column, pa.string()).to_pylist()]
    return [_plain(value, kind) for value in column.to_pylist()]


def _numbers(column: pa.ChunkedArray) -> list[Any]:
    values = column.to_pylist()
    return [
        None if value is None else Number(value if isinstance(value, int) else format(value, "f")) for value in values
    ]


def _float_text(text: str | None) -> str | None:
    """A float's digits as a person writes them: Arrow writes 4.9e+11 for a whole number from ten digits up."""
    if text is None or text == "nan":
        return None
    if "e" in text and (value := Decimal(text)) == value.to_integral_value() and abs(value) < _EXACT:
        return format(value, "f")
    return _INFINITE.get(text, text)


def _date(text: str) -> str:
    """A date or time without the zeros that its type adds."""
    text = _FRACTION.sub(lambda found: f".{found[1]}" if found[1] else "", text)
    return text.removesuffix(" 00:00:00")


def _text(value: bytes | None) -> Any:
    if value is None:
        return None
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        return error


def _plain(value: Any, kind: pa.DataType | None) -> Any:
    """A nested value with what JSON can say."""
    if isinstance(value, dict):
        kinds = {field.name: field.type for field in kind} if kind is not None and pa.types.is_struct(kind) else {}
        # parquet gives every struct all fields of the column; those that a value does not have are null
        return {str(key): _plain(item, kinds.get(key)) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        if value and all(isinstance(item, tuple) and len(item) == 2 for item in value):  # a map
            return {str(key): _plain(item, getattr(kind, "item_type", None)) for key, item in value}
        return [_plain(item, getattr(kind, "value_type", None)) for item in value]
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return base64.b64encode(value).decode("ascii")
    if isinstance(value, (bool, str)) or value is None:
        return value
    if isinstance(value, float):
        is_short = kind is not None and (pa.types.is_float32(kind) or pa.types.is_float16(kind))
        text = str((np.float32 if pa.types.is_float32(kind) else np.float16)(value)) if is_short else repr(value)
        return None if value != value else Number(_INFINITE.get(text, text))
    if isinstance(value, Decimal):
        return format(value, "f")
    if isinstance(value, int):
        return Number(value)
    return str(value)
