"""Kill the real process at random moments: the output has the same bytes, and little is computed twice."""

from __future__ import annotations

import pytest
from rehearsal import rehearse


@pytest.mark.slow
@pytest.mark.parametrize("is_new_host", [False, True], ids=["same host", "only checkpoints kept"])
def test_a_job_killed_and_restarted_ends_with_the_same_bytes(tmp_path, tiny_model, is_new_host):
    result = rehearse(tmp_path, tiny_model, kills=2, seed=5 + is_new_host, is_new_host=is_new_host, files=10, rows=120)
    assert result.equal, result.different
    assert result.kills
    assert result.within_bound, f"{result.rows_twice} rows started twice by {len(result.kills)} kills"


@pytest.mark.slow
@pytest.mark.parametrize("output", ["mean", "rows"])
def test_a_job_of_chunks_killed_and_restarted_ends_with_the_same_bytes(tmp_path, tiny_model, output):
    flags = ("--chunk", "16", "--chunk-overlap", "4", "--chunk-output", output, "--engine", "torch")
    result = rehearse(tmp_path, tiny_model, kills=2, seed=7, is_new_host=True, files=10, rows=120, flags=flags)
    assert result.equal, result.different
    assert result.kills
