"""Write a run's outputs, verify what was written, and leave a usable adapter after a stop."""

from __future__ import annotations

import gc
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from estiba import __version__
from estiba.errors import DataError, EstibaError, Interrupted, StoreError, first_line
from estiba.log import get_logger
from estiba.paths import upload_output
from estiba.storage import FileStore
from estiba.training.fit import Run
from estiba.training.plot import loss_plot
from estiba.training.prefetch import to_device
from estiba.training.trainer import Trainer
from finetune.answers import Answer, answer, exact_match
from finetune.artifacts.gguf import FILE, find_converter, write_gguf
from finetune.artifacts.merge import write_adapter, write_merged
from finetune.artifacts.older_names import add_older_names
from finetune.artifacts.report import write_report
from finetune.config import FinetuneConfig
from finetune.model import packed_attention
from finetune.model.forward import token_losses
from finetune.task import FinetuneTask
from finetune.tokens.examples import pack

logger = get_logger(__name__)

LOG_COLUMNS = ("epoch", "train_loss", "val_loss", "step", "lr", "grad_norm", "tokens")
"""Columns of training_log.csv: those that interruptions do not change."""
STAGING = ".writing"
FILE_MODE = 0o644
DIVERGED = "pass a lower --learning-rate and another --checkpoint-path, and if the base is in float16, one in bfloat16"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def write_artifacts(run: Run[FinetuneConfig], task: FinetuneTask, trainer: Trainer) -> None:
    """Write model, adapter, report, plot and results.json, the latter last. Raises StoreError."""
    folder, staging = run.output, run.output / STAGING
    if trainer.skipped_steps >= trainer.step:
        raise DataError(f"none of {trainer.step} steps had finite gradients, so nothing was learnt; {DIVERGED}")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir()
        dtype = saved_dtype(task)
        write_merged(task.model, staging, dtype=dtype)
        task.inputs.encoder.tokenizer.save_pretrained(staging)
        add_older_names(staging)
        if isinstance(task.model, PeftModel):
            write_adapter(task.model, staging / "adapter")
        _release(task)
        verified, after = _verify(task, staging)
        loss_plot(
            trainer.metrics_logger.rows, staging / "loss.png", title=f"{task.inputs.base.name}, {run.config.method}"
        )
        results = results_of(task, trainer, verified, after, str(dtype).removeprefix("torch."))
        if run.config.gguf:
            results["gguf"] = _convert(run.config, staging)
        write_report(staging / "report.md", task, trainer, results, after)
        shutil.copyfile(staging / "report.md", staging / "README.md")  # the hub's model card
        _publish(staging, folder)
    except (OSError, SafetensorError, RuntimeError) as error:
        free = shutil.disk_usage(folder).free
        raise StoreError(
            f"{folder}: cannot write the outputs ({first_line(error)}; {free / 1e6:.0f} MB free). "
            "What was trained is safe in the checkpoints: free some space or use a larger volume, then run again"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    FileStore(folder).write("results.json", (json.dumps(results, indent=2) + "\n").encode())
    upload_output(folder, run.config.output_dir)
    logger.info(results["summary"])


def write_interrupt(run: Run[FinetuneConfig], task: FinetuneTask, trainer: Trainer, error: Interrupted) -> None:
    """After a stop, leave the adapter as it is: small, and usable with the base."""
    del error
    if not trainer.step or not isinstance(task.model, PeftModel):
        return
    staging = run.output / STAGING
    try:
        shutil.rmtree(staging, ignore_errors=True)
        write_adapter(task.model, staging / "adapter")
        task.inputs.encoder.tokenizer.save_pretrained(staging / "adapter")
        _publish(staging, run.output)
        logger.info(
            f"{run.output / 'adapter'}: the adapter at step {trainer.step}; the same command resumes the training"
        )
    except (OSError, SafetensorError) as problem:
        logger.warning(f"the adapter was not written ({problem}); the checkpoint holds it")
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def saved_dtype(task: FinetuneTask) -> torch.dtype:
    """Return the dtype of the base's files; float32 where they name none."""
    named = getattr(task.inputs.base.config, "dtype", None)
    return named if isinstance(named, torch.dtype) else DTYPES.get(str(named), torch.float32)


def results_of(
    task: FinetuneTask, trainer: Trainer, verified: dict[str, Any], after: list[Answer], dtype: str
) -> dict[str, Any]:
    """Return the contents of results.json."""
    inputs, report = task.inputs, task.inputs.dataset.report
    losses = {name: value for name, value in trainer.metrics.items() if math.isfinite(value)}
    columns = {}
    for column, before in exact_match(task.before).items():
        if column:
            metric = task.column_metric(inputs.columns.index(column) + 1)
            columns[column] = {
                "exact_match_before": before,
                "exact_match": exact_match(after).get(column),
                "answers": sum(one.column == column for one in after),
                "val_loss_before": task.losses_before.get(metric),
                "val_loss": losses.get(metric),
            }
    last = next((row for row in reversed(trainer.metrics_logger.rows) if "train_loss" in row), {})
    memorised = [column for table in report.tables for column in table.memorisation_columns]
    loss = losses.get("val_loss")
    name, value = ("training", last.get("train_loss")) if loss is None else ("held-out", loss)
    return {
        "summary": f"finetune: {trainer.step} steps, {name} loss {math.nan if value is None else value:.4f}, in "
        f"{task.config.output_dir}",
        "base_model": inputs.base.name,
        "method": task.config.method,
        "steps": trainer.step,
        "train_loss": last.get("train_loss"),
        "val_loss_before": task.losses_before.get("val_loss"),
        "val_loss": loss,
        "columns": columns,
        "not_learnable": memorised,
        "exact_match_before": _share(task.before),
        "exact_match": _share(after),
        "saved_model": {"dtype": dtype, **verified},
        "rows": report.rows,
        "records": report.kept,
        "dropped": {reason: len(sources) for reason, sources in inputs.dropped().items()},
        "truncated_prompts": inputs.training.truncated,
        "tokens_per_epoch": inputs.training.tokens,
        "trained_tokens_per_epoch": inputs.training.trained_tokens,
        "tokens_without_shared_trunks": inputs.training.unshared_tokens,
        "skipped_steps": trainer.skipped_steps,
        "estiba": __version__,
    }


def _share(answers: list[Answer]) -> float | None:
    return sum(one.is_exact for one in answers) / len(answers) if answers else None


def _release(task: FinetuneTask) -> None:
    """Free the trained model's memory: what was saved is loaded next."""
    task.optimizer.state.clear()
    task.model = torch.nn.Identity()
    task.use_varlen = False  # it needs half precision, and the saved model may be in float32
    gc.collect()
    if task.device.type == "cuda":
        torch.cuda.empty_cache()


def _verify(task: FinetuneTask, folder: Path) -> tuple[dict[str, Any], list[Answer]]:
    """Load what was written as a user would, evaluate it on the held-out records and let it answer."""
    try:
        return _loaded_again(task, folder)
    except torch.cuda.OutOfMemoryError:
        logger.warning("the merged model and its held-out records do not fit on this GPU, so it was not evaluated")
        return {"loaded_again": False}, []


def _loaded_again(task: FinetuneTask, folder: Path) -> tuple[dict[str, Any], list[Answer]]:
    packed_attention.register()
    model, info = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype="auto",
        attn_implementation=packed_attention.NAME,
        output_loading_info=True,
        local_files_only=True,
    )
    model = model.to(task.device).eval()
    if problems := [*info["missing_keys"], *info["unexpected_keys"]]:
        raise RuntimeError(f"the merged model does not load again as it was written: {sorted(problems)[:3]}")
    loss = held_out = task.held_out_losses(model).get("val_loss")
    if loss is None:  # nothing is held out; what it was trained on shows as well whether it works
        batch = to_device(pack(task.train.examples[: task.config.batch_size]), task.device)
        with torch.no_grad():
            loss = float(token_losses(model, batch).mean())
    if not math.isfinite(loss):
        raise DataError(f"the trained model gives values that are not finite, so it was not kept; {DIVERGED}")
    if held_out is not None:
        logger.info(f"the saved model, loaded again: held-out loss {held_out:.4f}")
    questions = task.before
    answers = answer(model, task.inputs.encoder, questions) if questions else []
    return {"loaded_again": True, "val_loss": held_out}, answers


def _convert(config: FinetuneConfig, staging: Path) -> str | None:
    """Write the GGUF file and return its name. A converter that fails costs the file, never the model."""
    assert config.gguf is not None
    try:
        write_gguf(staging, find_converter(config.gguf_converter), config.gguf)
    except EstibaError as error:
        logger.warning(str(error))
        return None
    return FILE


def _publish(staging: Path, folder: Path) -> None:
    """Rename everything into place; weights first, so that a directory with config.json is complete."""
    if (staging / "config.json").exists() and not (staging / FILE).exists():
        (folder / FILE).unlink(missing_ok=True)  # of an earlier run: it is another model
    for path in staging.rglob("*"):
        if path.is_file():
            path.chmod(FILE_MODE)  # safetensors writes files that only their owner may read
    for path in sorted(staging.iterdir(), key=lambda path: (path.name == "config.json", path.name)):
        target = folder / path.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(path, target)
