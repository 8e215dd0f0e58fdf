"""Sampling generates the right text and changes no state."""

from __future__ import annotations

import pytest
import torch
from letters import Letters

from aura.artifacts.sample import sample
from aura.model.decoder import Aura, ModelConfig
from estiba.errors import ConfigError

WORDS = Letters()
SENTENCE = "la mar y el puerto, la goleta."


def model_of(**changes: object) -> Aura:
    shape = {"vocab_size": WORDS.vocab_size, "embed_size": 32, "num_layers": 2, "num_heads": 2, "seq_length": 32}
    return Aura(ModelConfig(**(shape | changes)), seed=0)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def taught() -> Aura:
    """A model that has memorised one sentence and its end."""
    model = model_of(dropout=0.0)
    ids = torch.tensor([[WORDS.eos_id, *WORDS.encode_batch([SENTENCE])[0], WORDS.eos_id]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        (model.loss(ids[:, :-1], ids[:, 1:]) / 31).backward()
        optimizer.step()
    return model


def test_generation_stops_at_the_end_of_the_document(taught: Aura) -> None:
    assert sample(taught, WORDS, "la mar y", temperature=0) == SENTENCE
    assert sample(taught, WORDS, "la mar y", temperature=0.3, top_k=3) == SENTENCE
    assert sample(taught, WORDS, "la mar y", temperature=0, max_new_tokens=4) == SENTENCE[:12]


def test_sampling_changes_no_random_state_no_mode_and_no_gradient() -> None:
    model = model_of()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    sample(model, WORDS, "la mar", max_new_tokens=10)
    assert torch.equal(before, torch.get_rng_state())
    assert model.training and all(module.training for module in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    sample(model.eval(), WORDS, "la mar", max_new_tokens=2)
    assert not model.training


def test_the_seed_determines_the_text() -> None:
    model = model_of()
    texts = [sample(model, WORDS, "la", max_new_tokens=20, temperature=1.0, top_k=None, seed=s) for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_an_empty_prompt_starts_a_document(taught: Aura) -> None:
    assert sample(taught, WORDS, "", temperature=0) == SENTENCE


def test_top_k_one_is_greedy() -> None:
    model = model_of()
    assert sample(model, WORDS, "la", top_k=1, temperature=5.0, seed=9) == sample(model, WORDS, "la", temperature=0)


def test_padding_is_never_generated() -> None:
    model = model_of()
    with torch.no_grad():
        model.head_VD[WORDS.pad_id] = 100 * model.head_VD.mean(0) + 10
    assert "<pad>" not in sample(model, WORDS, "la mar", max_new_tokens=30, temperature=1.0, top_k=None)


def test_a_text_longer_than_the_context_continues() -> None:
    assert len(sample(model_of(), WORDS, SENTENCE * 3, max_new_tokens=5, top_k=1)) >= 90


def test_an_error_restores_the_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    monkeypatch.setattr(Aura, "hidden", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sample(model, WORDS, "la")
    assert model.training


@pytest.mark.parametrize(
    ("values", "message"), [({"temperature": -1.0}, "temperature -1.0"), ({"top_k": 0}, "top_k 0")]
)
def test_invalid_values_are_errors(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sample(model_of(), WORDS, "la", **values)
