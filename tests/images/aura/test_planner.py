"""The planner's recommendations and warnings, and their numbers."""

from __future__ import annotations

import json
import re

import pytest
import torch
from torch import Tensor

from aura.config import AuraConfig
from aura.model.decoder import Aura, Checkpointing, ModelConfig
from aura.planning import hardware, planner
from aura.planning.budget import Budget, expected_loss, learning_rate, plan_budget
from aura.planning.config import PlanConfig
from aura.planning.hardware import activation_bytes, checkpointing_for, memory_needed, state_bytes
from aura.planning.planner import budget_for, plan, table
from aura.planning.presets import PRESETS, find
from aura.resolve import resolve
from estiba.config import load
from estiba.errors import ConfigError
from estiba.gpus import find_device

A100 = {"flops_per_s": 0.5 * 312e12, "memory_bytes": 80 * 10**9}
MAX = PRESETS["aura-72h-max"].model(32_000)


@pytest.fixture(scope="module")
def three_days() -> Budget:
    """72 hours of an A100 at half of its peak."""
    return plan_budget(hours=72, **A100)  # type: ignore[arg-type]


# --- the law -------------------------------------------------------------------------------------------------------


def test_the_law_of_losses_has_the_refit_constants() -> None:
    # 1.8172 + 482.01 / 6e8^0.3478 + 2085.43 / 11.2e9^0.3658, and the same for 2.5B parameters and 2.7B tokens
    assert expected_loss(0.6e9, 11.2e9) == pytest.approx(2.683, abs=0.001)
    assert expected_loss(2.5e9, 2.7e9) == pytest.approx(2.817, abs=0.001)


def test_repeated_text_is_worth_less_than_new_text_and_more_than_none() -> None:
    new, repeated, none = expected_loss(5e8, 8e9), expected_loss(5e8, 8e9, 2e9), expected_loss(5e8, 2e9)
    assert new < repeated < none
    assert expected_loss(5e8, 2e9, 2e9) == none
    assert repeated - new < (none - new) / 10  # four times: nearly as good as new


def test_larger_models_learn_more_slowly() -> None:
    assert learning_rate(2_500_000_000) == pytest.approx(2.2e-4)  # the guide has 2e-4
    assert learning_rate(10_000_000) > learning_rate(10_000_000_000) >= 1e-4


# --- the recommendation --------------------------------------------------------------------------------------------


def test_three_days_of_an_a100_are_best_for_0_5_to_0_8_billion_parameters(three_days: Budget) -> None:
    assert 0.45e9 <= three_days.best.parameters <= 0.8e9
    assert three_days.best.loss == min(c.loss for c in three_days.candidates if c.fits)
    assert three_days.best.checkpointing is None and three_days.best.optimizer == "adamw"
    step = three_days.best.batch_size * three_days.best.gradient_accumulation_steps * 2048
    assert step == 65_536


def test_tokens_in_three_days_match_a_hand_calculation(three_days: Budget) -> None:
    largest = next(c for c in three_days.candidates if c.name == "aura-72h-max")
    assert largest.tokens_per_s == pytest.approx(9.3e3, rel=0.01)
    assert largest.tokens == pytest.approx(2.4e9, rel=0.02)
    large = next(c for c in three_days.candidates if c.name == "aura-large")
    assert large.tokens_per_s == pytest.approx(32.9e3, rel=0.03)
    assert large.tokens == pytest.approx(8.5e9, rel=0.03)


def test_a_warning_with_numbers_says_that_three_days_are_too_short_for_2_5_billion(three_days: Budget) -> None:
    first = three_days.warnings[0]
    assert first.startswith("aura-72h-max: 2.7B parameters would train on 2.4")
    assert "0.9 per parameter" in first and "Compute-optimal is about 20: 54B tokens" in first
    days = int(re.search(r"(\d+) days", first).group(1))  # type: ignore[union-attr]
    assert 62 <= days <= 70
    losses = [float(number) for number in re.findall(r"\d\.\d{3}", first)]
    assert losses[0] - losses[1] > 0.1
    assert losses[1] == pytest.approx(three_days.best.loss, abs=0.001)


def test_a_warning_says_that_checkpointing_is_not_needed(three_days: Budget) -> None:
    assert any("do not pass --gradient-checkpointing" in w and "25%" in w for w in three_days.warnings)
    small = plan_budget(hours=72, flops_per_s=50e12, memory_bytes=24 * 10**9, preset="aura-72h-extended")
    assert not any("do not pass" in warning for warning in small.warnings)


def test_more_time_or_more_gpus_allow_a_larger_model() -> None:
    sizes = [plan_budget(hours=hours, **A100).best.parameters for hours in (1, 24, 72, 700)]  # type: ignore[arg-type]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1] / 10
    eight = plan_budget(hours=72, gpus=8, **A100)  # type: ignore[arg-type]
    assert eight.best.parameters > plan_budget(hours=72, **A100).best.parameters  # type: ignore[arg-type]


def test_a_warning_says_that_little_text_repeats_too_often() -> None:
    budget = plan_budget(hours=72, tokens_available=200e6, **A100)  # type: ignore[arg-type]
    warning = budget.warnings[-1]
    assert warning.startswith("200M tokens of text would be read") and "stop after" in warning
    assert budget.best.epochs == pytest.approx(budget.best.tokens / 200e6)


def test_a_preset_that_does_not_fit_is_named_and_never_recommended() -> None:
    budget = plan_budget(hours=72, flops_per_s=50e12, memory_bytes=24 * 10**9, preset="aura-72h-max")
    assert budget.warnings[0].startswith("aura-72h-max (2.70B) needs") and "there are 24.0 GB" in budget.warnings[0]
    assert budget.best.fits and budget.best.memory_bytes < 24e9
    assert "does not fit" in table(budget)


def test_a_warning_says_that_the_budget_is_too_small_for_the_law() -> None:
    budget = plan_budget(hours=0.1, flops_per_s=1e11, memory_bytes=16 * 10**9, seq_length=256, preset="aura-tiny")
    assert any("guess" in warning for warning in budget.warnings)
    assert ">10.4" in table(budget)


@pytest.mark.parametrize("values", [{"hours": 0}, {"flops_per_s": -1.0}, {"gpus": 0}])
def test_invalid_budgets_are_errors(values: dict) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(values))} is .*more than 0"):
        plan_budget(**({"hours": 1.0} | A100 | values))


def test_memory_for_no_model_at_all_is_an_error() -> None:
    with pytest.raises(ConfigError, match="hold no model"):
        plan_budget(hours=1, flops_per_s=1e12, memory_bytes=10**9)


# --- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_estimate_of_activations_matches_what_a_layer_keeps(dropout: float) -> None:
    shape = ModelConfig(vocab_size=64, embed_size=256, num_layers=3, num_heads=4, seq_length=120, dropout=dropout)
    model = Aura(shape, seed=0)
    tokens = shape.seq_length * 2
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.numel() >= tokens * shape.embed_size and tensor.shape[0] in (2, tokens):  # no weights, no angles
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = torch.randn(2, shape.seq_length, shape.embed_size, dtype=torch.bfloat16, requires_grad=True)
    angles = [buffer[:, None].bfloat16() for buffer in (model.cos_TE, model.sin_TE)]
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        model.layers[0](x, *angles)
    # A CPU's RMSNorm keeps its input and what it normed in float32, where a GPU's keeps its input in bfloat16; and its
    # dropout a mask of two bytes, where a GPU's has one.
    measured = sum(kept.values()) - tokens * 12 * shape.embed_size
    if dropout:
        measured -= tokens * 2 * shape.embed_size
    two_layers = activation_bytes(ModelConfig(**(vars(shape) | {"num_layers": 2})), None)
    estimated = 2 * (activation_bytes(shape, None) - two_layers)
    assert measured == pytest.approx(estimated, rel=0.01)


def test_memory_of_the_largest_preset_matches_published_numbers() -> None:
    assert 16 * MAX.parameters == pytest.approx(43.4e9, rel=0.01)  # float32 weights, gradients, two moments
    assert state_bytes(MAX, "adamw") == 18 * MAX.parameters
    assert state_bytes(MAX, "adamw8bit") == pytest.approx(12.4 * MAX.parameters, rel=0.01)
    a_sequence = {how: activation_bytes(MAX, how) for how in (None, "selective", "full")}
    assert 5.4e9 < a_sequence[None] < 8e9
    assert 3.4e9 < a_sequence["selective"] < 4.6e9
    assert 0.3e9 < a_sequence["full"] < 0.9e9
    assert a_sequence["full"] < activation_bytes(MAX, 4) < a_sequence[None]


def test_checkpointing_is_the_least_that_fits_the_memory() -> None:
    def how(gigabytes: float, batch_size: int = 2) -> Checkpointing:
        return checkpointing_for(MAX, batch_size=batch_size, memory_bytes=int(gigabytes * 1e9))

    assert how(80) is None
    assert how(68) == "selective"
    assert how(60) == "full"
    assert how(80, batch_size=6) == "full"
    assert checkpointing_for(MAX, batch_size=2, memory_bytes=None) is None
    with pytest.raises(ConfigError, match=r"2\.70B parameters with batch 2 need about .*there are 40\.0 GB.*adamw8bit"):
        how(40)


def test_more_of_anything_needs_more_memory() -> None:
    base = memory_needed(MAX, batch_size=2)
    assert memory_needed(MAX, batch_size=3) > base
    assert memory_needed(MAX, batch_size=2, optimizer="adamw8bit") < base
    assert memory_needed(MAX, batch_size=2, checkpointing="full") < memory_needed(
        MAX, batch_size=2, checkpointing="selective"
    ) < base  # fmt: skip


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("how", [None, "selective", "full"])
def test_on_a_gpu_a_step_takes_the_estimated_memory(how: Checkpointing) -> None:
    shape = ModelConfig(vocab_size=16_384, embed_size=1024, num_layers=12, num_heads=8, seq_length=2048)
    model = Aura(shape, seed=0, checkpointing=how).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens = torch.zeros(4, 2048, dtype=torch.int64, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model.loss(tokens, tokens) / tokens.numel()
        loss.backward()
        optimizer.step()
    foretold = memory_needed(shape, batch_size=4, checkpointing=how) - hardware.CONTEXT_BYTES
    assert torch.cuda.max_memory_allocated() == pytest.approx(foretold, rel=0.15)


# --- devices -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("A100-80GB", "A100-80GB"), ("NVIDIA A100-SXM4-80GB", "A100-80GB"), ("NVIDIA A100-PCIE-40GB", "A100-40GB"),
        ("a100", "A100-80GB"), ("NVIDIA H100 PCIe", "H100-PCIe"), ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA L40S", "L40S"), ("NVIDIA L4", "L4"), ("Tesla T4", "T4"), ("Tesla V100-SXM2-16GB", "V100-16GB"),
        ("NVIDIA A10G", "A10G"), ("NVIDIA RTX A6000", "A6000"), ("NVIDIA RTX 6000 Ada Generation", "RTX-6000-Ada"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"), ("NVIDIA H200", "H200"), ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA L40", "L40"), ("NVIDIA A10", "A10"), ("NVIDIA A30", "A30"),
    ],
)  # fmt: skip
def test_a_gpu_is_found_by_the_names_that_people_and_drivers_use(written: str, name: str) -> None:
    device = find_device(written)
    assert device is not None and device.name == name


@pytest.mark.parametrize("written", ["NVIDIA L400", "A4000", "A1000", "Radeon", "T400", ""])
def test_an_unknown_gpu_is_not_mistaken_for_another(written: str) -> None:
    assert find_device(written) is None


def test_measuring_this_machine_gives_a_plausible_speed() -> None:
    assert 1e8 < hardware.measure(torch.device("cpu"), at_least_s=0.2) < 1e15


# --- the command ---------------------------------------------------------------------------------------------------


def test_the_command_prints_the_flags_the_table_and_numbered_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    plan(PlanConfig(hours=72, gpu="A100-80GB"))
    out = capsys.readouterr().out
    assert "assumed: 45% of A100-80GB's peak of 312 TFLOP/s" in out
    assert "WARNING 1: aura-72h-max: 2.7B parameters" in out
    assert "<- recommended" in out and "--batch-size" in out
    assert all(len(line) < 140 for line in out.splitlines() if not line.startswith(("WARNING", "Recommended")))


def test_measured_tokens_per_second_override_the_data_sheet() -> None:
    budget = budget_for(PlanConfig(gpu="A100-80GB", tokens_per_s=9300, measured_on="aura-72h-max"))
    assert budget.flops_per_s == pytest.approx(9300 * MAX.flops_per_token())
    assert "measured on aura-72h-max" in budget.speed_from


def test_without_a_name_this_machine_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "measure", lambda _device: 1e11)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    budget = budget_for(PlanConfig(hours=1, vocab_size=8192))
    assert budget.flops_per_s == 1e11 and "measured now on this CPU" in budget.speed_from
    assert budget.best.shape.seq_length == 256


def test_the_recommended_flags_train_for_the_whole_budget(three_days: Budget) -> None:
    best = three_days.best
    assert f"--max-steps {best.steps}" in planner.flags(best)
    assert best.steps == pytest.approx(best.tokens / 65_536, rel=0.001)
    eight = plan_budget(hours=72, gpus=8, **A100).best  # type: ignore[arg-type]
    step = 8 * eight.batch_size * eight.gradient_accumulation_steps * eight.shape.seq_length
    assert step == 65_536 and eight.steps == pytest.approx(eight.tokens / step, rel=0.001)


def test_the_recommendation_can_be_printed_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    plan(PlanConfig(gpu="L4", hours=10, as_json=True))
    document = json.loads(capsys.readouterr().out)
    assert document["hours"] == 10 and document["best"]["shape"]["embed_size"] > 0
    assert "--model-preset" in document["flags"]


def test_an_unknown_gpu_is_an_error_that_names_other_flags() -> None:
    with pytest.raises(ConfigError, match=r"--gpu Voodoo2: no data sheet.*--tokens-per-s and --memory-gb"):
        plan(PlanConfig(gpu="Voodoo2"))
    plan(PlanConfig(gpu="Voodoo2", tokens_per_s=5000, memory_gb=80))


@pytest.mark.parametrize("vocab_size", [32_000, 1000])
def test_the_flags_that_are_printed_train_the_model_of_the_plan(vocab_size: int) -> None:
    """They planned 43.7M parameters and trained 60.0M: tied embeddings and dropout were not passed."""
    budgets = [
        plan_budget(hours=72, vocab_size=vocab_size, **A100),  # type: ignore[arg-type]
        plan_budget(hours=1, vocab_size=vocab_size, flops_per_s=2e11, memory_bytes=16 * 10**9, seq_length=256),
    ]
    candidates = [candidate for budget in budgets for candidate in budget.candidates]
    assert any(candidate.shape.tie_embeddings for candidate in candidates)
    for candidate in candidates:
        words = planner.flags(candidate).split()
        config = load(AuraConfig, argv=words, environ=None, hyperparameters=None)
        preset = find(config.model_preset, memory_bytes=None)
        assert config.vocab_size is not None
        resolved = resolve(config, preset, vocab_size=config.vocab_size, device=torch.device("cpu"), world_size=1)
        assert resolved.model == candidate.shape and resolved.model.parameters == candidate.parameters
        assert (resolved.batch_size, resolved.accumulation_steps, resolved.learning_rate) == (
            candidate.batch_size, candidate.gradient_accumulation_steps, candidate.learning_rate,
        )  # fmt: skip
        assert (config.optimizer, config.max_steps) == (candidate.optimizer, candidate.steps)
