"""Packed sequences see only themselves and their trunk, in every kind of model."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_model
import torch
from records_for_tests import chat, encoder, row

from estiba.errors import ConfigError
from estiba.training.precision import AmpContext
from finetune.model import packed_attention
from finetune.model.base import find_base
from finetune.model.forward import logits_of
from finetune.model.packed_attention import Segment, Segments
from finetune.model.self_test import _alone, check_gradients, choose_attention
from finetune.tokens.encode import Encoder
from finetune.tokens.examples import pack

CPU = torch.device("cpu")
FLOAT32 = AmpContext("float32", CPU)
RECORDS = (
    row(known="Year: 2019\nCode: H01\nVariable: sales of goods", Units="Dollars (millions)", Value="1,234"),
    chat(
        ("user", "El barco zarpa al alba con la bodega llena de trigo"),
        ("assistant", "y vino"),
        ("user", "a"),
        ("assistant", "b"),
    ),
    row(Units="x", Value="2"),
)


def load(folder: Path, kind: str = "llama") -> torch.nn.Module:
    tiny_model.build(folder, kind)
    return find_base(str(folder), folder).load(dtype=torch.float32).eval()


@pytest.mark.parametrize("block_tokens", [0, packed_attention.BLOCK_TOKENS], ids=["by segment", "by record"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral", "gemma3"])
def test_packed_logits_are_those_of_each_sequence_alone(
    tmp_path: Path, kind: str, block_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_attention, "BLOCK_TOKENS", block_tokens)
    model = load(tmp_path, kind)
    one: Encoder = encoder()
    examples = [example for record in RECORDS for example in one.examples(record)]
    with torch.no_grad():
        expected = torch.cat([_alone(model, example, CPU) for example in examples])
        found = logits_of(model, pack(examples))
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
        assert not choose_attention(model, examples, FLOAT32, CPU)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3"])
def test_the_dense_mask_of_a_gpu_gives_the_same_logits(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU without varlen_attn one call with a mask does the work of one call per segment."""
    model = load(tmp_path, kind)
    examples = [example for record in RECORDS for example in encoder().examples(record)]

    def attend_at_once(
        module, query, key, value, mask, scaling=None, dropout=0.0, segments=None, sliding_window=None, **_
    ):  # type: ignore[no-untyped-def]
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        dense = segments.mask(query.device, sliding_window)
        return packed_attention._attend(query, key, value, dense, scaling, dropout, None).transpose(1, 2), None

    with torch.no_grad():
        expected = logits_of(model, pack(examples))
        monkeypatch.setitem(
            packed_attention.ALL_ATTENTION_FUNCTIONS._global_mapping, packed_attention.NAME, attend_at_once
        )
        found = logits_of(model, pack(examples))
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_a_neighbour_changes_no_bit(tmp_path: Path) -> None:
    model = load(tmp_path)
    one = encoder()
    first, second, other = (one.examples(record)[0] for record in (RECORDS[0], RECORDS[1], RECORDS[2]))
    with torch.no_grad():
        beside = logits_of(model, pack([first, second]))
        replaced = logits_of(model, pack([first, other]))
    count = first.trained_tokens
    assert torch.equal(beside[:count], replaced[:count])


def test_a_branch_sees_its_trunk_and_itself_alone() -> None:
    segments = Segments((Segment(0, 2), Segment(2, 4, 0, 2), Segment(4, 5, 0, 2), Segment(5, 7)))
    expected = [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1, 1],
    ]
    assert segments.mask(CPU, None).int().tolist() == expected
    windowed = segments.mask(CPU, 2).int().tolist()
    assert windowed[3] == [0, 0, 1, 1, 0, 0, 0]
    index, queries, keys, longest_query, longest_key = segments.varlen(CPU)
    assert index.tolist() == [0, 1, 0, 1, 2, 3, 0, 1, 4, 5, 6]
    assert (queries.tolist(), keys.tolist()) == ([0, 2, 4, 5, 7], [0, 2, 6, 9, 11])
    assert (longest_query, longest_key) == (2, 4)


def test_the_self_test_refuses_a_model_whose_attention_leaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(tmp_path)
    examples = [example for record in RECORDS for example in encoder().examples(record)]
    dense = packed_attention.ALL_ATTENTION_FUNCTIONS["sdpa"]

    def leaks(module, query, key, value, mask, segments=None, **options):  # type: ignore[no-untyped-def]
        return dense(module, query, key, value, None if segments else mask, **options)

    monkeypatch.setitem(packed_attention.ALL_ATTENTION_FUNCTIONS._global_mapping, packed_attention.NAME, leaks)
    with pytest.raises(ConfigError, match="cannot be packed"):
        choose_attention(model, examples, FLOAT32, CPU)


def test_a_trained_tensor_without_a_gradient_is_named(tmp_path: Path) -> None:
    model = load(tmp_path).train()
    examples = encoder().examples(RECORDS[0])
    check_gradients(model, examples, FLOAT32, CPU)
    assert all(parameter.grad is None for parameter in model.parameters())
    model.forgotten = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(ConfigError, match="forgotten"):
        check_gradients(model, examples, FLOAT32, CPU)
