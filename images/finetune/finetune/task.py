"""Fine-tuning as a trainer task: micro-batches, loss, evaluation by column, and what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from estiba.distributed import DistContext
from estiba.training.prefetch import to_device
from estiba.training.task import Sums, TrainTask
from finetune.answers import Answer
from finetune.config import FinetuneConfig
from finetune.inputs import Inputs
from finetune.model.adapters import load_trainable_state, trainable_state
from finetune.model.forward import token_losses
from finetune.model.optimizer import make_optimizer
from finetune.tokens.examples import NO_COLUMN, Example, PackedBatch, pack


class FinetuneTask(TrainTask[PackedBatch]):
    """Next-token prediction of the answers, averaged over trained tokens."""

    unit = "tokens"

    def __init__(
        self,
        config: FinetuneConfig,
        model: torch.nn.Module,
        inputs: Inputs,
        *,
        device: torch.device,
        dist: DistContext,
    ) -> None:
        self.config, self.model, self.inputs, self.device, self.dist = config, model, inputs, device, dist
        self.train, self.validation = inputs.training, inputs.validation
        self.use_varlen = False
        self.optimizer = make_optimizer(
            model.parameters(),
            config.optimizer,
            lr=config.resolved_learning_rate(),
            weight_decay=config.weight_decay,
            device=device,
        )
        self.records_per_step = config.batch_size * config.gradient_accumulation_steps * dist.world_size
        self.before: list[Answer] = []
        """Answers to held-out questions before training."""
        self.losses_before: dict[str, float] = {}
        """Held-out losses before training, by the name of their metric."""
        self._order: dict[int, np.ndarray] = {}

    def batches(self, step: int) -> Sequence[PackedBatch]:
        size, count = self.config.batch_size, self.config.gradient_accumulation_steps
        first = step * self.records_per_step + self.dist.rank * size * count
        drawn = [self._drawn(position) for position in range(first, first + size * count)]
        return [pack(drawn[start : start + size], use_varlen=self.use_varlen) for start in range(0, size * count, size)]

    def units_in(self, batch: PackedBatch) -> int:
        return len(batch.targets)

    def loss(self, model: torch.nn.Module, batch: PackedBatch) -> torch.Tensor:
        return token_losses(model, batch).sum()

    def evaluate(self, model: torch.nn.Module) -> Iterator[Sums]:
        del model  # DDP's wrapper would wait for ranks that have fewer batches
        yield from self._held_out_sums(self.model, self.dist.rank, self.dist.world_size)

    def held_out_losses(self, model: torch.nn.Module) -> dict[str, float]:
        """Return a model's loss on the held-out records, and by column: what `evaluate` logs, on this rank alone."""
        totals: dict[str, list[float]] = {}
        was_training = model.training
        model.eval()
        with torch.no_grad():
            for sums in self._held_out_sums(model, 0, 1):
                for name, (total, count) in sums.items():
                    known = totals.setdefault(name, [0.0, 0.0])
                    known[0], known[1] = known[0] + float(total), known[1] + count
        model.train(was_training)
        return {name: total / count for name, (total, count) in totals.items()}

    def _held_out_sums(self, model: torch.nn.Module, rank: int, ranks: int) -> Iterator[Sums]:
        """Yield the sums of every `ranks`-th batch of the evaluation."""
        size, examples = self.config.batch_size, self.validation.examples[: self.config.eval_records]
        for start in range(rank * size, len(examples), size * ranks):
            batch = to_device(pack(examples[start : start + size], use_varlen=self.use_varlen), self.device)
            losses = token_losses(model, batch)
            sums: dict[str, tuple[float | torch.Tensor, float]] = {"val_loss": (losses.sum(), len(losses))}
            for column in batch.columns.unique().tolist():
                if column != NO_COLUMN:
                    chosen = losses[batch.columns == column]
                    sums[self.column_metric(column)] = (chosen.sum(), len(chosen))
            yield sums

    def column_metric(self, column: int) -> str:
        """Return the name of a column's held-out loss."""
        return "val_loss." + "".join(letter if letter.isalnum() else "_" for letter in self.inputs.columns[column - 1])

    def log_fields(self, step: int) -> Mapping[str, Any]:
        return {"epoch": round(step * self.records_per_step / len(self.train.examples), 4)}

    def run_fingerprint(self) -> Mapping[str, Any]:
        config = self.config
        names = (
            "batch_size",
            "gradient_accumulation_steps",
            "optimizer",
            "weight_decay",
            "method",
            "neftune_alpha",
            "share_trunks",
        )
        adapters = ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "rslora", "dora", "double_quantization")
        own = {name: getattr(config, name) for name in (*names, *(adapters if config.method != "full" else ()))}
        if own.get("lora_targets"):
            own["lora_targets"] = list(own["lora_targets"])
        return {**self.inputs.identity(), **own, "records_per_step": self.records_per_step}

    def model_state(self) -> Mapping[str, torch.Tensor]:
        return trainable_state(self.model)

    def load_model_state(self, state: Mapping[str, torch.Tensor]) -> None:
        load_trainable_state(self.model, state)

    def state_dict(self) -> dict[str, Any]:
        return {"before": [asdict(answer) for answer in self.before], "losses_before": self.losses_before}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.before = [Answer(**answer) for answer in state["before"]]
        self.losses_before = dict(state["losses_before"])

    def _drawn(self, position: int) -> Example:
        """Return the example at a position of the run: each epoch is its own permutation of all examples."""
        epoch, index = divmod(position, len(self.train.examples))
        if epoch not in self._order:
            self._order = {key: order for key, order in self._order.items() if key >= epoch - 1}
            self._order[epoch] = np.random.default_rng((self.config.seed, epoch)).permutation(len(self.train.examples))
        return self.train.examples[self._order[epoch][index]]
