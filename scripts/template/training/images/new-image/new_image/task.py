"""One step, its loss, its evaluation, and what a resume compares."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from estiba.distributed import DistContext
from estiba.training.task import Sums, TrainTask
from new_image.config import TextConfig
from new_image.data import Batch, Text
from new_image.model import ByteModel


class LanguageTask(TrainTask[Batch]):
    """Next-byte prediction."""

    unit = "bytes"

    def __init__(self, config: TextConfig, text: Text, device: torch.device, dist: DistContext) -> None:
        torch.manual_seed(config.seed)
        self.config, self.text, self.device, self.dist = config, text, device, dist
        self.model = ByteModel(config.hidden_size, config.dropout).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=config.learning_rate)

    def batches(self, step: int) -> Sequence[Batch]:
        return [self.text.batch(step, self.dist.rank, self.config.batch_size)]

    def units_in(self, batch: Batch) -> int:
        return batch[:, 1:].numel()

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        logits_BTV = model(batch[:, :-1])
        return cross_entropy(logits_BTV.flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="sum")

    def evaluate(self, model: torch.nn.Module) -> Iterator[Sums]:
        for batch in self.text.validation()[self.dist.rank :: self.dist.world_size]:
            batch = batch.to(self.device)
            yield {"val_loss": (self.loss(model, batch), self.units_in(batch))}

    def run_fingerprint(self) -> Mapping[str, Any]:
        config = self.config
        return {
            "text": self.text.digest,
            "batch_size": config.batch_size,
            "seq_length": config.seq_length,
            "hidden_size": config.hidden_size,
            "dropout": config.dropout,
        }
