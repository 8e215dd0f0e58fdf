"""Feature transforms on the device: smoothing, and in training also noise and masks.

Source: nejm-brain-to-text, model_training/data_augmentations.py and rnn_trainer.py. The random cut at the start of a
batch is made on the host (batches.py), so that batches come in only a few lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

MIN_WEIGHT = 0.01
"""Smaller weights of the smoothing kernel are dropped, as in upstream."""


@dataclass(frozen=True, kw_only=True)
class NoiseConfig:
    """Standard deviations of the noise added in training; 0 adds none."""

    white_noise_std: float = 1.0
    constant_offset_std: float = 0.2
    random_walk_std: float = 0.0
    random_walk_axis: int = -1
    static_gain_std: float = 0.0
    time_masks: int | None = None
    """Number of masks per trial; None masks nothing."""
    time_mask_share: float = 0.075
    """Maximum length of a mask, as a fraction of the trial."""


def smoothing_kernel(std: float, size: int) -> np.ndarray:
    """Return float32[W] that sums to 1: an impulse in `size` bins after a Gaussian filter, without weights below 1%.

    The filter equals scipy's gaussian_filter1d (mode "reflect", truncate 4).
    """
    radius = int(4.0 * std + 0.5)
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / std) ** 2)
    weights /= weights.sum()
    impulse = np.zeros(size)
    impulse[size // 2] = 1.0
    response = np.convolve(np.pad(impulse, radius, mode="symmetric"), weights, mode="valid").astype(np.float32)
    kept = response[response > MIN_WEIGHT]
    return kept / kept.sum(dtype=np.float32)


class Augment(nn.Module):
    """Maps float32[B, T, C] to float32[B, T, C]. Draws random numbers on the device, and only in training mode."""

    def __init__(self, noise: NoiseConfig, *, smooth_std: float | None, smooth_size: int = 100) -> None:
        """`smooth_std` is in bins; None turns smoothing off."""
        super().__init__()
        self.noise = noise
        # Built once, not at every step, and as plain numbers, which need no copy to the device.
        self.kernel = None if smooth_std is None else smoothing_kernel(smooth_std, smooth_size).tolist()

    @torch.no_grad()
    def forward(self, features_BTC: Tensor, n_bins_B: Tensor) -> Tensor:
        with torch.autocast(features_BTC.device.type, enabled=False):
            if self.training:
                features_BTC = self._add_noise(features_BTC)
            if self.kernel is not None:
                features_BTC = smooth(features_BTC, self.kernel)
            if self.training and self.noise.time_masks is not None:
                features_BTC = self._mask(features_BTC, n_bins_B)
        return features_BTC

    def _add_noise(self, x_BTC: Tensor) -> Tensor:
        noise, (size, _, width) = self.noise, x_BTC.shape
        if noise.static_gain_std > 0:
            gain_BCC = torch.eye(width, device=x_BTC.device) + noise.static_gain_std * torch.randn(
                size, width, width, device=x_BTC.device
            )
            x_BTC = torch.bmm(x_BTC, gain_BCC)
        if noise.white_noise_std > 0:
            x_BTC = torch.add(x_BTC, torch.randn_like(x_BTC), alpha=noise.white_noise_std)
        if noise.constant_offset_std > 0:
            offset_B1C = torch.randn(size, 1, width, device=x_BTC.device)
            x_BTC = torch.add(x_BTC, offset_B1C, alpha=noise.constant_offset_std)
        if noise.random_walk_std > 0:
            walk_BTC = torch.cumsum(torch.randn_like(x_BTC), dim=noise.random_walk_axis)
            x_BTC = torch.add(x_BTC, walk_BTC, alpha=noise.random_walk_std)
        return x_BTC

    def _mask(self, x_BTC: Tensor, n_bins_B: Tensor) -> Tensor:
        """Zero random spans of each trial. Source: SpecAugment (arXiv:1904.08779), along time only."""
        assert self.noise.time_masks is not None
        shape = (x_BTC.shape[0], self.noise.time_masks)
        length_B1 = n_bins_B[:, None].float()
        widths_BM = torch.rand(shape, device=x_BTC.device) * self.noise.time_mask_share * length_B1
        starts_BM = torch.rand(shape, device=x_BTC.device) * (length_B1 - widths_BM)
        bins_T = torch.arange(x_BTC.shape[1], device=x_BTC.device)
        masked_BMT = (bins_T >= starts_BM[..., None]) & (bins_T < (starts_BM + widths_BM)[..., None])
        return x_BTC.masked_fill(masked_BMT.any(1)[..., None], 0.0)


def smooth(x_BTC: Tensor, kernel: Sequence[float]) -> Tensor:
    """Smooth each feature along time, padded with zeros at both ends as by torch's padding "same"."""
    before, length = (len(kernel) - 1) // 2, x_BTC.shape[1]
    padded = pad(x_BTC, (0, 0, before, len(kernel) - 1 - before))
    # A few shifted sums in place need no transposed copy, and no copy of the kernel per feature.
    smoothed = padded[:, :length] * kernel[0]
    for shift, weight in enumerate(kernel[1:], start=1):
        smoothed.add_(padded[:, shift : shift + length], alpha=weight)
    return smoothed
