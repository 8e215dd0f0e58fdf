"""What a run leaves: model, tokenizer, log, plot; and on Ctrl+C a file of where it was."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from aura.export import final_model, hf_directory
from aura.plot import loss_plot
from estiba import __version__
from estiba.checkpoint.exports import export_pt
from estiba.errors import StoreError
from estiba.loop.loop import Loop
from estiba.stop import Stop, say
from estiba.store import FileStore, open_store

if TYPE_CHECKING:
    from aura.work import Pretraining

PT_BYTES_PER_S = 200e6
"""Assumed of a disk that was not measured."""


def finish(work: Pretraining, loop: Loop, folder: Path, output_dir: str) -> None:
    """Write everything; results.json last. Raises StoreError."""
    try:
        _write_all(work, loop, folder, output_dir)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch.save has no error of its own for a full disk
        free = shutil.disk_usage(folder).free
        raise StoreError(
            f"{folder}: outputs could not be written ({str(error).splitlines()[0]}; {free / 1e6:.0f} MB free). What "
            "was trained is safe in the checkpoints: free some space or give a larger volume, and run again"
        ) from error


def _write_all(work: Pretraining, loop: Loop, folder: Path, output_dir: str) -> None:
    work.tokenizer.save(folder / "tokenizer")
    hf_directory(work.aura, work.tokenizer, folder / "hf")
    final_model(work.aura, loop.step, folder / "final_model.pt")
    loss_plot(
        loop.history.rows, folder / "loss.png", title=f"Aura, {work.choices.shape.parameters / 1e6:.0f}M parameters"
    )
    if work.samples:
        text = "\n\n".join(sample_lines(step, text) for step, text in work.samples)
        FileStore(folder).write("samples.txt", (text + "\n").encode())
    results = results_of(work, loop)
    FileStore(folder).write("results.json", (json.dumps(results, indent=2, ensure_ascii=True) + "\n").encode())
    store = open_store(output_dir)
    if not isinstance(store, FileStore):
        names = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
        for name in sorted(names, key=lambda name: name.name == "results.json"):
            store.put_file(name.as_posix(), folder / name)
    say(results["summary"])


def results_of(work: Pretraining, loop: Loop) -> dict[str, Any]:
    """The run in numbers."""
    last = next((row for row in reversed(loop.history.rows) if "train_loss" in row), {})
    loss = loop.metrics.get("val_loss")
    has_loss = loss is not None and math.isfinite(loss)
    said = f"validation loss {loss:.4f}" if has_loss else f"training loss {last.get('train_loss', math.nan):.4f}"
    return {
        "summary": f"aura: {loop.step} steps, {said}, in {work.config.output_dir}",
        "steps": loop.step,
        "train_loss": last.get("train_loss"),
        "val_loss": loss if has_loss else None,
        "parameters": work.choices.shape.parameters,
        "tokens_seen": last.get("tokens"),
        "tokens_per_s": last.get("tokens_per_s"),
        "skipped_steps": loop.skipped,
        "preset": work.choices.preset.name,
        "estiba": __version__,
    }


def interrupted(loop: Loop, folder: Path, stop: Stop) -> None:
    """`interrupt-step-N.pt`, if there is time for it; the verified checkpoint is on the disk already."""
    state = loop.state()
    size = 4 * 3 * sum(parameter.numel() for parameter in loop.work.model.parameters())
    left = stop.seconds_left()
    path = folder / f"interrupt-step-{loop.step}.pt"
    if left is not None and size / PT_BYTES_PER_S > left:
        say(f"warning: {path.name} is not written: {size / 1e9:.1f} GB in {left:.0f} s; the checkpoint holds the same")
        return
    try:
        export_pt(state, path)
        say(f"{path}: what --resume-from takes")
    except StoreError as error:
        say(f"warning: {path.name} is not written ({error}); the checkpoint holds the same")


def sample_lines(step: int, text: str) -> str:
    """One line, whatever the text holds."""
    return f"sample at step {step}: {' '.join(text.split())}"
