"""report.md: data, settings, losses, answers before and after, in the form of a hub's model card."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from estiba.training.trainer import Trainer
from finetune.answers import Answer
from finetune.introduction import data_lines
from finetune.model.base import BaseModel
from finetune.task import FinetuneTask

ANSWERS_SHOWN = 12
_CARD_LICENCE = re.compile(r"---\n(?:(?!---).*\n)*?licen[sc]e: *(\S+)")
"""The licence in the front matter of a model card."""


def write_report(
    path: Path, task: FinetuneTask, trainer: Trainer, results: dict[str, Any], after: list[Answer]
) -> None:
    """Write the report. Raises OSError."""
    inputs = task.inputs
    lines = [
        "---",
        f"base_model: {inputs.base.name}",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "---",
        "",
        f"# {inputs.base.name}, fine-tuned",
        "",
        f"{results['summary']}.",
        f"The base model's licence applies to this model as well: {licence_of(inputs.base)}.",
        "",
        "## Results",
        "",
        *_results(results),
        "",
        "## Data",
        "",
        *(f"- {line}" for line in data_lines(inputs)),
        *_templates(task),
        "",
        "## Answers to held-out questions",
        "",
        *_answers(task.before, after),
        "",
        "## Settings",
        "",
        "| setting | value |",
        "|---|---|",
        *(f"| {name} | {_cell(value)} |" for name, value in _settings(task, trainer).items()),
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def licence_of(base: BaseModel) -> str:
    """Return what is known of a base model's licence: its model card's word, its licence file, or where to look."""
    if base.is_hub:
        return f"see https://huggingface.co/{base.name}"
    folder = Path(base.location)
    card = folder / "README.md"
    if card.is_file() and (named := _CARD_LICENCE.match(card.read_text(encoding="utf-8", errors="replace"))):
        return named[1].strip("'\"")
    files = sorted(path.name for path in folder.iterdir() if path.name.lower().startswith(("licen", "copying")))
    return f"{files[0]} of the base model's directory" if files else "see where the base model is from"


def _results(results: dict[str, Any]) -> list[str]:
    before, after = results["val_loss_before"], results["val_loss"]
    lines = [f"Held-out loss: {_number(before)} before training, {_number(after)} after"]
    saved = results["saved_model"]
    if saved.get("loaded_again"):
        lines[0] += f"; of the saved {saved['dtype']} model, loaded again: {_number(saved.get('val_loss'))}"
    lines[0] += "."
    if results["columns"]:
        names = ("column", "answers", "exact before", "after", "held-out loss before", "after", "")
        lines += ["", f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
        for column, values in results["columns"].items():
            note = "not learnable: no other column predicts it" if column in results["not_learnable"] else ""
            cells = (
                str(values["answers"]),
                _percent(values["exact_match_before"]),
                _percent(values["exact_match"]),
                _number(values["val_loss_before"]),
                _number(values["val_loss"]),
                note,
            )
            lines.append(f"| {_cell(column)} | {' | '.join(cells)} |")
    elif results["exact_match"] is not None:
        exact = _percent(results["exact_match_before"]), _percent(results["exact_match"])
        lines += ["", f"Exact answers: {exact[0]} before, {exact[1]} after."]
    return lines


def _templates(task: FinetuneTask) -> list[str]:
    lines = []
    for table in task.inputs.dataset.report.tables:
        lines += ["", "The template that turned rows into text:", "", "```jinja", table.template.rstrip(), "```"]
    return lines


def _answers(before: list[Answer], after: list[Answer]) -> list[str]:
    if not after:
        return ["None were asked."]
    lines = ["| question | expected | before | after |", "|---|---|---|---|"]
    step = max(1, len(after) // ANSWERS_SHOWN)
    for first, second in list(zip(before, after, strict=True))[::step][:ANSWERS_SHOWN]:
        question = first.prompt if len(first.prompt) < 300 else "... " + first.prompt[-290:]
        lines.append(f"| {' | '.join(_cell(text) for text in (question, first.expected, first.given, second.given))} |")
    return lines


def _settings(task: FinetuneTask, trainer: Trainer) -> dict[str, Any]:
    config = task.config
    shown = {name: value for name, value in config.model_dump().items() if value is not None}
    return {**shown, "learning_rate": trainer.config.schedule.peak, "steps": trainer.config.schedule.steps}


def _cell(value: object) -> str:
    return str(value).replace("\\", "\\\\").replace("|", "\\|").replace("\n", "\\n").replace("<", "&lt;")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"
