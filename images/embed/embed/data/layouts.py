"""Which objects of a folder are data: hidden names are not, and a table format's files are not its rows."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from estiba.errors import ConfigError

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


def refuse_table_formats(location: str, paths: Iterable[str]) -> None:
    """Raise ConfigError if a folder is a Delta, Iceberg or Hudi table.

    Such a folder also holds files whose rows were deleted or replaced; only the table's log says which.
    """
    tables: dict[str, str] = {}
    for path in paths:
        if (table := _table_of(path)) is not None:
            tables.setdefault(*table)
    if not tables and "://" not in location:
        tables = _tables_above(Path(location))
    if tables:
        folder, kind = min(tables.items())
        where = location if folder in ("", ".") else f"{folder} in {location}"
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


def _tables_above(folder: Path) -> dict[str, str]:
    """The table that a local folder is a part of, such as one partition, or the `data` of an Iceberg table."""
    for parent in folder.absolute().parents:
        if (parent / "_delta_log").is_dir():
            return {str(parent): "Delta"}
        if (parent / ".hoodie").is_dir():
            return {str(parent): "Hudi"}
        if next((parent / "metadata").glob("*.metadata.json*"), None) is not None:
            return {str(parent): "Iceberg"}
    return {}
