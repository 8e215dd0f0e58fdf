"""Finished decoders on recorded trials: one, or several whose outputs or weights are averaged.

brain-to-text evaluate --model out/model --dataset-dir s3://bucket/prefix --split val --output-dir evaluation
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from brain_to_text import choices
from brain_to_text.augment import Augment
from brain_to_text.batches import Preparation
from brain_to_text.outcome import write_days, write_predictions
from brain_to_text.verdicts import Verdict, error_rates, judge, prepared
from brain_to_text.weights import Decoder, open_decoder
from estiba.config import Config
from estiba.errors import ConfigError
from estiba.loop.precision import Mixed
from estiba.loop.settings import Precision
from estiba.places import writable
from estiba.stop import Stop, say
from estiba.store import FileStore

if TYPE_CHECKING:
    from brain_to_text.data import Trials


class EvaluateConfig(Config):
    """Write what decoders make of each trial, and the phoneme error rate of each day."""

    model: list[str]
    """Decoders: best_checkpoint files, directories that hold one, or directories of verified checkpoints. Several,
    separated by commas, are averaged."""
    average: Literal["outputs", "weights"] = "outputs"
    """Of several: the probabilities of each output, or the weights themselves (of one run only)."""
    dataset_dir: str | None = None
    """Where the sessions lie; default is --s3-bucket, or the channel `dataset`."""
    s3_bucket: str | None = None
    """Bucket of the sessions."""
    s3_data_prefix: str | None = None
    """Prefix in it."""
    sessions: list[str] | None = None
    """Those to evaluate; default is all that the decoder was trained on."""
    split: Literal["val", "test", "train"] = "val"
    """Which trials. `test` has no labels: predictions alone are written."""
    output_dir: str = "evaluation"
    """Where predictions.csv, per_by_day.csv and results.json go."""
    batch_size: Annotated[int, Field(ge=1)] | None = None
    """Trials at once; default is that of the training."""
    precision: Precision = "auto"
    """auto is bfloat16 where the GPU has it; float32 on a CPU."""
    device: str | None = None
    """Torch device."""
    index_path: str | None = None
    """Where the byte index is kept when the data's own place cannot be written."""
    on_bad_trial: Literal["fail", "skip"] = "fail"
    """A trial that cannot be read ends the command, or is counted and listed."""


def evaluate(config: EvaluateConfig, stop: Stop) -> dict[str, Any]:
    """Run the command; returns what results.json holds. Raises EstibaError."""
    device = choices.device_of(config.device)
    decoders = [open_decoder(place, device) for place in config.model]
    if not decoders:
        raise ConfigError("--model: give at least one decoder")
    _check_alike(decoders)
    if config.average == "weights" and len(decoders) > 1:
        decoders = [_mean(decoders)]
    first = decoders[0]
    output = writable(Path(config.output_dir), "--output-dir")
    trials = _open(config, first, stop, device)
    mixed = Mixed(config.precision, device)
    verdicts: list[Verdict] = []
    with torch.no_grad(), mixed.forward():
        for some in _verdicts(decoders, trials, config.batch_size or first.config.batch_size, device, stop):
            verdicts += some
    write_predictions(verdicts, output / "predictions.csv")
    days = error_rates(verdicts)
    edits, length = sum(one for one, _ in days.values()), sum(one for _, one in days.values())
    if days:
        write_days(verdicts, output / "per_by_day.csv")
    per = edits / length if length else None
    n_diphones = sum(one.n_diphones for one in verdicts)
    results = {
        "summary": f"{len(verdicts)} {config.split} trials, "
        + (f"PER {per:.4f} ({edits} edits, {length} phonemes)" if per is not None else "no labels"),
        "per": per,
        "der": sum(one.diphone_edits or 0 for one in verdicts) / n_diphones if n_diphones else None,
        "n_trials": len(verdicts),
        "n_phonemes": length,
        "trials_not_read": [str(one) for one in trials.bad],
        "models": [one.name for one in decoders],
        "average": config.average if len(config.model) > 1 else None,
    }
    FileStore(output).write("results.json", (json.dumps(results, indent=2) + "\n").encode())
    say(f"{output}: {results['summary']}")
    return results


def mean_outputs(logits: Sequence[Tensor]) -> Tensor:
    """The logarithm of the mean probability of each class at each output, of several decoders."""
    if len(logits) == 1:
        return logits[0]
    stacked = torch.stack([one.float().log_softmax(-1) for one in logits])
    return stacked.logsumexp(0) - torch.log(torch.tensor(float(len(logits))))


def _verdicts(
    decoders: Sequence[Decoder],
    trials: Trials,
    batch_size: int,
    device: torch.device,
    stop: Stop,
) -> Iterator[list[Verdict]]:
    settings = decoders[0].config
    order = {name: number for number, name in enumerate(decoders[0].sessions)}
    days = [order.get(name, 0) if settings.day_layers else 0 for name in trials.sessions]
    prepare = Preparation(
        decoders[0].model.shape,
        seed=0,
        bucket=choices.bucket_of(settings, device),
        day_of=days.__getitem__,
    )
    augment = (
        Augment(
            choices.noise_of(settings),
            smooth_std=settings.smooth_kernel_std if settings.smooth_data else None,
            smooth_size=settings.smooth_kernel_size,
        )
        .to(device)
        .eval()
    )
    for batch, micro, moved in prepared(trials, prepare, batch_size, device):
        if stop():
            raise stop.interrupted("nothing is kept of an evaluation; run it again")
        features = augment(moved.features, moved.n_bins)
        logits = mean_outputs([one.model(features, micro.days, moved.day_index) for one in decoders])
        yield judge(logits, micro, batch, trials.sessions)


def _check_alike(decoders: Sequence[Decoder]) -> None:
    first = decoders[0]
    for other in decoders[1:]:
        for what, mine, theirs in (
            ("sessions", first.sessions, other.sessions),
            ("n_classes", first.config.n_classes, other.config.n_classes),
            ("patch_size", first.config.patch_size, other.config.patch_size),
            ("patch_stride", first.config.patch_stride, other.config.patch_stride),
            ("feature_subset", first.config.feature_subset, other.config.feature_subset),
            ("day_layers", first.config.day_layers, other.config.day_layers),
        ):
            if mine != theirs:
                raise ConfigError(
                    f"{first.name} and {other.name} have other {what} ({mine} and {theirs}); average such as agree"
                )


def _mean(decoders: Sequence[Decoder]) -> Decoder:
    from brain_to_text.model import load_weights

    states = [one.model.state_dict() for one in decoders]
    first = decoders[0]
    for other in decoders[1:]:
        if other.model.shape != first.model.shape:
            raise ConfigError(f"{other.name}: has other sizes than {first.name}; average outputs instead")
    mean = {name: torch.stack([state[name].float() for state in states]).mean(0) for name in states[0]}
    load_weights(first.model, mean, "the mean")
    return first


def _open(config: EvaluateConfig, decoder: Decoder, stop: Stop, device: torch.device) -> Trials:
    places: dict[str, Any] = {"s3_bucket": config.s3_bucket, "s3_data_prefix": config.s3_data_prefix}
    if config.dataset_dir is not None:
        places["dataset_dir"] = config.dataset_dir
    settings = decoder.config.model_copy(
        update={**places, "index_path": config.index_path, "on_bad_trial": config.on_bad_trial}
    )
    choices.check(settings)
    wanted = config.sessions or decoder.sessions
    if settings.day_layers and (strange := [name for name in wanted if name not in decoder.sessions]):
        raise ConfigError(
            f"--sessions {', '.join(strange)}: {decoder.name} has no layer for these days; leave them out"
        )
    return choices.open_trials(settings, config.split, stop, sessions=wanted, device=device)
