"""The decoder computes the same as upstream's, and loads weights in every common form."""

from __future__ import annotations

import functools
import random
from typing import Any

import pytest
import torch
from torch import nn

from brain_to_text import resolve
from brain_to_text.config import BrainConfig
from brain_to_text.model import DecoderShape, GRUDecoder, load_weights
from estiba.config import load
from estiba.errors import ConfigError

SMALL = DecoderShape(n_features=6, n_units=8, n_layers=2, n_classes=5, n_days=3, patch_size=4, patch_stride=2)


def step_by_step(model: GRUDecoder, x_BTC: torch.Tensor, day_of: list[int]) -> torch.Tensor:
    """Compute the decoder as the paper describes it, one trial and one patch at a time."""
    shape, rows = model.shape, []
    for x_TC, day in zip(x_BTC, day_of, strict=True):
        y_TC = nn.functional.softsign(x_TC @ model.day_weights[day] + model.day_biases[day])
        starts = range(0, len(y_TC) - shape.patch_size + 1, shape.patch_stride)
        rows.append(torch.stack([torch.cat(list(y_TC[start : start + shape.patch_size])) for start in starts]))
    states = model.h0.repeat(shape.n_layers * (2 if shape.bidirectional else 1), len(rows), 1)
    output, _ = model.gru(torch.stack(rows), states)
    logits: torch.Tensor = output @ model.out.weight.T + model.out.bias
    return logits


@pytest.mark.parametrize("bidirectional", [False, True])
def test_logits_match_a_step_by_step_computation(bidirectional: bool) -> None:
    model = GRUDecoder(DecoderShape(**{**SMALL.__dict__, "bidirectional": bidirectional}), seed=1).eval()
    with torch.no_grad():
        for number, weight in enumerate(model.day_weights):
            weight += 0.1 * torch.randn(6, 6, generator=torch.Generator().manual_seed(number))
    x_BTC, day_of = torch.randn(4, 21, 6), [2, 0, 2, 2]
    logits = model(x_BTC, (0, 2), torch.tensor([1, 0, 1, 1]))
    assert logits.shape == (4, SMALL.frames(21), 5)
    torch.testing.assert_close(logits, step_by_step(model, x_BTC, day_of))


def test_gradients_of_the_day_layers_do_not_depend_on_thread_timing() -> None:
    """Several threads work on the trials of a day. Their sums must not depend on which one finishes first."""
    shape = DecoderShape(n_features=64, n_units=4, n_layers=1, n_days=3)
    model, before = GRUDecoder(shape, seed=1).eval(), torch.get_num_threads()
    x_BTC, index = torch.randn(15, 60, 64), torch.arange(15) % 3
    torch.set_num_threads(max(2, before))
    try:
        distinct = set()
        for _ in range(40):
            model.zero_grad()
            model(x_BTC, (0, 1, 2), index).square().sum().backward()
            day_layers = [*model.day_weights, *model.day_biases]
            distinct.add(
                b"".join(parameter.grad.numpy().tobytes() for parameter in day_layers if parameter.grad is not None)
            )
    finally:
        torch.set_num_threads(before)
    assert len(distinct) == 1


def test_without_patches_each_bin_is_a_frame() -> None:
    shape = DecoderShape(n_features=6, n_units=8, n_layers=1, n_days=1, patch_size=0)
    assert GRUDecoder(shape)(torch.randn(2, 9, 6), (0,), torch.zeros(2, dtype=torch.long)).shape == (2, 9, 41)
    assert shape.frames(9) == 9


@pytest.mark.parametrize("n_bins", range(1, 40))
def test_the_number_of_frames_is_that_of_the_network(n_bins: int) -> None:
    frames = SMALL.frames(n_bins)
    windows = len(range(0, n_bins - SMALL.patch_size + 1, SMALL.patch_stride))
    assert max(0, frames) == windows


def test_day_layers_start_as_identity_and_hidden_weights_orthogonal() -> None:
    model = GRUDecoder(SMALL, seed=3)
    assert all(torch.equal(weight, torch.eye(6)) for weight in model.day_weights)
    assert all(not bias.any() for bias in model.day_biases)
    hidden = model.gru.weight_hh_l0
    torch.testing.assert_close(hidden.T @ hidden, torch.eye(8), atol=1e-5, rtol=0)


def test_the_seed_determines_the_weights_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    first = torch.rand(1)
    torch.manual_seed(0)
    model = GRUDecoder(SMALL, seed=3)
    assert torch.equal(torch.rand(1), first)
    assert torch.equal(model.out.weight, GRUDecoder(SMALL, seed=3).out.weight)
    assert not torch.equal(model.out.weight, GRUDecoder(SMALL, seed=4).out.weight)


def test_a_day_that_is_not_in_the_batch_has_no_gradient() -> None:
    model = GRUDecoder(SMALL, seed=1)
    model(torch.randn(2, 12, 6), (1,), torch.zeros(2, dtype=torch.long)).sum().backward()
    assert model.day_weights[1].grad is not None
    assert model.day_weights[0].grad is None


def test_the_default_model_has_the_published_size() -> None:
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in GRUDecoder(DecoderShape(n_days=45)).parameters())
    gru = 3 * 768 * (7168 + 768 + 2) + 4 * 3 * 768 * (768 + 768 + 2)
    assert count == gru + 45 * (512 * 512 + 512) + 768 * 41 + 41 + 768


def test_weights_load_in_upstreams_compiled_form_and_in_the_guides_stacked_form() -> None:
    model, other = GRUDecoder(SMALL, seed=1), GRUDecoder(SMALL, seed=2)
    weights = model.state_dict()
    load_weights(other, {f"_orig_mod.{name}": tensor for name, tensor in weights.items()}, "upstream's")
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in weights.items())
    stacked = {name: tensor for name, tensor in weights.items() if not name.startswith("day_")}
    stacked["day_weights"] = torch.stack([weights[f"day_weights.{day}"] + day for day in range(3)])
    stacked["day_biases"] = torch.cat([weights[f"day_biases.{day}"] for day in range(3)])
    load_weights(other, stacked, "the guide's")
    assert torch.equal(other.day_weights[2], weights["day_weights.2"] + 2)


def test_weights_of_other_sizes_are_refused() -> None:
    weights = GRUDecoder(DecoderShape(**{**SMALL.__dict__, "n_days": 2})).state_dict()
    with pytest.raises(ConfigError, match=r"other\.pt: the weights belong to another decoder.*sessions"):
        load_weights(GRUDecoder(SMALL), weights, "other.pt")


def test_the_compiled_model_computes_the_same_with_few_compilations(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch._dynamo.is_dynamo_supported():
        pytest.skip("torch.compile does not run on this Python")
    model = GRUDecoder(SMALL, seed=1).eval()
    x_BTC, index = torch.randn(2, 64, 6), torch.tensor([0, 1])
    plain = model(x_BTC, (0, 1), index)
    counter = count_graphs(monkeypatch)
    model.compile_network()
    torch.testing.assert_close(model(x_BTC, (0, 1), index), plain)
    lengths = [64, 128, 192, 256, 320, 128, 64]
    for days in ((0, 1), (1, 2), (0, 2)):
        for length in lengths:
            model(torch.randn(2, length, 6), days, index)
    assert counter.frame_count == 1


def count_graphs(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Have torch.compile count graphs instead of building them, which needs a C++ compiler."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    return counter


def test_changing_lengths_batch_sizes_and_days_do_not_recompile_each_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run has steps of several days and of one, evaluations of one day, and anywhere a batch of a single trial."""
    if not torch._dynamo.is_dynamo_supported():
        pytest.skip("torch.compile does not run on this Python")
    counter, dice = count_graphs(monkeypatch), random.Random(3)
    model = GRUDecoder(SMALL, seed=1)
    model.compile_network()

    def step(size: int, length: int, days: tuple[int, ...]) -> None:
        index = torch.arange(size) % len(days)
        model.train()(torch.randn(size, length, 6), days, index).sum().backward()

    def evaluate(size: int, length: int, day: int) -> None:
        with torch.no_grad():
            model.eval()(torch.randn(size, length, 6), (day,), torch.zeros(size, dtype=torch.int64))

    def run_some() -> None:
        for number in range(20):
            days = tuple(sorted(dice.sample(range(3), dice.randint(1, 3))))
            step(dice.choice((8, 7, 4)), 64 * dice.randint(2, 9), days)
            if number % 10 == 9:
                step(1, 64 * dice.randint(2, 9), (0,))
                for size in (8, 3, 1):
                    evaluate(size, 64 * dice.randint(1, 9), dice.randrange(3))

    run_some()
    compiled = counter.frame_count
    assert compiled <= 6 < torch._dynamo.config.recompile_limit
    for _ in range(3):
        run_some()
    assert counter.frame_count == compiled, "later batches use the graphs of the first ones"


@pytest.mark.parametrize(
    ("value", "on_gpu", "on_cpu"),
    [(None, True, False), ("auto", True, False), ("true", True, True), ("false", False, False)],
)
def test_the_decoder_is_compiled_for_a_gpu_unless_a_flag_says_otherwise(
    value: str | None, on_gpu: bool, on_cpu: bool
) -> None:
    argv = [] if value is None else ["--compile", value]
    config = load(BrainConfig, argv=argv, environ={}, hyperparameters={})
    assert resolve.compiles(config, torch.device("cuda")) == on_gpu
    assert resolve.compiles(config, torch.device("cpu")) == on_cpu
    assert resolve.length_bucket(config, torch.device("cpu")) == (64 if on_cpu else 1)
