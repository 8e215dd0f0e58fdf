"""A run's metrics as rows, written to the log, JSON lines, a CSV file and TensorBoard event files.

The rows are part of every checkpoint. After a resume the files are rewritten from the checkpoint's rows: files that
were lost with a host come back, and no step appears twice.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import sys
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from estiba.errors import StoreError
from estiba.log import format_fields, format_value, get_logger, json_value, progress_bar
from estiba.storage import FileStore

logger = get_logger(__name__)

Row = dict[str, Any]
"""`step`, and numbers by name."""
PACKED_ROWS = 1000
"""Rows that are compressed together in a checkpoint, once, so that saving a long run stays fast."""
EPOCH_LOSS = "epoch_train_loss"
"""The mean training loss of an epoch, in the row at its end; the CSV file has it in the column train_loss."""


class MetricsLogger:
    """Rows of metrics, and the files written from them."""

    def __init__(
        self,
        folder: Path | None,
        *,
        csv_path: Path | None = None,
        columns: Sequence[str] | None = None,
        tensorboard: bool = True,
    ) -> None:
        """`folder` None keeps the rows in memory only, as ranks other than the main one do.

        The CSV file is `metrics.csv` in the folder, or `csv_path`. It has all columns, or just `columns`.
        """
        self.rows: list[Row] = []
        self._packed: list[torch.Tensor] = []
        self._is_main = folder is not None
        self._folder, self._columns = folder, None if columns is None else list(columns)
        self._csv_path = csv_path or (folder / "metrics.csv" if folder is not None else Path())
        self._events: Any = None
        self._tensorboard = tensorboard
        self._written_columns: list[str] = []
        self._bar: Any = None

    def state(self) -> dict[str, Any]:
        """Return all rows for a checkpoint: those of long ago compressed."""
        while len(self.rows) >= (len(self._packed) + 2) * PACKED_ROWS:
            first = len(self._packed) * PACKED_ROWS
            text = "\n".join(json.dumps(row, default=_plain) for row in self.rows[first : first + PACKED_ROWS])
            data = bytearray(zlib.compress(text.encode()))
            self._packed.append(torch.frombuffer(data, dtype=torch.uint8))
        return {"packed": list(self._packed), "rows": self.rows[len(self._packed) * PACKED_ROWS :]}

    def start(self, rows: Sequence[Row], *, total_steps: int, step: int) -> None:
        """Start with the rows of a checkpoint and rewrite the files from them."""
        self.rows = [dict(row) for row in rows]
        if self._folder is None:
            return
        self._bar = progress_bar(sys.stderr, total=total_steps, done=step, unit=" steps")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            text = "".join(_json_line(row) for row in self.rows)
            FileStore(self._folder).write("metrics.jsonl", text.encode())
            self._write_csv()
            self._open_events()
        except (OSError, StoreError) as error:
            self._disable_files(error)

    def add(self, row: Row, *, is_printed: bool = True) -> None:
        """Add one row to the log and to every file."""
        self.rows.append(row)
        if is_printed and self._bar is None and self._is_main:
            print(format_fields(row), flush=True)
        if self._bar is not None:
            shown = [name for name in ("train_loss", "val_loss", "lr") if name in row]
            self._bar.set_postfix({name: format_value(row[name]) for name in shown})
        if self._folder is None:
            return
        try:
            with open(self._folder / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(_json_line(row))
            if self._columns is None and set(row) - set(self._written_columns):
                self._write_csv()
            else:
                with open(self._csv_path, "a", encoding="utf-8", newline="") as file:
                    csv.DictWriter(file, self._written_columns, extrasaction="ignore").writerow(_csv_row(row))
            self._write_events(row)
        except (OSError, StoreError) as error:  # a full disk must not end the job
            self._disable_files(error)

    def advance(self, step: int) -> None:
        """Move the progress bar."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._events is not None:
            self._events.close()

    def _disable_files(self, error: Exception) -> None:
        logger.warning(f"{self._folder}: metrics are no longer written there ({error}); the log has them")
        self._folder = None

    def _write_csv(self) -> None:
        assert self._folder is not None
        names = dict.fromkeys(self._columns or ())
        for row in self.rows if self._columns is None else ():
            names.update(dict.fromkeys(row))
        self._written_columns = list(names)
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._written_columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(map(_csv_row, self.rows))
        FileStore(self._csv_path.parent).write(self._csv_path.name, text.getvalue().encode())

    def _open_events(self) -> None:
        if not self._tensorboard:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:  # this image has no TensorBoard; JSON lines and CSV have the same
            return
        assert self._folder is not None
        folder = self._folder / "tensorboard"
        for old in folder.glob("events.out.tfevents.*"):  # of an earlier attempt; its rows are written again below
            old.unlink()
        self._events = SummaryWriter(str(folder), flush_secs=30)
        for row in self.rows:
            self._write_events(row)

    def _write_events(self, row: Mapping[str, Any]) -> None:
        if self._events is None:
            return
        for name, value in row.items():
            if name != "step" and isinstance(value, (int, float)):
                self._events.add_scalar(name, value, row["step"])


def rows_in(state: Any) -> list[Row]:
    """Return the rows in what `MetricsLogger.state` returned; earlier versions saved the list itself."""
    if isinstance(state, list):
        return state
    texts = (zlib.decompress(packed.numpy().tobytes()).decode() for packed in state["packed"])
    return [json.loads(line) for text in texts for line in text.split("\n")] + list(state["rows"])


def points(rows: Iterable[Mapping[str, Any]], column: str) -> list[tuple[float, float]]:
    """Return the (step, value) points of a column, sorted by step. Rows without a finite number are skipped."""
    found = []
    for row in rows:
        value = row.get(column)
        if value not in (None, "") and math.isfinite(float(value)):
            found.append((float(row["step"]), float(value)))
    return sorted(found)


def _csv_row(row: Row) -> Row:
    return {**row, "train_loss": row[EPOCH_LOSS]} if EPOCH_LOSS in row else row


def _plain(value: Any) -> Any:
    return value.item()  # a number of numpy or torch


def _json_line(row: Row) -> str:
    return json.dumps({name: json_value(value) for name, value in row.items()}) + os.linesep
