"""The training run: trials to steps, evaluations by phoneme error rate, the best weights kept."""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from brain_to_text import choices
from brain_to_text.augment import Augment
from brain_to_text.batches import Micro, Preparation
from brain_to_text.config import FREE, BrainConfig
from brain_to_text.ctc import DIPHONES, marginal, summed_loss
from brain_to_text.model import GRUDecoder, load_weights
from brain_to_text.optimizer import make_optimizer, set_day_rate
from brain_to_text.outcome import LOG_COLUMNS, finish
from brain_to_text.verdicts import Verdict, error_rates, judge, prepared
from brain_to_text.weights import first_weights
from estiba.checkpoint.retention import Retention
from estiba.checkpoint.saver import Checkpoints
from estiba.contract import Job
from estiba.errors import ConfigError, DataError, Interrupted
from estiba.loop.ahead import POLL_S
from estiba.loop.history import History
from estiba.loop.loop import Loop
from estiba.loop.work import Sums, Work
from estiba.places import checkpoint_places, writable
from estiba.stop import Stop, say

if TYPE_CHECKING:
    from brain_to_text.data import Trials


class Over(Exception):
    """Early stopping: the run is complete before its last step."""


class Decoding(Work[Micro]):
    """CTC on trials. A batch is drawn by the plan of the reader, as a function of the step."""

    unit = "trials"

    def __init__(
        self, config: BrainConfig, train: Trials, val: Trials | None, device: torch.device, origin: str | None = None
    ) -> None:
        """`origin` says where the first weights come from. Raises DataError where nothing can be learnt from."""
        if train.n_trials < 1:
            raise DataError(f"{config.data_location}: no training trials; check --sessions")
        self.config, self.train, self.val, self.device, self.origin = config, train, val, device, origin
        self.shape = choices.shape_of(config, len(train.sessions))
        self.decoder = GRUDecoder(self.shape, seed=config.seed).to(device)
        for name, parameter in self.decoder.named_parameters():
            is_fixed = ("gru" in name and not config.rnn_trainable) or ("day" in name and not config.input_trainable)
            parameter.requires_grad_(not is_fixed)
        self.model = self.decoder
        self.optimizer = make_optimizer(
            self.decoder,
            lr=config.lr_max,
            betas=(config.beta0, config.beta1),
            epsilon=config.epsilon,
            weight_decay=config.weight_decay,
            weight_decay_day=config.weight_decay_day,
            device=device,
        )
        self.augment = Augment(
            choices.noise_of(config),
            smooth_std=config.smooth_kernel_std if config.smooth_data else None,
            smooth_size=config.smooth_kernel_size,
        ).to(device)
        self.day_course = choices.courses_of(config)[1]
        self.averaged = copy.deepcopy(self.decoder).requires_grad_(False).eval() if config.ema_decay else None
        self.n_averaged = 0
        if self.averaged is not None:
            self.optimizer.register_step_post_hook(self._average)
        if config.compile:
            self.decoder.compile_network()
        self._prepare = self._preparation(train)
        self._prepare_val = self._preparation(val) if val is not None else None
        self.best: dict[str, Any] = {"step": None, "val_per": math.inf, "val_loss": math.inf, "weights": None}
        self.days: list[list[Any]] = []
        """[step, session, edits, phonemes] of every evaluation."""
        self.since_best = 0
        self._verdicts: list[Verdict] = []

    def _preparation(self, trials: Trials) -> Preparation:
        config = self.config
        order = {name: number for number, name in enumerate(self.train.sessions)}
        unknown = [name for name in trials.sessions if name not in order]
        if unknown and config.day_layers:
            raise DataError(f"sessions {', '.join(unknown)} are to be evaluated and have no training trials")
        days = [order.get(name, 0) if config.day_layers else 0 for name in trials.sessions]
        return Preparation(
            self.shape,
            seed=config.dataset_seed,
            random_cut=config.random_cut,
            bucket=choices.bucket_of(config, self.device),
            skips_bad=config.on_bad_trial == "skip",
            day_of=days.__getitem__,
        )

    # --- training

    def batches(self, step: int) -> Sequence[Micro]:
        parts = self.config.gradient_accumulation_steps
        try:
            batch = self.train.batch(step)
        except Interrupted:
            time.sleep(2 * POLL_S)  # by then the loop has seen the stop itself, and saves
            raise
        return self._prepare(batch, step=step, parts=parts, is_training=True)

    def count(self, batch: Micro) -> int:
        return batch.features.shape[0]

    def loss(self, model: torch.nn.Module, batch: Micro) -> torch.Tensor:
        if self.is_over:
            raise Over
        set_day_rate(self.optimizer.param_groups, self.day_course.at(batch.step))  # the loop knows one course for all
        features = self.augment.train()(batch.features, batch.n_bins)
        return self.criterion(model(features, batch.days, batch.day_index), batch)

    def criterion(self, logits: torch.Tensor, batch: Micro) -> torch.Tensor:
        """Summed over trials."""
        alpha = self.alpha(batch.step)
        skips = self.config.on_bad_trial == "skip"
        loss = torch.zeros((), device=logits.device)
        if alpha < 1.0:
            one = summed_loss(logits, batch.labels, batch.frames, batch.label_lengths, zero_infinity=skips)
            loss = loss + (1.0 - alpha) * one
        if alpha > 0.0:
            assert batch.phonemes is not None
            phonemes = marginal(logits.float())
            one = summed_loss(phonemes, batch.phonemes, batch.frames, batch.phoneme_lengths, zero_infinity=skips)
            loss = loss + alpha * one
        return loss

    def alpha(self, step: int) -> float:
        """The share of the loss that is over phonemes, where classes are diphones."""
        config = self.config
        if not config.use_composite_loss:
            return 0.0
        if not config.use_alpha_schedule:
            return config.composite_loss_alpha
        stairs = step // config.alpha_schedule_step_interval
        return min(config.alpha_schedule_end, config.alpha_schedule_start + stairs * config.alpha_schedule_step_size)

    def _average(self, *_: Any) -> None:
        """After each step, on the device. The first steps count more, so that the average forgets the first weights."""
        assert self.averaged is not None and self.config.ema_decay is not None
        self.n_averaged += 1
        decay = min(self.config.ema_decay, (1 + self.n_averaged) / (10 + self.n_averaged))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.averaged.parameters()), list(self.decoder.parameters()), 1.0 - decay)

    # --- evaluation

    @property
    def judged(self) -> GRUDecoder:
        """The weights that are evaluated and delivered."""
        return self.decoder if self.averaged is None else self.averaged

    def evaluation(self, model: torch.nn.Module) -> Iterator[Sums]:
        del model
        if self.val is None:
            return
        self._verdicts = []
        try:
            for verdicts, loss in self.verdicts(self.val):
                self._verdicts += verdicts
                yield self._sums(verdicts, loss)
        except Interrupted:
            yield {}  # the loop looks for the stop itself, and saves

    def _sums(self, verdicts: Sequence[Verdict], loss: torch.Tensor) -> Sums:
        rates = error_rates(verdicts).values()
        sums: dict[str, tuple[float | torch.Tensor, float]] = {"val_loss": (loss, len(verdicts))}
        sums["val_per"] = (sum(edits for edits, _ in rates), sum(length for _, length in rates))
        if self.shape.n_classes == DIPHONES:
            diphones = [one for one in verdicts if one.diphone_edits is not None]
            sums["val_der"] = (sum(one.diphone_edits or 0 for one in diphones), sum(one.n_diphones for one in diphones))
        return sums

    def verdicts(self, trials: Trials) -> Iterator[tuple[list[Verdict], torch.Tensor]]:
        """Each batch of an evaluation, and its summed loss. In the precision that is set around it."""
        assert self._prepare_val is not None
        augment = self.augment.eval()
        for batch, micro, moved in prepared(trials, self._prepare_val, self.config.batch_size, self.device):
            logits = self.judged(augment(moved.features, moved.n_bins), micro.days, moved.day_index)
            loss = summed_loss(logits, moved.labels, micro.frames, micro.label_lengths, zero_infinity=True)
            yield judge(logits, micro, batch, trials.sessions), loss

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> Mapping[str, float]:
        rate, loss = metrics.get("val_per", math.nan), metrics.get("val_loss", math.nan)
        if not math.isfinite(rate):
            return {}
        days = error_rates(self._verdicts)
        self.days += [[step, session, *days[session]] for session in sorted(days)]
        if self.config.log_individual_day_val_PER:
            said = ", ".join(f"{session} {days[session][0] / days[session][1]:.4f}" for session in sorted(days))
            say(f"PER by day at step {step}: {said}")
        if (rate, loss) < (self.best["val_per"], self.best["val_loss"]):
            weights = {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.judged.state_dict().items()}
            self.best = {"step": step, "val_per": rate, "val_loss": loss, "weights": weights}
            self.since_best = 0
        else:
            self.since_best += 1
        return {"best_val_per": self.best["val_per"]}

    @property
    def not_learnt_from(self) -> list[str]:
        """Trials that are too short for their labels, under --on-bad-trial skip."""
        return self._prepare.too_short

    @property
    def is_over(self) -> bool:
        return self.config.early_stopping and self.since_best >= self.config.early_stopping_val_steps

    # --- state

    def fields(self, step: int) -> Mapping[str, Any]:
        return {"alpha": round(self.alpha(step), 4)} if self.config.use_composite_loss else {}

    def plan(self) -> Mapping[str, Any]:
        settings = self.config.model_dump(mode="json")
        return {
            "data": self.train.identity,
            "sessions": list(self.train.sessions),
            "day_course": self.day_course.model_dump(mode="json"),
            "config": {name: value for name, value in sorted(settings.items()) if name not in FREE},
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "origin": self.origin,
            "best": self.best,
            "days": self.days,
            "since_best": self.since_best,
            "averaged": None if self.averaged is None else dict(self.averaged.state_dict()),
            "n_averaged": self.n_averaged,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.origin, self.best, self.since_best = state["origin"], state["best"], state["since_best"]
        self.days = [list(row) for row in state["days"]]
        if self.averaged is not None:  # a run that begins to average now begins with the weights as they are
            self.averaged.load_state_dict(state["averaged"] or self.decoder.state_dict())
            self.n_averaged = state["n_averaged"]


def train(config: BrainConfig, job: Job, stop: Stop) -> None:
    """Run the job. Raises EstibaError: Interrupted when asked to stop, with everything that is safe in its message."""
    choices.check(config)
    if job.host_count > 1:
        raise ConfigError(f"{job.host_count} hosts: this decoder is trained on one GPU of one; set InstanceCount to 1")
    device = choices.device_of(config.device, config.gpu_number)
    folder, upload = checkpoint_places(config.checkpoint_path, config.checkpoint_upload)
    output = writable(Path(config.output_data_dir), "--output-data-dir")
    model_dir = writable(Path(config.model_dir), "--model-dir")
    checkpoints = Checkpoints(
        folder,
        retention=Retention(
            keep_last=config.keep_last,
            keep_every=config.batches_per_val_step if config.save_all_val_steps else None,
            keep_best=config.keep_best,
            metric="val_per",
        ),
        upload=upload,
    )
    with contextlib.ExitStack() as open_now:
        trials = choices.open_trials(config, "train", stop, sessions=config.sessions, device=device)
        open_now.enter_context(trials)
        choices.keep_on_device(config, trials, device)
        if (val := open_val(config, trials, stop, device)) is not None:
            open_now.enter_context(val)
        work, loop = _run(config, trials, val, checkpoints, device=device, output=output, stop=stop)
        finish(work, loop, output=output, model_dir=model_dir)


def _run(
    config: BrainConfig,
    trials: Trials,
    val: Trials | None,
    checkpoints: Checkpoints,
    *,
    device: torch.device,
    output: Path,
    stop: Stop,
) -> tuple[Decoding, Loop]:
    """Train until the last step, or until early stopping."""
    kept = "nothing was trained in this attempt, and what earlier ones saved is kept"
    settings = choices.settings_of(config)
    found = stop.unless_stopped(checkpoints.restore, kept)
    first = first_weights(config) if found is None else None
    work = Decoding(config, trials, val, device, origin=None if first is None else first.name)
    if first is not None:
        load_weights(work.decoder, first.weights, first.name)
        if work.averaged is not None:
            work.averaged.load_state_dict(work.decoder.state_dict())
        say(f"beginning with the weights of {first.name}")
    history = History(output / "metrics", csv_path=output / "training_log.csv", columns=LOG_COLUMNS)
    loop = Loop(work, settings, checkpoints=checkpoints, history=history, stop=stop, device=device)
    loop.resume(found)
    say(_introduction(work, loop))
    try:
        if not work.is_over:
            loop.run()
    except Over:
        text = f"PER has not become better for {work.since_best} evaluations; stopping early at step {loop.step}"
        say(f"{text}, as --early-stopping says")
        checkpoints.save(loop.step, loop.state(), kind="final", metrics=loop.metrics, wait=True)
    finally:
        checkpoints.close(stop.seconds_left())
    return work, loop


def open_val(config: BrainConfig, trained: Trials, stop: Stop, device: torch.device) -> Trials | None:
    """The trials to evaluate on: of the sessions that are trained on and have some; None where no session has."""
    wanted = list(trained.sessions)
    if config.sessions is not None and config.dataset_probability_val is not None:
        chosen = {name for name, p in zip(config.sessions, config.dataset_probability_val, strict=True) if p}
        wanted = [name for name in wanted if name in chosen]
    if not wanted:
        return None
    val = choices.open_trials(config, "val", stop, sessions=wanted, device=device)
    return val if val.n_trials else None


def _introduction(work: Decoding, loop: Loop) -> str:
    shape, config, device = work.shape, work.config, work.device
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    else:
        machine = f"no GPU; CPU with {torch.get_num_threads()} threads"
    count = sum(parameter.numel() for parameter in work.decoder.parameters())
    of_days = sum(parameter.numel() for name, parameter in work.decoder.named_parameters() if "day_" in name)
    evaluated = 0 if work.val is None else work.val.n_trials
    both = ", both directions" if shape.bidirectional else ""
    lines = [f"{machine}, {loop.mixed.name}"]
    lines.append(
        f"decoder: {count / 1e6:.1f}M parameters, {of_days / 1e6:.1f}M of them layers of {shape.n_days} days; "
        f"{shape.n_layers} x GRU {shape.n_units}{both}, {shape.n_classes} classes, patches of {shape.patch_size} at "
        f"stride {shape.patch_stride}"
    )
    lines.append(
        f"data: {config.data_location}: {len(work.train.sessions)} sessions, {work.train.n_trials:,} trials to train "
        f"on, {evaluated:,} to evaluate"
    )
    lines.append(
        f"{loop.settings.schedule.steps:,} steps of {config.batch_size} trials of {config.days_per_batch} days"
    )
    if loop.step:
        lines.append(f"resuming at step {loop.step} of {loop.settings.schedule.steps}")
    return "\n".join(lines)
