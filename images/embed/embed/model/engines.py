"""Which engine computes the vectors: OpenVINO on a CPU where it gives torch's vectors, otherwise torch."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from embed.config import EmbedConfig
from embed.model.forward import Engine
from embed.model.openvino import EngineError, NotConvertible, OpenVinoEngine, has_bfloat16, is_installed
from embed.model.tokens import Features
from estiba.errors import ConfigError

logger = logging.getLogger(__name__)

LEAST_COSINE = 0.9999
MOST_OFF_LENGTH = 0.01
"""What a vector may differ from that of torch in float32: its direction, and its length relative to torch's. An engine
that differs by more is not used."""


class Engines:
    """The engines of one model. `reference` is torch; its vectors are right by definition."""

    def __init__(self, config: EmbedConfig, reference: Engine, sample: Features, digest: str, why_not: str) -> None:
        """`sample` is a batch to convert the model with; `why_not` says why OpenVINO cannot run it, if that is known.

        Raises ConfigError if the settings ask for OpenVINO and it cannot be used.
        """
        self._config, self._sample, self._digest = config, sample, digest
        self.reference = reference
        self.why_not = self._why_not(reference) or why_not
        if config.engine == "openvino" and self.why_not:
            raise ConfigError(f"--engine openvino: {self.why_not}; pass --engine auto or torch")

    def _why_not(self, reference: Engine) -> str:
        if reference.device.type != "cpu":
            return f"it computes on a CPU, and the device is {reference.device}"
        if reference.dtype != torch.float32:
            return f"it does not take weights in {str(reference.dtype).removeprefix('torch.')}"
        if not is_installed():
            return "the package openvino is not installed"
        try:
            has_bfloat16()
        except Exception as error:  # a library that does not load, or no plugin for this CPU
            return f"openvino does not start ({type(error).__name__}: {error})"
        return ""

    def best(self) -> Engine:
        """The fastest engine that the settings allow and that agrees with torch on the sample."""
        if self.why_not and self._config.engine == "auto" and self.reference.device.type == "cpu":
            logger.info("torch computes this model, and not OpenVINO: %s", self.why_not)
        if self._config.engine == "torch" or self.why_not:
            return self.reference
        is_half_allowed = self._config.dtype == "auto" and has_bfloat16()
        return self.agreeing(["bfloat16", "float32"] if is_half_allowed else ["float32"], [self._sample])

    def agreeing(self, precisions: Iterable[str], batches: list[Features]) -> Engine:
        """The first OpenVINO engine that agrees with torch on the batches; otherwise torch.

        Raises ConfigError instead if the settings ask for OpenVINO: a resume shall not find another engine.
        """
        for precision in precisions:
            try:
                engine = OpenVinoEngine(self.reference, self._sample, self._digest, precision)
            except NotConvertible as error:
                if self._config.engine == "openvino":
                    raise ConfigError(f"--engine openvino: {error}; pass --engine auto or torch") from error
                logger.info("torch computes this model, and not OpenVINO: %s", error)
                return self.reference
            if self.agrees(engine, batches):
                return engine
        if self._config.engine == "openvino":
            raise ConfigError(
                "--engine openvino: it gives other vectors than torch for this model; pass --engine torch"
            )
        return self.reference

    def agrees(self, engine: Engine, batches: list[Features]) -> bool:
        """Whether the engine's vectors are torch's; says why if they are not."""
        try:
            lowest = min((_lowest_cosine(engine, self.reference, batch) for batch in batches), default=1.0)
        except EngineError as error:
            logger.warning("%s cannot compute this model at every length: %s", engine.version, error)
            return False
        if lowest >= LEAST_COSINE:
            return True
        # That a model needs more than bfloat16 is no fault.
        logger.log(
            logging.WARNING if engine.is_exact else logging.INFO,
            "%s in %s gives other vectors than torch in float32 (lowest cosine %.6f, and at least %s is needed); it is "
            "not used", engine.version, engine.precision, lowest, LEAST_COSINE,
        )  # fmt: skip
        return False

    def of_earlier(self, current: Engine, earlier: Mapping[str, Any]) -> Engine:
        """The engine that computed the rows of an earlier attempt, if it runs here; otherwise the current one."""
        if self._config.engine != "auto":
            return current
        kind, precision = str(earlier.get("engine", "")).split(" ")[0], earlier.get("dtype")
        if kind == current.kind and precision == current.precision:
            return current
        if kind == self.reference.kind and precision == self.reference.precision:
            return self.reference
        if kind == OpenVinoEngine.kind and precision == "float32" and not self.why_not:
            return self.agreeing(["float32"], [self._sample])
        return current


def _lowest_cosine(engine: Engine, reference: Engine, batch: Features) -> float:
    """Over the rows of which torch has a valid vector; one that is not finite or has another length counts as -1."""
    rows = np.arange(len(batch["input_ids"]))
    actual_BD, expected_BD = (each.launch(batch, rows).wait() for each in (engine, reference))
    valid = ~reference.invalid(expected_BD)
    actual_BD, expected_BD = actual_BD[valid].astype(np.float64), expected_BD[valid].astype(np.float64)
    with np.errstate(all="ignore"):
        actual, expected = np.linalg.norm(actual_BD, axis=1), np.linalg.norm(expected_BD, axis=1)
        cosines = (actual_BD * expected_BD).sum(axis=1) / (actual * expected)
        cosines[np.abs(actual / expected - 1) > MOST_OFF_LENGTH] = -1
    return float(np.nan_to_num(cosines, nan=-1.0).min(initial=1.0))
