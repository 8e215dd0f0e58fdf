"""Which checkpoints to keep."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from pydantic import BaseModel, ConfigDict, Field

from estiba.checkpoint.format import Manifest

MIN_VERIFIED = 2
"""At least this many checkpoints that were read back and verified are kept, whatever the settings."""


class Retention(BaseModel):
    """Which checkpoints are kept besides the newest two that verify."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    keep_last: int = Field(default=3, ge=MIN_VERIFIED)
    """How many of the newest to keep. Three, since a lagging sync to S3 may have only part of the newest."""
    keep_every: int | None = Field(default=None, ge=1)
    """Also every checkpoint whose step is a multiple of this; None: no such rule."""
    keep_best: int = Field(default=0, ge=0)
    """Also this many of the best by `metric`."""
    metric: str = "val_loss"
    """Lower is better."""

    def surplus(self, checkpoints: Sequence[tuple[str, Manifest]], verified: Collection[str]) -> list[str]:
        """Return the names to delete. `checkpoints` is newest first; those in `verified` were read back.

        Nothing is deleted unless at least two of the kept ones are verified.
        """
        kept = {name for name, _ in checkpoints[: self.keep_last]}
        kept |= set([name for name, _ in checkpoints if name in verified][:MIN_VERIFIED])
        if self.keep_every is not None:
            kept |= {name for name, manifest in checkpoints if manifest.step and manifest.step % self.keep_every == 0}
        scores = [(manifest.metrics.get(self.metric, math.nan), name) for name, manifest in checkpoints]
        scored = [(score, name) for score, name in scores if math.isfinite(score)]  # NaN has no order
        kept |= {name for _, name in sorted(scored)[: self.keep_best]}
        if len(kept & set(verified)) < MIN_VERIFIED:
            return []
        return [name for name, _ in checkpoints if name not in kept]
