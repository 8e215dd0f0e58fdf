"""Where a job's progress numbers go beside the log: JSON lines, a Prometheus file, or CloudWatch's embedded format.

A writer takes one record at a time, `{"time": ..., "rows": ..., "rows_per_s": ...}`.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

Record = Mapping[str, Any]

UNITS = {"_per_s": "Count/Second", "_s": "Seconds", "_mb": "Megabytes"}
"""CloudWatch's unit by the end of a name; the first that fits."""


class MetricsWriter(Protocol):
    """Writes one record. Raises OSError."""

    name: str
    """Where the records go, for messages."""

    def write(self, record: Record) -> None: ...


class JsonLines:
    """Appends each record as one line."""

    def __init__(self, path: Path) -> None:
        self._path, self.name = path, str(path)

    def write(self, record: Record) -> None:
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


class PrometheusFile:
    """Keeps the newest numbers in a text file, for node_exporter's textfile collector. It is replaced whole."""

    def __init__(self, path: Path, prefix: str, labels: Mapping[str, str]) -> None:
        self._path, self.name, self._prefix = path, str(path), prefix
        self._labels = ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items())
        self._newest: dict[str, float] = {}

    def write(self, record: Record) -> None:
        self._newest |= _numbers(record)
        lines = []
        for name, value in self._newest.items():
            metric = re.sub(r"[^a-zA-Z0-9_]", "_", f"{self._prefix}_{name}")
            lines += [f"# TYPE {metric} gauge", f"{metric}{{{self._labels}}} {value}"]
        beside = self._path.with_name(f".{self._path.name}.new")
        beside.write_text("\n".join(lines) + "\n", "utf-8")
        os.replace(beside, self._path)


class EmbeddedMetrics:
    """Prints each record as a line of CloudWatch's embedded metric format, which becomes metrics in CloudWatch Logs."""

    name = "standard output"

    def __init__(self, namespace: str, dimensions: Mapping[str, str], stream: TextIO | None = None) -> None:
        self._namespace, self._dimensions, self._stream = namespace, dict(dimensions), stream

    def write(self, record: Record) -> None:
        numbers = _numbers(record)
        metrics = [{"Name": name, "Unit": _unit(name)} for name in numbers]
        about = {"Namespace": self._namespace, "Dimensions": [list(self._dimensions)], "Metrics": metrics}
        line = {"_aws": {"Timestamp": round(record["time"] * 1000), "CloudWatchMetrics": [about]}}
        print(json.dumps({**line, **self._dimensions, **numbers}), file=self._stream or sys.stdout, flush=True)


def _numbers(record: Record) -> dict[str, float]:
    return {
        name: value
        for name, value in record.items()
        if name != "time" and isinstance(value, int | float) and not isinstance(value, bool)
    }


def _unit(name: str) -> str:
    return next((unit for end, unit in UNITS.items() if name.endswith(end)), "None")


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
