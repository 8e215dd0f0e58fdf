"""Pretraining as a trainer task: batches, loss, evaluation, and the task's part of a checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from aura.artifacts.sample import sample, sample_line
from aura.config import AuraConfig
from aura.data.corpus import Corpus
from aura.model.decoder import Aura
from aura.model.optimizer import make_optimizer
from aura.resolve import ResolvedConfig
from aura.tokenizer.loading import Tokenizer
from estiba.log import get_logger
from estiba.training.fingerprint import DETAILS
from estiba.training.task import Sums, TrainTask

logger = get_logger(__name__)


EVAL_BATCH = 8
"""Windows in a batch of --eval-batches."""


class PretrainingTask(TrainTask[torch.Tensor]):
    """Next-token prediction on windows of packed text. A batch is int64[B, T + 1]."""

    unit = "tokens"
    fixed_settings = frozenset({"tokenizer", "optimizer"}) | {
        f"model.{name}" for name in ("vocab_size", "embed_size", "num_layers", "num_heads", "ff_size", "tie_embeddings")
    }

    def __init__(
        self,
        config: AuraConfig,
        resolved: ResolvedConfig,
        corpus: Corpus,
        tokenizer: Tokenizer,
        *,
        device: torch.device,
        rank: int,
        origin: str | None,
        settings: Mapping[str, Any],
        total_steps: int,
    ) -> None:
        """`origin` identifies the --resume-from checkpoint, so that an interrupted run recognises its checkpoints.

        `settings` are those of `saved_settings.settings_of`, for a resume that is not given them.
        """
        self.settings, self.total_steps = settings, total_steps
        self.config, self.resolved, self.corpus, self.tokenizer = config, resolved, corpus, tokenizer
        self.rank, self.device, self.origin = rank, device, origin
        self.aura = Aura(resolved.model, seed=config.seed, checkpointing=resolved.checkpointing).to(device)
        self.model = self.aura
        self.optimizer = make_optimizer(
            self.aura, config.optimizer, lr=resolved.learning_rate, weight_decay=resolved.weight_decay, device=device
        )
        self.flops_per_unit = resolved.model.flops_per_token()
        self.samples: list[list[Any]] = []
        """[step, text] for every evaluation."""

    def batches(self, step: int) -> Sequence[torch.Tensor]:
        count = self.resolved.batch_size * self.resolved.accumulation_steps
        first = step * self.resolved.sequences_per_step + self.rank * count
        return self.corpus.train.take(first, count).split(self.resolved.batch_size)

    def units_in(self, batch: torch.Tensor) -> int:
        return batch.shape[0] * (batch.shape[1] - 1)

    def loss(self, model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = model(batch[:, :-1], batch[:, 1:])
        return loss

    def evaluate(self, model: torch.nn.Module) -> Iterator[Sums]:
        del model  # DDP's wrapper would wait for ranks that have fewer batches
        size, windows = self.resolved.batch_size, self.corpus.validation
        count = min(len(windows), self.config.eval_batches * EVAL_BATCH)  # the same for every micro-batch
        for first in range(self.rank * size, count, self.resolved.world_size * size):
            batch = windows.take(first, min(size, count - first)).to(self.device)
            yield {"val_loss": (self.aura.loss(batch[:, :-1], batch[:, 1:]), self.units_in(batch))}

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> Mapping[str, float]:
        del metrics
        prompt, max_new_tokens = self.config.sample_prompt, self.config.sample_tokens
        if prompt:
            text = sample(self.aura, self.tokenizer, prompt, max_new_tokens=max_new_tokens)
            self.samples.append([step, text])
            logger.info(sample_line(step, text))
        return {}

    def epoch_ending_at(self, step: int) -> float | None:
        """Epoch e ends with step int(e * windows / sequences per step), as the schedule counts; the run's end too."""
        windows, size = len(self.corpus.train), self.resolved.sequences_per_step
        epoch = -(-step * size // windows)
        if epoch >= 1 and epoch * windows < (step + 1) * size:
            return epoch
        return round(step * size / windows, 4) if step == self.total_steps else None

    def log_fields(self, step: int) -> Mapping[str, Any]:
        return {"epoch": round(step * self.resolved.sequences_per_step / len(self.corpus.train), 4)}

    def run_fingerprint(self) -> Mapping[str, Any]:
        return {
            "data": self.corpus.identity,
            "tokenizer": self.tokenizer.identity,
            "sequences_per_step": self.resolved.sequences_per_step,
            "model": dataclasses.asdict(self.resolved.model),
            "optimizer": self.config.optimizer,
            "weight_decay": self.resolved.weight_decay,
            DETAILS: {
                "documents": self.corpus.stats.documents,
                "train_tokens": self.corpus.stats.train_tokens,
                "validation_tokens": self.corpus.stats.validation_tokens,
                "text_bytes": self.corpus.stats.text_bytes,
                "validation_split": self.config.validation_split,
                "seq_length": self.resolved.model.seq_length,
            },
        }

    def state_dict(self) -> dict[str, Any]:
        return {"origin": self.origin, "samples": self.samples, "settings": dict(self.settings)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.samples = state["samples"]
