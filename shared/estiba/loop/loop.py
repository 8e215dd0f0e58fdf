"""Steps, evaluations, saves; stop at any point, resume at the same bits.

The state of a run is what it is between two steps. A stop in the middle of a step drops that step's gradients and puts
its random state back; one in an evaluation drops the evaluation, which is held again after the resume.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch.nn.parallel import DistributedDataParallel

from estiba.checkpoint.saver import Checkpoints, Restored
from estiba.errors import ConfigError, DataError
from estiba.loop import randomness
from estiba.loop.ahead import Ahead, to_device
from estiba.loop.history import History
from estiba.loop.memory import keep_freed_memory
from estiba.loop.precision import Mixed
from estiba.loop.settings import Settings
from estiba.loop.speed import Meter
from estiba.loop.work import Work
from estiba.ranks import Ranks
from estiba.stop import Stop, say

CLEAN_UP_S = 5.0
"""Kept of the time before a kill for the end of the process."""
MOST_SKIPPED = 50
"""Steps in a row whose gradients are not finite; then the run is not learning any more."""


class Loop:
    """One run of one workload."""

    def __init__(
        self,
        work: Work[Any],
        settings: Settings,
        *,
        checkpoints: Checkpoints | None,
        history: History,
        stop: Stop,
        device: torch.device,
        ranks: Ranks | None = None,
    ) -> None:
        """`checkpoints` None keeps nothing: a run that is stopped begins again."""
        self.work, self.settings, self.checkpoints, self.history, self.stop = work, settings, checkpoints, history, stop
        self.device, self.ranks = device, ranks or Ranks()
        self.mixed = Mixed(settings.precision, device)
        self.step = 0
        self.evaluated: int | None = None
        """The step of the last evaluation that was held whole."""
        self._is_reserved = False
        self.skipped = 0
        self.metrics: dict[str, float] = {}
        """Of the last evaluation."""
        self._save_asked = False
        self._meter = Meter(work, device, self.mixed.dtype, self.ranks.count)
        if device.type == "cpu":
            keep_freed_memory()
        if settings.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)

    # --- state

    def resume(self, found: Restored | None) -> None:
        """Take over a restored state; None begins at step 0. Raises ConfigError where the plan changed."""
        rows: Sequence[Any] = ()
        if found is None:
            randomness.seed(self.settings.seed + self.ranks.rank)
        else:
            state = found.state
            self._check_plan(state["plan"], str(found.path))
            self.work.model.load_state_dict(state["model"])
            self.work.optimizer.load_state_dict(state["optimizer"])
            self.mixed.load_state_dict(state["scaler"])
            self.work.load_state_dict(state["work"])
            of_loop = state["loop"]
            self.step, self.evaluated = of_loop["step"], of_loop["evaluated"]
            self.skipped, self.metrics = of_loop["skipped"], of_loop["metrics"]
            rows = of_loop["rows"]
            if self.ranks.is_first or found.manifest.ranks == self.ranks.count:
                randomness.put_back(state["random"])
                self._meter.load_state_dict(state["meter"])
            else:  # this rank was not there
                randomness.seed(self.settings.seed + self.ranks.rank + self.step * 1009)
        if self.ranks.is_first:
            self.history.start(rows, total_steps=self.settings.schedule.steps, step=self.step)

    def state(self) -> dict[str, Any]:
        """Everything that decides the rest of the run. Other ranks than the first add what is their own."""
        own = {"random": randomness.take(), "meter": self._meter.state_dict()}
        if not self.ranks.is_first:
            return own
        return {
            **own,
            "model": self.work.model.state_dict(),
            "optimizer": self.work.optimizer.state_dict(),
            "scaler": self.mixed.state_dict(),
            "work": self.work.state_dict(),
            "plan": self._plan(),
            "loop": {
                "step": self.step,
                "evaluated": self.evaluated,
                "skipped": self.skipped,
                "metrics": self.metrics,
                "rows": self.history.rows,
            },
        }

    def _plan(self) -> dict[str, Any]:
        fixed = {
            "schedule": self.settings.schedule.model_dump(),
            "seed": self.settings.seed,
            "clip": self.settings.clip,
        }
        return {**fixed, "precision": self.mixed.name, **self.work.plan()}

    def _check_plan(self, saved: dict[str, Any], where: str) -> None:
        now = self._plan()
        changed = _differences(saved, now)
        if not changed:
            return
        text = f"{where} was made with another plan: {'; '.join(changed)}"
        if not self.settings.accept_changed_plan:
            raise ConfigError(
                f"{text}. Give the same settings, another place for checkpoints (--checkpoint-path; of a job file, its "
                "CheckpointConfig), or --accept-changed-plan to go on so"
            )
        say(f"warning: {text}. Going on with the new one, as --accept-changed-plan says")

    # --- the run

    def run(self) -> None:
        """Until the last step of the schedule. Raises Interrupted when asked to stop; what can be saved then is."""
        model = self._wrapped()
        total = self.settings.schedule.steps
        ahead = Ahead(self.work.batches, self.step, total)
        saved_at = time.monotonic()
        self._meter.start()
        try:
            while True:
                if self._is_evaluation_due() and not self._evaluate(model):
                    self._end_early()
                if self._agreed_stop():
                    self._end_early()
                if self.step >= total:
                    break
                if self._is_save_due(saved_at) and self.checkpoints is not None:
                    self.checkpoints.save(self.step, self.state(), metrics=self.metrics)
                    saved_at, self._save_asked = time.monotonic(), False
                if not self._train(model, ahead):
                    self._end_early()
            self._save_last()
        finally:
            ahead.close()
            self.history.close()

    def _wrapped(self) -> torch.nn.Module:
        model = self.work.model
        if self.settings.compile:
            model.compile()  # in place, so that the names of its parameters stay
        if self.ranks.count > 1:
            ids = [self.ranks.local] if self.device.type == "cuda" else None
            return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
        return model

    def _agreed_stop(self) -> bool:
        """All ranks stop at the same place, or none."""
        return self.ranks.largest(float(self.stop()))[0] > 0

    def _train(self, model: torch.nn.Module, ahead: Ahead[Any]) -> bool:
        """One step. False where a stop came before its end; then nothing of it is left."""
        alone = self.ranks.count == 1
        batches = ahead.next(self.step, self.stop if alone else lambda: False)
        if batches is None:
            return False
        before = randomness.take(quick=True)
        counts = [self.work.count(batch) for batch in batches]
        total = self.ranks.sums(float(sum(counts)))[0]
        if total <= 0:
            raise DataError(f"step {self.step}: nothing in its batches to learn from; check the data and the labels")
        lr = self.settings.schedule.at(self.step)
        for group in self.work.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        losses = torch.zeros((), device=self.device)
        for index, batch in enumerate(batches):
            if self._agreed_stop():
                self.work.optimizer.zero_grad(set_to_none=True)
                randomness.put_back(before)
                return False
            is_last = index + 1 == len(batches)
            with contextlib.nullcontext() if is_last or alone else model.no_sync():  # type: ignore[operator]
                with self.mixed.forward():
                    loss = self.work.loss(model, to_device(batch, self.device))
                losses += loss.detach()
                # DDP averages over ranks what is to be a sum over all of them.
                share = loss * (self.ranks.count / total)
                (share if self.mixed.scaler is None else self.mixed.scaler.scale(share)).backward()
        norm = self._update()
        self.step += 1
        self._meter.add(losses, norm, sum(counts), total)
        self.history.advance(self.step)
        if self.step % self.settings.log_every == 0 or self.step == self.settings.schedule.steps:
            self._log(lr)
        return True

    def _update(self) -> torch.Tensor:
        """Clip and step. Gradients that are not finite change nothing. Returns their norm before clipping."""
        optimizer, scaler = self.work.optimizer, self.mixed.scaler
        if scaler is not None:
            scaler.unscale_(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        limit = self.settings.clip if self.settings.clip is not None else float("inf")
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        if scaler is not None:
            scaler.step(optimizer)
            scaler.update()
        elif all(group.get("fused") for group in optimizer.param_groups):
            # The fused step skips by itself and on the device, so that no step waits for the answer.
            optimizer.grad_scale = None  # type: ignore[attr-defined]
            optimizer.found_inf = (~torch.isfinite(norm)).float().to(self.device)  # type: ignore[attr-defined]
            optimizer.step()
        elif bool(torch.isfinite(norm)):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    def _log(self, lr: float) -> None:
        row = self._meter.row(self.ranks)
        bad = row.pop("bad_steps")
        if bad:
            self.skipped += bad
            say(f"warning: {bad} of the last steps had gradients that are not finite; they changed nothing")
            if bad >= min(MOST_SKIPPED, self.settings.log_every) and self.mixed.scaler is None:
                raise DataError(
                    f"step {self.step}: no gradient was finite for {bad} steps; lower the learning rate "
                    f"({lr:.3g}), or resume from an earlier checkpoint with other data"
                )
        left = self.settings.schedule.steps - self.step
        row = {"step": self.step, "of": self.settings.schedule.steps, **self.work.fields(self.step), **row, "lr": lr}
        row["eta_s"] = round(left * self._meter.seconds_per_step) if self._meter.seconds_per_step else None
        self.history.add(row)

    # --- evaluation

    def _is_evaluation_due(self) -> bool:
        every, total = self.settings.evaluate_every, self.settings.schedule.steps
        is_its_turn = self.step > 0 and (self.step == total or bool(every and self.step % every == 0))
        return is_its_turn and self.evaluated != self.step

    def _evaluate(self, model: torch.nn.Module) -> bool:
        """False where a stop came in between: nothing of it counts."""
        sums: dict[str, list[Any]] = {}
        was_training = self.work.model.training
        self.work.model.eval()
        with self._meter.paused(), randomness.untouched():
            try:
                with torch.no_grad(), self.mixed.forward():
                    for batch in self.work.evaluation(model):
                        if self.stop() and self.ranks.count == 1:
                            return False
                        for name, (value, count) in batch.items():
                            pair = sums.setdefault(name, [0.0, 0.0])
                            pair[0], pair[1] = pair[0] + value, pair[1] + count
                flat = [float(value) for name in sorted(sums) for value in sums[name]]
                flat = self.ranks.sums(*flat)
                self.metrics = {
                    name: flat[2 * index] / flat[2 * index + 1] if flat[2 * index + 1] else float("nan")
                    for index, name in enumerate(sorted(sums))
                }
                if self.ranks.is_first:
                    self.metrics |= self.work.evaluated(self.step, self.metrics)
            finally:
                self.work.model.train(was_training)
        self.evaluated = self.step
        if self.ranks.is_first and self.metrics:
            self.history.add({"step": self.step, **self.work.fields(self.step), **self.metrics})
        return True

    # --- saves

    def _is_save_due(self, saved_at: float) -> bool:
        """By steps or by the clock; put off while the one before is on its way."""
        if self.checkpoints is None or self.step == 0:
            return False
        every, every_s = self.settings.save_every, self.settings.save_every_s
        if every and self.step % every == 0 and self.checkpoints.newest != self.step:
            self._save_asked = True
        if every_s and time.monotonic() - saved_at >= every_s:
            self._save_asked = True
        if not self._is_reserved:  # the states of the optimizer are there now, so their size is known
            self._is_reserved = True
            self.checkpoints.reserve(self.state())
        if self.ranks.count == 1:
            return self._save_asked and self.checkpoints.is_affordable
        wish = float(self._save_asked and self.checkpoints.is_affordable)
        return bool(self.ranks.from_first(wish))

    def _save_last(self) -> None:
        if self.checkpoints is None or self.ranks.from_first(self.checkpoints.newest == self.step):
            return
        self.checkpoints.save(self.step, self.state(), kind="final", metrics=self.metrics, wait=True)

    def _end_early(self) -> NoReturn:
        """Save what can be saved in the time left, and end. Raises Interrupted."""
        if self.checkpoints is None:
            raise self.stop.interrupted("nothing is kept without checkpoints")
        # A signal may have come to one rank alone, and its part may be written before the first rank's is.
        own = self.stop.seconds_left()
        least = -self.ranks.largest(-(math.inf if own is None else own))[0]
        left = None if math.isinf(least) else max(0.0, least - CLEAN_UP_S)
        if not self.stop():
            self.stop.request("the stop of another rank", seconds_left=least)
        fits = self.ranks.from_first(self.checkpoints.fits(left))
        if self.step == 0:
            safe = "no step was done"
        elif self.ranks.from_first(self.checkpoints.newest == self.step and not self.checkpoints.is_busy):
            safe = f"everything up to step {self.step} is saved in {self.checkpoints.folder}"
        else:
            safe = self.checkpoints.save_before_stop(
                self.step,
                self.state(),
                seconds_left=left,
                fits=fits,
                kind="interrupt",
                metrics=self.metrics,
            )
        self.history.close()
        raise self.stop.interrupted(safe)


def _differences(saved: Mapping[str, Any], now: Mapping[str, Any], above: str = "") -> list[str]:
    """`schedule.steps: saved 40, now 60`, for every value that is another one."""
    found: list[str] = []
    for name in sorted({*saved, *now}):
        before, after = saved.get(name), now.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += _differences(before, after, f"{above}{name}.")
        elif before != after:
            found.append(f"{above}{name}: saved {before!r}, now {after!r}")
    return found
