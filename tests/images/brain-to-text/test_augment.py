"""Noise, smoothing and masks follow their settings; an evaluation draws no random numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from brain_to_text.data.augment import Augment, NoiseConfig, smooth, smoothing_kernel

SILENT = NoiseConfig(white_noise_std=0.0, constant_offset_std=0.0)


def test_the_kernel_is_nine_weights_of_a_gaussian_that_sum_to_one() -> None:
    kernel = smoothing_kernel(2.0, 100)
    weights = np.array([math.exp(-(k**2) / 8) for k in range(-4, 5)])
    assert kernel.dtype == np.float32
    np.testing.assert_allclose(kernel, weights / weights.sum(), rtol=1e-5)


@pytest.mark.parametrize(("std", "size"), [(2.0, 100), (3.0, 100), (1.0, 21), (2.0, 12), (4.0, 9)])
def test_the_kernel_equals_scipys(std: float, size: int) -> None:
    ndimage = pytest.importorskip("scipy.ndimage", reason="upstream computes its kernel with scipy")
    impulse = np.zeros(size, dtype=np.float32)
    impulse[size // 2] = 1
    response = ndimage.gaussian_filter1d(impulse, std)
    kept = response[response > 0.01]
    np.testing.assert_allclose(smoothing_kernel(std, size), kept / kept.sum(), rtol=1e-4)


@pytest.mark.parametrize("width", [9, 4, 1])
def test_smoothing_equals_a_grouped_convolution(width: int) -> None:
    x_BTC, kernel = torch.randn(2, 30, 5), torch.rand(width)
    grouped = torch.nn.functional.conv1d(
        x_BTC.transpose(1, 2), kernel.repeat(5, 1, 1), padding="same", groups=5
    ).transpose(1, 2)
    torch.testing.assert_close(smooth(x_BTC, kernel.tolist()), grouped)


def test_an_evaluation_smooths_and_draws_no_random_numbers() -> None:
    augment = Augment(NoiseConfig(time_masks=5, random_walk_std=1.0, static_gain_std=1.0), smooth_std=2.0).eval()
    state = torch.get_rng_state()
    x_BTC = torch.randn(2, 40, 3)
    state = torch.get_rng_state()
    out = augment(x_BTC, torch.tensor([40, 30]))
    assert torch.equal(torch.get_rng_state(), state)
    assert augment.kernel is not None
    assert torch.equal(out, smooth(x_BTC, augment.kernel))


def test_noise_and_offset_have_their_standard_deviations() -> None:
    zeros, bins = torch.zeros(64, 200, 16), torch.full((64,), 200)
    torch.manual_seed(0)
    white = Augment(NoiseConfig(white_noise_std=0.7, constant_offset_std=0.0), smooth_std=None)(zeros, bins)
    assert float(white.std()) == pytest.approx(0.7, rel=0.02)
    offset = Augment(NoiseConfig(white_noise_std=0.0, constant_offset_std=0.2), smooth_std=None)(zeros, bins)
    assert torch.equal(offset, offset[:, :1].expand_as(offset))
    assert float(offset[:, 0].std()) == pytest.approx(0.2, rel=0.1)


def test_a_random_walk_accumulates_along_its_axis() -> None:
    zeros, bins = torch.zeros(200, 30, 40), torch.full((200,), 30)
    noise = NoiseConfig(white_noise_std=0.0, constant_offset_std=0.0, random_walk_std=1.0, random_walk_axis=1)
    walk = Augment(noise, smooth_std=None)(zeros, bins)
    assert float(walk[:, 24].std()) == pytest.approx(5.0, rel=0.1)


def test_static_gain_mixes_features_the_same_way_throughout_a_trial() -> None:
    augment = Augment(NoiseConfig(white_noise_std=0.0, constant_offset_std=0.0, static_gain_std=0.5), smooth_std=None)
    x_BTC = torch.randn(1, 50, 4)
    out = augment(x_BTC, torch.tensor([50]))
    mixing = torch.linalg.lstsq(x_BTC[0], out[0]).solution
    torch.testing.assert_close(x_BTC[0] @ mixing, out[0], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(out, x_BTC)


def test_a_mask_is_one_span_within_the_trial_up_to_its_maximum_length() -> None:
    augment = Augment(NoiseConfig(white_noise_std=0.0, constant_offset_std=0.0, time_masks=1, time_mask_share=0.2),
                      smooth_std=None)  # fmt: skip
    ones, bins = torch.ones(300, 120, 2), torch.tensor([100, 60, 120] * 100)
    masked = augment(ones, bins)[..., 0] == 0
    for row, length in zip(masked, bins, strict=True):
        (at,) = torch.nonzero(row, as_tuple=True)
        assert len(at) <= 0.2 * int(length) + 1
        if len(at):
            assert int(at[-1]) - int(at[0]) + 1 == len(at)
            assert int(at[-1]) < int(length)
    assert 0.06 < float(masked.sum() / bins.sum()) < 0.14  # half of the maximum length, on average


def test_the_input_is_not_modified() -> None:
    x_BTC = torch.randn(2, 20, 3)
    before = x_BTC.clone()
    Augment(NoiseConfig(random_walk_std=0.1, time_masks=2), smooth_std=2.0)(x_BTC, torch.tensor([20, 20]))
    assert torch.equal(x_BTC, before)


def test_without_noise_and_smoothing_the_features_are_unchanged() -> None:
    x_BTC = torch.randn(2, 20, 3)
    assert torch.equal(Augment(SILENT, smooth_std=None)(x_BTC, torch.tensor([20, 20])), x_BTC)
