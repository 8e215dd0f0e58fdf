"""Decoder training as a trainer task: CTC loss, evaluation by phoneme error rate, the task's part of a checkpoint."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from brain_to_text import resolve
from brain_to_text.config import BrainConfig
from brain_to_text.ctc import marginalize, summed_loss
from brain_to_text.data.batches import MicroBatch, MicroBatcher
from brain_to_text.data.dataset import TrialDataset
from brain_to_text.data.schema import N_DIPHONES
from brain_to_text.model import GRUDecoder, load_weights
from brain_to_text.optimizer import DAY_GROUP, LearningRateSchedule, make_optimizer
from brain_to_text.scoring import TrialResult, error_rates, evaluation_batches, score_batch, total
from estiba.errors import DataError, Interrupted
from estiba.log import get_logger
from estiba.training.prefetch import POLL_S
from estiba.training.task import Sums, TrainTask

logger = get_logger(__name__)


class DecodingTask(TrainTask[MicroBatch]):
    """Trains a decoder. The batch of a step is a function of seed and step (see the data set's sampler)."""

    unit = "trials"

    def __init__(
        self, config: BrainConfig, train: TrialDataset, val: TrialDataset | None, device: torch.device
    ) -> None:
        """Raises DataError if there are no training trials."""
        if train.n_trials < 1:
            raise DataError(f"{config.data_location}: no training trials; check --sessions")
        self.config, self.train, self.val, self.device = config, train, val, device
        self.shape = resolve.decoder_shape(config, len(train.sessions))
        self.decoder = self.model = GRUDecoder(self.shape, seed=config.seed).to(device)
        for name, parameter in self.decoder.named_parameters():
            is_fixed = ("gru" in name and not config.rnn_trainable) or ("day" in name and not config.input_trainable)
            parameter.requires_grad_(not is_fixed)
        self.optimizer = make_optimizer(
            self.decoder,
            lr=config.lr_max,
            betas=(config.beta0, config.beta1),
            epsilon=config.epsilon,
            weight_decay=config.weight_decay,
            weight_decay_day=config.weight_decay_day,
            device=device,
        )
        self.augment = resolve.augment(config).to(device)
        self.day_schedule = resolve.schedules(config)[1]
        self.averaged = copy.deepcopy(self.decoder).requires_grad_(False).eval() if config.ema_decay else None
        self.n_averaged = 0
        if self.averaged is not None:
            self.optimizer.register_step_post_hook(self._average)
        if resolve.compiles(config, device):
            self.decoder.compile_network()
        self.micro_batcher = self._micro_batcher_for(train)
        self._val_micro_batcher = None if val is None else self._micro_batcher_for(val)
        self.origin: str | None = None
        """The file that the initial weights came from; None for random weights."""
        self.best: dict[str, Any] = {"step": None, "val_per": math.inf, "val_loss": math.inf, "weights": None}
        self.per_history: list[list[Any]] = []
        """[step, session, edits, phonemes] for every session of every evaluation."""
        self.evaluations_since_best = 0
        self._results: list[TrialResult] = []

    def _micro_batcher_for(self, trials: TrialDataset) -> MicroBatcher:
        return resolve.micro_batcher(self.config, self.shape, self.train.sessions, trials.sessions, self.device)

    def start_from(self, origin: str, weights: Mapping[str, torch.Tensor]) -> None:
        """Replace the random weights. Raises ConfigError if the weights do not fit."""
        load_weights(self.decoder, weights, origin)
        if self.averaged is not None:
            self.averaged.load_state_dict(self.decoder.state_dict())
        self.origin = origin
        logger.info(f"starting from the weights of {origin}")

    # --- training

    def batches(self, step: int) -> Sequence[MicroBatch]:
        try:
            batch = self.train.batch(step)
        except Interrupted:
            time.sleep(2 * POLL_S)  # until the trainer notices the stop itself and saves a checkpoint
            raise
        return self.micro_batcher(batch, step=step, parts=self.config.gradient_accumulation_steps, is_training=True)

    def units_in(self, batch: MicroBatch) -> int:
        return batch.features.shape[0]

    def loss(self, model: torch.nn.Module, batch: MicroBatch) -> torch.Tensor:
        features = self.augment.train()(batch.features, batch.n_bins)
        return self.criterion(model(features, batch.days, batch.day_index), batch)

    def criterion(self, logits: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        """Return the loss, summed over trials."""
        alpha = self.alpha(batch.step)
        loss = torch.zeros((), device=logits.device)
        if alpha < 1.0:
            labels, lengths = batch.labels, batch.label_lengths
            loss = loss + (1.0 - alpha) * summed_loss(logits, labels, batch.frames, lengths)
        if alpha > 0.0:
            assert batch.phonemes is not None
            logits, labels, lengths = marginalize(logits.float()), batch.phonemes, batch.phoneme_lengths
            loss = loss + alpha * summed_loss(logits, labels, batch.frames, lengths)
        return loss

    def alpha(self, step: int) -> float:
        """Return the weight of the phoneme loss in the composite loss; 0 without the composite loss."""
        config = self.config
        if not config.use_composite_loss:
            return 0.0
        if not config.use_alpha_schedule:
            return config.composite_loss_alpha
        increases = step // config.alpha_schedule_step_interval
        return min(config.alpha_schedule_end, config.alpha_schedule_start + increases * config.alpha_schedule_step_size)

    def group_schedule(self, group: Mapping[str, Any]) -> LearningRateSchedule | None:
        return self.day_schedule if group["group_type"] == DAY_GROUP else None

    def _average(self, *_: Any) -> None:
        """Update the averaged weights after a step. The decay starts low, so that the random weights are forgotten."""
        assert self.averaged is not None and self.config.ema_decay is not None
        self.n_averaged += 1
        decay = min(self.config.ema_decay, (1 + self.n_averaged) / (10 + self.n_averaged))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.averaged.parameters()), list(self.decoder.parameters()), 1.0 - decay)

    # --- evaluation

    @property
    def evaluated_model(self) -> GRUDecoder:
        """The model whose weights are evaluated and written at the end."""
        return self.decoder if self.averaged is None else self.averaged

    def evaluate(self, model: torch.nn.Module) -> Iterator[Sums]:
        del model
        if self.val is None:
            return
        self._results = []
        try:
            for results, loss in self.results(self.val):
                self._results += results
                yield self._sums(results, loss)
        except Interrupted:
            yield {}  # the trainer notices the stop itself and saves a checkpoint

    def _sums(self, results: Sequence[TrialResult], loss: torch.Tensor) -> Sums:
        sums: dict[str, tuple[float | torch.Tensor, float]] = {"val_loss": (loss, len(results))}
        sums["val_per"] = total(error_rates(results))
        if self.shape.n_classes == N_DIPHONES:
            labelled = [result for result in results if result.diphone_edits is not None]
            edits = sum(result.diphone_edits or 0 for result in labelled)
            sums["val_der"] = (edits, sum(result.n_diphones for result in labelled))
        return sums

    def results(self, trials: TrialDataset) -> Iterator[tuple[list[TrialResult], torch.Tensor]]:
        """Yield the results and the summed loss of each evaluation batch, under the caller's autocast."""
        micro_batcher, augment = self._val_micro_batcher, self.augment.eval()
        assert micro_batcher is not None
        for batch, micro, on_device in evaluation_batches(trials, micro_batcher, self.config.batch_size, self.device):
            features = augment(on_device.features, on_device.n_bins)
            logits = self.evaluated_model(features, micro.days, on_device.day_index)
            loss = summed_loss(logits, on_device.labels, micro.frames, micro.label_lengths, zero_infinity=True)
            yield score_batch(logits, micro, batch, trials.sessions), loss

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> Mapping[str, float]:
        """Record the PER by day, and keep the weights if they are the best so far."""
        rate, loss = metrics.get("val_per", math.nan), metrics.get("val_loss", math.nan)
        if not math.isfinite(rate):
            return {}
        days = error_rates(self._results)
        self.per_history += [[step, session, *counts] for session, counts in days.items()]
        if self.config.log_individual_day_val_PER:
            rates = ", ".join(f"{session} {edits / length:.4f}" for session, (edits, length) in days.items())
            logger.info(f"PER by day at step {step}: {rates}")
        if (rate, loss) < (self.best["val_per"], self.best["val_loss"]):
            state = self.evaluated_model.state_dict()
            weights = {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}
            self.best = {"step": step, "val_per": rate, "val_loss": loss, "weights": weights}
            self.evaluations_since_best = 0
        else:
            self.evaluations_since_best += 1
        return {"best_val_per": self.best["val_per"]}

    def should_stop(self, step: int, metrics: Mapping[str, float]) -> str | None:
        del step, metrics
        if not self.config.early_stopping or self.evaluations_since_best < self.config.early_stopping_val_steps:
            return None
        return f"--early-stopping: the PER has not improved for {self.evaluations_since_best} evaluations"

    @property
    def trials_left_out(self) -> list[str]:
        """The trials that any attempt of this run left out, each with the reason."""
        return sorted({*self.train.skipped, *(() if self.val is None else self.val.skipped)})

    def log_fields(self, step: int) -> Mapping[str, Any]:
        return {"alpha": round(self.alpha(step), 4)} if self.config.use_composite_loss else {}

    # --- checkpoints: the keys must stay the same, so that older checkpoints can be read

    def run_fingerprint(self) -> Mapping[str, Any]:
        return {
            "data": self.train.identity,
            "sessions": list(self.train.sessions),
            "day_course": self.day_schedule.model_dump(mode="json"),
            "config": self.config.fingerprint_settings(),
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "origin": self.origin,
            "best": self.best,
            "days": self.per_history,
            "since_best": self.evaluations_since_best,
            "averaged": None if self.averaged is None else dict(self.averaged.state_dict()),
            "n_averaged": self.n_averaged,
            "skipped": {"train": [*self.train.skipped], "val": [] if self.val is None else [*self.val.skipped]},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.origin, self.best = state["origin"], state["best"]
        self.evaluations_since_best = state["since_best"]
        self.per_history = [list(row) for row in state["days"]]
        skipped = state.get("skipped") or {}  # absent in older checkpoints
        self.train.add_skipped(skipped.get("train", ()))
        if self.val is not None:
            self.val.add_skipped(skipped.get("val", ()))
        if self.averaged is not None:  # a run that resumes with a new --ema-decay averages from the current weights
            self.averaged.load_state_dict(state["averaged"] or self.decoder.state_dict())
            self.n_averaged = state["n_averaged"]
