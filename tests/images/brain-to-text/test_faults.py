"""A run from a misbehaving bucket ends with the same bits as a run from a folder."""

from __future__ import annotations

import json
import os
import random
import threading
from pathlib import Path

import pytest
from bucket import bucket_for
from rehearsal import outcome, recordings, run

STEPS = 80
CHANGES = {"num_training_batches": STEPS, "batches_per_val_step": 20, "cache_gb": 0.0}
"""There is no cache, so every trial of every step is a request."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recordings(tmp_path_factory.mktemp("data"), trials=60)


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The outputs of a run from a folder, without faults."""
    root = tmp_path_factory.mktemp("undisturbed")
    run(root, data, **CHANGES)
    return outcome(root)


@pytest.mark.parametrize("seed", [1, 2])
def test_errors_slow_responses_expired_credentials_and_a_restart_change_no_bit(
    seed: int, undisturbed: dict[str, bytes], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1% of requests fail, 5% take half a second, the credentials expire, and the endpoint restarts."""
    dice, counts = random.Random(seed), {"error": 0, "slow": 0, "expired": 0, "restarted": 0}
    with bucket_for(monkeypatch) as bucket:
        location = bucket.put_folder(data)
        first_get = len(bucket.gets)
        expires, restarts = dice.randint(50, 150), dice.randint(180, 280)
        is_back = threading.Event()

        def restart() -> None:
            bucket.stop()
            threading.Timer(0.5, lambda: (bucket.start(), is_back.set())).start()

        def fault(number: int, _: str) -> tuple[str, float] | None:
            number -= first_get
            if number == expires:
                counts["expired"] = 1
                monkeypatch.setitem(os.environ, "AWS_ACCESS_KEY_ID", "second")
                bucket.good_keys = {"second"}
            if number == restarts:
                counts["restarted"] = 1
                threading.Thread(target=restart).start()
            draw = dice.random()
            kind = "error" if draw < 0.01 else "slow" if draw < 0.06 else None
            if kind is not None:
                counts[kind] += 1
            return None if kind is None else (kind, 0.5)

        run(tmp_path / "index", location, **{**CHANGES, "num_training_batches": 1})
        first_get = len(bucket.gets)
        bucket.fault = fault
        run(tmp_path / "run", location, **CHANGES)
        requests = len(bucket.gets) - first_get
        assert is_back.is_set()
    results = json.loads((tmp_path / "run/output/results.json").read_text())
    assert requests >= 300 and all(counts.values()), (requests, counts)
    assert results["trials_left_out"] == []
    assert outcome(tmp_path / "run") == undisturbed
