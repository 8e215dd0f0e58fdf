"""What a run leaves: the best weights, the log, predictions of each trial, rates by day, a plot, the numbers."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from brain_to_text import weights as decoders
from brain_to_text.ctc import NAMES
from brain_to_text.plot import per_plot
from brain_to_text.verdicts import Verdict, error_rates
from estiba import __version__
from estiba.loop.loop import Loop
from estiba.stop import say
from estiba.store import FileStore

if TYPE_CHECKING:
    from brain_to_text.work import Decoding

LOG_COLUMNS = ("step", "train_loss", "grad_norm", "lr", "val_loss", "val_per", "val_der", "best_val_per", "trials")
"""Of training_log.csv: what is the same however often the run was interrupted. metrics/ has the rest."""
PREDICTION_COLUMNS = (
    "session",
    "trial",
    "edits",
    "n_phonemes",
    "per",
    "predicted_phonemes",
    "true_phonemes",
    "sentence",
)


def finish(work: Decoding, loop: Loop, *, output: Path, model_dir: Path) -> None:
    """Write everything; results.json last. Raises StoreError."""
    config, sessions, best = work.config, work.train.sessions, work.best
    folder = model_dir / "checkpoint"
    last = {name: tensor.detach().cpu() for name, tensor in work.judged.state_dict().items()}
    if best["weights"] is None:  # never evaluated: the last are the best that is known
        best = {"step": loop.step, "val_per": None, "val_loss": None, "weights": last}
    numbers = {"val_per": best["val_per"], "val_loss": best["val_loss"]}
    if config.save_best_checkpoint:
        decoders.write(
            folder, decoders.BEST, best["weights"], config=config, sessions=sessions, step=best["step"], **numbers
        )
    if config.save_final_model:
        name = f"{decoders.FINAL}_batch_{loop.step}"
        at_end = {"val_per": loop.metrics.get("val_per"), "val_loss": loop.metrics.get("val_loss")}
        decoders.write(folder, name, last, config=config, sessions=sessions, step=loop.step, **at_end)
    store = FileStore(output)
    if work.val is not None:
        work.judged.load_state_dict(best["weights"])
        work.judged.eval()
        with torch.no_grad(), loop.mixed.forward():
            verdicts = [one for some, _ in work.verdicts(work.val) for one in some]
        write_predictions(verdicts, output / "val_predictions.csv")
        write_days(verdicts, output / "val_per_by_day.csv")
        rows = [["step", "session", "edits", "n_phonemes", "per"]]
        rows += [[*row, round(row[2] / row[3], 6) if row[3] else ""] for row in work.days]
        store.write("per_over_time.csv", _csv(rows))
    per_plot(loop.history.rows, output / "per.png")
    results = results_of(work, loop, best)
    store.write("final_metrics.json", _json(_as_the_guide(loop, best)))
    store.write("results.json", _json(results))
    say(results["summary"])


def write_predictions(verdicts: Iterable[Verdict], path: Path) -> None:
    """One row a trial. Raises StoreError."""
    rows: list[Sequence[Any]] = [PREDICTION_COLUMNS]
    for one in verdicts:
        length = None if one.true is None else len(one.true)
        per = round(one.edits / length, 6) if one.edits is not None and length else ""
        true = "" if one.true is None else spelt(one.true)
        edits = "" if one.edits is None else one.edits
        rows.append([one.session, one.trial, edits, length or "", per, spelt(one.predicted), true, one.sentence or ""])
    FileStore(path.parent).write(path.name, _csv(rows))


def write_days(verdicts: Iterable[Verdict], path: Path) -> None:
    """PER of each session, and of all. Raises StoreError."""
    days = error_rates(verdicts)
    rows: list[Sequence[Any]] = [["session", "edits", "n_phonemes", "per"]]
    rows += [[session, *days[session], _rate(*days[session])] for session in sorted(days)]
    total = (sum(edits for edits, _ in days.values()), sum(length for _, length in days.values()))
    rows.append(["all", *total, _rate(*total)])
    FileStore(path.parent).write(path.name, _csv(rows))


def spelt(phonemes: Iterable[int]) -> str:
    """`HH AH L OW |`, as a language model takes it."""
    return " ".join(NAMES[number] for number in phonemes)


def results_of(work: Decoding, loop: Loop, best: dict[str, Any]) -> dict[str, Any]:
    """The run in numbers."""
    last = next((row for row in reversed(loop.history.rows) if "train_loss" in row), {})
    per = best["val_per"]
    said = "no PER (no val trials)" if per is None else f"PER {per:.4f} at step {best['step']}"
    unread = [*work.train.bad, *(work.val.bad if work.val is not None else [])]
    return {
        "summary": f"brain-to-text: {loop.step} steps, {said}, in {work.config.model_dir}",
        "steps": loop.step,
        "best_val_per": per,
        "best_val_loss": best["val_loss"],
        "best_step": best["step"],
        "train_loss": _finite(last.get("train_loss")),
        "parameters": sum(parameter.numel() for parameter in work.decoder.parameters()),
        "trials_seen": last.get("trials"),
        "trials_per_s": last.get("trials_per_s"),
        "skipped_steps": loop.skipped,
        "trials_not_learnt_from": sorted(work.not_learnt_from),
        "trials_not_read": [str(one) for one in unread],
        "reading": work.train.statistics(),
        "estiba": __version__,
    }


def _as_the_guide(loop: Loop, best: dict[str, Any]) -> dict[str, Any]:
    rows = loop.history.rows

    def column(name: str) -> list[Any]:
        return [_finite(row[name]) for row in rows if name in row]

    return {
        "best_val_PER": best["val_per"],
        "best_val_loss": best["val_loss"],
        "train_losses": column("train_loss")[-100:],
        "val_losses": column("val_loss"),
        "val_PERs": column("val_per"),
    }


def _rate(edits: int, length: int) -> float | str:
    return round(edits / length, 6) if length else ""


def _finite(value: float | None) -> float | None:
    return value if value is None or math.isfinite(value) else None


def _csv(rows: Iterable[Sequence[Any]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=True, default=str) + "\n").encode()
