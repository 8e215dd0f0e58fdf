# environment: torch
# needs: corpus
"""Validation loss of aura after 400 steps for several initialisations, on a ladder of widths.

    python benchmarks/aura_init.py                                     # untied embeddings, then tied ones
    python benchmarks/aura_init.py --embeddings untied --widths 96 192 --seeds 1 2 3

Needs a Python with aura's requirements; no network, no image. Every candidate starts from the same random numbers,
scaled by its own standard deviations (D is the width; those that write to the residual stream are divided by
sqrt(2 layers), except with 0.02 everywhere), and sees the same tokens in the same order with the same learning rate:
Spanish text, a vocabulary of 2,048, 3 layers, 400 steps of 4 x 64 tokens, AdamW, peak 2e-3 (--peak) after 12 steps of
warm-up, linear to zero, clipping at 1, no dropout. The seed decides the random numbers and the order of the text. The
loss is that of the same 256 held-out windows. One thread unless OMP_NUM_THREADS says otherwise. The goal: aura's own is
never worse than 0.02 everywhere, at any width and seed.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from document import goal, publish

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY, LAYERS, SEQ_LENGTH, BATCH, PEAK, WARMUP = 2048, 3, 64, 4, 2e-3, 12
HEADS = {96: 3, 192: 3, 384: 6}
USUAL = "0.02 everywhere"
BEFORE = "embedding 0.02, rest sqrt(0.4/D)"
OURS = "ours"
WITH_TIED = (USUAL, BEFORE, OURS)
"""Measured with tied embeddings too, where the head has the standard deviation of the embedding."""
TIED_WIDTHS = (96, 192)
"""Up to the width of aura-tiny, the preset that ties them."""


def candidates() -> dict[str, Callable[[str, int, Any], float]]:
    from aura.model.decoder import initial_std, writes_to_stream  # type: ignore[import-not-found,import-untyped]

    def scaled(name: str, std: float, config: Any) -> float:
        return std / math.sqrt(2 * config.num_layers) if writes_to_stream(name) else std

    def before(name: str, inputs: int, config: Any) -> float:
        del inputs
        return scaled(name, 0.02 if name == "embedding" else math.sqrt(0.4 / config.embed_size), config)

    def usual(name: str, inputs: int, config: Any) -> float:
        del name, inputs, config
        return 0.02

    def embedding_then(rest: Callable[[int], float]) -> Callable[[str, int, Any], float]:
        def std_of(name: str, inputs: int, config: Any) -> float:
            return config.embed_size**-0.5 if name == "embedding" else scaled(name, rest(inputs), config)

        return std_of

    return {
        USUAL: usual,
        BEFORE: before,
        "embedding 1/sqrt(D), rest 0.02": embedding_then(lambda _: 0.02),
        "embedding 1/sqrt(D), rest 1/sqrt(inputs)": embedding_then(lambda inputs: inputs**-0.5),
        OURS: initial_std,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=ROOT / "runs/aura/input", help="directory of .txt files")
    parser.add_argument("--widths", type=int, nargs="+", default=list(HEADS), choices=list(HEADS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--embeddings", nargs="+", default=["untied", "tied"], choices=["untied", "tied"])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--peak", type=float, default=PEAK, help="learning rate after warm-up")
    parser.add_argument("--tiny", action="store_true", help="width 96, one seed, 3 steps")
    options = parser.parse_args()
    if options.tiny:
        options.widths, options.seeds, options.steps = [96], [1], 3
    if not any(options.text.glob("*.txt")):
        print(f"no .txt in {options.text}; run: python demo/aura_corpus.py --out {options.text}", file=sys.stderr)
        return 2
    sys.path[:0] = [str(ROOT / "shared"), str(ROOT / "images/aura")]
    os.environ.update(HF_HUB_OFFLINE="1", PYTHONWARNINGS="ignore", PYTHONPATH=os.pathsep.join(sys.path[:2]))
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    with tempfile.TemporaryDirectory(prefix="aura-init-") as folder:
        corpora = {seed: corpus(options.text, Path(folder), seed) for seed in options.seeds}
        losses: dict[str, dict[str, float]] = {}
        for width in options.widths:
            for embeddings in options.embeddings:
                if embeddings == "tied" and width not in TIED_WIDTHS:
                    continue
                for seed in options.seeds:
                    case = f"{embeddings}, width {width}, seed {seed}"
                    losses[case] = ladder(corpora[seed], embeddings == "tied", width, seed, options, case)
    report(losses, options)
    return 0


def corpus(text: Path, folder: Path, seed: int) -> Any:
    from aura.data.corpus import prepare  # type: ignore[import-not-found,import-untyped]
    from aura.data.documents import read_documents  # type: ignore[import-not-found,import-untyped]
    from aura.tokenizer.loading import load_tokenizer  # type: ignore[import-not-found,import-untyped]
    from aura.tokenizer.training import train_tokenizer  # type: ignore[import-not-found,import-untyped]
    from estiba.platform.stop import Stop

    if not (folder / "tokenizer").exists():
        pieces = (piece for path in sorted(text.glob("*.txt")) for piece in read_documents(str(path)))
        train_tokenizer(pieces, vocab_size=VOCABULARY, folder=folder / "tokenizer")
    return prepare(
        str(text), tokenizer=load_tokenizer(str(folder / "tokenizer")), folder=folder / "tokens",
        seq_length=SEQ_LENGTH, validation_split=0.02, text_format="running", workers=1, stop=Stop(), seed=seed,
    )  # fmt: skip


def ladder(corpus: Any, tied: bool, width: int, seed: int, options: argparse.Namespace, case: str) -> dict[str, float]:
    """Return the validation loss of every candidate. Equal initial weights are trained once."""
    import torch

    from aura.model.decoder import Aura, ModelConfig

    config = ModelConfig(
        vocab_size=VOCABULARY, embed_size=width, num_layers=LAYERS, num_heads=HEADS[width], seq_length=SEQ_LENGTH,
        tie_embeddings=tied,
    )  # fmt: skip
    losses: dict[str, float] = {}
    trained: list[tuple[Any, float]] = []
    for name, std_of in candidates().items():
        if tied and name not in WITH_TIED:
            continue
        model = Aura(config, seed=seed)
        model.initialise(seed, std_of)
        weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
        same = [loss for before, loss in trained if torch.equal(before, weights)]
        began = time.perf_counter()
        losses[name] = same[0] if same else round(train(model, corpus, options.steps, options.peak), 4)
        trained.append((weights, losses[name]))
        print(f"{case}, {name}: {losses[name]:.4f} ({time.perf_counter() - began:.0f} s)", file=sys.stderr, flush=True)
    return losses


def train(model: Any, corpus: Any, steps: int, peak: float) -> float:
    """Train, and return the validation loss in nats per token."""
    import torch

    from aura.model.optimizer import make_optimizer
    from estiba.training.schedule import Schedule

    schedule = Schedule(kind="linear", peak=peak, steps=steps, warmup_steps=min(WARMUP, steps // 2))
    optimizer = make_optimizer(model, "adamw", lr=peak)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.at(step)
        batch = corpus.train.take(step * BATCH, BATCH)
        (model.loss(batch[:, :-1], batch[:, 1:]) / (BATCH * SEQ_LENGTH)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    model.eval()
    held_out = corpus.validation.take(0, min(256, len(corpus.validation)))
    with torch.no_grad():
        return float(model.loss(held_out[:, :-1], held_out[:, 1:])) / held_out[:, 1:].numel()


def report(losses: dict[str, dict[str, float]], options: argparse.Namespace) -> None:
    names = list(dict.fromkeys(name for found in losses.values() for name in found))
    print(f"{'validation loss less that of ' + USUAL:<42}{'mean':>8}{'worst':>8}")
    differences = {name: [found[name] - found[USUAL] for found in losses.values() if name in found] for name in names}
    for name, values in differences.items():
        print(f"{name:<42}{sum(values) / len(values):>8.3f}{max(values):>8.3f}")
    worst = round(max(differences[OURS]), 4)
    results = {
        "validation_loss": losses,
        "worst_difference_from_0.02": {name: round(max(values), 4) for name, values in differences.items()},
        "steps": options.steps,
        "peak": options.peak,
    }
    publish("aura_init", results, [goal("ours less 0.02 everywhere, worst of all", worst, "<=0")])


if __name__ == "__main__":
    sys.exit(main())
