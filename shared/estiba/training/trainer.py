"""The trainer: steps, evaluations and saves. It can stop at any point, and resumes bit for bit.

The state of a run is its state between two steps. A stop inside a step discards that step's gradients and restores the
random state from before it; a stop inside an evaluation discards the evaluation, which runs again after the resume.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch.nn.parallel import DistributedDataParallel

from estiba.checkpoint.manager import CheckpointManager, Restored
from estiba.distributed import DistContext
from estiba.errors import ConfigError, DataError
from estiba.log import get_logger
from estiba.platform.steps import report_end, report_step
from estiba.platform.stop import Stop
from estiba.training import rng
from estiba.training.allocator import keep_freed_memory
from estiba.training.config import TrainerConfig
from estiba.training.fingerprint import check_fingerprint
from estiba.training.loss_check import check_loss_is_a_sum
from estiba.training.metrics import EPOCH_LOSS, MetricsLogger, rows_in
from estiba.training.precision import AmpContext
from estiba.training.prefetch import Prefetcher, to_device
from estiba.training.saving import SavePolicy
from estiba.training.survivors import Survivors
from estiba.training.task import TrainTask
from estiba.training.throughput import ThroughputMeter

logger = get_logger(__name__)

MAX_SKIPPED_STEPS = 50
"""A run ends with an error after this many consecutive steps without finite gradients. It is checked as often."""
GROUP_SETTINGS = ("weight_decay", "betas", "eps", "momentum", "alpha")
"""Settings of an optimizer's groups, which --accept-changed-plan may change."""


class Trainer:
    """One run of one task."""

    def __init__(
        self,
        task: TrainTask[Any],
        config: TrainerConfig,
        *,
        checkpoints: CheckpointManager | None,
        metrics_logger: MetricsLogger,
        stop: Stop,
        device: torch.device,
        dist: DistContext | None = None,
    ) -> None:
        """`checkpoints` None saves nothing: an interrupted run starts again from step 0."""
        self.task, self.config, self.metrics_logger, self.stop = task, config, metrics_logger, stop
        self.device, self.dist = device, dist or DistContext()
        self.amp = AmpContext(config.precision, device)
        self.step = 0
        self.evaluated_step: int | None = None
        """The step of the last complete evaluation."""
        self.metrics: dict[str, float] = {}
        """The results of the last complete evaluation."""
        self.skipped_steps = 0
        """Steps that were skipped because their gradients were not finite."""
        self._saves = SavePolicy(checkpoints, config, dist=self.dist, stop=stop)
        self._survivors = Survivors(checkpoints, self._current_state, stop=stop)
        self._state_lock = threading.RLock() if checkpoints is None else checkpoints.state_lock
        self._shards: Mapping[str, torch.Tensor] = {}
        self._random_between: dict[str, Any] = {}
        """The random state before the step or evaluation in progress."""
        self._updated: torch.cuda.Event | None = None
        """Complete once the GPU has the state after the last step."""
        self._meter = ThroughputMeter(task, device, self.amp.dtype, self.dist.world_size)
        if device.type == "cpu":
            keep_freed_memory()
        if config.deterministic:
            torch.use_deterministic_algorithms(True)

    # --- state

    def resume(self, restored: Restored | None) -> None:
        """Load a restored state; None starts at step 0. Raises ConfigError if the run fingerprint changed."""
        rows: Sequence[Any] = ()
        if restored is None:
            rng.seed(self.config.seed + self.dist.rank)
        else:
            rows = self._load_state(restored)
        if self.dist.is_main or self.task.is_sharded:  # any rank may have to save them
            self.metrics_logger.start(rows, total_steps=self.config.schedule.steps, step=self.step)

    def _load_state(self, restored: Restored) -> Sequence[Any]:
        """Load a restored state. Returns its rows of metrics."""
        state, accept = restored.state, self.config.accept_changed_plan
        where, groups = str(restored.path), self.task.optimizer.param_groups
        check_fingerprint(state["plan"], self._fingerprint(), where, accept=accept, fixed=self.task.fixed_settings)
        current = [{name: group[name] for name in GROUP_SETTINGS if name in group} for group in groups]
        try:
            self.task.load_model_state(state["model"])
            self.task.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            if not accept:  # equal fingerprints: not the user's mistake
                raise
            lines = [line.strip() for line in str(error).splitlines()[1:]] or [str(error)]
            raise ConfigError(
                f"{where}: its tensors do not fit this model and optimizer ({lines[0][:300]}); --accept-changed-plan "
                "cannot change sizes, vocabulary or optimizer. Use the same ones, or give another --checkpoint-path"
            ) from None
        if accept:  # loading brought the saved settings back
            for group, settings in zip(self.task.optimizer.param_groups, current, strict=True):
                group.update(settings)
        self.amp.load_state_dict(state["scaler"])
        self.task.load_state_dict(state["work"])
        own = state["loop"]
        self.step, self.evaluated_step = own["step"], own["evaluated"]
        self.skipped_steps, self.metrics = own["skipped"], own["metrics"]
        is_same_number = restored.manifest.ranks == self.dist.world_size
        if self.dist.is_main or is_same_number:
            rng.set_state(state["random"])
            self._meter.load_state_dict(state["meter"], of_all=not is_same_number)
        else:  # saved with another number of ranks: this rank has no random state of its own
            rng.seed(self.config.seed + self.dist.rank + self.step * 1009)
        return rows_in(own["rows"])

    def state(self, *, alone: bool = False) -> dict[str, Any]:
        """Return everything that the rest of the run depends on. Ranks other than the main one return their own part.

        All ranks call it together, unless `alone`: then the throughput is that of this rank.

        The keys are those of checkpoint format 1 (docs/decisions/0007), so checkpoints of earlier versions restore.
        """
        own = {"random": rng.get_state(), "meter": self._meter.state_dict(None if alone else self.dist)}
        if not self.dist.is_main and not self.task.is_sharded:
            return own
        return {**own, **self._common_state(self.task.model_state())}

    def _current_state(self) -> tuple[int, Mapping[str, Any], Mapping[str, float]]:
        """Return the state after the last complete step, also in the middle of a step whose other ranks are lost."""
        if self._updated is not None:
            torch.cuda.current_stream().wait_event(self._updated)
        own = {"random": rng.get_state() | self._random_between, "meter": self._meter.state_dict()}
        return self.step, {**own, **self._common_state(self._shards)}, self.metrics

    def _common_state(self, model: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        return {
            "model": model,
            "optimizer": self.task.optimizer.state_dict(),
            "scaler": self.amp.state_dict(),
            "work": self.task.state_dict(),
            "plan": self._fingerprint(),
            "loop": {
                "step": self.step,
                "evaluated": self.evaluated_step,
                "skipped": self.skipped_steps,
                "metrics": self.metrics,
                "rows": self.metrics_logger.state(),
            },
        }

    def _fingerprint(self) -> dict[str, Any]:
        return {
            "schedule": self.config.schedule.model_dump(),
            "seed": self.config.seed,
            "clip": self.config.clip,
            "precision": self.amp.name,
            **self.task.run_fingerprint(),
        }

    # --- the run

    def run(self) -> None:
        """Train until the last step, or until the task stops early.

        Raises Interrupted when asked to stop, RanksLost after the loss of another host (sharded tasks).
        """
        if self.task.is_sharded:  # in the middle of a step, FSDP has whole tensors in the shards' place
            self._shards = dict(self.task.model_state())
        with self._survivors.watching():
            self._run()

    def _run(self) -> None:
        model = self._wrapped()
        total = self.config.schedule.steps
        self._meter.start()
        if self.step > 0 and self._is_log_due() and self._logged_step() < self.step:  # its other ranks were lost then
            self._log(self.config.schedule.at(self.step - 1))
        is_complete = self.step > 0 and self._stop_early() is not None  # an early-stopped run that is started again
        batches = Prefetcher(self.task.batches, self.step, 0 if is_complete else total)
        self._saves.start()
        try:
            while not is_complete:
                if self._is_evaluation_due():
                    if not self._evaluate(model):
                        self._interrupt()
                    if reason := self._stop_early():
                        is_complete = True
                        if self.dist.is_main:
                            logger.info(f"{reason}; stopping early at step {self.step}")
                if self._any_rank_stops():
                    self._interrupt()
                if is_complete or self.step >= total:
                    break
                self._saves.save_if_due(self.step, self.state, self.metrics)
                if not self._train(model, batches):
                    self._interrupt()
            report_end()
            self._saves.save_final(self.step, self.state, self.metrics)
        finally:
            batches.close()
            self.metrics_logger.close()

    def _wrapped(self) -> torch.nn.Module:
        model = self.task.model
        if self.config.compile:
            model.compile()  # in place, so that its parameters keep their names
        if self.dist.world_size > 1 and not self.task.is_sharded:
            ids = [self.dist.local_rank] if self.device.type == "cuda" else None
            return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
        return model

    def _any_rank_stops(self) -> bool:
        """All ranks stop at the same place, or none does."""
        return self.dist.all_reduce_max(float(self.stop()))[0] > 0

    def _interrupt(self) -> NoReturn:
        self._saves.save_and_interrupt(self.step, self.state, self.metrics)

    def _stop_early(self) -> str | None:
        own = self.task.should_stop(self.step, self.metrics) if self.dist.is_main else None
        reason: str | None = self.dist.broadcast(own)
        return reason

    # --- steps

    def _train(self, model: torch.nn.Module, prefetcher: Prefetcher[Any]) -> bool:
        """Train one step. Returns False if a stop interrupted it; the step is then undone."""
        is_alone = self.dist.world_size == 1
        batches = prefetcher.next(self.step, self.stop if is_alone else lambda: False)
        if batches is None:
            return False
        if self.step == 0 and is_alone and not self.config.compile:  # a compiled model would compile for the halves
            check_loss_is_a_sum(self.task, batches, self.amp, self.device)
        random_before = self._random_between = rng.get_state(quick=True)
        units = [self.task.units_in(batch) for batch in batches]
        total = self.dist.all_reduce_sum(float(sum(units)))[0]
        if total <= 0:
            raise DataError(f"step {self.step}: nothing in its batches to learn from; check the data and the labels")
        lr = self._set_learning_rates()
        losses = torch.zeros((), device=self.device, dtype=torch.float64)  # exact enough for any division of the batch
        for index, batch in enumerate(batches):
            if self._any_rank_stops():
                self.task.optimizer.zero_grad(set_to_none=True)
                rng.set_state(random_before)
                return False
            is_last = index + 1 == len(batches)
            keeps_gradients = not (is_last or is_alone or self.task.is_sharded)  # whole ones; FSDP has no room for them
            with model.no_sync() if keeps_gradients else contextlib.nullcontext():  # type: ignore[operator]
                with self.amp.forward():
                    loss = self.task.loss(model, to_device(batch, self.device))
                losses += loss.detach()
                # DDP and FSDP average gradients over the ranks; they must be summed.
                share = loss * (self.dist.world_size / total)
                (share if self.amp.scaler is None else self.amp.scaler.scale(share)).backward()
        norm = self._clip()
        with self._state_lock:
            self._update(norm)
            self.step += 1
            self._random_between = {}
            self._meter.add(losses, norm, sum(units), total)
            if self.task.is_sharded and self.device.type == "cuda":
                self._updated = torch.cuda.Event()
                self._updated.record()
        report_step(self.step)
        self.metrics_logger.advance(self.step)
        if self._is_log_due():
            self._log(lr)
        is_last = self.step == self.config.schedule.steps
        if self.step % MAX_SKIPPED_STEPS == 0 or is_last:
            self._check_skipped(lr)
        return True

    def _check_skipped(self, lr: float) -> None:
        """Raises DataError after too many steps in a row without finite gradients, with the weights saved."""
        in_a_row = self._meter.bad_in_a_row(self.dist)
        if in_a_row >= min(MAX_SKIPPED_STEPS, self.config.schedule.steps):
            if in_a_row < self.step and self._is_finite():
                self._saves.save_before_error(self.step, self.state, self.metrics)
            raise DataError(
                f"step {self.step}: no gradient was finite for {in_a_row} steps in a row; lower the learning rate "
                f"({lr:.3g}), or resume from an earlier checkpoint with other data"
            )

    def _is_finite(self) -> bool:
        """Whether all trained weights are, on every rank. Weights that are not would push good checkpoints out."""
        trained = (p.detach() for p in self.task.model.parameters() if p.requires_grad)
        own = (p.to_local() if self.task.is_sharded else p for p in trained)  # type: ignore[operator]
        is_bad = not all(bool(torch.isfinite(p).all()) for p in own)
        return self.dist.all_reduce_max(float(is_bad))[0] == 0

    def _set_learning_rates(self) -> float:
        """Set each group's learning rate for this step. Returns the one of the trainer's own schedule."""
        for group in self.task.optimizer.param_groups:
            schedule = self.task.group_schedule(group) or self.config.schedule
            group["lr"] = schedule.at(self.step) * group.get("lr_scale", 1.0)
        return self.config.schedule.at(self.step)

    def _clip(self) -> torch.Tensor:
        """Clip the gradients. Returns their norm before, which is the last thing in a step that ranks exchange."""
        if self.amp.scaler is not None:
            self.amp.scaler.unscale_(self.task.optimizer)
        groups = self.task.optimizer.param_groups
        parameters = [p for group in groups for p in group["params"] if p.grad is not None]
        limit = float("inf") if self.config.clip is None else self.config.clip
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        if self.task.is_sharded:
            norm = norm.full_tensor()  # type: ignore[attr-defined]
            if self.device.type == "cuda":  # what waits for a lost rank must wait here, and not hold the lock
                torch.cuda.current_stream().synchronize()
        return norm

    def _update(self, norm: torch.Tensor) -> None:
        """Take the optimizer's step. Non-finite gradients are skipped."""
        optimizer, scaler = self.task.optimizer, self.amp.scaler
        if scaler is not None:
            scaler.step(optimizer)
            scaler.update()
        elif all(group.get("fused") for group in optimizer.param_groups):
            # The fused optimizer skips the step on the device, without a synchronization.
            optimizer.grad_scale = None  # type: ignore[attr-defined]
            optimizer.found_inf = (~torch.isfinite(norm)).float().to(self.device)  # type: ignore[attr-defined]
            optimizer.step()
        elif bool(torch.isfinite(norm)):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def _is_log_due(self) -> bool:
        is_last = self.step == self.config.schedule.steps
        return self.step % self.config.log_every == 0 or is_last or self.task.epoch_ending_at(self.step) is not None

    def _logged_step(self) -> int:
        """Return the last step that has a row of training metrics on the main rank."""
        steps = [row["step"] for row in self.metrics_logger.rows if "train_loss" in row]
        return int(self.dist.broadcast(steps[-1] if steps else 0))

    def _log(self, lr: float) -> None:
        row = self._meter.row(self.dist)
        bad = row.pop("bad_steps")
        if bad:
            self.skipped_steps += bad
            logger.warning(f"{bad} of the last steps skipped: gradients were not finite")
        total, seconds = self.config.schedule.steps, self._meter.seconds_per_step
        row = {"step": self.step, "of": total, **self.task.log_fields(self.step), **row, "lr": lr}
        row["eta_s"] = round((total - self.step) * seconds) if seconds else None
        self.metrics_logger.add(row)

    # --- evaluation

    def _is_evaluation_due(self) -> bool:
        every, total = self.config.evaluate_every, self.config.schedule.steps
        is_regular = bool(every and self.step % every == 0)
        is_scheduled = self.step > 0 and (
            self.step == total or is_regular or self.task.epoch_ending_at(self.step) is not None
        )
        return is_scheduled and self.evaluated_step != self.step

    def _evaluate(self, model: torch.nn.Module) -> bool:
        """Evaluate. Returns False if a stop interrupted it; its results are then discarded."""
        sums: dict[str, list[Any]] = {}
        was_training = self.task.model.training
        self._random_between = rng.get_state(quick=True)
        self.task.model.eval()
        with self._meter.paused(), rng.preserved():
            try:
                with torch.no_grad(), self.amp.forward():
                    for batch in self.task.evaluate(model):
                        report_step(self.step)
                        if self.stop() and self.dist.world_size == 1:
                            return False
                        for name, (value, count) in batch.items():
                            pair = sums.setdefault(name, [0.0, 0.0])
                            pair[0], pair[1] = pair[0] + value, pair[1] + count
                # A rank may have had no batch, or records of other columns than another one.
                names = sorted({name for part in self.dist.all_gather(sorted(sums)) for name in part})
                values = (float(value) for name in names for value in sums.get(name, (0.0, 0.0)))
                flat = self.dist.all_reduce_sum(*values)
                pairs = zip(names, flat[::2], flat[1::2], strict=True)
                self.metrics = {name: value / count if count else float("nan") for name, value, count in pairs}
                if self.dist.is_main:
                    self.metrics |= self.task.on_evaluation(self.step, self.metrics)
            finally:
                self.task.model.train(was_training)
        self.evaluated_step, self._random_between = self.step, {}
        epoch = self.task.epoch_ending_at(self.step)
        ended = {} if epoch is None else {"epoch": epoch, EPOCH_LOSS: self._meter.end_epoch()}
        if self.metrics or ended:
            self.metrics_logger.add({"step": self.step, **self.task.log_fields(self.step), **ended, **self.metrics})
        return True
