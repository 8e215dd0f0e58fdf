"""The phoneme error rate over the steps, beside the losses that led there."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from estiba.store import FileStore


def per_plot(rows: Iterable[Mapping[str, Any]], path: Path, *, title: str = "Phoneme error rate") -> bool:
    """A PNG, whole or not there. A row has `step` and any of `val_per`, `val_der`, `val_loss`, `train_loss`.

    Returns False, and writes nothing, where there is no error rate to draw.
    """
    # Not pyplot: it holds every figure in global state, and looks for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = list(rows)
    rates = _points(rows, "val_per")
    if not rates:
        return False
    figure = Figure(figsize=(8, 6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True)
    best = min(rate for _, rate in rates)
    above.plot(*zip(*rates, strict=True), "o-", color="#c8553d", markersize=3.5, label=f"PER, best {best:.2%}")
    if diphones := _points(rows, "val_der"):
        above.plot(*zip(*diphones, strict=True), "o-", color="#9a7fb8", markersize=3, label="diphone error rate")
    above.set(ylabel="edits a phoneme", title=title)
    above.set_ylim(0, 1.06 * max(0.01, *(rate for _, rate in [*rates, *diphones])))
    losses: list[float] = []
    for column, color, label in (("train_loss", "#1f5f99", "training"), ("val_loss", "#c8553d", "validation")):
        if points := _points(rows, column):
            below.plot(*zip(*points, strict=True), color=color, linewidth=1.2, label=label)
            losses += [loss for _, loss in points]
    below.set(xlabel="step", ylabel="CTC loss (nats a trial)")
    if losses and min(losses) > 0:
        below.set_yscale("log")  # it falls a thousandfold
    for axes in (above, below):
        axes.grid(alpha=0.25)
        if axes.lines:
            axes.legend(frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    path.parent.mkdir(parents=True, exist_ok=True)
    FileStore(path.parent).write(path.name, picture.getvalue())
    return True


def _points(rows: Iterable[Mapping[str, Any]], column: str) -> list[tuple[float, float]]:
    values = [(row["step"], row.get(column)) for row in rows]
    return sorted((float(step), float(value)) for step, value in values if value is not None and math.isfinite(value))
