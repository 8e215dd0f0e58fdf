"""One step of a sharded causal language model, its loss, its evaluation, and what a resume compares."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from estiba.distributed import DistContext
from estiba.training.prefetch import to_device
from estiba.training.task import Sums, TrainTask
from multinode.config import MultinodeConfig
from multinode.data import IGNORED, Batch, Sequences


class CausalTask(TrainTask[Batch]):
    """Next-token prediction. The ranks divide a step's sequences, so their number does not change the step."""

    is_sharded = True

    def __init__(
        self,
        config: MultinodeConfig,
        model: PreTrainedModel,
        training: Sequences,
        validation: Sequences | None,
        *,
        device: torch.device,
        dist: DistContext,
    ) -> None:
        self.config, self.training, self.validation = config, training, validation
        self.model, self.device, self.dist = model.train(), device, dist
        matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
        others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
        groups: list[dict[str, Any]] = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=config.learning_rate,
            betas=(0.9, config.beta2),
            weight_decay=config.weight_decay,
        )
        self.flops_per_unit = 6.0 * sum(parameter.numel() for parameter in model.parameters())

    def batches(self, step: int) -> Sequence[Batch]:
        config = self.config
        return self._share(self.training, self.training.step(step, config.global_batch_size))

    def _share(self, sequences: Sequences, indices: Sequence[int]) -> list[Batch]:
        """This rank's micro-batches. All ranks have as many, since they gather each layer's weights together."""
        size = self.config.batch_size
        own = indices[self.dist.rank :: self.dist.world_size]
        most = -(-len(indices) // self.dist.world_size)
        return [sequences.batch(own[start : start + size], size) for start in range(0, most, size)]

    def units_in(self, batch: Batch) -> int:
        return int((batch.labels_BT != IGNORED).sum())

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        logits_BTV = model(input_ids=batch.inputs_BT, use_cache=False).logits
        # In double precision, so that the sum does not depend on how the ranks divide it.
        losses = cross_entropy(logits_BTV.flatten(0, 1).float(), batch.labels_BT.flatten(), reduction="none")
        return losses.double().sum()

    def evaluate(self, model: torch.nn.Module) -> Iterator[Sums]:
        if self.validation is None:
            return
        for batch in self._share(self.validation, range(len(self.validation))):
            count = self.units_in(batch)
            yield {"val_loss": (self.loss(model, to_device(batch, self.device)), count)}

    def log_fields(self, step: int) -> Mapping[str, Any]:
        return {"epoch": round(step * self.config.global_batch_size / len(self.training), 3)}

    # --- checkpoints

    def run_fingerprint(self) -> Mapping[str, Any]:
        config = self.config
        return {
            "data": self.training.identity,
            "global_batch_size": config.global_batch_size,
            "weight_decay": config.weight_decay,
            "beta2": config.beta2,
        }

    def model_state(self) -> Mapping[str, torch.Tensor]:
        """Tied weights once, and no buffers that are computed."""
        persistent = self.model.state_dict()
        buffers = {name: buffer for name, buffer in self.model.named_buffers() if name in persistent}
        return {**dict(self.model.named_parameters()), **buffers}

    @torch.no_grad()
    def load_model_state(self, state: Mapping[str, torch.Tensor]) -> None:
        own = self.model_state()
        for name, tensor in state.items():
            own[name].copy_(tensor)
