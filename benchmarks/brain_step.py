# environment: torch
"""brain-to-text's training step compared with upstream's, on the same trials.

    python benchmarks/brain_step.py                       # on a CPU: a smaller decoder, float32
    python benchmarks/brain_step.py --rounds 7            # on a GPU: full sizes, bfloat16

Needs a Python with brain-to-text's requirements; no network, no image, no data. The two alternate; results are medians
of the ratios of each round.

"Theirs" is nejm-brain-to-text's rnn_trainer.py with the guide's changes for S3. It looks up the day weights one trial
at a time, builds the smoothing kernel at every step and repeats it for every feature, has an optimizer that is not
fused because it was created before the model moved to the device, keeps lengths as tensors on the device, fills in
phoneme logits slice by slice, and reads the loss back at every step. "Ours" is `DecodingTask.loss` and the trainer's
update. Both start from tensors in host memory, add the same kinds of noise, and compute the same gradients of the same
model. The difference between their losses on a batch without noise is printed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from document import goal, publish

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "shared"), str(ROOT / "images/brain-to-text")]

SMALL = {"n_units": 128, "n_layers": 3, "batch": 8, "bins": 400, "steps": 3}
FULL = {"n_units": 768, "n_layers": 5, "batch": 64, "bins": 950, "steps": 10}
DAYS, FEATURES = 8, 512


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="torch threads on a CPU; default is torch's own number")
    parser.add_argument("--compile", action="store_true", help="torch.compile ours and theirs")
    parser.add_argument("--results", type=Path, help="also write the JSON document here")
    options = parser.parse_args()
    try:
        import torch

        import brain_to_text.task  # type: ignore[import-not-found,import-untyped]  # noqa: F401
    except ModuleNotFoundError as error:
        print(f"needs {error.name}: pip install -r images/brain-to-text/requirements.txt torch", file=sys.stderr)
        return 2
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = FULL if device.type == "cuda" else SMALL
    results = {
        name: measure(device, sizes, n_classes=n_classes, rounds=options.rounds, compiled=options.compile)
        for name, n_classes in (("phonemes", 41), ("diphones", 1681))
    }
    return report({"sizes": sizes, "device": _name(device), **results}, options.results)


@dataclass
class Case:
    """A model in both implementations, and the batches that they alternate on."""

    device: Any
    task: Any
    theirs: Theirs
    batches: list[Any]


class Theirs:
    """Upstream's training step."""

    def __init__(self, task: Any, device: Any, *, compiled: bool) -> None:
        import copy

        import torch

        self.torch, self.device, self.task = torch, device, task
        self.model = copy.deepcopy(task.decoder)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.005, eps=0.1, weight_decay=0.001, fused=False)
        self.ctc = torch.nn.CTCLoss(blank=0, reduction="none", zero_infinity=False)
        self.is_diphones = task.config.n_classes == 1681
        self.losses: list[float] = []
        self.decode = torch.compile(self._decode) if compiled else self._decode
        self.dtype = torch.bfloat16 if device.type == "cuda" else None

    def step(self, batch: Any) -> None:
        torch = self.torch
        self.model.train()
        self.optimizer.zero_grad()
        with self._autocast():
            loss = self.loss(batch, noisy=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), max_norm=10.0, foreach=True)
        self.optimizer.step()
        self.losses.append(loss.detach().item())

    def _autocast(self) -> Any:
        import contextlib

        return contextlib.nullcontext() if self.dtype is None else self.torch.autocast("cuda", dtype=self.dtype)

    def loss(self, batch: Any, *, noisy: bool) -> Any:
        torch, device = self.torch, self.device
        features, days = batch.features.to(device), batch.day.to(device)
        if noisy:
            features = features + torch.randn(features.shape, device=device)
            features = features + torch.randn((features.shape[0], 1, features.shape[2]), device=device) * 0.2
        return self.loss_of(self.decode(self._smoothed(features), days), batch)

    def loss_of(self, logits: Any, batch: Any) -> Any:
        torch, device = self.torch, self.device
        labels, lengths = batch.labels.to(device), batch.label_lengths.to(device)
        frames = ((batch.n_time_steps.to(device) - 14) / 4 + 1).to(torch.int32)
        loss = self._ctc(logits, labels, frames, lengths)
        if not self.is_diphones:
            return loss
        phonemes = torch.zeros((*logits.shape[:2], 41), device=device, dtype=logits.dtype)
        for number in range(41):
            phonemes[:, :, number] = torch.logsumexp(logits[:, :, list(range(number, 1681, 41))], dim=-1)
        labels, lengths = batch.phoneme_labels.to(device), batch.phoneme_lengths.to(device)
        return 0.5 * self._ctc(phonemes, labels, frames, lengths) + 0.5 * loss

    def _ctc(self, logits: Any, labels: Any, frames: Any, lengths: Any) -> Any:
        return self.ctc(logits.log_softmax(2).permute(1, 0, 2), labels, frames, lengths).mean()

    def _smoothed(self, features: Any) -> Any:
        from brain_to_text.data.augment import smoothing_kernel  # type: ignore[import-not-found,import-untyped]

        torch, width = self.torch, features.shape[2]
        kernel = torch.tensor(smoothing_kernel(2.0, 100), dtype=torch.float32, device=self.device)
        kernel = kernel.view(1, 1, -1).repeat(width, 1, 1)
        return torch.nn.functional.conv1d(features.permute(0, 2, 1), kernel, padding="same", groups=width).permute(
            0, 2, 1
        )

    def _decode(self, x: Any, days: Any) -> Any:
        torch, model = self.torch, self.model
        weights = torch.stack([model.day_weights[day] for day in days], dim=0)
        biases = torch.cat([model.day_biases[day] for day in days], dim=0).unsqueeze(1)
        x = model.day_layer_dropout(torch.nn.functional.softsign(torch.einsum("btd,bdk->btk", x, weights) + biases))
        patches = x.unsqueeze(1).permute(0, 3, 1, 2).unfold(3, 14, 4).squeeze(2).permute(0, 2, 3, 1)
        x = patches.reshape(patches.size(0), patches.size(1), -1)
        output, _ = model.gru(x, model.h0.expand(model.shape.n_layers, x.shape[0], model.shape.n_units).contiguous())
        return model.out(output)


def measure(device: Any, sizes: dict[str, int], *, n_classes: int, rounds: int, compiled: bool) -> dict[str, Any]:
    """Time a step of both implementations, and the parts that differ."""
    import torch

    case = make_case(device, sizes, n_classes, compiled=compiled)
    ours = our_step(case)
    difference = check_same(case)
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    for step in (ours, case.theirs.step):
        for batch in case.batches[:2]:
            step(batch)
    for turn in range(rounds):
        order: list[tuple[str, Callable[[Any], None]]] = [("ours", ours), ("theirs", case.theirs.step)]
        for name, step in order if turn % 2 else order[::-1]:
            _wait(device)
            started = time.perf_counter()
            for batch in case.batches:
                step(batch)
            _wait(device)
            times[name].append((time.perf_counter() - started) / len(case.batches))
    ratios = [theirs_s / ours_s for ours_s, theirs_s in zip(times["ours"], times["theirs"], strict=True)]
    parts = measure_parts(case)
    memory = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None
    return {
        "step_ms": {name: round(1000 * statistics.median(seconds), 2) for name, seconds in times.items()},
        "ratio": round(statistics.median(ratios), 3),
        "ratio_worst_best": [round(min(ratios), 3), round(max(ratios), 3)],
        "parts_ms": parts,
        "loss_difference": difference,
        "gpu_memory_gb": memory,
    }


def measure_parts(case: Case) -> dict[str, dict[str, float]]:
    """Return the best milliseconds of the parts that differ most: smoothing, and the loss with its gradient."""
    import torch

    from brain_to_text.data.augment import smooth  # type: ignore[import-not-found,import-untyped]
    from estiba.training.prefetch import to_device

    task, batch = case.task, case.batches[0]
    (micro,) = task.micro_batcher(batch, step=1500, is_training=True)
    moved = to_device(micro, case.device)
    kernel = task.augment.kernel
    shape = (len(micro.frames), max(micro.frames), task.config.n_classes)
    logits = torch.randn(shape, device=case.device, requires_grad=True)

    def gradient(loss: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            logits.grad = None
            loss().backward()

        return run

    def best_ms(run: Callable[[], Any]) -> float:
        times = []
        for _ in range(4):
            _wait(case.device)
            started = time.perf_counter()
            run()
            _wait(case.device)
            times.append(time.perf_counter() - started)
        return round(1000 * min(times), 2)

    return {
        "smoothing": {
            "ours": best_ms(lambda: smooth(moved.features, kernel)),
            "theirs": best_ms(lambda: case.theirs._smoothed(moved.features)),
        },
        "loss": {
            "ours": best_ms(gradient(lambda: task.criterion(logits, moved))),
            "theirs": best_ms(gradient(lambda: case.theirs.loss_of(logits, batch))),
        },
    }


def make_case(device: Any, sizes: dict[str, int], n_classes: int, *, compiled: bool) -> Case:
    """Build a model, and batches of different lengths whose labels fit."""
    import torch

    from brain_to_text.config import BrainConfig  # type: ignore[import-not-found,import-untyped]
    from brain_to_text.task import DecodingTask  # type: ignore[import-not-found,import-untyped]

    config = BrainConfig(
        n_units=sizes["n_units"],
        n_layers=sizes["n_layers"],
        n_classes=n_classes,  # type: ignore[arg-type]
        batch_size=sizes["batch"],
        use_composite_loss=n_classes == 1681,
        compile=compiled,
        random_cut=0,
    )
    random = torch.Generator().manual_seed(1)

    def draw(low: int, high: int, *shape: int) -> Any:
        return torch.randint(low, high, shape, generator=random)

    def batch() -> Any:
        size = sizes["batch"]
        bins = draw(sizes["bins"] * 3 // 4, sizes["bins"] * 5 // 4, size)
        lengths = bins // 40
        width = int(lengths.max())
        labels = draw(1, n_classes, size, width) * (torch.arange(width) < lengths[:, None])
        phonemes = draw(1, 41, size, width) * (torch.arange(width) < lengths[:, None])
        return SimpleNamespace(
            features=torch.randn(size, int(bins.max()), FEATURES, generator=random),
            labels=labels,
            n_time_steps=bins,
            label_lengths=lengths,
            day=draw(0, DAYS, size // 4).repeat_interleave(4),
            phoneme_labels=phonemes if n_classes == 1681 else None,
            phoneme_lengths=lengths,
            trial=[f"synthetic {row}" for row in range(size)],
            sentences=[None] * size,
        )

    batches = [batch() for _ in range(sizes["steps"])]
    sessions = [f"day {number}" for number in range(DAYS)]
    trials = SimpleNamespace(n_trials=1, sessions=sessions, identity="synthetic", batch=batches.__getitem__)
    task = DecodingTask(config, trials, None, device)  # type: ignore[arg-type]
    return Case(device=device, task=task, theirs=Theirs(task, device, compiled=compiled), batches=batches)


def our_step(case: Case) -> Callable[[Any], None]:
    """Return the trainer's step without its log: prepare on the host, move, compute, clip, update."""
    from brain_to_text.resolve import trainer_config  # type: ignore[import-not-found,import-untyped]
    from estiba.platform.stop import Stop
    from estiba.training.config import TrainerConfig
    from estiba.training.metrics import MetricsLogger
    from estiba.training.prefetch import to_device
    from estiba.training.trainer import Trainer

    task = case.task
    settings: TrainerConfig = trainer_config(task.config)
    trainer = Trainer(
        task, settings, checkpoints=None, metrics_logger=MetricsLogger(None), stop=Stop(), device=case.device
    )

    def step(batch: Any) -> None:
        (micro,) = task.micro_batcher(batch, step=1500, is_training=True)
        for group in task.optimizer.param_groups:
            group["lr"] = 0.005
        task.decoder.train()
        with trainer.amp.forward():
            loss = task.loss(task.decoder, to_device(micro, case.device))
        (loss / len(micro.frames)).backward()
        trainer._update(trainer._clip())

    return step


def check_same(case: Case) -> float:
    """Return the relative difference of the two losses of a batch, without noise and dropout, before any step."""
    import torch

    from estiba.training.prefetch import to_device

    task, batch = case.task, case.batches[0]
    case.theirs.model.eval()
    task.decoder.eval()
    with torch.no_grad():
        theirs = float(case.theirs.loss(batch, noisy=False))
        (micro,) = task.micro_batcher(batch, step=1500, is_training=True)
        moved = to_device(micro, case.device)
        features = task.augment.eval()(moved.features, moved.n_bins)
        ours = float(task.criterion(task.decoder(features, moved.days, moved.day_index), moved)) / len(micro.frames)
    difference = abs(ours - theirs) / abs(theirs)
    if difference > 1e-4:
        raise SystemExit(f"the two implementations compute different losses: {ours} and {theirs}")
    return difference


def _wait(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def _name(device: Any) -> str:
    import torch

    return torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def report(results: dict[str, Any], path: Path | None) -> int:
    print(f"a training step on {results['device']}, {results['sizes']}")
    for name in ("phonemes", "diphones"):
        times = results[name]["step_ms"]
        print(
            f"  {name:<10} ours {times['ours']:>9.1f} ms   theirs {times['theirs']:>9.1f} ms   "
            f"{results[name]['ratio']:.2f} x"
        )
        for part, times_ms in results[name]["parts_ms"].items():
            print(f"    {part:<10} {times_ms['ours']:>9.1f} ms   {times_ms['theirs']:>16.1f} ms")
    goals = [
        goal(f"{name}: steps/s, times upstream's", results[name]["ratio"], ">=1") for name in ("phonemes", "diphones")
    ]
    parts = results["diphones"]["parts_ms"]["loss"]
    ratio = round(parts["theirs"] / parts["ours"], 2)
    goals.append(goal("diphones: loss and its gradient, times faster", ratio, ">=2.5"))
    publish("brain_step", results, goals, path=path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
