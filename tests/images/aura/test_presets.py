"""The guide's presets, and which one `auto` selects."""

from __future__ import annotations

import pytest

from aura.model.decoder import ModelConfig
from aura.planning import presets
from estiba.errors import ConfigError


def model_of(name: str, vocab_size: int = 32_000) -> ModelConfig:
    return presets.PRESETS[name].model(vocab_size)


@pytest.mark.parametrize(
    ("name", "size", "step", "rate", "save"),
    [
        ("aura-72h-max", (2560, 32, 20, 2048), (2, 16), 2e-4, 500),
        ("aura-72h-extended", (2048, 28, 16, 2048), (4, 8), 2.5e-4, 500),
        ("aura-large", None, (4, 8), 2.5e-4, 1000),
        ("aura-medium", None, (8, 4), 3e-4, 1000),
    ],
)
def test_the_presets_of_the_guide_have_its_numbers(
    name: str, size: tuple[int, ...] | None, step: tuple[int, int], rate: float, save: int
) -> None:
    preset = presets.PRESETS[name]
    if size is not None:
        assert (preset.embed_size, preset.num_layers, preset.num_heads, preset.seq_length) == size
    assert (preset.batch_size, preset.gradient_accumulation_steps) == step
    assert (preset.learning_rate, preset.save_steps) == (rate, save)
    assert (preset.weight_decay, preset.dropout, preset.warmup_fraction) == (0.01, 0.1, 0.03)
    assert preset.batch_size * preset.gradient_accumulation_steps * preset.seq_length == 65_536


def test_the_largest_preset_is_the_model_of_two_and_a_half_billion() -> None:
    model = model_of("aura-72h-max")
    assert model.ff_size == 6912
    assert model.parameters == pytest.approx(2.70e9, rel=0.005)
    assert model.flops_per_token() == pytest.approx(1.67e10, rel=0.005)
    assert model.parameters - 2 * 32_000 * 2560 == pytest.approx(2.54e9, rel=0.005)  # the guide's ~2.5B


@pytest.mark.parametrize(
    ("gigabytes", "name"),
    [(85, "aura-72h-max"), (70, "aura-72h-max"), (69.9, "aura-72h-extended"), (55, "aura-72h-extended"),
     (48, "aura-large"), (40, "aura-large"), (39.9, "aura-medium"), (8, "aura-medium")],
)  # fmt: skip
def test_auto_selects_the_largest_preset_that_fits_the_memory(gigabytes: float, name: str) -> None:
    assert presets.find("auto", memory_bytes=int(gigabytes * 10**9)).name == name


def test_auto_selects_the_tiny_preset_without_a_gpu() -> None:
    assert presets.find("auto", memory_bytes=None).name == "aura-tiny"
    assert model_of("aura-tiny", 8_000).parameters < 5_000_000


def test_an_80_gb_card_gets_the_largest_preset_though_the_driver_reports_less() -> None:
    assert presets.choose(int(79.1 * 2**30)).name == "aura-72h-max"


def test_every_preset_is_a_valid_model() -> None:
    sizes = [model_of(name).parameters for name in ("aura-72h-max", "aura-72h-extended", "aura-large", "aura-medium")]
    assert sizes == sorted(sizes, reverse=True)
    assert model_of("manual").parameters > 0


def test_an_unknown_preset_is_an_error_that_lists_the_presets() -> None:
    with pytest.raises(ConfigError, match=r"'aura-huge'.*auto, aura-72h-max"):
        presets.find("aura-huge", memory_bytes=None)
