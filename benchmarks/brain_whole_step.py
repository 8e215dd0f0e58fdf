# environment: torch
"""brain-to-text's whole training step, with its reader, compared with the same step on tensors in memory.

    make bench/brain_whole_step                              # on a CPU: a smaller decoder, float32
    python benchmarks/brain_whole_step.py --rounds 7         # on a GPU: full sizes, bfloat16

Needs what `make bench/brain_whole_step` installs: brain-to-text's requirements; no image. Recordings as long as the
study's are on an S3 server started here (25 ms per request, 90 MB/s per connection). Each source of batches runs the
same steps in turn, like the trainer: prepare batches in a thread, move, compute, clip, update.

memory    batches that were read and prepared before the clock starts
loader    the reader, with trials cached in host memory by an earlier pass
device    the reader, with trials cached on the device by an earlier pass
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from document import goal, publish
from hdf5_s3 import BUCKET, KEY, LATENCY_MS, MB_PER_S, ROOT, SECRET, endpoint  # type: ignore[import-not-found]

SMALL = {"n_units": 64, "n_layers": 2, "batch_size": 16}
FULL = {"n_units": 768, "n_layers": 5, "batch_size": 64}
SOURCES = ("memory", "loader", "device")
SESSIONS, TRIALS = 4, 60
UNTIMED_STEPS = 3
"""The first steps of a turn are not timed, because their batches were prepared during another source's turn."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="timed steps per source and round")
    parser.add_argument("--threads", type=int, help="torch threads on a CPU; default leaves one core for the reader")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--results", type=Path, help="also write the JSON document here")
    options = parser.parse_args()
    sys.path[:0] = [str(ROOT / "shared"), str(ROOT / "images/brain-to-text")]
    try:
        import torch

        from brain_to_text.synthetic.generator import make_dataset
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
            results = measure(options, device, str(Path(folder) / "index"))
    return report(results, device, options.results)


class BatchSource:
    """A source of micro-batches, and its reader."""

    def __init__(self, name: str, task: Any, trials: Any) -> None:
        self.name, self.task, self.trials = name, task, trials
        self.kept: dict[int, Any] = {}

    def start(self, first: int, count: int) -> Callable[[int], Any]:
        """Return a function that returns the micro-batches of a step, for `count` steps from `first`."""
        from estiba.training.prefetch import Prefetcher

        if self.name == "memory":
            return lambda step: self.kept[step]
        self.task.train = self.trials
        prefetcher: Prefetcher[Any] = Prefetcher(self.task.batches, first, first + count)
        return lambda step: prefetcher.next(step, lambda: False)

    def warm(self, steps: range) -> None:
        """Read all trials, or the batches of the steps."""
        for ids in self.trials.sweep(64) if self.name == "loader" else []:
            self.trials.read(ids)
        # After so many batches, every trial has almost certainly been read.
        for step in range(10_000, 10_000 + (0 if self.name != "device" else 80)):
            self.trials.batch(step)
        if self.name == "memory":
            self.task.train = self.trials
            self.kept = {step: self.task.batches(step) for step in steps}


def measure(options: argparse.Namespace, device: Any, index: str) -> dict[str, Any]:
    from brain_to_text.config import BrainConfig
    from brain_to_text.resolve import keep_on_device, open_trials, trainer_config
    from brain_to_text.task import DecodingTask
    from estiba.platform.stop import Stop
    from estiba.training.metrics import MetricsLogger
    from estiba.training.prefetch import to_device
    from estiba.training.trainer import Trainer

    sizes = FULL if device.type == "cuda" else SMALL
    config = BrainConfig(
        **sizes,  # type: ignore[arg-type]
        dataset_dir=f"s3://{BUCKET}/data", index_path=index, cache_gb=8.0, device_cache_gb=8.0, compile=options.compile,
    )  # fmt: skip
    sources: list[BatchSource] = []
    for name in SOURCES:
        trials = open_trials(config, "train", Stop(), sessions=None, device=device)
        if name == "device":
            keep_on_device(config, trials, device)
        if not sources:
            task = DecodingTask(config, trials, None, device)
        sources.append(BatchSource(name, task, trials))
    trainer = Trainer(
        task,
        trainer_config(config),
        checkpoints=None,
        metrics_logger=MetricsLogger(None),
        stop=Stop(),
        device=device,
    )

    def step(micro: Any) -> None:
        """Run the trainer's step without its log."""
        task.decoder.train()
        with trainer.amp.forward():
            loss = task.loss(task.decoder, to_device(micro, device))
        (loss / len(micro.frames)).backward()
        trainer._update(trainer._clip())

    count = UNTIMED_STEPS + options.steps
    steps = range(1500, 1500 + count)
    for source in sources:
        source.warm(steps)
    times: dict[str, list[float]] = {name: [] for name in SOURCES}
    for turn in range(-1, options.rounds):  # the first turn is a warm-up
        for source in sources if turn % 2 == 0 else sources[::-1]:
            batches_of = source.start(steps.start, count)
            for number in steps:
                if number == steps.start + UNTIMED_STEPS:
                    _wait(device)
                    started = time.perf_counter()
                (micro,) = batches_of(number)
                step(micro)
            _wait(device)
            if turn >= 0:
                times[source.name].append((time.perf_counter() - started) / options.steps)
                print(f"  {source.name:<8}{1000 * times[source.name][-1]:>10.1f} ms a step", flush=True)
    results: dict[str, Any] = {"sizes": sizes, "step_ms": {}, "ratio": {}, "all_ratios": {}}
    for name in SOURCES:
        ratios = [own / memory for own, memory in zip(times[name], times["memory"], strict=True)]
        results["step_ms"][name] = round(1000 * statistics.median(times[name]), 2)
        results["ratio"][name] = round(statistics.median(ratios), 4)
        results["all_ratios"][name] = [round(ratio, 4) for ratio in ratios]
    for source in sources:
        results[f"statistics_{source.name}"] = source.trials.statistics()
        source.trials.close()
    return results


def _wait(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def report(results: dict[str, Any], device: Any, path: Path | None) -> int:
    import torch

    on = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    for name in SOURCES:
        print(f"{name:<8}{results['step_ms'][name]:>10.1f} ms   {results['ratio'][name]:.3f} x the step from memory")
    goals = [goal(f"whole step / step on memory, {name}", results["ratio"][name], "<=1.01") for name in SOURCES[1:]]
    conditions = f"{on}; {LATENCY_MS} ms per request, {MB_PER_S} MB/s per connection"
    publish("brain_whole_step", results, goals, conditions=conditions, path=path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
