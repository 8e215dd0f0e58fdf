"""A state as tensors and a spec, as bytes of a safetensors file, and back."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from estiba.checkpoint import layout, tree_spec
from estiba.errors import CheckpointError
from tensors.states import is_same

NUMBERS = sorted(layout.DTYPES, key=str)


def round_trip(state: Any) -> Any:
    """Through the very bytes that a file would hold, and through JSON."""
    tensors, spec = tree_spec.flatten(state)
    plan = layout.lay_out(tensors)
    buffer = bytearray(plan.size_bytes)
    buffer[: len(plan.header)] = plan.header
    for name, tensor in tensors.items():
        if tensor.numel():
            layout.view(buffer, plan.offsets[name], tensor).copy_(tensor)
    return tree_spec.unflatten(json.loads(json.dumps(spec)), layout.read(buffer).__getitem__)


@st.composite
def some_tensor(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    dtype = draw(st.sampled_from(NUMBERS))
    count = torch.Size(shape).numel()
    data = draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize))
    if dtype == torch.bool:
        data = bytes(byte & 1 for byte in data)
    flat = torch.frombuffer(bytearray(data), dtype=dtype) if count else torch.empty(0, dtype=dtype)
    tensor = flat.view(shape)
    return tensor.transpose(0, 1) if len(shape) > 1 and draw(st.booleans()) else tensor


KEYS = st.one_of(st.text(max_size=8), st.integers(-3, 300), st.booleans(), st.sampled_from(["model/x", "a/b", "'", ""]))
LEAVES = st.one_of(
    some_tensor(), st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.binary(max_size=8)
)
STATES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.lists(inner, max_size=3).map(tuple), st.dictionaries(KEYS, inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(STATES)
def test_any_state_comes_back_bit_by_bit(state: Any) -> None:
    assert is_same(round_trip(state), state)


def test_odd_states_come_back() -> None:
    shared = torch.randn(3, 3)
    odd = {
        "empty": torch.empty(0, 5),
        "scalar": torch.tensor(7, dtype=torch.int64),
        "bool": torch.tensor([True, False, True]),
        "bf16": torch.randn(3, 7).bfloat16(),
        "turned": torch.arange(12.0).view(3, 4).t(),
        "strided": torch.arange(20)[::3],
        "spread": torch.tensor([1.0, 2.0]).expand(4, 2),
        "tied": [shared, shared, shared[0]],
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
        "keys": {0: torch.ones(1), "0": torch.zeros(1), True: 1.5, "a/b": torch.ones(2), "a": {"b": torch.zeros(2)}},
        "numbers": (float("nan"), float("-inf"), -0.0, 1e-310, 0.1 + 0.2, 2**70, None, "ñ\ud800", b"\x00\xff"),
        "grad": torch.nn.Parameter(torch.ones(2)),
    }
    back = round_trip(odd)
    assert is_same(back, {**odd, "grad": torch.ones(2)})
    assert not isinstance(back["grad"], torch.nn.Parameter)


def test_numbers_of_numpy_become_plain_ones() -> None:
    back = round_trip({"a": np.int64(3), "b": np.float32(0.5), "c": np.bool_(True)})
    assert back == {"a": 3, "b": 0.5, "c": True}
    assert type(back["a"]) is int and type(back["c"]) is bool


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({1, 2}, "state work/odd: a set cannot be saved"),
        (lambda: None, "state work/odd: a function cannot be saved"),
        (np.arange(3), "state work/odd: a ndarray cannot be saved"),
        (np.complex64(1j), "state work/odd: a complex64 cannot be saved"),
        (np.longdouble(1), "state work/odd: a longdouble cannot be saved"),
        (np.datetime64("2026-01-01"), "state work/odd: a datetime64 cannot be saved"),
        ({(1, 2): 3}, "state work/odd: a key of type tuple"),
        (torch.eye(3).to_sparse(), "state work/odd: a tensor that is torch.sparse_coo"),
        (torch.empty(3, device="meta"), "state work/odd: a tensor that is torch.strided on meta"),
        (torch.zeros(3, dtype=torch.complex64), "state work/odd: tensors of torch.complex64"),
    ],
)
def test_what_cannot_be_saved_is_refused_by_its_path(value: Any, words: str) -> None:
    with pytest.raises(CheckpointError, match=words.replace("(", r"\(")):
        round_trip({"work": {"odd": value}})


def test_a_tensor_with_a_name_reserved_by_the_format_comes_back() -> None:
    state = {"__metadata__": torch.ones(2), "model": {"__metadata__": torch.zeros(3)}}
    assert is_same(round_trip(state), state)


def test_the_file_is_one_that_safetensors_reads(tmp_path: Any) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    tensors = {
        "b": torch.tensor([True]),
        "a": torch.randn(3, 5),
        "c": torch.randn(7).bfloat16(),
        "d": torch.tensor(2.5),
    }
    plan = layout.lay_out(tensors)
    buffer = bytearray(plan.size_bytes)
    buffer[: len(plan.header)] = plan.header
    for name, tensor in tensors.items():
        layout.view(buffer, plan.offsets[name], tensor).copy_(tensor)
    (tmp_path / "x.safetensors").write_bytes(buffer)
    found = safetensors.load_file(tmp_path / "x.safetensors")
    assert set(found) == set(tensors) and all(is_same(found[name], tensors[name]) for name in tensors)
    assert all(offset % 64 == 0 for offset in [len(plan.header)])


def test_a_file_that_another_program_wrote_is_read(tmp_path: Any) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    tensors = {"a": torch.arange(3, dtype=torch.uint8), "b": torch.randn(5), "c": torch.empty(0, 2)}
    found = layout.read(bytearray(safetensors.save(tensors)))
    assert all(is_same(found[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00" * 7,
        b"\xff" * 64,
        (2).to_bytes(8, "little") + b"[]",
        (2).to_bytes(8, "little") + b"{]",
        b"PK\x03\x04" * 20,
    ],
)
def test_bytes_that_are_not_a_safetensors_file_are_refused(data: bytes) -> None:
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        layout.read(bytearray(data))
