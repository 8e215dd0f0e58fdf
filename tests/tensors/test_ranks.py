"""Two processes that train one model: a part of each in every checkpoint, and a common stop."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from estiba.checkpoint import format as ckpt_format
from estiba.checkpoint.writer import Writer
from estiba.errors import CheckpointError


def start_two(toys: Any, folder: Path, *words: str) -> list[Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        toys.start(folder, "--evaluate-every", "6", *words, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]


def test_two_ranks_stop_together_and_resume_to_the_same_bits_and_one_rank_can_resume_alone(
    tmp_path: Path, toys: Any, until: Callable[[Callable[[], Any]], Any]
) -> None:
    whole = start_two(toys, tmp_path / "whole", "--steps", "20")
    ends = [toys.end(process) for process in whole]
    assert [end[0] for end in ends] == [0, 0], ends
    expected = ends[0][1].splitlines()[-1]

    run = start_two(toys, tmp_path / "run", "--steps", "20", "--pause-s", "0.03")
    until(lambda: "step=8 of" in run[0].out.read_text())
    os.kill(run[1].pid, signal.SIGTERM)  # one rank alone gets it
    ends = [toys.end(process) for process in run]
    assert [end[0] for end in ends] == [143, 143], ends
    assert "stopped by the stop of another rank: everything up to step" in ends[0][2]
    assert "stopped by SIGTERM: everything up to step" in ends[1][2]

    folder = tmp_path / "run/checkpoints"
    newest = folder / ckpt_format.checkpoint_names(folder)[0]
    manifest = ckpt_format.verify(newest)
    assert manifest.ranks == 2 and manifest.kind == "interrupt"
    assert {"state.json", "state-00001.json", "state-00001.safetensors"} <= set(manifest.files)

    shutil.copytree(folder, tmp_path / "alone/checkpoints")
    both = [toys.end(process) for process in start_two(toys, tmp_path / "run", "--steps", "20")]
    assert [end[0] for end in both] == [0, 0], both
    assert f"resuming at step {manifest.step}" in both[0][2]
    assert both[0][1].splitlines()[-1] == expected

    code, out, err = toys.end(toys.start(tmp_path / "alone", "--steps", "20", "--evaluate-every", "6"))
    assert code == 0 and f"resuming at step {manifest.step}" in err and "digest" in out


def test_a_signal_right_after_a_save_does_not_make_the_ranks_wait_for_each_other(
    tmp_path: Path, toys: Any, until: Callable[[Callable[[], Any]], Any]
) -> None:
    """The part of one rank may be written while the other's is still being written."""
    run = start_two(toys, tmp_path, "--steps", "400", "--save-every", "1", "--pause-s", "0.005", "--hidden", "20000")
    until(
        lambda: (tmp_path / "checkpoints").is_dir() and len(ckpt_format.checkpoint_names(tmp_path / "checkpoints")) > 1
    )
    for process in run:
        os.kill(process.pid, signal.SIGTERM)
    before = time.monotonic()
    ends = [toys.end(process) for process in run]
    assert [end[0] for end in ends] == [143, 143], ends
    assert time.monotonic() - before < 20
    assert "did not write its part" not in ends[0][2]


def writer_of(folder: Path, rank: int) -> Writer:
    descriptor = os.memfd_create("test")
    os.ftruncate(descriptor, 4096)
    return Writer(
        {
            "folder": str(folder), "rank": rank, "ranks": 2, "token": "feed", "descriptor": descriptor,
            "retention": {}, "upload": None,
        }
    )  # fmt: skip


def command(rank: int, number: int = 1, patience_s: float = 5) -> dict[str, Any]:
    name = "state.json" if rank == 0 else "state-00001.json"
    return {
        "step": 3, "number": number, "needed": 100, "kind": "step", "metrics": {}, "buffer_bytes": 4096, "files": [],
        "texts": {name: f"part {rank} of {number}"}, "rank_timeout_s": patience_s,
    }  # fmt: skip


@pytest.mark.parametrize("first", [0, 1])
def test_whichever_part_is_written_first_the_checkpoint_has_both(tmp_path: Path, first: int) -> None:
    writers = [writer_of(tmp_path, rank) for rank in range(2)]
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(writers[first].save, command(first))]
        time.sleep(0.2)
        futures.append(pool.submit(writers[1 - first].save, command(1 - first)))
        names = [future.result(timeout=10) for future in futures]
    assert sorted(names, key=str) == [None, "step-00000003"]
    manifest = ckpt_format.verify(tmp_path / "step-00000003")
    assert sorted(manifest.files) == ["state-00001.json", "state.json"] and manifest.ranks == 2
    assert sorted(os.listdir(tmp_path / "step-00000003")) == ["manifest.json", "state-00001.json", "state.json"]


def test_a_part_that_never_comes_costs_that_save_alone_and_is_not_mistaken_for_the_next(tmp_path: Path) -> None:
    writers = [writer_of(tmp_path, rank) for rank in range(2)]
    with pytest.raises(CheckpointError, match="rank 1 did not write its part in time"):
        writers[0].save(command(0, patience_s=0.2))
    writers[1].save(command(1))  # too late: the main rank no longer waits
    assert ckpt_format.checkpoint_names(tmp_path) == []
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda rank: writers[rank].save(command(rank, number=2)), (1, 0)))
    ckpt_format.verify(tmp_path / "step-00000003")
    assert (tmp_path / "step-00000003/state-00001.json").read_bytes() == b"part 1 of 2"
    assert not [name for name in os.listdir(tmp_path) if name.startswith(ckpt_format.TEMPORARY_PREFIX)]


def test_a_part_of_another_rank_is_verified_like_any_other(
    tmp_path: Path, until: Callable[[Callable[[], Any]], Any]
) -> None:
    writers = [writer_of(tmp_path, rank) for rank in range(2)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda rank: writers[rank].save(command(rank)), (0, 1)))
    until(lambda: writers[0].verified)  # it has been read back
    assert json.loads((tmp_path / "step-00000003/manifest.json").read_text())["ranks"] == 2
    (tmp_path / "step-00000003/state-00001.json").write_bytes(b"part 1 of 9")
    with pytest.raises(CheckpointError, match=r"state-00001\.json: its bytes do not match"):
        ckpt_format.verify(tmp_path / "step-00000003")
