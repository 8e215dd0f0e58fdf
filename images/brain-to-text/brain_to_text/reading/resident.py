"""The tier above memory: all trials as one tensor on the device, where a batch is a gather.

    resident = Resident(lengths, 512, device=device, dtype=torch.float32)
    resident.put(trial, features_TC)          # as each trial comes by for the first time
    features_BTC = resident.gather(ids, length=1024)

The whole study is 15.5 GB in float32 and half of that in float16, so an H100 or, in float16, a card of 24 GB holds it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


class Resident:
    """Trials on a device. Shapes: N time steps of all trials, C features, B trials of T time steps."""

    def __init__(self, lengths: Sequence[int], width: int, *, device: torch.device, dtype: torch.dtype) -> None:
        """`lengths`: time steps of every trial. Raises torch's OutOfMemoryError where they do not fit."""
        self._lengths = np.asarray(lengths, np.int64)
        self._starts = np.cumsum(self._lengths) - self._lengths
        self._is_there = np.zeros(len(self._lengths), bool)
        self._flat = torch.empty(int(self._lengths.sum()) + 1, width, dtype=dtype, device=device)
        self._flat[-1] = 0.0  # what lies behind the end of a trial

    @staticmethod
    def size_bytes(lengths: Sequence[int], width: int, dtype: torch.dtype) -> int:
        """What it would take of the device."""
        return (sum(lengths) + 1) * width * dtype.itemsize

    def __contains__(self, trial: int) -> bool:
        return bool(self._is_there[trial])

    @property
    def count(self) -> int:
        """Trials that are there."""
        return int(self._is_there.sum())

    def put(self, trial: int, features_TC: np.ndarray) -> None:
        """Keep one trial's float32[T, C]."""
        if trial in self:
            return
        start = int(self._starts[trial])
        # torch warns of memory that it may not write to, such as the bytes of an answer
        values = torch.from_numpy(features_TC if features_TC.flags.writeable else features_TC.copy())
        self._flat[start : start + len(values)].copy_(values)
        self._is_there[trial] = True

    def gather(self, ids: Sequence[int], length: int) -> torch.Tensor:
        """float32[B, length, C] of trials that are there, with zeros at their ends."""
        device = self._flat.device
        starts = torch.from_numpy(self._starts[ids]).to(device)
        lengths = torch.from_numpy(self._lengths[ids]).to(device)
        within = torch.arange(length, device=device)
        places = torch.where(within < lengths[:, None], starts[:, None] + within, len(self._flat) - 1)
        return self._flat[places].to(torch.float32)
