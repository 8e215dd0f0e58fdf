"""The last tier: all trials as one tensor on the device, where a batch is a gather.

    resident = Resident.load(trials, device, limit_bytes=free_bytes)     # None where they do not fit
    batch = resident.batch(step)                                        # as trials.batch(step), features on the device

The whole study is 15.5 GB in float32, half of that in float16 or bfloat16.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from brain_to_text.data import Batch, Trials, describe
from estiba.errors import ConfigError, DataError

LOADED_AT_ONCE = 64


class Resident:
    """Trials that are on a device. Shapes: N time steps of all trials, C features, B, T as in Batch."""

    def __init__(self, trials: Trials, flat: torch.Tensor, starts: Sequence[int], lengths: Sequence[int]) -> None:
        self.trials = trials
        self._flat = flat
        self._starts = torch.tensor(starts, device=flat.device)
        self._lengths = torch.tensor(lengths, device=flat.device)
        self._host_lengths = np.asarray(lengths, np.int64)

    @property
    def size_bytes(self) -> int:
        return self._flat.numel() * self._flat.element_size()

    @classmethod
    def load(
        cls, trials: Trials, device: torch.device, *, limit_bytes: int, dtype: torch.dtype = torch.float32
    ) -> Resident | None:
        """Read every trial once and keep it there; None where that is more than `limit_bytes`.

        Raises what reading raises, also where bad trials are left out otherwise: it is known then which to name.
        """
        lengths = [trials.steps_stored(position) for position in range(trials.n_trials)]
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).tolist()
        total, width = int(np.sum(lengths)), trials.width
        if total * width * dtype.itemsize > limit_bytes:
            return None
        flat = torch.empty(total, width, dtype=dtype, device=device)
        positions = list(range(trials.n_trials))
        groups = [positions[at : at + LOADED_AT_ONCE] for at in range(0, len(positions), LOADED_AT_ONCE)]
        for group, batch in zip(groups, trials.read_all(groups), strict=True):
            if len(batch.trial) != len(group):
                raise DataError(
                    f"{trials.bad[-1]}: trials that cannot be read cannot be left out of the device's tier; switch it "
                    "off, or mend the trial"
                )
            for row, position in enumerate(group):
                start, length = starts[position], lengths[position]
                flat[start : start + length].copy_(batch.features[row, :length])
        return cls(trials, flat, starts, lengths)

    def batch(self, step: int) -> Batch:
        """The plan's batch of `step`; features float32 on the device, the rest as `Trials.batch` gives it."""
        if self.trials.plan is None:
            raise ConfigError("only the training split has a plan of batches; use read()")
        return self.read(self.trials.plan.trials(step).tolist())

    def read(self, ids: Sequence[int]) -> Batch:
        """These trials, in this order."""
        ids = list(ids)
        longest = int(self._host_lengths[ids].max())
        chosen = torch.tensor(ids).to(self._flat.device, non_blocking=True)
        within = torch.arange(longest, device=self._flat.device)
        is_real = within[None, :] < self._lengths[chosen][:, None]
        places = (self._starts[chosen][:, None] + within[None, :]).masked_fill(~is_real, 0)
        features = self._flat[places].to(torch.float32).masked_fill_(~is_real[:, :, None], 0.0)
        said = describe([self.trials.known[position] for position in ids])
        return dataclasses.replace(said, features=features)
