"""Parameter groups and learning-rate schedules match upstream's."""

from __future__ import annotations

import math

import pytest
import torch

from brain_to_text.config import BrainConfig
from brain_to_text.model import DecoderShape, GRUDecoder
from brain_to_text.optimizer import make_optimizer
from brain_to_text.resolve import schedules
from estiba.errors import ConfigError

MODEL = DecoderShape(n_features=4, n_units=4, n_layers=2, n_days=2)


def test_three_groups_contain_every_parameter_once_with_its_weight_decay() -> None:
    model = GRUDecoder(MODEL)
    optimizer = make_optimizer(model, lr=0.1, betas=(0.9, 0.999), epsilon=0.1, weight_decay=0.3,
                               weight_decay_day=0.2, device=torch.device("cpu"))  # fmt: skip
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {group["group_type"]: group for group in optimizer.param_groups}
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.2, 0.3]
    grouped = {kind: {names[id(p)] for p in group["params"]} for kind, group in groups.items()}
    assert grouped["bias"] == {name for name in names.values() if name.startswith(("gru.bias", "out.bias"))}
    assert grouped["day_layer"] == {"day_weights.0", "day_weights.1", "day_biases.0", "day_biases.1"}
    assert sum(len(group) for group in grouped.values()) == len(names)
    assert all(group["fused"] for group in optimizer.param_groups)


def upstreams(kind: str, step: int, *, peak: float, least: float, decay: int, warmup: int) -> float:
    """Compute the rate of one group as rnn_trainer.py does."""
    if kind == "linear":
        return peak + (least - peak) * min(step, decay) / decay
    if step < warmup:
        return peak * step / max(1, warmup)
    if step >= decay:
        return least
    share = least / peak
    return peak * max(share, share + (1 - share) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (decay - warmup))))


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_rates_match_upstreams_at_every_step(kind: str) -> None:
    config = BrainConfig(lr_scheduler_type=kind, lr_max=0.005, lr_min=0.0001, lr_decay_steps=90, lr_warmup_steps=10,
                         lr_max_day=0.002, lr_min_day=0.0002, lr_decay_steps_day=70, lr_warmup_steps_day=20,
                         num_training_batches=100)  # fmt: skip
    schedule, days = schedules(config)
    for step in range(100):
        assert schedule.at(step) == pytest.approx(upstreams(kind, step, peak=0.005, least=0.0001, decay=90, warmup=10))
        if kind == "cosine":
            assert days.at(step) == pytest.approx(upstreams(kind, step, peak=0.002, least=0.0002, decay=70, warmup=20))


def test_linear_matches_torchs_linear_lr() -> None:
    config = BrainConfig(lr_scheduler_type="linear", lr_decay_steps=8, num_training_batches=12)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.005)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0001 / 0.005, total_iters=8)
    for step in range(12):
        assert schedules(config)[0].at(step) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()


def test_step_and_multistep_match_the_guides() -> None:
    steps = schedules(BrainConfig(lr_scheduler_type="step", lr_step_size=10, lr_max=1.0, num_training_batches=50))[0]
    assert [steps.at(step) for step in (0, 9, 10, 25)] == pytest.approx([1.0, 1.0, 0.1, 0.01])
    stones = schedules(BrainConfig(lr_scheduler_type="multistep", lr_milestones=[5, 20], lr_max=1.0))[0]
    assert [stones.at(step) for step in (4, 5, 19, 20)] == pytest.approx([1.0, 0.1, 0.1, 0.01])


def test_wsd_stays_at_the_peak_until_the_last_fifth() -> None:
    schedule = schedules(BrainConfig(lr_scheduler_type="wsd", lr_warmup_steps=10, lr_max=1.0, lr_min=0.1,
                                    num_training_batches=110))[0]  # fmt: skip
    assert [schedule.at(step) for step in (5, 10, 89, 110)] == pytest.approx([0.5, 1.0, 1.0, 0.1])
    assert 0.1 < schedule.at(100) < 1.0


def test_a_final_rate_above_the_peak_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--lr-min-day 0\.5 is above --lr-max-day 0\.1"):
        schedules(BrainConfig(lr_max_day=0.1, lr_min_day=0.5))
