"""What the planner recommends, and what it warns of, by its numbers."""

from __future__ import annotations

import json
import re

import pytest
import torch
from torch import Tensor

from aura import hardware, planner
from aura.hardware import activation_bytes, checkpointing_for, memory_needed, state_bytes
from aura.model import Aura, Checkpointing, Shape
from aura.planner import PlanConfig, main, plan_for, table
from aura.presets import PRESETS
from aura.sizing import Plan, expected_loss, learning_rate, plan, shape_of
from estiba.errors import ConfigError
from estiba.gpus import find_device

A100 = {"flops_per_s": 0.5 * 312e12, "memory_bytes": 80 * 10**9}
MAX = shape_of(PRESETS["aura-72h-max"], 32_000)


@pytest.fixture(scope="module")
def three_days() -> Plan:
    """72 hours of an A100 at half of its peak."""
    return plan(hours=72, **A100)  # type: ignore[arg-type]


# --- the law -------------------------------------------------------------------------------------------------------


def test_the_law_is_the_refit_one() -> None:
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


def test_for_three_days_of_an_a100_half_a_billion_to_0_8_is_best(three_days: Plan) -> None:
    assert 0.45e9 <= three_days.best.parameters <= 0.8e9
    assert three_days.best.loss == min(c.loss for c in three_days.candidates if c.fits)
    assert three_days.best.checkpointing is None and three_days.best.optimizer == "adamw"
    step = three_days.best.batch_size * three_days.best.gradient_accumulation_steps * 2048
    assert step == 65_536


def test_tokens_in_three_days_are_those_of_the_arithmetic(three_days: Plan) -> None:
    largest = next(c for c in three_days.candidates if c.name == "aura-72h-max")
    assert largest.tokens_per_s == pytest.approx(9.3e3, rel=0.01)
    assert largest.tokens == pytest.approx(2.4e9, rel=0.02)
    large = next(c for c in three_days.candidates if c.name == "aura-large")
    assert large.tokens_per_s == pytest.approx(32.9e3, rel=0.03)
    assert large.tokens == pytest.approx(8.5e9, rel=0.03)


def test_two_and_a_half_billion_in_three_days_is_warned_of_with_the_numbers(three_days: Plan) -> None:
    first = three_days.warnings[0]
    assert first.startswith("aura-72h-max: 2.7B parameters would see 2.4")
    assert "0.9 a parameter" in first and "Compute-optimal is about 20: 54B tokens" in first
    days = int(re.search(r"(\d+) days", first).group(1))  # type: ignore[union-attr]
    assert 62 <= days <= 70
    losses = [float(number) for number in re.findall(r"\d\.\d{3}", first)]
    assert losses[0] - losses[1] > 0.1
    assert losses[1] == pytest.approx(three_days.best.loss, abs=0.001)


def test_checkpointing_that_memory_does_not_ask_for_is_warned_of(three_days: Plan) -> None:
    assert any("do not pass --gradient-checkpointing" in w and "25%" in w for w in three_days.warnings)
    small = plan(hours=72, flops_per_s=50e12, memory_bytes=24 * 10**9, preset="aura-72h-extended")
    assert not any("do not pass" in warning for warning in small.warnings)


def test_more_time_pays_for_a_larger_model_and_so_do_more_gpus() -> None:
    sizes = [plan(hours=hours, **A100).best.parameters for hours in (1, 24, 72, 700)]  # type: ignore[arg-type]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1] / 10
    eight = plan(hours=72, gpus=8, **A100)  # type: ignore[arg-type]
    assert eight.best.parameters > plan(hours=72, **A100).best.parameters  # type: ignore[arg-type]


def test_little_text_is_said_to_be_read_too_often() -> None:
    made = plan(hours=72, tokens_available=200e6, **A100)  # type: ignore[arg-type]
    warning = made.warnings[-1]
    assert warning.startswith("200M tokens of text would be read") and "stop after" in warning
    assert made.best.epochs == pytest.approx(made.best.tokens / 200e6)


def test_a_preset_that_does_not_fit_is_named_and_never_recommended() -> None:
    made = plan(hours=72, flops_per_s=50e12, memory_bytes=24 * 10**9, preset="aura-72h-max")
    assert made.warnings[0].startswith("aura-72h-max (2.70B) needs") and "there are 24.0 GB" in made.warnings[0]
    assert made.best.fits and made.best.memory_bytes < 24e9
    assert "does not fit" in table(made)


def test_a_plan_far_below_the_law_says_so() -> None:
    made = plan(hours=0.1, flops_per_s=1e11, memory_bytes=16 * 10**9, seq_length=256, preset="aura-tiny")
    assert any("guess" in warning for warning in made.warnings)
    assert ">10.4" in table(made)


@pytest.mark.parametrize("values", [{"hours": 0}, {"flops_per_s": -1.0}, {"gpus": 0}])
def test_what_cannot_be_is_refused(values: dict) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(values))} is .*more than 0"):
        plan(**({"hours": 1.0} | A100 | values))


def test_memory_for_no_model_at_all_is_refused() -> None:
    with pytest.raises(ConfigError, match="hold no model"):
        plan(hours=1, flops_per_s=1e12, memory_bytes=10**9)


# --- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_activations_are_counted_as_a_layer_keeps_them(dropout: float) -> None:
    shape = Shape(vocab_size=64, embed_size=256, num_layers=3, num_heads=4, seq_length=120, dropout=dropout)
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
    two_layers = activation_bytes(Shape(**(vars(shape) | {"num_layers": 2})), None)
    estimated = 2 * (activation_bytes(shape, None) - two_layers)
    assert measured == pytest.approx(estimated, rel=0.01)


def test_memory_of_the_largest_preset_is_of_the_size_that_is_known() -> None:
    assert 16 * MAX.parameters == pytest.approx(43.4e9, rel=0.01)  # float32 weights, gradients, two moments
    assert state_bytes(MAX, "adamw") == 18 * MAX.parameters
    assert state_bytes(MAX, "adamw8bit") == pytest.approx(12.4 * MAX.parameters, rel=0.01)
    a_sequence = {how: activation_bytes(MAX, how) for how in (None, "selective", "full")}
    assert 5.4e9 < a_sequence[None] < 8e9
    assert 3.4e9 < a_sequence["selective"] < 4.6e9
    assert 0.3e9 < a_sequence["full"] < 0.9e9
    assert a_sequence["full"] < activation_bytes(MAX, 4) < a_sequence[None]


def test_checkpointing_is_what_memory_asks_for_and_no_more() -> None:
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
def test_on_a_gpu_a_step_takes_the_memory_that_was_foretold(how: Checkpointing) -> None:
    shape = Shape(vocab_size=16_384, embed_size=1024, num_layers=12, num_heads=8, seq_length=2048)
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
def test_a_gpu_is_known_by_the_names_that_people_and_drivers_use(written: str, name: str) -> None:
    device = find_device(written)
    assert device is not None and device.name == name


@pytest.mark.parametrize("written", ["NVIDIA L400", "A4000", "A1000", "Radeon", "T400", ""])
def test_a_gpu_without_a_data_sheet_here_is_not_taken_for_another(written: str) -> None:
    assert find_device(written) is None


def test_measuring_this_machine_gives_a_plausible_speed() -> None:
    assert 1e8 < hardware.measure(torch.device("cpu"), at_least_s=0.2) < 1e15


# --- the command ---------------------------------------------------------------------------------------------------


def test_the_command_prints_the_flags_the_table_and_numbered_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--hours", "72", "--gpu", "A100-80GB"]) == 0
    out = capsys.readouterr().out
    assert "assumed: 45% of A100-80GB's peak of 312 TFLOP/s" in out
    assert "WARNING 1: aura-72h-max: 2.7B parameters" in out
    assert "<- recommended" in out and "--batch-size" in out
    assert all(len(line) < 140 for line in out.splitlines() if not line.startswith(("WARNING", "Recommended")))


def test_tokens_a_second_that_were_measured_count_for_more_than_the_data_sheet() -> None:
    made = plan_for(PlanConfig(gpu="A100-80GB", tokens_per_s=9300, measured_on="aura-72h-max"))
    assert made.flops_per_s == pytest.approx(9300 * MAX.flops_per_token())
    assert "measured on aura-72h-max" in made.speed_from


def test_without_a_name_this_machine_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "measure", lambda _device: 1e11)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    made = plan_for(PlanConfig(hours=1, vocab_size=8192))
    assert made.flops_per_s == 1e11 and "measured now on this CPU" in made.speed_from
    assert made.best.shape.seq_length == 256


def test_the_flags_train_for_as_many_steps_as_there_is_time_for(three_days: Plan) -> None:
    best = three_days.best
    assert f"--max-steps {best.steps}" in planner.flags(best)
    assert best.steps == pytest.approx(best.tokens / 65_536, rel=0.001)
    eight = plan(hours=72, gpus=8, **A100).best  # type: ignore[arg-type]
    step = 8 * eight.batch_size * eight.gradient_accumulation_steps * eight.shape.seq_length
    assert step == 65_536 and eight.steps == pytest.approx(eight.tokens / step, rel=0.001)


def test_a_document_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--gpu", "L4", "--hours", "10", "--as-json"])
    document = json.loads(capsys.readouterr().out)
    assert document["hours"] == 10 and document["best"]["shape"]["embed_size"] > 0
    assert "--model-preset" in document["flags"]


def test_an_unknown_gpu_is_refused_with_what_to_pass() -> None:
    with pytest.raises(ConfigError, match=r"--gpu Voodoo2: no data sheet.*--tokens-per-s and --memory-gb"):
        main(["--gpu", "Voodoo2"])
    assert main(["--gpu", "Voodoo2", "--tokens-per-s", "5000", "--memory-gb", "80"]) == 0
