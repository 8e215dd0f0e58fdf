"""The model and its loss compute the right values, and optimizations do not change them."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from aura.model.cross_entropy import IGNORED, chunk_rows, summed_cross_entropy
from aura.model.decoder import Aura, Checkpointing, ModelConfig, RMSNorm, rotary, rotate
from estiba.errors import ConfigError

TINY = {"vocab_size": 97, "embed_size": 32, "num_layers": 3, "num_heads": 4, "seq_length": 24}


def tiny(seed: int = 1, **changes: object) -> Aura:
    return Aura(ModelConfig(**(TINY | changes)), seed=seed)  # type: ignore[arg-type]


def batch(rows: int = 3, length: int = 24, vocab: int = 97) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, vocab, (rows, length + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:].clone()


def gradients(model: Aura, loss: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


# --- loss ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rows", [16, 31, 72, 1000])
def test_the_chunked_loss_is_plain_cross_entropy_and_so_are_its_gradients(tied: bool, rows: int) -> None:
    model = tiny(tie_embeddings=tied).double()
    tokens, targets = batch()
    targets[0, :5] = IGNORED
    targets[2] = IGNORED
    hidden = model.hidden(tokens).flatten(0, 1)
    chunked = summed_cross_entropy(hidden, model.head_VD, targets.flatten(), rows)
    plain = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), reduction="sum")
    assert chunked.item() == pytest.approx(plain.item(), rel=1e-6)
    ours = gradients(model, chunked / 43)
    theirs = gradients(model, F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), reduction="sum") / 43)
    assert len(ours) == len(theirs) == len(list(model.parameters()))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_the_loss_of_a_batch_is_the_sum_of_its_parts() -> None:
    model = tiny()
    tokens, targets = batch()
    parts = sum(model.loss(tokens[i : i + 1], targets[i : i + 1]).item() for i in range(3))
    assert model.loss(tokens, targets).item() == pytest.approx(parts, rel=1e-6)
    assert model(tokens, targets).item() == model.loss(tokens, targets).item()


def test_targets_that_are_all_ignored_give_no_loss_and_no_gradient() -> None:
    model = tiny()
    tokens, targets = batch()
    loss = model.loss(tokens, torch.full_like(targets, IGNORED))
    assert loss.item() == 0
    assert all(not grad.any() for grad in gradients(model, loss))


def test_the_loss_is_the_same_with_and_without_gradients() -> None:
    model = tiny()
    tokens, targets = batch()
    with torch.no_grad():
        without = model.loss(tokens, targets)
    assert without.item() == model.loss(tokens, targets).item()
    assert not without.requires_grad


def test_evaluation_does_one_matrix_product_and_training_three() -> None:
    class Count(TorchDispatchMode):
        products = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.products += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm_.default)
            return func(*args, **(kwargs or {}))

    hidden, weight = torch.randn(32, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    products = []
    for wants_grad in (False, True):
        with Count() as count, torch.set_grad_enabled(wants_grad):
            summed_cross_entropy(hidden, weight, torch.zeros(32, dtype=torch.int64), 16)
        products.append(count.products)
    assert products == [2, 6]


def test_large_logits_do_not_overflow() -> None:
    hidden = torch.tensor([[1e4, -1e4]], requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    loss = summed_cross_entropy(hidden, weight, torch.tensor([1]))
    assert loss.item() == pytest.approx(2e4)
    loss.backward()
    assert torch.equal(hidden.grad, torch.tensor([[1.0, -1.0]]))


def test_chunks_fit_a_cpu_cache_and_are_never_empty() -> None:
    assert chunk_rows(16_384, "cpu") * 16_384 * 4 <= 16 * 2**20
    assert chunk_rows(10**9, "cuda") == 16


def test_a_new_model_has_the_loss_of_a_random_guess() -> None:
    tokens, targets = batch()
    assert tiny().loss(tokens, targets).item() / targets.numel() == pytest.approx(math.log(97), abs=0.4)


# --- checkpointing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["full", "selective", 1, 2, 3, 7])
def test_checkpointing_gives_the_same_bits_with_dropout(how: Checkpointing) -> None:
    model, again = tiny(dropout=0.2), tiny(dropout=0.2)
    again.checkpointing = how
    tokens, targets = batch()
    results = []
    for each in (model, again):
        torch.manual_seed(11)
        loss = each.loss(tokens, targets)
        results.append((loss, gradients(each, loss), torch.get_rng_state()))
    (loss, grads, state), (loss_again, grads_again, state_again) = results
    assert torch.equal(loss, loss_again)
    assert all(torch.equal(a, b) for a, b in zip(grads, grads_again, strict=True))
    assert torch.equal(state, state_again)


@pytest.mark.parametrize("how", ["full", "selective", 2])
def test_checkpointing_keeps_less(how: Checkpointing) -> None:
    kept: dict[str, int] = {}

    def count(name: str, model: Aura) -> None:
        seen: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model.loss(*batch())
        kept[name] = sum(seen.values())
        loss.backward()

    plain, again = tiny(dropout=0.1), tiny(dropout=0.1)
    again.checkpointing = how
    count("plain", plain)
    count("again", again)
    # What "selective" keeps is held by the checkpoint's own cache, which these hooks do not see.
    assert kept["again"] < kept["plain"] / 2


def test_evaluation_recomputes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    model.checkpointing = "full"
    monkeypatch.setattr("aura.model.decoder.checkpoint", lambda *_, **__: pytest.fail("checkpointed in evaluation"))
    tokens, targets = batch()
    model.eval().loss(tokens, targets)
    with torch.no_grad():
        model.train().loss(tokens, targets)


# --- model ---------------------------------------------------------------------------------------------------------


def test_initialization_depends_on_the_seed_and_not_on_the_global_random_state() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = tiny(seed=3)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    second, other = tiny(seed=3), tiny(seed=4)
    ours, same, different = first.state_dict(), second.state_dict(), other.state_dict()
    assert all(torch.equal(ours[name], same[name]) for name in ours)
    assert not any(torch.equal(ours[name], different[name]) for name in ours if ours[name].ndim == 2)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("width", [64, 256])
def test_initial_weights_have_the_standard_deviations_of_decision_10(width: int, tied: bool) -> None:
    """1/sqrt(D) for the embedding, sqrt(2/5D) for the rest, less where a matrix writes to the residual stream."""
    model = tiny(vocab_size=997, embed_size=width, num_layers=8, tie_embeddings=tied)
    layer, rest = model.layers[3], math.sqrt(0.4 / width)
    assert model.embedding.std().item() == pytest.approx(width**-0.5, rel=0.05)
    assert model.head_VD.std().item() == pytest.approx(width**-0.5 if tied else rest, rel=0.05)
    for matrix in (layer.qkv, layer.gate_up):
        assert matrix.std().item() == pytest.approx(rest, rel=0.05)
    for matrix in (layer.out, layer.down):
        assert matrix.std().item() == pytest.approx(rest / 4, rel=0.05)
    assert torch.equal(layer.ff_norm.weight, torch.ones(width))


def test_a_token_never_affects_earlier_positions() -> None:
    model = tiny().eval()
    tokens, _ = batch(1)
    changed = tokens.clone()
    changed[0, 10] = (changed[0, 10] + 1) % 97
    one, other = model(tokens), model(changed)
    assert torch.equal(one[:, :10], other[:, :10])
    assert not torch.equal(one[:, 10:], other[:, 10:])


def test_attention_depends_on_relative_positions() -> None:
    cos, sin = rotary(64, 8, 10_000.0)
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 1, 1, 8, generator=generator), torch.randn(1, 1, 1, 8, generator=generator)

    def score(at_q: int, at_k: int) -> float:
        turned = [rotate(x, cos[at : at + 1, None], sin[at : at + 1, None]) for x, at in ((q, at_q), (k, at_k))]
        return (turned[0] * turned[1]).sum().item()

    assert score(9, 4) == pytest.approx(score(50, 45), abs=1e-5)
    assert score(9, 4) != pytest.approx(score(9, 5), abs=1e-3)


def test_a_norm_has_unit_mean_square_for_any_input() -> None:
    x = torch.randn(4, 7, 64, generator=torch.Generator().manual_seed(0)) * 1000
    out = RMSNorm(64)(x)
    assert torch.allclose(out.pow(2).mean(-1), torch.ones(4, 7), atol=1e-4)


def test_dropout_works_in_training_only_and_follows_the_global_seed() -> None:
    model = tiny(dropout=0.3)
    tokens, targets = batch()
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(model.loss(tokens, targets).item())
    assert losses[0] == losses[1] != losses[2]
    model.eval()
    assert model.loss(tokens, targets).item() == model.loss(tokens, targets).item()


def test_under_autocast_the_layers_are_bfloat16_and_loss_and_gradients_float32() -> None:
    model = tiny()
    tokens, targets = batch()
    seen = []
    for layer in model.layers:
        layer.register_forward_hook(lambda _module, args, out: seen.append((args[0].dtype, out.dtype)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.loss(tokens, targets)
        assert model(tokens).dtype == torch.bfloat16
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(model.loss(tokens, targets).item(), rel=2e-3)
    half = gradients(model, loss)
    full = gradients(model, model.loss(tokens, targets))
    for one, other in zip(half, full, strict=True):
        assert one.dtype == torch.float32
        assert F.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.99


def test_the_model_memorises_a_line() -> None:
    model = tiny()
    tokens, targets = batch(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        (model.loss(tokens, targets) / targets.numel()).backward()
        optimizer.step()
    assert torch.equal(model.eval()(tokens).argmax(-1), targets)


def test_a_copied_model_has_its_own_parameters() -> None:
    model = tiny()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.embedding.add_(1)
    tokens, targets = batch()
    assert model.loss(tokens, targets).item() != other.loss(tokens, targets).item()


# --- shape ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {"ff_size": 40}])
def test_the_parameter_count_is_exact(changes: dict[str, object]) -> None:
    model = tiny(**changes)
    assert model.config.parameters == sum(p.numel() for p in model.parameters())


def test_a_model_config_is_plain_numbers() -> None:
    shape = ModelConfig(**TINY)  # type: ignore[arg-type]
    assert json.loads(json.dumps(vars(shape))) == vars(shape)
    assert shape.ff_size == 256


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, "embed_size 32 over num_heads 5 gives heads of size 6.4.*can be 2 or 4 or 8"),
        ({"num_heads": 32}, "heads of size 1"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"seq_length": -1}, "seq_length is -1"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"rope_theta": 0.0}, "rope_theta"),
        ({"ff_size": 0}, "ff_size is 0"),
    ],
)
def test_an_impossible_model_is_an_error_that_names_possible_values(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**(TINY | changes))  # type: ignore[arg-type]


def test_a_sequence_that_is_too_long_is_an_error() -> None:
    with pytest.raises(ConfigError, match="25 tokens in a sequence; this model reads 24"):
        tiny()(torch.zeros(1, 25, dtype=torch.int64))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("how", [None, "full", "selective"])
def test_on_a_gpu_bfloat16_gives_the_gradients_of_float32_on_the_cpu(how: Checkpointing) -> None:
    model = tiny(embed_size=128, num_heads=2)
    tokens, targets = batch()
    expected = gradients(model, model.loss(tokens, targets))
    model.cuda().checkpointing = how
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = model.loss(tokens.cuda(), targets.cuda())
    for one, other in zip(gradients(model, loss), expected, strict=True):
        assert F.cosine_similarity(one.cpu().flatten(), other.flatten(), dim=0) > 0.99
