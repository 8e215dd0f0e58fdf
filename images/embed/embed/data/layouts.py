"""Which objects of a folder are data: hidden names are not, and a table format's files are not its rows."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from estiba.errors import ConfigError, StoreError
from estiba.storage import FileStore, open_store, split_location

SPARK_COPYING = "._COPYING_"
_REMEDY = {
    "Delta": "spark.read.format('delta').load(TABLE).write.parquet(FOLDER), or deltalake's DeltaTable(TABLE)",
    "Iceberg": "spark.read.format('iceberg').load(TABLE).write.parquet(FOLDER), or pyiceberg's table.scan()",
    "Hudi": "spark.read.format('hudi').load(TABLE).write.parquet(FOLDER)",
}


def is_hidden(path: str) -> bool:
    """Spark's rule: a name that begins with `.` or `_` is no data, unless it is a partition such as `_id=3`."""
    return any(
        part.startswith(".") or (part.startswith("_") and "=" not in part) or part.endswith(SPARK_COPYING)
        for part in path.split("/")
    )


def refuse_table_formats(location: str, paths: Sequence[str]) -> None:
    """Raise ConfigError if a folder is a Delta, Iceberg or Hudi table.

    Such a folder also holds files whose rows were deleted or replaced; only the table's log says which.
    """
    tables: dict[str, str] = {}
    for path in paths:
        if (table := _table_of(path)) is not None:
            tables.setdefault(*table)
    if not tables:
        store = open_store(location)
        tables = _tables_around(store, paths) if isinstance(store, FileStore) else _tables_above_prefix(location)
    if tables:
        folder, kind = min(tables.items())
        is_above = folder.startswith(("/", "s3://"))
        where = location if folder in ("", ".") else f"{folder} {'around' if is_above else 'in'} {location}"
        more = f" (and {len(tables) - 1} more tables)" if len(tables) > 1 else ""
        raise ConfigError(
            f"{where} is a table of the format {kind}{more}: its folder also holds rows that were deleted or replaced; "
            f"write its current rows to a folder of parquet files and pass that ({_REMEDY[kind]})"
        )


def _table_of(path: str) -> tuple[str, str] | None:
    """The table's folder and its format, if `path` belongs to a table's log."""
    *folders, name = path.split("/")
    for marker, kind in (("_delta_log", "Delta"), (".hoodie", "Hudi")):
        if marker in folders:
            return "/".join(folders[: folders.index(marker)]), kind
    if folders and folders[-1] == "metadata" and name.endswith((".metadata.json", ".metadata.json.gz")):
        return "/".join(folders[:-1]), "Iceberg"
    return None


def _tables_around(store: FileStore, paths: Sequence[str]) -> dict[str, str]:
    """The tables that a local input is a part of, by its path or by a link in it, such as one partition of a table."""
    root = os.path.realpath(store.root)
    folders = {store.root} | {store.path_of(path).parent for path in paths}
    real = {os.path.realpath(folder) for folder in folders}
    links = (path for path in map(store.path_of, paths) if path.is_symlink())
    real |= {os.path.dirname(os.path.realpath(path)) for path in links}
    outside = {folder for folder in real if not folder.startswith(f"{root}/")}
    above = {parent for folder in {*outside, str(store.root)} for parent in (Path(folder), *Path(folder).parents)}
    tables = {}
    for folder in above:
        if (folder / "_delta_log").is_dir():
            tables[str(folder)] = "Delta"
        elif (folder / ".hoodie").is_dir():
            tables[str(folder)] = "Hudi"
        elif next((folder / "metadata").glob("*.metadata.json*"), None) is not None:
            tables[str(folder)] = "Iceberg"
    return tables


def _tables_above_prefix(location: str) -> dict[str, str]:
    """The table of which an S3 prefix or object is a part. A role that may not list above it is not asked for more."""
    above, name = split_location(location)
    while name and not above.endswith(":/"):
        with contextlib.suppress(StoreError):
            store = open_store(above)
            for marker, kind in (("_delta_log", "Delta"), (".hoodie", "Hudi"), ("metadata", "Iceberg")):
                if any(_table_of(entry.path) == ("", kind) for entry in store.list(marker)):
                    return {above: kind}
        above, name = split_location(above)
    return {}
