"""A model on a device, and loaded again where that device or its precision cannot compute a row."""

from __future__ import annotations

import logging

import torch

from embed.config import EmbedConfig
from embed.model import loading
from embed.model.batches import default_token_budget
from embed.model.forward import Engine
from embed.model.heads import Heads

logger = logging.getLogger(__name__)


class EngineLoader:
    """Loads a model's files by torch. The engines that it falls back to are loaded once."""

    def __init__(self, files: loading.ModelFiles, config: EmbedConfig, heads: Heads) -> None:
        self._files, self._config, self._heads = files, config, heads
        self._loaded: dict[str, Engine] = {}

    def load(self, device: torch.device, dtype: torch.dtype) -> Engine:
        config = self._config
        model = loading.load(self._files, device=str(device), dtype=dtype, trust_remote_code=config.trust_remote_code)
        memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
        budget = config.token_budget or default_token_budget(device.type, memory)
        width = config.dimensions or model.truncate_dim
        return Engine(
            model, device, dtype, token_budget=budget, normalize=config.normalize, dimensions=width,
            heads=self._heads.of(model, device, dtype),
        )  # fmt: skip

    def float32(self, engine: Engine) -> Engine:
        """The model loaded again from its files, with exact weights; on the CPU if the device cannot hold both."""
        if "float32" not in self._loaded:
            try:
                exact = self.load(engine.device, torch.float32)
                exact.token_budget = max(1, exact.token_budget // 4)  # twice the bytes per token, and two models
                self._loaded["float32"] = exact
            except torch.OutOfMemoryError:
                dtype = str(engine.dtype).removeprefix("torch.")
                logger.warning(
                    "the model in float32 does not fit on %s beside the %s one; using the CPU", engine.device, dtype
                )
        return self._loaded.get("float32") or self.cpu(engine)

    def cpu(self, engine: Engine) -> Engine:
        if engine.device.type == "cpu" and engine.dtype == torch.float32:
            return engine
        if "cpu" not in self._loaded:
            self._loaded["cpu"] = self.load(torch.device("cpu"), torch.float32)
        return self._loaded["cpu"]

    def forget(self) -> None:
        """Let go of the engines that were fallen back to."""
        self._loaded.clear()
