# environment: torch
"""Saving and loading one training state of 1.3 GB: ours against torch.save, safetensors and torch's distributed one.

    python benchmarks/checkpoint_save.py                        # five rounds, some minutes on a quiet machine
    python benchmarks/checkpoint_save.py --rounds 9 --place /mnt/disk

Needs a Python with torch, safetensors and what shared/estiba imports; no network, no image. Every method in turn, in
an order that turns with each round; medians. Between two of them files are deleted and the disk is synced.

blocking: until the call returns, which is what a training step waits for. durable: until every byte is on the disk:
after fsync for torch.save and safetensors, which leave that to the caller; after the future for dcp.async_save, whose
writer syncs its files; when the name is published for ours, digests of all bytes included (the read-back that follows
is waited for before the next method begins). load: back to tensors in memory, from the disk and not the page cache
where this process may drop that; ours compares every byte with its digest, the others compare none.
The state: a model of 49 tensors and two AdamW moments of each, float32, and AdamW's 49 step counters.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

from document import goal, publish

ROOT = Path(__file__).resolve().parent.parent
WIDTH, LAYERS, VOCABULARY = 768, 12, 32_000
GOALS = [
    ("blocking vs dcp.async_save", "blocking_s", "dcp.async_save", 0.35),
    ("blocking vs torch.save", "blocking_s", "torch.save", 0.4),
    ("durable vs dcp.async_save", "durable_s", "dcp.async_save", 0.4),
    ("durable vs safetensors + fsync", "durable_s", "safetensors + fsync", 1.2),
]


def make_state(scale: float) -> dict[str, Any]:
    """As a model's and AdamW's state_dict() give it."""
    import torch

    width = max(8, int(WIDTH * scale))
    shapes = [(max(8, int(VOCABULARY * scale)), width)]
    shapes += [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)] * LAYERS
    generator = torch.Generator().manual_seed(1)

    def some(shape: tuple[int, int]) -> Any:
        return torch.randn(shape, generator=generator)

    model = {f"layers.{index}.weight": some(shape) for index, shape in enumerate(shapes)}
    moments = {
        index: {"step": torch.tensor(100.0), "exp_avg": some(shape), "exp_avg_sq": some(shape).square()}
        for index, shape in enumerate(shapes)
    }
    groups = [{"lr": 2e-4, "betas": (0.9, 0.95), "params": list(range(len(shapes)))}]
    return {"model": model, "optimizer": {"state": moments, "param_groups": groups}}


class Method(ABC):
    """One way to save. `save` gives a function that waits until it is durable."""

    def __init__(self, folder: Path, state: dict[str, Any]) -> None:
        self.folder, self.state = folder, state

    @abstractmethod
    def save(self) -> Callable[[], object]: ...

    @abstractmethod
    def load(self) -> dict[str, Any]: ...

    def quiet(self) -> None:
        """Wait for what goes on after a save."""
        return None  # noqa: RET501 - nothing does

    def wait(self) -> None:
        """Forget what was saved."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


class Ours(Method):
    def __init__(self, folder: Path, state: dict[str, Any]) -> None:
        from estiba.checkpoint.manager import CheckpointManager

        super().__init__(folder, state)
        self.checkpoints = CheckpointManager(folder)
        self.step = 0
        self.checkpoints.reserve(state)  # the loop does so after the first step
        self.checkpoints._buffer.wait_until_populated()

    def save(self) -> Callable[[], object]:
        self.step += 1
        self.checkpoints.save(self.step, self.state)
        return self.checkpoints.wait

    def load(self) -> dict[str, Any]:
        found = self.checkpoints.restore(self._newest())
        assert found is not None
        return found.state

    def _newest(self) -> Path:
        return self.folder / f"step-{self.step:08d}"

    def quiet(self) -> None:
        """Wait until the read-back is over: the writer does nothing any more."""
        import psutil

        assert self.checkpoints._writer is not None
        writer = psutil.Process(self.checkpoints._writer.pid)
        before = None
        while before != (now := writer.cpu_times()[:2]):
            before = now
            time.sleep(1.0)

    def wait(self) -> None:
        shutil.rmtree(self._newest(), ignore_errors=True)

    def close(self) -> None:
        self.checkpoints.close()
        super().close()


class TorchSave(Method):
    def save(self) -> Callable[[], object]:
        import torch

        path = self.folder / "state.pt"
        torch.save(self.state, path)
        return lambda: fsync(path)

    def load(self) -> dict[str, Any]:
        import torch

        return dict(torch.load(self.folder / "state.pt", weights_only=True))


class Safetensors(Method):
    """Tensors alone; its format has no place for the rest of a state."""

    def __init__(self, folder: Path, state: dict[str, Any]) -> None:
        from estiba.checkpoint import tree_spec

        super().__init__(folder, state)
        self.flat, self.skeleton = tree_spec.flatten(state)

    def save(self) -> Callable[[], object]:
        from safetensors.torch import save_file

        path = self.folder / "state.safetensors"
        save_file(self.flat, path)
        return lambda: fsync(path)

    def load(self) -> dict[str, Any]:
        from safetensors.torch import load_file

        from estiba.checkpoint import tree_spec

        return dict(tree_spec.unflatten(self.skeleton, load_file(self.folder / "state.safetensors").__getitem__))


class Dcp(Method):
    """`no_dist`: one process, which another row's process group is not to change."""

    def save(self) -> Callable[[], object]:
        import torch.distributed.checkpoint as dcp

        dcp.save(self.state, checkpoint_id=self.folder / "state", no_dist=True)
        return lambda: None

    def load(self) -> dict[str, Any]:
        """Into tensors that are there, as its documentation says: a model and an optimizer that were just made."""
        import torch.distributed.checkpoint as dcp

        dcp.load(self.target, checkpoint_id=self.folder / "state", no_dist=True)
        return self.target

    def prepare(self) -> None:
        self.target = zeros(self.state)


class DcpAsync(Dcp):
    def options(self) -> dict[str, Any]:
        return {"no_dist": True}

    def __init__(self, folder: Path, state: dict[str, Any]) -> None:
        super().__init__(folder, state)
        self.given = self.options()

    def save(self) -> Callable[[], object]:
        import torch.distributed.checkpoint as dcp

        future = dcp.async_save(self.state, checkpoint_id=self.folder / "state", **self.given)
        return future.upload_completion.result if hasattr(future, "upload_completion") else future.result


class DcpAsyncCached(DcpAsync):
    """Its older stager, which copies into the memory of the save before."""

    def options(self) -> dict[str, Any]:
        from torch.distributed.checkpoint.staging import BlockingAsyncStager

        return {**super().options(), "async_stager": BlockingAsyncStager(cache_staged_state_dict=True)}


class DcpAsyncShared(DcpAsync):
    """Its newer stager kept over all saves, with shared memory; pinned memory and asynchronous staging want a GPU."""

    def options(self) -> dict[str, Any]:
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        return {
            **super().options(),
            "async_stager": DefaultStager(
                StagingOptions(
                    use_pinned_memory=False,
                    use_shared_memory=True,
                    use_async_staging=False,
                    use_non_blocking_copy=False,
                )
            ),
        }


class DcpAsyncProcess(DcpAsyncShared):
    """The same, written by another process. It needs a process group."""

    def options(self) -> dict[str, Any]:
        import torch.distributed as dist
        from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

        if not dist.is_initialized():
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
            dist.init_process_group("gloo", rank=0, world_size=1)
        return {**super().options(), "no_dist": False, "async_checkpointer_type": AsyncCheckpointerType.PROCESS}


METHODS: dict[str, type[Method]] = {
    "ours": Ours,
    "torch.save": TorchSave,
    "safetensors + fsync": Safetensors,
    "dcp.save": Dcp,
    "dcp.async_save": DcpAsync,
    "dcp.async_save, cached": DcpAsyncCached,
    "dcp.async_save, shared": DcpAsyncShared,
    "dcp.async_save, process": DcpAsyncProcess,
}


def measure(folder: Path, rounds: int, scale: float) -> dict[str, Any]:
    """Seconds of every round by method; a method that cannot run has a reason instead."""
    state = make_state(scale)
    found: dict[str, Any] = {}
    methods: dict[str, Method] = {}
    for name, kind in METHODS.items():
        place = folder / name.replace(" ", "-")
        place.mkdir()
        try:
            methods[name] = kind(place, state)
            found[name] = {"blocking_s": [], "durable_s": [], "load_s": []}
        except Exception as error:
            found[name] = {"reason": f"{type(error).__name__}: {error}"[:300]}
    order = list(methods)
    for turn in range(rounds + 1):  # the first warms up and is not counted
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            if "reason" in found[name]:
                continue
            try:
                seconds = once(methods[name], state, check=turn == 0)
            except Exception as error:
                found[name] = {"reason": f"{type(error).__name__}: {error}"[:300]}
                continue
            if turn:
                for key, value in seconds.items():
                    found[name][key].append(round(value, 4))
        print(f"round {turn} of {rounds} done", file=sys.stderr)
    for method in methods.values():
        method.close()
    return found


def once(method: Method, state: dict[str, Any], *, check: bool) -> dict[str, float]:
    """One save and one load, everything quiet before and after."""
    os.sync()
    time.sleep(0.3)
    began = time.monotonic()
    wait = method.save()
    blocking = time.monotonic() - began
    wait()
    durable = time.monotonic() - began
    method.quiet()
    if isinstance(method, Dcp):
        method.prepare()
    drop_caches()
    began = time.monotonic()
    loaded = method.load()
    load = time.monotonic() - began
    if check and not same(loaded, state):
        raise AssertionError("what was loaded is not what was saved")
    del loaded
    if isinstance(method, Dcp):
        method.target = {}
    method.wait()
    return {"blocking_s": blocking, "durable_s": durable, "load_s": load}


def drop_caches() -> bool:
    os.sync()
    with contextlib.suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("1")
        return True
    return False


def fsync(path: Path) -> None:
    for name in (path, path.parent):
        descriptor = os.open(name, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def zeros(state: Any) -> Any:
    import torch

    if isinstance(state, torch.Tensor):
        return torch.zeros_like(state)
    if isinstance(state, dict):
        return {key: zeros(value) for key, value in state.items()}
    return state


def same(left: Any, right: Any) -> bool:
    import torch

    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return set(left) == set(right) and all(same(left[key], right[key]) for key in left)
    return bool(left == right)


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--place", type=Path, help="where checkpoints are written; a temporary folder if left out")
    parser.add_argument("--scale", type=float, default=1.0, help="of each side of the tensors; below 1 for a trial")
    parser.add_argument("--results", type=Path, help="also write the JSON document here")
    options = parser.parse_args()
    sys.path[:0] = [str(ROOT / "shared")]
    os.environ["PYTHONPATH"] = sys.path[0]
    warnings.filterwarnings("ignore")
    try:
        import torch
        import xxhash  # noqa: F401 - to say what is missing before minutes have passed
    except ModuleNotFoundError as error:
        print(f"needs {error.name}: pip install torch safetensors -r shared/requirements.in", file=sys.stderr)
        return 2
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="checkpoint-save-", dir=options.place) as folder:
        found = measure(Path(folder), options.rounds, options.scale)
    state = make_state(options.scale)
    size = sum(t.nbytes for t in state["model"].values()) * 3
    medians = {
        name: entry if "reason" in entry else {key: statistics.median(values) for key, values in entry.items()}
        for name, entry in found.items()
    }
    for name, entry in medians.items():
        if "reason" in entry:
            print(f"{name:26} could not run: {entry['reason']}")
        else:
            print(
                f"{name:26} blocking {entry['blocking_s']:6.2f} s   durable {entry['durable_s']:6.2f} s   "
                f"load {entry['load_s']:6.2f} s"
            )
    goals = []
    for name, key, peer, limit in GOALS:
        both_ran = "reason" not in medians[peer] and "reason" not in medians["ours"]
        value = round(medians["ours"][key] / medians[peer][key], 3) if both_ran else None
        goals.append(goal(name, value, f"<={limit}"))
    results = {
        "size_bytes": size,
        "rounds": options.rounds,
        "load_average_before": round(load_before, 2),
        "cold_loads": drop_caches(),
        "medians": medians,
        "all_rounds": found,
    }
    publish("checkpoint_save", results, goals, conditions=f"torch {torch.__version__}", path=options.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
