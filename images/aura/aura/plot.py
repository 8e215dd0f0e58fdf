"""The loss over the steps as a picture, beside the CSV it is drawn from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from aura.export import write_whole

SMOOTHING = 0.98
"""Weight of what was, in the line through the training losses of single steps."""


def loss_plot(rows: Iterable[Mapping[str, Any]], path: Path, *, title: str = "Loss") -> bool:
    """A PNG of training and validation loss, nats a token, over steps; the file is whole or not there.

    A row is a mapping with `step` and either or both of `train_loss` and `val_loss`; None, "" and nan are gaps. Returns
    False, and writes nothing, where there is no number to draw.
    """
    # Not pyplot: it holds every figure in global state, and looks for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    train, validation = _points(rows := list(rows), "train_loss"), _points(rows, "val_loss")
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
    axes.set(xlabel="step", ylabel="loss (nats a token)", title=title)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda beside: figure.savefig(beside, format="png"))
    return True


def _points(rows: Iterable[Mapping[str, Any]], column: str) -> list[tuple[float, float]]:
    points = []
    for row in rows:
        value = row.get(column)
        if value not in (None, "") and math.isfinite(float(value)):
            points.append((float(row["step"]), float(value)))
    return sorted(points)


def _smoothed(losses: Iterable[float]) -> list[float]:
    """Exponential average without its bias towards zero at the beginning."""
    line, average = [], 0.0
    for count, loss in enumerate(losses, start=1):
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        line.append(average / (1 - SMOOTHING**count))
    return line
