"""`brain-to-text evaluate`: evaluate trained decoders, one alone or several averaged.

brain-to-text evaluate --model out/model --dataset-dir s3://bucket/prefix --split val --output-dir evaluation
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from brain_to_text import resolve
from brain_to_text.artifacts import to_json, write_days, write_predictions
from brain_to_text.data.dataset import TrialDataset
from brain_to_text.evaluate_config import EvaluateConfig
from brain_to_text.model import load_weights
from brain_to_text.scoring import TrialResult, error_rates, evaluation_batches, score_batch, total
from brain_to_text.weights import TrainedDecoder, open_decoder
from estiba.errors import ConfigError
from estiba.log import get_logger
from estiba.paths import writable
from estiba.platform.stop import Stop
from estiba.storage import FileStore
from estiba.training.precision import AmpContext

logger = get_logger(__name__)


def evaluate(config: EvaluateConfig, stop: Stop) -> dict[str, Any]:
    """Run the command. Returns the contents of results.json. Raises EstibaError."""
    device = resolve.device(config.device)
    decoders = [open_decoder(location, device) for location in config.model]
    if not decoders:
        raise ConfigError("--model: give at least one decoder")
    _check_compatible(decoders)
    if config.average == "weights" and len(decoders) > 1:
        decoders = [_average_weights(decoders)]
    first = decoders[0]
    output = writable(Path(config.output_dir), "--output-dir")
    trials = _open(config, first, stop, device)
    results: list[TrialResult] = []
    with torch.no_grad(), AmpContext(config.precision, device).forward():
        for batch_results in _results(decoders, trials, config.batch_size or first.config.batch_size, device, stop):
            results += batch_results
    write_predictions(results, output / "predictions.csv")
    days = error_rates(results)
    edits, length = total(days)
    if days:
        write_days(results, output / "per_by_day.csv")
    per = edits / length if length else None
    n_diphones = sum(result.n_diphones for result in results)
    content = {
        "summary": f"{len(results)} {config.split} trials, "
        + (f"PER {per:.4f} ({edits} edits, {length} phonemes)" if per is not None else "no labels"),
        "per": per,
        "der": sum(result.diphone_edits or 0 for result in results) / n_diphones if n_diphones else None,
        "n_trials": len(results),
        "n_phonemes": length,
        "trials_left_out": trials.skipped,
        "models": [decoder.name for decoder in decoders],
        "average": config.average if len(config.model) > 1 else None,
    }
    FileStore(output).write("results.json", to_json(content))
    logger.info(f"{output}: {content['summary']}")
    return content


def mean_outputs(logits: Sequence[Tensor]) -> Tensor:
    """Average probabilities: the log of the mean probability of each class in each frame."""
    if len(logits) == 1:
        return logits[0]
    stacked = torch.stack([decoder_logits.float().log_softmax(-1) for decoder_logits in logits])
    return stacked.logsumexp(0) - torch.log(torch.tensor(float(len(logits))))


def _results(
    decoders: Sequence[TrainedDecoder], trials: TrialDataset, batch_size: int, device: torch.device, stop: Stop
) -> Iterator[list[TrialResult]]:
    first = decoders[0]
    micro_batcher = resolve.micro_batcher(first.config, first.model.shape, first.sessions, trials.sessions, device)
    augment = resolve.augment(first.config).to(device).eval()
    for batch, micro_batch, on_device in evaluation_batches(trials, micro_batcher, batch_size, device):
        if stop():
            raise stop.interrupted("an evaluation keeps no partial results; run it again")
        features = augment(on_device.features, on_device.n_bins)
        days, day_index = micro_batch.days, on_device.day_index
        logits = mean_outputs([decoder.model(features, days, day_index) for decoder in decoders])
        yield score_batch(logits, micro_batch, batch, trials.sessions)


def _check_compatible(decoders: Sequence[TrainedDecoder]) -> None:
    names = {"n_classes", "patch_size", "patch_stride", "feature_subset", "day_layers"}
    settings = [{"sessions": decoder.sessions, **decoder.config.model_dump(include=names)} for decoder in decoders]
    for decoder, own in zip(decoders, settings, strict=True):
        for name, value in settings[0].items():
            if own[name] != value:
                raise ConfigError(
                    f"{decoders[0].name} and {decoder.name} differ in {name} ({value} and {own[name]}); only average "
                    "decoders with the same settings"
                )


def _average_weights(decoders: Sequence[TrainedDecoder]) -> TrainedDecoder:
    first, states = decoders[0], [decoder.model.state_dict() for decoder in decoders]
    for other in decoders[1:]:
        if other.model.shape != first.model.shape:
            raise ConfigError(f"{other.name}: has other layer sizes than {first.name}; use --average outputs")
    mean = {name: torch.stack([state[name].float() for state in states]).mean(0) for name in states[0]}
    load_weights(first.model, mean, "the average")
    return first


def _open(config: EvaluateConfig, decoder: TrainedDecoder, stop: Stop, device: torch.device) -> TrialDataset:
    updates = config.model_dump(include={"s3_bucket", "s3_data_prefix", "index_path", "on_bad_trial"})
    if config.dataset_dir is not None:
        updates["dataset_dir"] = config.dataset_dir
    settings = decoder.config.model_copy(update=updates)
    settings.preflight()
    sessions = config.sessions or decoder.sessions
    if settings.day_layers and (unknown := [name for name in sessions if name not in decoder.sessions]):
        raise ConfigError(
            f"--sessions {', '.join(unknown)}: {decoder.name} has no input layer for these days; remove them"
        )
    return resolve.open_trials(settings, config.split, stop, sessions=sessions, device=device)
