# environment: torch
"""brain-to-text's accuracy: the phoneme error rate with each of its options, on synthetic recordings.

    make bench/brain_accuracy                                 # a quarter of an hour on two cores
    make bench/brain_accuracy ARGS="--seeds 1 --only baseline,ema"

Needs a Python with brain-to-text's requirements; no network, no image. Every variant trains the same decoder for the
same number of steps on the same recordings (`brain-to-text generate`, with so much noise that the baseline often errs).
Results are the error rates of the best evaluation, averaged over seeds. `ensemble` averages the outputs of the baseline
decoders of all seeds. The numbers apply to this synthetic task only: on the study's data, other options may help.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from document import goal, publish

ROOT = Path(__file__).resolve().parent.parent
DATA = {"sessions": 4, "trials": 80, "features": 64, "noise": 3.0, "longest_words": 3, "drift": 0.8}
STEPS = 350
BASE = {
    "n_input_features": 64, "n_units": 96, "n_layers": 2, "rnn_dropout": 0.2, "input_layer_dropout": 0.1,
    "batch_size": 16, "num_training_batches": STEPS, "lr_max": 0.004, "lr_warmup_steps": 30, "epsilon": 1e-8,
    "white_noise_std": 0.5, "constant_offset_std": 0.1, "batches_per_val_step": 50, "batches_per_train_log": 50,
    "num_dataloader_workers": 1, "log_individual_day_val_PER": False, "cache_gb": 0.5,
}  # fmt: skip
DIPHONES = {"n_classes": 1681, "num_training_batches": 4 * STEPS, "lr_max": 0.01}
"""With 41 times as many classes, training leaves its plateau later, so it takes four times the steps, with one seed."""
COMPOSITE = {"use_composite_loss": True, "composite_loss_alpha": 0.6}
VARIANTS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "one layer for all days": {"day_layers": False},
    "time masks": {"time_masks": 8},
    "ema": {"ema_decay": 0.99},
    "wsd": {"lr_scheduler_type": "wsd"},
    "both directions": {"bidirectional": True},
    "diphones": DIPHONES,
    "diphones + phonemes": {**DIPHONES, **COMPOSITE},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps; four times as many for diphones")
    parser.add_argument("--only", help="variants, separated by commas")
    parser.add_argument("--results", type=Path, help="also write the JSON document here")
    options = parser.parse_args()
    wanted = options.only.split(",") if options.only else list(VARIANTS)
    if unknown := [name for name in wanted if name not in VARIANTS]:
        print(f"--only: unknown {', '.join(unknown)}; available: {', '.join(VARIANTS)}", file=sys.stderr)
        return 2
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "shared"), str(ROOT / "images/brain-to-text")])
    results: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="brain-accuracy-") as folder:
        data = {kind: generate(Path(folder) / kind, kind) for kind in ("phoneme", "diphone")}
        for seed in range(options.seeds):
            for name in wanted:
                changes = {**BASE, **VARIANTS[name], "seed": seed}
                changes["num_training_batches"] = changes["num_training_batches"] * options.steps // STEPS
                if seed and "n_classes" in changes:
                    continue
                kind = "diphone" if changes.get("n_classes") == 1681 else "phoneme"
                run = Path(folder) / f"{name}-{seed}"
                results.setdefault(name, []).append(train(run, data[kind], changes))
                print(f"  {name}, seed {seed}: PER {results[name][-1]['per']:.4f}", flush=True)
        baselines = [Path(folder) / f"baseline-{seed}" for seed in range(options.seeds)]
        if "baseline" in wanted and len(baselines) > 1:
            results["ensemble"] = [evaluate_average(baselines, data["phoneme"])]
    return report(results, options.steps, options.results)


def generate(folder: Path, labels: str) -> Path:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in DATA.items()]
    call("generate", "--out", str(folder), "--labels", labels, *flags)
    return folder


def train(run: Path, data: Path, settings: dict[str, Any]) -> dict[str, float]:
    """Train in a new process."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    started = time.monotonic()
    call(f"--dataset-dir={data}", *flags, root=run)
    results = json.loads((run / "output/data/results.json").read_text())
    return {"per": results["best_val_per"], "step": results["best_step"], "seconds": time.monotonic() - started}


def evaluate_average(runs: list[Path], data: Path) -> dict[str, float]:
    models = ",".join(str(run / "model") for run in runs)
    output = runs[0] / "ensemble"
    call("evaluate", "--model", models, "--dataset-dir", str(data), "--output-dir", str(output), root=runs[0])
    return {"per": json.loads((output / "results.json").read_text())["per"]}


def call(*arguments: str, root: Path | None = None) -> None:
    environ = {**os.environ, **({} if root is None else {"ESTIBA_ROOT": str(root)})}
    done = subprocess.run(
        [sys.executable, "-m", "brain_to_text", *arguments], env=environ, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"brain_to_text {' '.join(arguments)}:\n{done.stderr[-2000:]}")


def report(results: dict[str, list[dict[str, float]]], steps: int, path: Path | None) -> int:
    pers = {name: [run["per"] for run in runs] for name, runs in results.items()}
    rates = {name: statistics.mean(values) for name, values in pers.items()}
    base = rates.get("baseline")
    print(f"phoneme error rate after {steps} steps, {DATA}")
    for name, rate in rates.items():
        low, high = min(pers[name]), max(pers[name])
        change = "" if base is None or name == "baseline" else f"   {(rate - base) / base:+.0%}"
        print(f"  {name:<24}{rate:>8.4f} ({low:.4f} to {high:.4f}){change}")
    goals = []
    if "diphones" in rates and "diphones + phonemes" in rates:
        ratio = rates["diphones + phonemes"] / rates["diphones"]
        goals.append(goal("PER of the composite loss, times that of diphones alone", round(ratio, 2), "<=1"))
    if base is not None:
        goals.append(goal("PER of the baseline", round(base, 4), "<=0.5"))
    if base is not None and "one layer for all days" in rates:
        ratio = rates["one layer for all days"] / base
        goals.append(goal("PER without day layers, times the baseline's", round(ratio, 2), ">=1.1"))
    found = {"data": DATA, "steps": steps, "per": rates, "runs": results}
    publish("brain_accuracy", found, goals, path=path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
