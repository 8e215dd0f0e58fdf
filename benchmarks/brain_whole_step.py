"""brain-to-text's whole step, loader included, against the same step on tensors that lie in memory already.

    make bench/brain_whole_step                              # the CPU: a smaller decoder, float32
    python benchmarks/brain_whole_step.py --rounds 7         # on a machine with a GPU: full sizes, bfloat16

Needs what `make bench/brain_whole_step` installs: brain-to-text's requirements; no image. Recordings of the study's
lengths lie on an S3 server of its own (25 ms a request, 90 MB/s a connection). Each feed takes the same steps of the
plan in turn, as the training loop does: batches made in a thread, moved, computed, clipped, stepped.

memory    the batches of these steps, read and prepared before the clock starts
loader    the reader with its trials in the host's memory, after one pass over them
device    the reader with its trials on the device, after one pass over them
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

from hdf5_s3 import BUCKET, KEY, LATENCY_MS, MB_PER_S, ROOT, SECRET, endpoint  # type: ignore[import-not-found]

SMALL = {"n_units": 64, "n_layers": 2, "batch_size": 16}
FULL = {"n_units": 768, "n_layers": 5, "batch_size": 64}
FEEDS = ("memory", "loader", "device")
SESSIONS, TRIALS = 4, 60
LEFT_OUT = 3
"""First steps of a feed's turn: their batches were made while another feed had its own."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="of each feed in each round")
    parser.add_argument("--threads", type=int, help="of torch on a CPU; default leaves one core to the loader")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--results", type=Path, help="also write the JSON document here")
    options = parser.parse_args()
    sys.path[:0] = [str(ROOT / "shared"), str(ROOT / "images/brain-to-text")]
    try:
        import torch

        from brain_to_text.generator import make_dataset
    except ModuleNotFoundError as error:
        print(f"needs {error.name}; `make bench/brain_whole_step` installs it", file=sys.stderr)
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(options.threads or max(1, (os.cpu_count() or 2) - 1))
    with tempfile.TemporaryDirectory(prefix="whole-step-") as folder:
        served = Path(folder) / "served"
        make_dataset(
            served / BUCKET / "data", sessions=SESSIONS, trials=TRIALS, held_out_trials=1, bins_per_phoneme=28.0
        )
        with endpoint(served, Path(folder) / "server.log") as (url, _):
            os.environ.update(
                AWS_ENDPOINT_URL_S3=url, AWS_ACCESS_KEY_ID=KEY, AWS_SECRET_ACCESS_KEY=SECRET, AWS_REGION="us-east-1",
                AWS_EC2_METADATA_DISABLED="true", NO_PROXY="127.0.0.1",
            )  # fmt: skip
            os.environ.pop("AWS_SESSION_TOKEN", None)
            found = measure(options, device, str(Path(folder) / "index"))
    return report(found, device, options.results)


class Feed:
    """Where micro-batches of a step come from, and the reader behind it."""

    def __init__(self, name: str, work: Any, trials: Any) -> None:
        self.name, self.work, self.trials = name, work, trials
        self.kept: dict[int, Any] = {}

    def take(self, first: int, count: int) -> Callable[[int], Any]:
        """A function of the step, for `count` of them from `first`."""
        from estiba.loop.ahead import Ahead

        if self.name == "memory":
            return lambda step: self.kept[step]
        self.work.train = self.trials
        ahead: Ahead[Any] = Ahead(self.work.batches, first, first + count)
        return lambda step: ahead.next(step, lambda: False)

    def warm(self, steps: range) -> None:
        """Read all there is, and what the steps need."""
        for ids in self.trials.sweep(64) if self.name == "loader" else []:
            self.trials.read(ids)
        # Every trial has come by, with a probability that leaves no doubt.
        for step in range(10_000, 10_000 + (0 if self.name != "device" else 80)):
            self.trials.batch(step)
        if self.name == "memory":
            self.work.train = self.trials
            self.kept = {step: self.work.batches(step) for step in steps}


def measure(options: argparse.Namespace, device: Any, index: str) -> dict[str, Any]:
    from brain_to_text.choices import keep_on_device, open_trials, settings_of
    from brain_to_text.config import BrainConfig
    from brain_to_text.work import Decoding
    from estiba.loop.ahead import to_device
    from estiba.loop.history import History
    from estiba.loop.loop import Loop
    from estiba.stop import Stop

    sizes = FULL if device.type == "cuda" else SMALL
    config = BrainConfig(
        **sizes,  # type: ignore[arg-type]
        dataset_dir=f"s3://{BUCKET}/data", index_path=index, cache_gb=8.0, device_cache_gb=8.0, compile=options.compile,
    )  # fmt: skip
    feeds: list[Feed] = []
    for name in FEEDS:
        trials = open_trials(config, "train", Stop(), sessions=None, device=device)
        if name == "device":
            keep_on_device(config, trials, device)
        if not feeds:
            work = Decoding(config, trials, None, device)
        feeds.append(Feed(name, work, trials))
    loop = Loop(work, settings_of(config), checkpoints=None, history=History(None), stop=Stop(), device=device)

    def step(micro: Any) -> None:
        """What the loop does of a step, without its log."""
        work.decoder.train()
        with loop.mixed.forward():
            loss = work.loss(work.decoder, to_device(micro, device))
        (loss / len(micro.frames)).backward()
        loop._update()

    count = LEFT_OUT + options.steps
    steps = range(1500, 1500 + count)
    for feed in feeds:
        feed.warm(steps)
    times: dict[str, list[float]] = {name: [] for name in FEEDS}
    for turn in range(-1, options.rounds):  # the first one warms up
        for feed in feeds if turn % 2 == 0 else feeds[::-1]:
            give = feed.take(steps.start, count)
            for number in steps:
                if number == steps.start + LEFT_OUT:
                    _wait(device)
                    began = time.perf_counter()
                (micro,) = give(number)
                step(micro)
            _wait(device)
            if turn >= 0:
                times[feed.name].append((time.perf_counter() - began) / options.steps)
                print(f"  {feed.name:<8}{1000 * times[feed.name][-1]:>10.1f} ms a step", flush=True)
    found: dict[str, Any] = {"sizes": sizes, "step_ms": {}, "ratio": {}, "all_ratios": {}}
    for name in FEEDS:
        ratios = [own / memory for own, memory in zip(times[name], times["memory"], strict=True)]
        found["step_ms"][name] = round(1000 * statistics.median(times[name]), 2)
        found["ratio"][name] = round(statistics.median(ratios), 4)
        found["all_ratios"][name] = [round(ratio, 4) for ratio in ratios]
    for feed in feeds:
        found[f"statistics_{feed.name}"] = feed.trials.statistics()
        feed.trials.close()
    return found


def _wait(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def report(found: dict[str, Any], device: Any, results: Path | None) -> int:
    import torch

    on = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    for name in FEEDS:
        print(f"{name:<8}{found['step_ms'][name]:>10.1f} ms   {found['ratio'][name]:.3f} x the step on memory")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    goals = [
        {"name": f"whole step / step on memory, {name}", "value": found["ratio"][name], "goal": "<=1.01",
         "met": found["ratio"][name] <= 1.01}
        for name in FEEDS[1:]
    ]  # fmt: skip
    document = {
        "benchmark": "brain_whole_step",
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}; {on}; {LATENCY_MS} ms a request, "
        f"{MB_PER_S} MB/s a connection",
        "date": date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "results": found,
        "goals": goals,
    }
    if results:
        results.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
