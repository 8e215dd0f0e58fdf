"""What a batch takes on a GPU, fitted to two batches, decides how many rows later ones have."""

from __future__ import annotations

import numpy as np
import pytest

from embed.config import EmbedConfig
from embed.model import Encoder
from embed.model.memory import MemoryModel, fitted

GIB = 2**30


@pytest.mark.parametrize("longest", [512, 8192])
@pytest.mark.parametrize(("per_token", "per_pair"), [(40_000, 0), (40_000, 100), (1_000, 3_000)])
def test_the_cost_of_tokens_and_of_pairs_of_tokens_is_found(per_token, per_pair, longest):
    def peak_bytes(rows: int, width: int) -> int:
        return rows * (per_token * width + per_pair * width**2)

    model = fitted(peak_bytes, GIB, longest)
    assert (model.bytes_per_token, model.bytes_per_pair) == pytest.approx((per_token, per_pair), rel=1e-6, abs=1e-3)
    for width in (8, 100, 512, 4096):
        rows = model.rows_of(width)
        assert rows == 1 or peak_bytes(rows, width) <= GIB
        assert peak_bytes(rows + 1, width) > GIB


@pytest.mark.parametrize("longest", [20, 32, 33, 100])
def test_a_model_that_reads_few_tokens_is_measured_on_those(longest):
    asked = []

    def peak_bytes(rows: int, width: int) -> int:
        asked.append((rows, width))
        return rows * min(width, longest) * 1000

    model = fitted(peak_bytes, GIB, longest)
    assert all(width <= longest for _, width in asked)
    assert model.bytes_per_token == pytest.approx(1000, rel=0.05)
    assert model.bytes_per_pair == pytest.approx(0, abs=1)


def test_batches_keep_to_what_fits_and_vectors_do_not_change(tiny_model, texts):
    plain, bounded = (Encoder(EmbedConfig(model=str(tiny_model), device="cpu", engine="torch")) for _ in range(2))
    bounded._engines.best.memory = MemoryModel(bytes_per_token=10, bytes_per_pair=1, room_bytes=4_000)
    expected = plain.encode(plain.tokenize(texts))
    batches = []
    found = bounded.encode(bounded.tokenize(texts), on_batch=batches.append)
    assert np.allclose(found.vectors, expected.vectors, atol=2e-6, rtol=1e-4)
    longest = int(found.n_tokens.max())
    assert batches[0].rows <= max(1, 4_000 // (10 * longest + longest**2))
    assert len(batches) > 1
