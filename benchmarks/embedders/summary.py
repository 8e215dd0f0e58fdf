"""What the workers answered, as figures: rates, paired ratios, and how near the vectors are to the reference."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from embedders.corpus import Corpus
from embedders.peers import DEFAULT, REFERENCE
from embedders.turns import Worker

QUERIES = 400
NEIGHBOURS = 10


def seconds_of(worker: Worker, kind: str) -> list[float]:
    """By file."""
    return [sum(turn[kind] for turn in turns) for turns in worker.turns]


def rates_of(worker: Worker, corpus: Corpus, kind: str = "wall_s") -> list[float]:
    """Tokens per second by file. Matrix products come in full batches, so they count their own tokens."""
    is_own = worker.peer.module == "matrix_products"
    tokens = [sum(turn["tokens"] for turn in turns) for turns in worker.turns] if is_own else corpus.file_tokens
    return [count / max(seconds, 1e-9) for count, seconds in zip(tokens, seconds_of(worker, kind), strict=True)]


def paired(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """The ratios of the same files: their median and range."""
    ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    return {
        "ratio": round(statistics.median(ratios), 3),
        "range": [round(min(ratios), 3), round(max(ratios), 3)],
    }


def quality(vectors: Path, reference: Path) -> dict[str, float] | None:
    """Cosine to the reference's vectors by row, and the share of each row's ten nearest that are the reference's."""
    if not vectors.exists() or not reference.exists():
        return None
    ours, theirs = (_unit(np.load(path).astype(np.float64)) for path in (vectors, reference))
    cosines = (ours * theirs).sum(axis=1)
    rows = np.arange(0, len(ours), max(1, len(ours) // QUERIES))
    found, wanted = _nearest(ours, rows), _nearest(theirs, rows)
    same = [len(set(a) & set(b)) / len(b) for a, b in zip(found.tolist(), wanted.tolist(), strict=True)]
    return {
        "cosine_mean": round(float(cosines.mean()), 7),
        "cosine_min": round(float(cosines.min()), 7),
        "recall_at_10": round(float(np.mean(same)), 4),
    }


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _nearest(vectors: np.ndarray, rows: np.ndarray) -> np.ndarray:
    scores = vectors[rows] @ vectors.T
    scores[np.arange(len(rows)), rows] = -np.inf
    return np.argsort(-scores, axis=1)[:, : min(NEIGHBOURS, len(vectors) - 1)]


def figures(workers: Sequence[Worker], corpus: Corpus) -> dict[str, dict[str, Any]]:
    """By the peer's name. `ours_is` is how many times as fast our default is."""
    by_name = {worker.peer.name: worker for worker in workers}
    ours, reference = by_name.get(DEFAULT), by_name.get(REFERENCE)
    found = {}
    for name, worker in by_name.items():
        wall, cpu = rates_of(worker, corpus), rates_of(worker, corpus, "cpu_s")
        entry: dict[str, Any] = {
            "tokens_per_s": round(statistics.median(wall), 1),
            "tokens_per_cpu_s": round(statistics.median(cpu), 1),
            "wall_s": round(sum(seconds_of(worker, "wall_s")), 2),
            "cpu_s": round(sum(seconds_of(worker, "cpu_s")), 2),
            "turns": sum(map(len, worker.turns)),
            "about": worker.about,
        }
        if ours is not None and worker is not ours:
            entry["ours_is"] = paired(rates_of(ours, corpus), wall)
            entry["ours_is"]["cpu_ratio"] = paired(rates_of(ours, corpus, "cpu_s"), cpu)["ratio"]
        if reference is not None and worker.peer.module != "matrix_products":
            entry["quality"] = quality(worker.vectors, reference.vectors)
        found[name] = entry
    return found


def shares(workers: Sequence[Worker], corpus: Corpus) -> dict[str, dict[str, Any]]:
    """Of each of our engines: its tokens per second over those of its matrix products alone."""
    products = {
        (each.peer.options["engine"], each.peer.options["precision"]): each
        for each in workers
        if each.peer.module == "matrix_products"
    }
    found = {}
    for worker in workers:
        if not worker.peer.is_ours:
            continue
        kind, _, precision = worker.about["engine"].partition(", ")
        alone = products.get((kind.split(" ")[0], precision))
        if alone is not None:
            share = paired(rates_of(worker, corpus), rates_of(alone, corpus))
            gflops = statistics.median(rates_of(alone, corpus)) * alone.about["flops_per_token"] / 1e9
            found[worker.peer.name] = {
                "share": share["ratio"],
                "range": share["range"],
                "cpu_share": paired(rates_of(worker, corpus, "cpu_s"), rates_of(alone, corpus, "cpu_s"))["ratio"],
                "gflops": round(gflops, 1),
            }
    return found
