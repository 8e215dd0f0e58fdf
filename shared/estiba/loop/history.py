"""What a run has measured so far: a log line, JSON lines, CSV and TensorBoard event files of the same rows.

The rows are part of every checkpoint. A host that is lost loses its files; they are written again from the rows, and
rows of steps after the checkpoint are cut, so that no step is there twice.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from estiba.errors import StoreError
from estiba.progress import columns_of
from estiba.stop import say
from estiba.store import FileStore

Row = dict[str, Any]
"""`step`, and numbers by name."""
MOST_ROWS = 20_000
"""More than a person can look at; beyond it, every second of the older half's lines leaves the checkpoint."""


class History:
    """Rows by step, and the files made of them."""

    def __init__(
        self,
        folder: Path | None,
        *,
        csv_path: Path | None = None,
        columns: Sequence[str] | None = None,
        tensorboard: bool = True,
    ) -> None:
        """`folder` None keeps the rows alone, as ranks other than the first do.

        The CSV is `metrics.csv` in there, or at `csv_path`, with every name there is or just `columns`.
        """
        self.rows: list[Row] = []
        self._is_first = folder is not None
        self._folder, self._columns = folder, None if columns is None else list(columns)
        self._csv_path = csv_path or (folder / "metrics.csv" if folder is not None else Path())
        self._events: Any = None
        self._tensorboard = tensorboard
        self._known: list[str] = []
        self._bar: tqdm | None = None

    def start(self, rows: Sequence[Row], *, total_steps: int, step: int) -> None:
        """Begin with the rows of a checkpoint; files are written anew from them."""
        self.rows = [dict(row) for row in rows]
        if self._folder is not None and sys.stderr.isatty():
            ncols = None if columns_of(sys.stderr) else 80
            nrows = None if columns_of(sys.stderr) else 24
            self._bar = tqdm(total=total_steps, initial=step, unit=" steps", ncols=ncols, nrows=nrows)
        if self._folder is None:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            text = "".join(_json_line(row) for row in self.rows)
            FileStore(self._folder).write("metrics.jsonl", text.encode())
            self._write_csv()
            self._open_events()
        except (OSError, StoreError) as error:
            self._give_up(error)

    def add(self, row: Row, *, said: bool = True) -> None:
        """One row: to the log, and to every file."""
        self.rows.append(row)
        if len(self.rows) > MOST_ROWS:
            half = len(self.rows) // 2
            self.rows = [
                row for index, row in enumerate(self.rows) if index >= half or index % 2 or "train_loss" not in row
            ]
        if said and self._bar is None and self._is_first:
            print(" ".join(f"{name}={_plain(value)}" for name, value in row.items() if value is not None), flush=True)
        if self._bar is not None:
            self._bar.set_postfix({name: _plain(row[name]) for name in ("train_loss", "val_loss", "lr") if name in row})
        if self._folder is None:
            return
        try:
            with open(self._folder / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(_json_line(row))
            if self._columns is None and set(row) - set(self._known):
                self._write_csv()
            else:
                with open(self._csv_path, "a", encoding="utf-8", newline="") as file:
                    csv.DictWriter(file, self._known, extrasaction="ignore").writerow(row)
            self._write_events(row)
        except (OSError, StoreError) as error:  # a full disk must not end a job for the sake of its diary
            self._give_up(error)

    def advance(self, step: int) -> None:
        """Move the bar, where there is one."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._events is not None:
            self._events.close()

    def _give_up(self, error: Exception) -> None:
        say(f"warning: {self._folder}: metrics are no longer written there ({error}); the log has them")
        self._folder = None

    def _write_csv(self) -> None:
        assert self._folder is not None
        names = dict.fromkeys(self._columns or ())
        for row in self.rows if self._columns is None else ():
            names.update(dict.fromkeys(row))
        self._known = list(names)
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._known, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(self.rows)
        FileStore(self._csv_path.parent).write(self._csv_path.name, text.getvalue().encode())

    def _open_events(self) -> None:
        if not self._tensorboard:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:  # an image without it; JSON lines and CSV hold the same
            return
        assert self._folder is not None
        folder = self._folder / "tensorboard"
        for old in folder.glob("events.out.tfevents.*"):  # an earlier attempt on this host: its rows come again below
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


def _json_line(row: Row) -> str:
    strict = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()
    }
    return json.dumps(strict) + os.linesep


def _plain(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
