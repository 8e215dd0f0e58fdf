"""INT96 timestamps, which Spark writes by default: 96 bits of date and nanoseconds, where arrow has 64.

Nanoseconds reach from 1677 to 2262, microseconds 292,000 years, and a value in the other unit wraps or is cut without
an error. A file whose values all fit keeps nanoseconds; otherwise it gets microseconds, if none is lost by that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as kinds

from embed.data.files import READ_AS
from embed.data.identity import open_unchanged
from embed.data.rows import record_batches
from embed.data.table import BadFile, Table
from estiba.errors import DataError
from estiba.storage import Store

NS_PER_US = 1000
LARGEST_US, SMALLEST_US = (2**63 - 1) // NS_PER_US, -(2**63 // NS_PER_US)


def with_exact_timestamps(store: Store, table: Table, kept: Sequence[str]) -> Table | BadFile:
    """The table with the unit in which its INT96 columns are exact, or why there is none."""
    columns = [name for name in int96_columns(table) if name in kept]
    if not columns:
        return table
    beyond, fine = set(), set()
    try:
        with open_unchanged(store, table) as file, open_unchanged(store, table) as again:
            for group in range(len(table.row_group_rows)):
                for ns, us in zip(
                    record_batches(file, table, group, columns, int96_unit="ns"),
                    record_batches(again, table, group, columns, int96_unit="us"),
                    strict=True,
                ):
                    for name in columns:
                        is_beyond, is_fine = _looks(ns.column(name), us.column(name))
                        beyond |= {name} if is_beyond else set()
                        fine |= {name} if is_fine else set()
    except DataError as error:
        return BadFile(path=table.path, reason=str(error).removeprefix(f"{table.path}: "))
    if not beyond:
        return table
    if fine:
        return BadFile(
            path=table.path,
            reason=f"INT96 timestamps before 1678 or after 2262 (column {min(beyond)!r}) cannot be kept beside ones of "
            f"nanoseconds (column {min(fine)!r}); leave one out with --columns, or write it in another type",
        )
    with open_unchanged(store, table) as file:
        parquet = pq.ParquetFile(file, metadata=table.metadata, coerce_int96_timestamp_unit="us", **READ_AS)
        schema = parquet.schema_arrow
    return replace(table, schema=schema, int96_unit="us")


def int96_columns(table: Table) -> list[str]:
    """The top-level columns that hold INT96 timestamps."""
    schema = table.metadata.schema
    leaves = (schema.column(index) for index in range(len(schema)))
    paths = [leaf.path for leaf in leaves if leaf.physical_type == "INT96"]
    return [name for name in table.schema.names if any(f"{path}.".startswith(f"{name}.") for path in paths)]


def _looks(ns: pa.Array, us: pa.Array) -> tuple[bool, bool]:
    """Whether a value is out of reach of nanoseconds, and whether one has a fraction of a microsecond."""
    is_beyond = is_fine = False
    for ns_leaf, us_leaf in zip(_timestamps(ns), _timestamps(us), strict=True):
        ns_values, us_values = (leaf.drop_null().cast(pa.int64()).to_numpy() for leaf in (ns_leaf, us_leaf))
        is_beyond |= bool(((us_values > LARGEST_US) | (us_values < SMALLEST_US)).any())
        with np.errstate(over="ignore"):  # both wrap at 64 bits, so the comparison also holds beyond them
            is_fine |= bool((us_values * NS_PER_US != ns_values).any())
    return is_beyond, is_fine


def _timestamps(array: pa.Array) -> Iterator[pa.Array]:
    if kinds.is_timestamp(array.type):
        yield array
    elif kinds.is_struct(array.type):
        for field in array.flatten():
            yield from _timestamps(field)
    elif kinds.is_map(array.type):
        yield from _timestamps(array.keys)
        yield from _timestamps(array.items)
    elif kinds.is_nested(array.type):
        yield from _timestamps(array.flatten())
