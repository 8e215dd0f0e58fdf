"""Which engine computes the vectors: OpenVINO on a CPU, and on a GPU torch without padding, where they give the
vectors of torch with padding; otherwise that.

The choice depends on the model, the kind of CPU and the first texts of the input, and never on which rows an earlier
attempt has finished: a job that was stopped ends with the bytes of one that was not.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from embed.config import EmbedConfig
from embed.model.forward import Engine, InFlight, is_out_of_memory
from embed.model.openvino import (
    EngineError,
    NotConvertible,
    OpenVinoEngine,
    has_bfloat16,
    is_bfloat16_faster,
    is_installed,
)
from embed.model.samples import WIDTHS
from embed.model.tokens import Features
from embed.model.varlen import NotVarlen, VarlenEngine, attention_here
from estiba.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

LEAST_COSINE = {"float32": 0.9999, "bfloat16": 0.9999, "int8": 0.95}
MOST_OFF_LENGTH = {"float32": 0.01, "bfloat16": 0.01, "int8": 0.2}
"""What a vector may differ from that of torch in float32, by the precision of the products: its direction, and its
length relative to torch's. An engine that differs by more is not used."""
LEAST_COSINE_IN_HALF = 0.999
"""Where torch itself computes in half precision: two orders of the same sums differ by about this."""


class Engines:
    """The engines of one model. `reference` is torch; its vectors are right by definition."""

    def __init__(
        self,
        config: EmbedConfig,
        reference: Engine,
        samples: list[Features],
        row_of_width: Callable[[int], Features],
        digest: str,
        why_not: str,
        calibration: Sequence[Features] = (),
    ) -> None:
        """Choose the fastest engine that the settings allow and that agrees with torch on the samples.

        samples: the batches to compare; the model is converted with the first one
        row_of_width: makes a batch of one row with as many tokens
        digest: that of the model's files
        why_not: why OpenVINO cannot run the model, if that is known
        calibration: batches of texts as the input's, for products in int8

        Raises ConfigError if the settings ask for OpenVINO and it cannot be used.
        """
        self._config, self._samples, self._row_of_width, self._digest = config, samples, row_of_width, digest
        self.reference, self._calibration = reference, calibration
        self._why_not = why_not or _why_not(reference, config.dtype)
        if self._why_not:
            self._refuse_if_asked_for(config.dtype, self._why_not)
        if self._why_not and config.engine == "auto" and reference.device.type == "cpu":
            logger.info("torch computes this model, and not OpenVINO: %s", self._why_not)
        self._precisions, self._runnable = ["float32"], ["float32"]
        if config.dtype in ("auto", "int8") and not self._why_not and has_bfloat16():
            self._runnable.append("bfloat16")
            if is_bfloat16_faster():
                self._precisions.insert(0, "bfloat16")
        if config.dtype == "int8":
            self._precisions.insert(0, "int8")
            self._runnable.append("int8")
        self._use(self._without_padding(samples) or self._agreeing(self._precisions, samples))

    def _use(self, engine: Engine) -> None:
        self._best = engine
        self._of_width: dict[int, Engine] = {}

    @property
    def best(self) -> Engine:
        """The one that was chosen for the job; windows with longer rows than it can compute have another one."""
        return self._best

    def for_width(self, width: int) -> Engine:
        """The engine for windows whose longest row has `width` tokens: a traced model may be right for some only.

        Widths are judged together up to a power of two, on a sample that does not depend on the window.
        """
        if width <= max(WIDTHS) or self._best is self.reference:
            return self._best
        width = 1 << (width - 1).bit_length()
        if width not in self._of_width:
            sample = [self._row_of_width(width)]
            engine = self._best
            if not self._agrees(engine, sample):
                engine = self._agreeing([] if engine.is_exact else ["float32"], sample)
            self._of_width[width] = engine
        return self._of_width[width]

    def continue_with(self, earlier: Mapping[str, Any]) -> None:
        """Use the engine that computed the rows of an earlier attempt, if the settings allow it and it runs here."""
        if self._config.engine != "auto":
            return
        kind, precision = str(earlier.get("engine", "")).split(" ")[0], earlier.get("dtype")
        if (kind, precision) == (self._best.kind, self._best.precision):
            return
        if (kind, precision) == (self.reference.kind, self.reference.precision):
            self._use(self.reference)
        elif kind == OpenVinoEngine.kind and precision in self._runnable:
            self._use(self._agreeing([precision, *self._precisions], self._samples))
        else:
            return
        logger.info("continuing with %s in %s, as the saved rows", self._best.version, self._best.precision)

    def _without_padding(self, batches: list[Features]) -> Engine | None:
        """Torch over rows without padding, if this GPU and the model can do that and the vectors are the same."""
        if self._config.engine != "auto" or not batches:
            return None
        try:
            attention = attention_here(self.reference.device, self.reference.dtype)
            if attention is None:
                return None
            engine = VarlenEngine(self.reference, *attention)
            return engine if self._agrees(engine, batches) else None
        except NotVarlen as error:
            reason = str(error)
        except Exception as error:  # of kernels that do not know this GPU, or of a model's own code
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        logger.info("rows are padded on %s: %s", self.reference.device, reason)
        return None

    def _agreeing(self, precisions: Iterable[str], batches: list[Features]) -> Engine:
        """The first OpenVINO engine that agrees with torch on the batches; otherwise torch.

        Raises ConfigError instead if the settings ask for OpenVINO.
        """
        if self._config.engine == "torch" or self._why_not:
            return self.reference
        for precision in precisions:
            try:
                engine = OpenVinoEngine(self.reference, self._samples[0], self._digest, precision, self._calibration)
            except NotConvertible as error:
                self._refuse_if_asked_for(precision, str(error))
                logger.info("torch computes this model, and not OpenVINO: %s", error)
                return self.reference
            if self._agrees(engine, batches):
                return engine
            del engine  # before the next one is loaded
        if self._config.engine == "openvino":
            raise ConfigError(
                "--engine openvino: it gives other vectors than torch for this model; pass --engine torch"
            )
        return self.reference

    def _refuse_if_asked_for(self, precision: str, why_not: str) -> None:
        if precision == "int8":
            raise ConfigError(f"--dtype int8: {why_not}; pass --dtype auto")
        if self._config.engine == "openvino":
            raise ConfigError(f"--engine openvino: {why_not}; pass --engine auto or torch")

    def _agrees(self, engine: Engine, batches: list[Features]) -> bool:
        """Whether the engine's vectors are torch's; says why if they are not."""
        try:
            lowest = min((_lowest_cosine(engine, self.reference, batch) for batch in batches), default=1.0)
        except EngineError as error:
            logger.warning("%s cannot compute this model at every length: %s", engine.version, error)
            return False
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            logger.info("%s is not used: its comparison with torch does not fit in memory", engine.version)
            engine.free()
            return False  # torch makes batches smaller and names the row that does not fit
        is_half = self.reference.dtype != torch.float32
        least = LEAST_COSINE_IN_HALF if is_half else LEAST_COSINE[engine.precision]
        if lowest >= least:
            return True
        # That a model needs more than bfloat16 is no fault.
        logger.log(
            logging.INFO if engine.precision == "bfloat16" else logging.WARNING,
            "%s in %s gives other vectors than torch in %s (lowest cosine %.6f, and at least %s is needed); it is "
            "not used", engine.version, engine.precision, self.reference.precision, lowest, least,
        )  # fmt: skip
        return False


def _why_not(reference: Engine, dtype: str) -> str:
    """Why OpenVINO cannot take the place of this engine; empty if it can."""
    if reference.device.type != "cpu":
        return f"it computes on a CPU, and the device is {reference.device}"
    if reference.dtype != torch.float32:
        return f"it does not take weights in {str(reference.dtype).removeprefix('torch.')}"
    if not is_installed():
        return "the package openvino is not installed"
    if dtype == "int8" and not is_installed("nncf"):
        return "the package nncf is not installed"
    try:
        has_bfloat16()
    except Exception as error:  # a library that does not load, or no plugin for this CPU
        return f"openvino does not start ({type(error).__name__}: {error})"
    return ""


def _lowest_cosine(engine: Engine, reference: Engine, batch: Features) -> float:
    """Over the rows of which torch has a valid vector; one that is not finite or has another length counts as -1."""
    rows = np.arange(len(batch["input_ids"]))
    actual_BD, expected_BD = (each.launch(batch, rows).wait() for each in (engine, reference))
    valid = ~reference.invalid(expected_BD)
    actual_BD, expected_BD = actual_BD[valid].astype(np.float64), expected_BD[valid].astype(np.float64)
    with np.errstate(all="ignore"):
        actual, expected = np.linalg.norm(actual_BD, axis=1), np.linalg.norm(expected_BD, axis=1)
        cosines = (actual_BD * expected_BD).sum(axis=1) / (actual * expected)
        cosines[np.abs(actual / expected - 1) > MOST_OFF_LENGTH.get(engine.precision, 0.01)] = -1
    return float(np.nan_to_num(cosines, nan=-1.0).min(initial=1.0))


def vectors_of(engine: Engine, batch: InFlight) -> np.ndarray:
    """float32[B, D]. Raises DataError if the engine cannot compute the batch."""
    try:
        return batch.wait()
    except EngineError as error:
        raise DataError(f"{engine.version} cannot compute a batch ({error}); pass --engine torch") from error
