"""brain-to-text's accuracy ladder: the phoneme error rate with each of its flags, on made-up recordings.

    make bench/brain_accuracy                                 # a quarter of an hour on two cores
    make bench/brain_accuracy ARGS="--seeds 1 --only baseline,ema"

Needs a Python with brain-to-text's requirements; no network, no image. Every rung trains the same decoder for the same
steps on the same recordings (`brain-to-text generate`, noisy enough that the baseline errs often) and is judged by its
best evaluation; means over seeds. `ensemble` averages the outputs of the baseline's decoders of all seeds. Numbers are
of this made-up task alone: what helps here may not on the study's data, and the other way round.
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
from datetime import date
from pathlib import Path
from typing import Any

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
"""41 times the classes come off their plateau later: four times the steps, with one seed."""
COMPOSITE = {"use_composite_loss": True, "composite_loss_alpha": 0.6}
RUNGS: dict[str, dict[str, Any]] = {
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
    parser.add_argument("--only", help="rungs, separated by commas")
    parser.add_argument("--results", type=Path, help="also write the JSON document here")
    options = parser.parse_args()
    wanted = options.only.split(",") if options.only else list(RUNGS)
    if unknown := [name for name in wanted if name not in RUNGS]:
        print(f"unknown: {', '.join(unknown)}; there are: {', '.join(RUNGS)}", file=sys.stderr)
        return 2
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "shared"), str(ROOT / "images/brain-to-text")])
    found: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="brain-accuracy-") as folder:
        data = {kind: generated(Path(folder) / kind, kind) for kind in ("phoneme", "diphone")}
        for seed in range(options.seeds):
            for name in wanted:
                changes = {**BASE, **RUNGS[name], "seed": seed}
                if seed and "n_classes" in changes:
                    continue
                kind = "diphone" if changes.get("n_classes") == 1681 else "phoneme"
                run = Path(folder) / f"{name}-{seed}"
                found.setdefault(name, []).append(trained(run, data[kind], changes))
                print(f"  {name}, seed {seed}: PER {found[name][-1]['per']:.4f}", flush=True)
        together = [Path(folder) / f"baseline-{seed}" for seed in range(options.seeds)]
        if "baseline" in wanted and len(together) > 1:
            found["ensemble"] = [averaged(together, data["phoneme"])]
    return report(found, options.results)


def generated(folder: Path, labels: str) -> Path:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in DATA.items()]
    call("generate", "--out", str(folder), "--labels", labels, *flags)
    return folder


def trained(run: Path, data: Path, settings: dict[str, Any]) -> dict[str, float]:
    """One run, in a process of its own."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    began = time.monotonic()
    call(f"--dataset-dir={data}", *flags, root=run)
    results = json.loads((run / "output/data/results.json").read_text())
    return {"per": results["best_val_per"], "step": results["best_step"], "seconds": time.monotonic() - began}


def averaged(runs: list[Path], data: Path) -> dict[str, float]:
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


def report(found: dict[str, list[dict[str, float]]], results: Path | None) -> int:
    rates = {name: statistics.mean(one["per"] for one in some) for name, some in found.items()}
    base = rates.get("baseline")
    spread = {name: [min(one["per"] for one in some), max(one["per"] for one in some)] for name, some in found.items()}
    print(f"phoneme error rate after {STEPS} steps, {DATA}")
    for name, rate in rates.items():
        less, more = spread[name]
        against = "" if base is None or name == "baseline" else f"   {(rate - base) / base:+.0%}"
        print(f"  {name:<24}{rate:>8.4f} ({less:.4f} to {more:.4f}){against}")
    goals = []
    if "diphones" in rates and "diphones + phonemes" in rates:
        ratio = rates["diphones + phonemes"] / rates["diphones"]
        goals.append({"name": "PER of the composite loss, times that of diphones alone", "value": round(ratio, 2),
                      "goal": "<=1.0", "met": ratio <= 1.0})  # fmt: skip
    if base is not None:
        goals.append({"name": "PER of the baseline", "value": round(base, 4), "goal": "<=0.5", "met": base <= 0.5})
    if base is not None and "one layer for all days" in rates:
        ratio = rates["one layer for all days"] / base
        goals.append({"name": "PER without layers of days, times the baseline's", "value": round(ratio, 2),
                      "goal": ">=1.1", "met": ratio >= 1.1})  # fmt: skip
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    document = {
        "benchmark": "brain_accuracy",
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}",
        "date": date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "results": {"data": DATA, "steps": STEPS, "per": rates, "runs": found},
        "goals": goals,
    }
    if results:
        results.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
