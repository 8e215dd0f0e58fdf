"""What a rank does after other ranks were lost, without them: which thread ends the process, and what it says."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from estiba.checkpoint.manager import CheckpointManager
from estiba.distributed import DistContext
from estiba.errors import RanksLost
from estiba.platform.stop import Stop
from estiba.training.survivors import Survivors

State = tuple[int, Mapping[str, Any], Mapping[str, float]]


class Checkpoints:
    """Sharded checkpoints of a rank of two replicas."""

    is_sharded = has_replicas = is_first_of_replica = True
    folder = Path("/checkpoints")
    newest_step = 5

    def __init__(self, save: Callable[[], bool] = lambda: True) -> None:
        self.state_lock = threading.RLock()
        self.dist = DistContext()
        self._save = save

    def save_replica(self, *_: Any, **__: Any) -> bool:
        return self._save()


def lose(checkpoints: Checkpoints, state: Callable[[], State] = lambda: (7, {}, {})) -> str:
    """Lose the connection to another rank in the middle of training. Returns what the rank says."""
    survivors = Survivors(cast(CheckpointManager, checkpoints), state, stop=Stop())
    with pytest.raises(RanksLost) as caught, survivors.watching():
        raise RuntimeError("Connection closed by peer")
    return str(caught.value)


def fail() -> Any:
    raise KeyError("exp_avg")


def test_an_error_of_the_save_does_not_hide_the_loss() -> None:
    kept = r"lost other ranks of the run (RuntimeError: Connection closed by peer): checkpoints up to step 5 are kept; "
    assert lose(Checkpoints(save=fail)) == f"{kept}step 7 could not be saved (KeyError: 'exp_avg')"
    assert lose(Checkpoints(), state=fail) == f"{kept}the current step could not be saved (KeyError: 'exp_avg')"
    assert lose(Checkpoints(save=lambda: False)) == f"{kept}step 7 could not be saved"


def test_only_the_rank_that_commits_says_that_its_replica_saved_everything() -> None:
    checkpoints = Checkpoints()
    assert "this replica saved everything up to step 7 in /checkpoints" in lose(checkpoints)
    checkpoints.is_first_of_replica = False
    assert "this rank's part of step 7 is written; it counts once" in lose(checkpoints)


def test_only_the_main_rank_knows_which_checkpoint_is_the_newest() -> None:
    checkpoints = Checkpoints()
    checkpoints.has_replicas = False
    assert "checkpoints up to step 5 are kept" in lose(checkpoints)
    checkpoints.dist = DistContext(rank=1, world_size=2)
    assert "the newest committed checkpoint is kept" in lose(checkpoints)


def test_the_watcher_works_on_this_ranks_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[tuple[int, bool]] = []
    is_set = threading.Event()

    def set_device(device: int) -> None:
        chosen.append((device, threading.current_thread() is threading.main_thread()))
        is_set.set()

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    monkeypatch.setenv("ESTIBA_LOST_FILE", str(tmp_path / "lost"))
    survivors = Survivors(cast(CheckpointManager, Checkpoints()), lambda: (7, {}, {}), stop=Stop())
    with survivors.watching():
        assert is_set.wait(30)
    assert chosen == [(3, False)]


WATCHED = """
    import os, threading, time
    from pathlib import Path
    from estiba.errors import RanksLost
    from estiba.platform.stop import Stop
    from estiba.training import survivors
    from tensors.test_survivors import Checkpoints

    closing = threading.Event()

    class Closing(Checkpoints):
        def close(self, timeout_s):
            closing.set()
            {close}

    survivors.POLL_S = survivors.SETTLE_S = 0.1
    watch = survivors.Survivors(Closing(), lambda: (7, {{}}, {{}}), stop=Stop())
    try:
        with watch.watching():
            closing.wait()
            {then}
    except RanksLost:
        pass
    os._exit(3)
"""


def watched(folder: Path, close: str, then: str) -> tuple[int, str]:
    """Run a rank whose host agent noticed a loss. Returns its status and what it wrote."""
    (folder / "lost").touch()
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(WATCHED.format(close=close, then=then))],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "ESTIBA_ROOT": str(folder),
            "ESTIBA_LOST_FILE": str(folder / "lost"),
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    return process.returncode, process.stdout + process.stderr


@pytest.mark.parametrize("then", ["raise RuntimeError('Connection closed by peer')", "raise KeyError('x')", "pass"])
def test_the_main_thread_does_not_end_the_process_while_the_watcher_finishes_an_upload(
    tmp_path: Path, then: str
) -> None:
    """The upload takes a second, in which the main thread comes to its end."""
    code, log = watched(tmp_path, "time.sleep(1); print('uploaded', flush=True)", then)
    assert code == 75 and "uploaded" in log, log


def test_an_error_while_the_watcher_closes_the_checkpoints_does_not_hide_the_loss(tmp_path: Path) -> None:
    code, log = watched(tmp_path, "raise OSError('no space')", "threading.Event().wait()")
    assert code == 75, log
    assert (tmp_path / "output/failure").read_text().startswith("this replica saved everything up to step 7")


def test_the_watcher_keeps_what_another_rank_gave_as_the_reason(tmp_path: Path) -> None:
    (tmp_path / "output").mkdir()
    (tmp_path / "output/failure").write_text("ValueError: loss is nan\n")
    code, log = watched(tmp_path, "pass", "threading.Event().wait()")
    assert code == 75, log
    assert (tmp_path / "output/failure").read_text() == "ValueError: loss is nan\n"
