"""What a run holds in memory: caches leave room for the steps, and buffers do not pile up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hdf5_files import open_trials, write_folder

from brain_to_text.config import BrainConfig
from brain_to_text.data import opening
from brain_to_text.data.buffers import MAX_FREE, BufferPool
from brain_to_text.model import DecoderShape, GRUDecoder
from estiba.training import allocator

GB = 10**9


def test_a_cache_takes_a_share_of_what_is_left_but_never_what_the_steps_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "available_memory_bytes", lambda: 10 * GB)
    assert opening.cache_bytes(None, 0.4, 2 * GB) == 4 * GB
    assert opening.cache_bytes(None, 0.4, 9 * GB) == 1 * GB
    assert opening.cache_bytes(None, 0.4, 11 * GB) == 0
    assert opening.cache_bytes(0.5, 0.4, 11 * GB) == GB // 2


@pytest.mark.parametrize("settings", [{}, {"n_classes": 1681}, {"patch_size": 0}, {"batch_size": 4}])
def test_a_step_is_never_taken_for_smaller_than_it_is(settings: dict[str, Any]) -> None:
    """The memory of the tensors that a step saves for its gradient, measured by torch."""
    config = BrainConfig(**{"n_units": 32, "n_layers": 2, "batch_size": 8, **settings})
    shape = DecoderShape(n_features=64, n_days=2, **config.model_dump(include={
        "n_units", "n_layers", "n_classes", "patch_size", "patch_stride", "rnn_dropout", "bidirectional"}))  # fmt: skip
    saved: dict[int, int] = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        features = torch.randn(config.batch_size, 300, 64)
        GRUDecoder(shape, seed=1)(features, (0, 1), torch.zeros(config.batch_size, dtype=torch.int64))
    on_gpu = opening.step_bytes(config, [(300, 64)], on_cpu=False)
    assert opening.step_bytes(config, [(300, 64)], on_cpu=True) - on_gpu > sum(saved.values())


def test_buffers_of_batches_that_grow_do_not_pile_up() -> None:
    pool = BufferPool()
    for size in range(1000, 4000, 300):
        held = [pool.take(size) for _ in range(4)]
        del held
        assert len(pool._free) <= MAX_FREE == 2


def test_freed_memory_is_kept_only_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []
    monkeypatch.setattr(
        allocator.ctypes, "CDLL", lambda _: type("C", (), {"mallopt": lambda *a: called.append(a) or 1})
    )
    monkeypatch.setattr(allocator, "available_memory_bytes", lambda: 2 * 2**30)
    assert not allocator.keep_freed_memory() and not called
    monkeypatch.setattr(allocator, "available_memory_bytes", lambda: 64 * 2**30)
    assert allocator.keep_freed_memory() and len(called) == 2


def test_the_limit_of_a_container_counts_when_a_data_set_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_folder(tmp_path, splits=("train",))
    monkeypatch.setattr(opening, "available_memory_bytes", lambda: 10**5)
    with open_trials(folder, cache_gb=None) as trials:
        needed = opening.step_bytes(
            BrainConfig(batch_size=6, patch_size=0), [ref.layout.shape for ref in trials.refs], on_cpu=False
        )
        assert trials.reader.memory.policy.limit_bytes == 10**5 - needed < 40_000
