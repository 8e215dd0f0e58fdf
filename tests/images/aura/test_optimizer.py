"""Which parameters decay, when AdamW is fused, and which states have 8 bits."""

from __future__ import annotations

import sys

import pytest
import torch

from aura.model.decoder import Aura, ModelConfig
from aura.model.optimizer import make_optimizer
from estiba.errors import ConfigError

SHAPE = ModelConfig(vocab_size=200, embed_size=64, num_layers=2, num_heads=2, seq_length=16)


def one_step(model: Aura, optimizer: torch.optim.Optimizer) -> None:
    tokens = torch.randint(0, 200, (2, 17), generator=torch.Generator().manual_seed(0))
    (model.loss(tokens[:, :-1], tokens[:, 1:]) / 32).backward()
    optimizer.step()
    optimizer.zero_grad()


def test_matrices_decay_and_norms_do_not_and_every_parameter_is_optimized() -> None:
    model = Aura(SHAPE, seed=0)
    decaying, rest = make_optimizer(model, lr=1e-3, weight_decay=0.01).param_groups
    assert (decaying["weight_decay"], rest["weight_decay"]) == (0.01, 0.0)
    assert {p.ndim for p in decaying["params"]} == {2} and {p.ndim for p in rest["params"]} == {1}
    assert len(decaying["params"]) + len(rest["params"]) == len(list(model.parameters()))


def test_fused_adamw_matches_plain_adamw() -> None:
    ours, plain = Aura(SHAPE, seed=0), Aura(SHAPE, seed=0)
    fused = make_optimizer(ours, lr=1e-3, weight_decay=0.1)
    assert fused.param_groups[0]["fused"] is True
    reference = torch.optim.AdamW(
        [{"params": [p for p in plain.parameters() if (p.ndim == 2) is matrix], "weight_decay": 0.1 * matrix}
         for matrix in (True, False)], lr=1e-3, betas=(0.9, 0.95), fused=False, foreach=False,
    )  # fmt: skip
    for _ in range(3):
        one_step(ours, fused)
        one_step(plain, reference)
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_all_states_but_those_of_embeddings_and_small_parameters_have_eight_bits() -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = Aura(SHAPE, seed=0)
    optimizer = make_optimizer(model, "adamw8bit", lr=1e-3, weight_decay=0.01)
    one_step(model, optimizer)
    kinds = {name: optimizer.state[p]["state1"].dtype for name, p in model.named_parameters()}
    assert kinds["embedding"] == kinds["head"] == torch.float32
    assert kinds["layers.0.qkv"] == kinds["layers.1.down"] == torch.uint8
    assert kinds["norm.weight"] == torch.float32


def test_eight_bits_learn_as_well_as_32() -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    losses = {}
    tokens = torch.randint(0, 200, (4, 17), generator=torch.Generator().manual_seed(0))
    for name in ("adamw", "adamw8bit"):
        model = Aura(SHAPE, seed=0)
        optimizer = make_optimizer(model, name, lr=3e-3)  # type: ignore[arg-type]
        for _ in range(20):
            loss = model.loss(tokens[:, :-1], tokens[:, 1:]) / 64
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses[name] = loss.item()
    assert losses["adamw"] < 3
    assert losses["adamw8bit"] == pytest.approx(losses["adamw"], rel=0.05)


def test_without_bitsandbytes_the_error_names_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"needs bitsandbytes.*pass --optimizer adamw"):
        make_optimizer(Aura(SHAPE, seed=0), "adamw8bit", lr=1e-3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": 0.0}, "learning rate 0.0"),
        ({"lr": float("nan")}, "learning rate nan"),
        ({"lr": 1e-3, "weight_decay": -1.0}, "weight decay -1.0"),
        ({"lr": 1e-3, "betas": (0.9, 1.0)}, "betas"),
        ({"lr": 1e-3, "name": "sgd"}, "unknown optimizer 'sgd'; give adamw or adamw8bit"),
    ],
)
def test_invalid_values_are_errors(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_optimizer(Aura(SHAPE, seed=0), **values)
