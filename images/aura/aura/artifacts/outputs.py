"""Write a run's outputs: model, tokenizer, log and plot, and its state after Ctrl+C."""

from __future__ import annotations

import json
import math
import shutil
import signal
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from aura.artifacts.export import FILE_MODE, write_final_model, write_hf_directory
from aura.artifacts.sample import sample_line
from aura.config import AuraConfig
from aura.task import PretrainingTask
from aura.tokenizer.loading import Tokenizer
from estiba import __version__
from estiba.checkpoint.exports import export_pt
from estiba.errors import Interrupted, StoreError, first_line
from estiba.log import get_logger
from estiba.paths import upload_output
from estiba.storage import FileStore, open_store
from estiba.training.fit import Run
from estiba.training.plot import loss_plot
from estiba.training.trainer import Trainer

logger = get_logger(__name__)

LOG_COLUMNS = ("epoch", "train_loss", "val_loss", "step", "lr", "grad_norm", "tokens")
"""Columns of training_log.csv: only those that interruptions do not change. metrics/ has the rest."""
PT_BYTES_PER_S = 200e6
"""Assumed disk write speed."""


def write_tokenizer_files(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json, vocab.json and the others directly into the output directory, as the guide promises."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".tokenizer-") as temporary:
        tokenizer.save(Path(temporary))
        tokenizer.save_vocabulary(Path(temporary))
        for path in sorted(Path(temporary).iterdir()):
            path.chmod(FILE_MODE)
            path.replace(folder / path.name)


def write_artifacts(run: Run[AuraConfig], task: PretrainingTask, trainer: Trainer) -> None:
    """Write all outputs, results.json last. Raises StoreError."""
    folder = run.output
    try:
        task.tokenizer.save(folder / "tokenizer")
        write_hf_directory(task.aura, task.tokenizer, folder / "hf")
        write_tokenizer_files(task.tokenizer, folder)
        write_final_model(task.aura, trainer.step, folder / "final_model.pt")
        title = f"Aura, {task.resolved.model.parameters / 1e6:.0f}M parameters"
        loss_plot(trainer.metrics_logger.rows, folder / "loss.png", title=title)
    except (OSError, SafetensorError, RuntimeError, StoreError) as error:  # torch.save on a full disk raises any
        free_bytes = shutil.disk_usage(folder).free
        raise StoreError(
            f"{folder}: cannot write the outputs ({first_line(error)}; {free_bytes / 1e6:.0f} MB free). "
            "The trained state is safe in the checkpoints: free some space or use a larger volume, then run again"
        ) from error
    local = FileStore(folder)
    if task.samples:
        local.write("samples.txt", "\n\n".join(sample_line(*sample) for sample in task.samples).encode() + b"\n")
    results = results_of(task, trainer)
    local.write("results.json", (json.dumps(results, indent=2) + "\n").encode())
    upload_output(folder, run.config.output_dir)
    logger.info(results["summary"])


def results_of(task: PretrainingTask, trainer: Trainer) -> dict[str, Any]:
    """Return the contents of results.json."""
    last = next((row for row in reversed(trainer.metrics_logger.rows) if "train_loss" in row), {})
    val_loss = trainer.metrics.get("val_loss")
    if val_loss is not None and not math.isfinite(val_loss):
        val_loss = None
    train_loss = last.get("train_loss")
    name, loss = ("training", train_loss) if val_loss is None else ("validation", val_loss)
    return {
        "summary": f"aura: {trainer.step} steps, {name} loss {math.nan if loss is None else loss:.4f}, "
        f"in {task.config.output_dir}",
        "steps": trainer.step,
        "train_loss": train_loss,
        "val_loss": val_loss,
        "parameters": task.resolved.model.parameters,
        "tokens_seen": last.get("tokens"),
        "tokens_per_s": last.get("tokens_per_s"),
        "skipped_steps": trainer.skipped_steps,
        "preset": task.resolved.preset.name,
        "estiba": __version__,
    }


def write_interrupt(run: Run[AuraConfig], task: PretrainingTask, trainer: Trainer, error: Interrupted) -> None:
    """After Ctrl+C, write `interrupt-step-N.pt` if time allows; the verified checkpoint is already saved."""
    if error.signum != signal.SIGINT or not trainer.step:
        return
    path = run.output / f"interrupt-step-{trainer.step}.pt"
    size_bytes = 3 * 4 * sum(parameter.numel() for parameter in task.model.parameters())
    seconds_left = run.stop.seconds_left()
    try:
        if seconds_left is not None and size_bytes / PT_BYTES_PER_S > seconds_left:
            raise StoreError(f"no time to write {size_bytes / 1e9:.1f} GB in {seconds_left:.0f} s")
        export_pt(trainer.state(alone=True), path)
        logger.info(f"{path}: written; resume with --resume-from {path}")
        url = run.config.output_dir
        if not isinstance(open_store(url), FileStore):
            upload_output(run.output, url)
            logger.info(f"{url}: uploaded; resume with --resume-from {url.rstrip('/')}/{path.name}")
    except StoreError as problem:
        logger.warning(f"{path.name} was not written ({problem}); the checkpoint has the same state")
