"""How good this attempt's speed was: against the machine's own rate of matrix products, and in dollars."""

from __future__ import annotations

from typing import Any

from embed.config import EmbedConfig
from embed.data.chunks import ModelInfo
from estiba.log import get_logger
from estiba.platform.contract import Job
from estiba.prices import price_of

logger = get_logger(__name__)

LEAST_S = 20.0
"""A shorter attempt says little about its speed, and would spend a notable part of its time on this."""
MEASURE_S = 0.4
MOST_TOKENS = {"cpu": 4_096, "cuda": 65_536}
"""In a product that is measured, by device. A larger --token-budget may be more than any batch of the job had."""


def speed_of(
    config: EmbedConfig, job: Job, model: ModelInfo, *, tokens: int, padded_tokens: int, seconds: float
) -> dict[str, Any]:
    """`tokens` without padding, in the `seconds` of computing; None where it is unknown."""
    tokens_per_s = tokens / seconds if seconds > 0 else 0.0
    price = price_of(job.instance_type)
    needed = 2 * sum(inputs * outputs for inputs, outputs in model.products)
    peak = _peak(config, model) if tokens and needed and seconds >= LEAST_S else None
    dollars = price.usd_per_h / 3600 / tokens_per_s * 1e6 if price is not None and tokens_per_s else None
    return {
        "tokens_per_s": round(tokens_per_s, 1),
        "padding_ratio": round(padded_tokens / tokens, 4) if tokens else None,
        "matrix_gflops": round(needed * tokens_per_s / 1e9, 1) if needed else None,
        "matrix_gflops_peak": None if peak is None else round(peak / 1e9, 1),
        "share_of_peak": None if peak is None else round(needed * tokens_per_s / peak, 3),
        "usd_per_million_tokens": None if dollars is None else round(dollars, 6),
    }


def _peak(config: EmbedConfig, model: ModelInfo) -> float | None:
    """FLOP/s of all devices, measured now that they have nothing else to do."""
    import torch

    from embed.model.peak import MatrixProducts
    from embed.pool import limit_threads

    limit_threads(1)
    engine, _, precision = model.engine.partition(", ")
    try:
        tokens = min(model.token_budget, MOST_TOKENS[model.device.split(":")[0]])
        matrices = MatrixProducts(
            model.products, tokens, engine=engine.split(" ")[0], precision=precision, device=model.device
        )
        rate = matrices.flops_per_s(MEASURE_S)
    except Exception as error:  # a report does not fail the job that it reports on
        logger.info("the machine's peak was not measured: %s: %s", type(error).__name__, error)
        return None
    is_on_all = model.device.startswith("cuda") and config.device in (None, "cuda")
    return rate * (min(config.workers or torch.cuda.device_count(), torch.cuda.device_count()) if is_on_all else 1)
