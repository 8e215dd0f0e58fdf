"""What a run says at its start: the data as the model will see it, and what training will take."""

from __future__ import annotations

import torch

from estiba.log import get_logger
from estiba.prices import price_of
from estiba.training.schedule import Schedule
from finetune.config import FinetuneConfig
from finetune.inputs import Inputs
from finetune.tokens.corpus import summarize_drops
from finetune.tokens.examples import TokenSequence

logger = get_logger(__name__)

SAMPLES = 5


def introduce(
    inputs: Inputs,
    config: FinetuneConfig,
    model: torch.nn.Module,
    schedule: Schedule,
    seconds_per_token: float,
    instance_type: str | None,
) -> None:
    """Log the introduction. `seconds_per_token` is of one forward and backward pass of one rank."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    lines = [*data_lines(inputs), *sample_lines(inputs)]
    rate = f"learning rate {schedule.peak:g}"
    if config.learning_rate is None:
        rate += (
            f" (the default for {config.method}; the fine-tuning document's 0.001 suits full training of small models)"
        )
    per_record = inputs.training.tokens / len(inputs.training.examples)
    records = schedule.steps * config.batch_size * config.gradient_accumulation_steps
    hours = records * per_record * seconds_per_token / 3600
    estimate = f"about {hours * 60:.0f} min" if hours < 2 else f"about {hours:.1f} h"
    if price := price_of(instance_type):
        estimate += f", {hours * price.usd_per_h:.2f} USD"
    lines.append(f"{schedule.steps:,} steps, {trained:,} trained parameters ({config.method}), {rate}; {estimate}")
    if inputs.encoder.renderer.uses_plain:
        asked = "prompts and answers are" if inputs.completions_only else "conversations are"
        form = "written as they stand" if inputs.completions_only else "written as `User: ...`, `Assistant: ...`"
        lines.append(f"the base model has no chat template: {asked} {form}")
    logger.info("\n".join(lines))


def data_lines(inputs: Inputs) -> list[str]:
    """Return the data report with tokens."""
    training, report = inputs.training, inputs.dataset.report
    lengths, train, held_out = training.lengths(), len(inputs.dataset.train), len(inputs.dataset.validation)
    kinds, share = ", ".join(report.records), training.trained_tokens / training.tokens
    span = f"sequences of {lengths['min']} to {lengths['max']} tokens, median {lengths['median']}"
    lines = [
        f"data: {report.rows:,} rows, {report.kept:,} records ({kinds}), {train:,} to train on, {held_out:,} held out",
        f"tokens: {training.tokens:,}, {share:.1%} of them trained; {span}",
    ]
    if training.unshared_tokens > training.tokens:
        lines.append(f"shared trunks: {training.unshared_tokens / training.tokens:.2f} times fewer tokens than without")
    if training.truncated:
        lines.append(f"{training.truncated:,} prompts were shortened to --max-sequence-length; their answers are whole")
    if dropped := inputs.dropped():
        lines.append(f"not used: {summarize_drops(dropped)}")
    for table in report.tables:
        if table.memorisation_columns:
            names = ", ".join(table.memorisation_columns)
            lines.append(
                f"memorisation: nothing in the table predicts {names}; the model learns its form, not its values"
            )
    lines += report.warnings
    return lines


def sample_lines(inputs: Inputs) -> list[str]:
    """Return a few sequences as the model sees them, with the trained part between marks."""
    examples = inputs.training.examples
    step = max(1, len(examples) // SAMPLES)
    return [
        f"sample {number} ({inputs.training.sources[index]}): {_marked(examples[index].sequences()[0], inputs)}"
        for number, index in enumerate(list(range(0, len(examples), step))[:SAMPLES], start=1)
    ]


def _marked(sequence: TokenSequence, inputs: Inputs) -> str:
    """Decode run by run: untrained text as it is, trained text between >>> and <<<."""
    text, start = "", 0
    tokenizer, trained = inputs.encoder.tokenizer, sequence.trained
    while start < len(trained):
        end = start
        while end < len(trained) and trained[end] == trained[start]:
            end += 1
        part = str(tokenizer.decode(sequence.ids[start:end].tolist()))
        text += f">>>{part}<<<" if trained[start] else part
        start = end
    text = text.replace("\n", "\\n")
    return text if len(text) <= 800 else f"{text[:400]} ... {text[-390:]}"
