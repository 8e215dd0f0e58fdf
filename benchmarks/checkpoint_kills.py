# environment: torch
"""Kill a trainer at a thousand random moments, and damage checkpoints: does anything get lost, is anything believed?

    python benchmarks/checkpoint_kills.py                      # 1,000 kills, some ten minutes on two cores
    python benchmarks/checkpoint_kills.py --kills 40 --damages 12

Needs a Python with torch, safetensors and what shared/estiba imports; no network, no image.

Kills: a process saves states as fast as it can and is killed with SIGKILL, in restores, snapshots, writes, publications
and deletions (tests/tensors/kills.py). After each kill a restore must give exactly the bits of the newest step that was
acknowledged as durable, or of a later one. SIGKILL leaves the page cache in place: power cuts are not rehearsed here.
Damage: single bits turned over and pages of zeros, at random places. Ours: ten in each file of a checkpoint; caught
means that the checkpoint before it came back, exact, and the bad one was quarantined. The peers get the same kinds of
damage at places spread over all their bytes, and are read as their documentation says; silent means that they gave
other numbers without a word.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from document import goal, publish

ROOT = Path(__file__).resolve().parent.parent
SERIES = 25
"""Kills in one folder that lives on."""
WIDTH, LAYERS = 512, 4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--damages", type=int, default=40)
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--at-once", type=int, default=os.cpu_count() or 1, help="series of kills side by side")
    parser.add_argument("--place", type=Path, help="where checkpoints are written; a temporary folder if left out")
    parser.add_argument("--results", type=Path, help="also write the JSON document here")
    options = parser.parse_args()
    sys.path[:0] = [str(ROOT / "shared"), str(ROOT / "tests")]
    os.environ |= {"PYTHONPATH": os.pathsep.join(sys.path[:2]), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory(prefix="checkpoint-kills-", dir=options.place) as folder:
        try:
            damage = damage_all(Path(folder), options.damages, options.seed)
        except ModuleNotFoundError as error:
            print(f"needs {error.name}: pip install torch safetensors -r shared/requirements.in", file=sys.stderr)
            return 2
        kills = kill_all(Path(folder), options)
    return report(kills, damage, options)


# --- kills


def kill_all(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Series of kills in folders of their own; half of them with files large enough for direct writes."""

    def series(index: int) -> dict[str, Any]:
        place = folder / f"series-{index}"
        count = min(SERIES, options.kills - index * SERIES)
        shape = ("small", "direct")[index % 2]
        words = [sys.executable, "-m", "tensors.kills", str(place), str(count), str(options.seed + index), shape]
        log = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout
        shutil.rmtree(place)
        found: dict[str, Any] = json.loads(log.split("KILLS ", 1)[1])
        print(f"series {index}: {found['kills']} kills, {found['saves']} saves, {found['unrecoverable'] or 'all well'}")
        return found

    began = time.monotonic()
    with ThreadPoolExecutor(options.at_once) as pool:
        all_series = list(pool.map(series, range(-(-options.kills // SERIES))))
    total: dict[str, Any] = {
        name: sum(found[name] for found in all_series) for name in ("kills", "saves", "resumed", "older")
    }
    phases = sorted({phase for found in all_series for phase in found["phases"]})
    total["phases"] = {phase: sum(found["phases"].get(phase, 0) for found in all_series) for phase in phases}
    total["unrecoverable"] = [problem for found in all_series for problem in found["unrecoverable"]]
    total["seconds"] = round(time.monotonic() - began, 1)
    return total


# --- damage


def damage_all(folder: Path, count: int, seed: int) -> dict[str, Any]:
    """The same kinds of damage for ours and for each peer."""
    peers: dict[str, Callable[[Path], Any]] = {"torch.save": torch_save, "safetensors": safetensors, "dcp": dcp}
    results: dict[str, Any] = {"ours": damage_ours(folder / "ours", count, seed)}
    for name, prepare in peers.items():
        place = folder / name
        place.mkdir()
        results[name] = damage_peer(place, prepare(place), count, seed)
    return results


@contextlib.contextmanager
def damaged(path: Path, kind: str, offset: int) -> Iterator[None]:
    """A file that is damaged as long as the block lasts."""
    from tensors.states import PAGE_BYTES, flip_bit, zero_page

    start = offset // PAGE_BYTES * PAGE_BYTES
    with open(path, "rb") as file:
        file.seek(start)
        before = file.read(PAGE_BYTES)
    if kind == "bit":
        flip_bit(path, offset * 8 + offset % 8)
    else:
        zero_page(path, offset // PAGE_BYTES)
    yield
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(before)


def damage_ours(folder: Path, count: int, seed: int) -> dict[str, Any]:
    from estiba.checkpoint.manager import CheckpointManager
    from tensors.states import files_of, is_same, state_of

    checkpoints = CheckpointManager(folder)
    for step in (2, 3):
        checkpoints.save(step, state_of(step, width=WIDTH, layers=LAYERS), wait=True)
    checkpoints.close()
    newest = folder / "step-00000003"
    chance = random.Random(seed)
    tally: dict[str, Any] = {"caught": 0, "of": count, "files": {}, "missed": []}
    for index in range(count):
        name = files_of(newest)[index % 4]
        kind = ("bit", "page")[index // 4 % 2]
        offset = chance.randrange((newest / name).stat().st_size)
        with damaged(newest / name, kind, offset), contextlib.redirect_stderr(open(os.devnull, "w")):
            again = CheckpointManager(folder)
            found = again.restore()
            again.close()
            is_caught = (
                found is not None
                and found.step == 2
                and is_same(found.state, state_of(2, width=WIDTH, layers=LAYERS))
                and (folder / "bad-step-00000003").is_dir()
            )
            if (folder / "bad-step-00000003").is_dir():
                os.rename(folder / "bad-step-00000003", newest)
        tally["files"][name] = tally["files"].get(name, 0) + is_caught
        tally["caught"] += is_caught
        if not is_caught:
            tally["missed"].append(f"{name}: {kind} at {offset}")
    return tally


def damage_peer(folder: Path, load: Callable[[], dict[str, Any]], count: int, seed: int) -> dict[str, Any]:
    """`load` gives tensors by name; how often it raises, gives the right numbers, or gives others without a word."""
    from tensors.states import bytes_of

    def digest() -> dict[str, bytes]:
        return {name: bytes_of(tensor) for name, tensor in load().items()}

    expected = digest()
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    total = sum(path.stat().st_size for path in files)
    chance = random.Random(seed)
    tally: dict[str, Any] = {"caught": 0, "silent": 0, "without effect": 0, "of": count}
    for index in range(count):
        offset = chance.randrange(total)
        path = files[0]
        for path in files:
            if offset < path.stat().st_size:
                break
            offset -= path.stat().st_size
        with damaged(path, ("bit", "page")[index // 4 % 2], offset):
            try:
                outcome = "without effect" if digest() == expected else "silent"
            except KeyboardInterrupt:
                raise
            except BaseException:  # dcp's own error is not an Exception
                outcome = "caught"
        tally[outcome] += 1
    return tally


def _flat() -> dict[str, Any]:
    from estiba.checkpoint import tree_spec
    from tensors.states import state_of

    tensors, _ = tree_spec.flatten(state_of(3, width=WIDTH, layers=LAYERS))
    return {name: tensor.clone() for name, tensor in tensors.items()}


def torch_save(folder: Path) -> Callable[[], dict[str, Any]]:
    import torch

    torch.save(_flat(), folder / "state.pt")
    return lambda: torch.load(folder / "state.pt", weights_only=True)


def safetensors(folder: Path) -> Callable[[], dict[str, Any]]:
    from safetensors.torch import load_file, save_file

    save_file(_flat(), folder / "state.safetensors")
    return lambda: load_file(folder / "state.safetensors")


def dcp(folder: Path) -> Callable[[], dict[str, Any]]:
    import warnings

    import torch
    import torch.distributed.checkpoint as checkpoint

    warnings.filterwarnings("ignore", category=UserWarning)
    checkpoint.save(_flat(), checkpoint_id=folder)
    shapes = _flat()

    def load() -> dict[str, Any]:
        state = {name: torch.full_like(tensor, 1) for name, tensor in shapes.items()}
        checkpoint.load(state, checkpoint_id=folder)
        return state

    return load


# --- what came out


def report(kills: dict[str, Any], damage: dict[str, Any], options: argparse.Namespace) -> int:
    print(
        f"{kills['kills']} kills in {kills['seconds']:.0f} s, {kills['saves']} checkpoints acknowledged as durable, "
        f"{len(kills['unrecoverable'])} unrecoverable; killed "
        + ", ".join(f"{phase} {count}" for phase, count in kills["phases"].items())
    )
    for name, found in damage.items():
        rest = ", ".join(f"{word} {found[word]}" for word in ("silent", "without effect") if word in found)
        print(f"{name:12} caught {found['caught']} of {found['of']} damages{', ' + rest if rest else ''}")
    goals = [
        goal("kills", kills["kills"], f">={options.kills}"),
        goal("unrecoverable", len(kills["unrecoverable"]), "==0"),
        goal("damage caught, the one before restored", damage["ours"]["caught"], f"=={options.damages}"),
    ]
    publish("checkpoint_kills", {"kills": kills, "damage": damage}, goals, path=options.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
