"""Write a run's outputs: the best weights, predictions by trial, error rates by day, a plot, summary files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from brain_to_text import weights
from brain_to_text.config import BrainConfig
from brain_to_text.ctc import PHONEME_NAMES
from brain_to_text.scoring import TrialResult, error_rates, total
from brain_to_text.task import DecodingTask
from estiba import __version__
from estiba.log import get_logger, json_value
from estiba.storage import FileStore
from estiba.training.fit import Run
from estiba.training.metrics import points
from estiba.training.trainer import Trainer

logger = get_logger(__name__)

LOG_COLUMNS = ("step", "train_loss", "grad_norm", "lr", "val_loss", "val_per", "val_der", "best_val_per", "trials")
"""Columns of training_log.csv: only those that interruptions do not change. metrics/ has the rest."""
PREDICTION_COLUMNS = "session trial edits n_phonemes per predicted_phonemes true_phonemes sentence".split()


def write_artifacts(run: Run[BrainConfig], task: DecodingTask, trainer: Trainer) -> None:
    """Write all outputs, results.json last. Raises StoreError."""
    config, sessions, best = run.config, task.train.sessions, task.best
    folder = Path(config.model_dir) / "checkpoint"
    last = {name: tensor.detach().cpu() for name, tensor in task.evaluated_model.state_dict().items()}
    if best["weights"] is None:  # without an evaluation, the last weights count as the best
        best = {"step": trainer.step, "val_per": None, "val_loss": None, "weights": last}
    if config.save_best_checkpoint:
        weights.write(folder, weights.BEST, best["weights"], config=config, sessions=sessions, metrics=best)
    if config.save_final_model:
        metrics = {**trainer.metrics, "step": trainer.step}
        name = f"{weights.FINAL}_batch_{trainer.step}"
        weights.write(folder, name, last, config=config, sessions=sessions, metrics=metrics)
    store = FileStore(run.output)
    if task.val is not None:
        task.evaluated_model.load_state_dict(best["weights"])
        task.evaluated_model.eval()
        with torch.no_grad(), trainer.amp.forward():
            results = [result for batch_results, _ in task.results(task.val) for result in batch_results]
        write_predictions(results, run.output / "val_predictions.csv")
        write_days(results, run.output / "val_per_by_day.csv")
        rows = [[*row, round(row[2] / row[3], 6) if row[3] else ""] for row in task.per_history]
        store.write("per_over_time.csv", _csv([["step", "session", "edits", "n_phonemes", "per"], *rows]))
    if (png := per_plot(trainer.metrics_logger.rows)) is not None:
        store.write("per.png", png)
    results_json = results_summary(run, task, trainer, best)
    store.write("final_metrics.json", to_json(_final_metrics(trainer, best)))
    store.write("results.json", to_json(results_json))
    logger.info(results_json["summary"])


def write_predictions(results: Iterable[TrialResult], path: Path) -> None:
    """Write one CSV row per trial. Raises StoreError."""
    rows: list[Sequence[Any]] = [PREDICTION_COLUMNS]
    for result in results:
        length = 0 if result.true is None else len(result.true)
        per = "" if result.edits is None else _rate(result.edits, length)
        true = "" if result.true is None else phoneme_text(result.true)
        edits = "" if result.edits is None else result.edits
        predicted, sentence = phoneme_text(result.predicted), result.sentence or ""
        rows.append([result.session, result.trial, edits, length or "", per, predicted, true, sentence])
    FileStore(path.parent).write(path.name, _csv(rows))


def write_days(results: Iterable[TrialResult], path: Path) -> None:
    """Write the PER of each session and the overall PER as CSV. Raises StoreError."""
    days = error_rates(results)
    rows: list[Sequence[Any]] = [["session", "edits", "n_phonemes", "per"]]
    for name, counts in [*days.items(), ("all", total(days))]:
        rows.append([name, *counts, _rate(*counts)])
    FileStore(path.parent).write(path.name, _csv(rows))


def phoneme_text(phonemes: Iterable[int]) -> str:
    """Return phonemes as text in the form that a language model expects: `HH AH L OW |`."""
    return " ".join(PHONEME_NAMES[number] for number in phonemes)


def results_summary(
    run: Run[BrainConfig], task: DecodingTask, trainer: Trainer, best: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the contents of results.json."""
    last = next((row for row in reversed(trainer.metrics_logger.rows) if "train_loss" in row), {})
    per = best["val_per"]
    rate = "no PER (no val trials)" if per is None else f"PER {per:.4f} at step {best['step']}"
    return {
        "summary": f"brain-to-text: {trainer.step} steps, {rate}, in {run.config.model_dir}",
        "steps": trainer.step,
        "best_val_per": per,
        "best_val_loss": best["val_loss"],
        "best_step": best["step"],
        "train_loss": json_value(last.get("train_loss")),
        "parameters": sum(parameter.numel() for parameter in task.decoder.parameters()),
        "trials_seen": last.get("trials"),
        "trials_per_s": last.get("trials_per_s"),
        "skipped_steps": trainer.skipped_steps,
        "trials_left_out": task.trials_left_out,
        "reading": task.train.statistics(),
        "estiba": __version__,
    }


def _final_metrics(trainer: Trainer, best: Mapping[str, Any]) -> dict[str, Any]:
    """Return the contents of final_metrics.json in the format of the guide's trainer."""

    def column(name: str) -> list[Any]:
        return [json_value(row[name]) for row in trainer.metrics_logger.rows if name in row]

    return {
        "best_val_PER": best["val_per"],
        "best_val_loss": best["val_loss"],
        "train_losses": column("train_loss")[-100:],
        "val_losses": column("val_loss"),
        "val_PERs": column("val_per"),
    }


def per_plot(rows: Iterable[Mapping[str, Any]], *, title: str = "Phoneme error rate") -> bytes | None:
    """Plot the error rate by step, with the losses below it, as a PNG. Returns None if no row has an error rate.

    A row has `step` and any of `val_per`, `val_der`, `val_loss`, `train_loss`.
    """
    # Not pyplot, which keeps figures in global state and looks for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = list(rows)
    rates = points(rows, "val_per")
    if not rates:
        return None
    figure = Figure(figsize=(8, 6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    rate_axes, loss_axes = figure.subplots(2, 1, sharex=True)
    best = min(rate for _, rate in rates)
    rate_axes.plot(*zip(*rates, strict=True), "o-", color="#c8553d", markersize=3.5, label=f"PER, best {best:.2%}")
    if diphones := points(rows, "val_der"):
        rate_axes.plot(*zip(*diphones, strict=True), "o-", color="#9a7fb8", markersize=3, label="diphone error rate")
    rate_axes.set(ylabel="edits per phoneme", title=title)
    rate_axes.set_ylim(0, 1.06 * max(0.01, *(rate for _, rate in [*rates, *diphones])))
    losses: list[float] = []
    for column, color, label in (("train_loss", "#1f5f99", "training"), ("val_loss", "#c8553d", "validation")):
        if curve := points(rows, column):
            loss_axes.plot(*zip(*curve, strict=True), color=color, linewidth=1.2, label=label)
            losses += [loss for _, loss in curve]
    loss_axes.set(xlabel="step", ylabel="CTC loss (nats per trial)")
    if losses and min(losses) > 0:
        loss_axes.set_yscale("log")  # the loss falls a thousandfold
    for axes in (rate_axes, loss_axes):
        axes.grid(alpha=0.25)
        if axes.lines:
            axes.legend(frameon=False)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def _rate(edits: int, length: int) -> float | str:
    return round(edits / length, 6) if length else ""


def _csv(rows: Iterable[Sequence[Any]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def to_json(content: Any) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=True, default=str) + "\n").encode()
