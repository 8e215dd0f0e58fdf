"""A trainer that saves as fast as it can, killed at random moments: what was acknowledged as durable must come back.

The trainer is forked from a process that has imported everything, so that a thousand kills take minutes. Each attempt
restores, compares every bit with what the step must hold, and saves on; SIGKILL comes at a random moment, in a restore,
a snapshot, a write, a publication, a read-back or a deletion.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

from estiba.checkpoint import format as ckpt_format
from estiba.checkpoint.manager import CheckpointManager
from estiba.checkpoint.retention import Retention
from estiba.errors import EstibaError
from tensors.states import is_same, state_of

LONGEST_S = 1.6
"""A writer needs about half a second to start; the rest is saving."""
SHAPES = {"small": {"width": 48, "layers": 3}, "direct": {"width": 880, "layers": 3}}
"""`direct` has files beyond 8 MiB, which are written and read past the page cache."""


@dataclass
class Kills:
    """The results of a series of kills."""

    kills: int = 0
    saves: int = 0
    """Acknowledged as durable."""
    resumed: int = 0
    """Attempts that began from a checkpoint."""
    phases: dict[str, int] = field(default_factory=dict)
    """Kills by what the trainer was doing, judged by the folder."""
    older: int = 0
    """The checkpoint before the newest acknowledged one came back."""
    unrecoverable: list[str] = field(default_factory=list)


def kill_again_and_again(folder: Path, *, kills: int, seed: int, shape: str = "small") -> Kills:
    """Start, kill, restore, compare; `kills` times in one folder."""
    chance = random.Random(seed)
    found = Kills()
    folder.mkdir(parents=True, exist_ok=True)
    acknowledged = 0
    while found.kills < kills:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            _train(folder, writing, shape, seed * 100_003 + found.kills)
        os.close(writing)
        # One in eight very early, in the restore; the others anywhere.
        early = chance.random() < 0.125
        time.sleep(chance.uniform(0.0, 0.03) if early else chance.uniform(0.3, LONGEST_S))
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        with os.fdopen(reading) as file:
            lines = file.read().split("\n")
        _, status = os.waitpid(child, 0)
        words = [json.loads(line) for line in lines[:-1]]  # the last line may be half a word
        saved = [word["saved"] for word in words if "saved" in word]
        writers = [word["writer"] for word in words if "writer" in word]
        found.resumed += any("resumed" in word for word in words)
        if not os.WIFSIGNALED(status):
            why = next((word["error"] for word in words if "error" in word), f"ended with {status}")
            found.unrecoverable.append(why)
            return found
        found.kills += 1
        found.saves += len(saved)
        phase = _phase(folder, bool(words))
        found.phases[phase] = found.phases.get(phase, 0) + 1
        _wait_for_the_end_of(writers)
        acknowledged = max([acknowledged, *saved])
        try:
            problem = _problem(folder, acknowledged, shape, found)
        except EstibaError as error:
            problem = str(error)
        if problem:
            found.unrecoverable.append(f"kill {found.kills}: {problem}")
    return found


def _train(folder: Path, writing: int, shape: str, seed: int) -> None:
    """The killed process. Never returns."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        chance = random.Random(seed)

        def tell(**word: object) -> None:
            os.write(writing, (json.dumps(word) + "\n").encode())

        checkpoints = CheckpointManager(folder, retention=Retention(keep_last=2, keep_every=97))
        restored = checkpoints.restore()
        step = 0
        if restored is not None:
            step = restored.step
            if not is_same(restored.state, state_of(step, **SHAPES[shape])):
                tell(error=f"what came back at step {step} is not what was saved")
                os._exit(1)
            tell(resumed=step)
        told, writer = step, None
        while True:
            step += 1
            checkpoints.save(step, state_of(step, **SHAPES[shape]))
            if checkpoints._writer is not None and checkpoints._writer.pid != writer:
                writer = checkpoints._writer.pid
                tell(writer=writer)
            time.sleep(chance.choice((0.0, 0.0, 0.01, 0.05)))
            if checkpoints.newest_step is not None and checkpoints.newest_step > told:
                told = checkpoints.newest_step
                tell(saved=told)
    except BaseException:
        os.write(writing, (json.dumps({"error": traceback.format_exc()}) + "\n").encode())
    finally:
        os._exit(1)


def _phase(folder: Path, had_begun: bool) -> str:
    """Return what the trainer was doing, judged by the files present."""
    with contextlib.suppress(FileNotFoundError):
        names = [name for name in os.listdir(folder) if name.startswith(ckpt_format.TEMPORARY_PREFIX)]
        if any("deleting" in name for name in names):
            return "while deleting"
        if names:
            return "while writing"
    return "between" if had_begun else "while starting or restoring"


def _wait_for_the_end_of(pids: list[int]) -> None:
    """The kernel kills the writer with its trainer; a lost machine takes both at once."""
    deadline = time.monotonic() + 10
    for pid in pids:
        while time.monotonic() < deadline:
            try:
                with open(f"/proc/{pid}/stat") as file:
                    if file.read().rsplit(")", 1)[1].split()[0] == "Z":  # waits for whoever adopted it
                        break
            except OSError:
                break
            time.sleep(0.002)
        else:
            raise RuntimeError(f"the writer {pid} outlived its trainer")


def _problem(folder: Path, acknowledged: int, shape: str, found: Kills) -> str | None:
    """Restore in this process, and return what is wrong with the state."""
    checkpoints = CheckpointManager(folder)
    try:
        restored = checkpoints.restore()
        if restored is None:
            return f"nothing came back; step {acknowledged} was acknowledged" if acknowledged else None
        if not is_same(restored.state, state_of(restored.step, **SHAPES[shape])):
            return f"what came back at step {restored.step} is not what was saved"
        if restored.step < acknowledged:
            if restored.step < acknowledged - 1:
                return f"step {restored.step} came back; step {acknowledged} was acknowledged"
            found.older += 1
        if bad := ckpt_format.quarantined_names(folder):
            return f"{bad} did not verify, though no byte was touched"
        return None
    finally:
        checkpoints.close()


if __name__ == "__main__":  # python -m tensors.kills FOLDER KILLS SEED SHAPE
    series = kill_again_and_again(Path(sys.argv[1]), kills=int(sys.argv[2]), seed=int(sys.argv[3]), shape=sys.argv[4])
    print("KILLS " + json.dumps(vars(series)))
