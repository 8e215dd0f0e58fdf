"""Which checkpoints to keep."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from pydantic import BaseModel, ConfigDict, Field

from estiba.checkpoint.directory import Manifest

LEAST = 2
"""However little is asked to be kept, so many that were read back and verified are."""


class Retention(BaseModel):
    """What is kept beyond the newest two that verify."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    keep_last: int = Field(default=3, ge=LEAST)
    """The newest so many. Three, since a copy to S3 that runs behind may hold the newest only in part."""
    keep_every: int | None = Field(default=None, ge=1)
    """Every checkpoint whose step is a multiple; None keeps none for its step."""
    keep_best: int = Field(default=0, ge=0)
    """The best so many by `metric`."""
    metric: str = "val_loss"
    """Lower is better."""

    def surplus(self, found: Sequence[tuple[str, Manifest]], verified: Collection[str]) -> list[str]:
        """Names that may go. `found` is newest first; `verified` were read back whole since they were written.

        Nothing goes while fewer than two that stay are verified.
        """
        kept = {name for name, _ in found[: self.keep_last]}
        kept |= set([name for name, _ in found if name in verified][:LEAST])
        if self.keep_every is not None:
            kept |= {name for name, manifest in found if manifest.step and manifest.step % self.keep_every == 0}
        scores = [(manifest.metrics.get(self.metric, math.nan), name) for name, manifest in found]
        scored = [(score, name) for score, name in scores if math.isfinite(score)]  # NaN sorts anywhere
        kept |= {name for _, name in sorted(scored)[: self.keep_best]}
        if len(kept & set(verified)) < LEAST:
            return []
        return [name for name, _ in found if name not in kept]
