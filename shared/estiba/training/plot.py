"""The loss curve as a PNG."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from estiba.storage import FileStore
from estiba.training.metrics import points

SMOOTHING = 0.98
"""Decay of the exponential moving average of training losses."""


def loss_plot(rows: Iterable[Mapping[str, Any]], path: Path, *, title: str = "Loss") -> bool:
    """Plot training and validation loss (nats per token) by step to a PNG. The file is published atomically.

    A row has `step` and `train_loss`, `val_loss` or both; None, "" and nan are gaps. Returns False and writes
    nothing if there is no number to plot.
    """
    # Not pyplot, which keeps figures in global state and looks for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    train, validation = points(rows := list(rows), "train_loss"), points(rows, "val_loss")
    if not train and not validation:
        return False
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color="#9ab7d3", linewidth=0.8, label="training")
        if len(train) > 50:
            axes.plot(steps, _smoothed(losses), color="#1f5f99", linewidth=1.5, label="training, smoothed")
    if validation:
        steps, losses = zip(*validation, strict=True)
        best = min(losses)
        axes.plot(steps, losses, "o-", color="#c8553d", markersize=3.5, label=f"validation, best {best:.3f}")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    FileStore(path.parent).write(path.name, picture.getvalue())
    return True


def _smoothed(losses: Iterable[float]) -> list[float]:
    """Return the exponential moving average, corrected for its initial bias towards zero."""
    line, average = [], 0.0
    for count, loss in enumerate(losses, start=1):
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        line.append(average / (1 - SMOOTHING**count))
    return line
