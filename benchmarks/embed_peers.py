# environment: torch
# needs: corpus
"""Our embedder against those that people use: tokens per second, CPU seconds and quality, in one run on one corpus.

    make bench/embed_peers                          # about 25 minutes on 2 cores, and as long the first time to install
    python benchmarks/embed_peers.py --rows 1000
    python benchmarks/embed_peers.py --tiny         # some minutes, to see that it runs; only peers that are installed

Every peer has its own process and, unless it runs with our libraries, its own locked environment in .build/peers. One
computes at a time, the others wait at a pipe: all take turns of `--turn-tokens` tokens on the same file, and the next
file begins when all are done. A turn of ours is a whole file, which is one row group and one window. Each reports its
wall and CPU seconds; ratios are of the same file, and the median and range of them are printed. Model: MiniLM-L6 in
float32 as its wheel has it, reading 512 tokens (`--max-length`). Threads are the same for all, and idle ones sleep.

Share of peak: tokens per second, padding not counted, over those of the model's matrix products alone (6 layers, the
same engine, precision, threads and tokens in a batch), measured in turn with the rest. Then once, as whole processes:
our job and the original's loop from parquet to parquet; the first batch after a start; memory over ten times as many
rows.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from document import goal, hardware, publish
from embedders import corpus, jobs, summary
from embedders.environments import NotInstalled, python_of_image
from embedders.peers import DEFAULT, NOT_TO_BE_HAD, PEERS, REFERENCE, Peer, matrices
from embedders.turns import Worker, WorkerFailed, take_turns

ROOT = Path(__file__).resolve().parent.parent
RATIOS = {
    REFERENCE: (">=5", ">=2"),
    "sentence-transformers, OpenVINO": (">=1.35", ">=1.35"),
    "transformers, unsorted": (">=12", ">=4"),
    "ONNX Runtime": (">=2.5", ">=1.5"),
}
"""How many times as fast ours is to be: on a CPU that multiplies bfloat16 in hardware, and on another one."""


def start(
    options: argparse.Namespace, place: Path, model: Path, made: corpus.Corpus
) -> tuple[list[Worker], dict[str, str]]:
    """The workers that run, and why the others do not."""
    workers: list[Worker] = []
    missing = dict(NOT_TO_BE_HAD)
    engines: dict[str, int] = {}

    def add(peer: Peer) -> None:
        try:
            worker = Worker(
                peer,
                place,
                made,
                model=model,
                max_length=options.max_length,
                threads=options.threads,
                install=not options.tiny,
            )
        except (WorkerFailed, NotInstalled) as error:
            missing[peer.name] = str(error)
            return
        engine = worker.about.get("engine", "")
        if peer.is_ours and engine in engines:
            worker.stop()
            missing[peer.name] = f"computes as another one does: {engine}"
            return
        if peer.is_ours:
            engines[engine] = worker.about["token_budget"]
        workers.append(worker)

    for peer in PEERS:
        if not options.only or peer.name in (DEFAULT, *options.only):
            add(peer)
    for engine, tokens in list(engines.items()):
        add(matrices(engine, tokens))
    for name, reason in missing.items():
        print(f"without {name}: {reason}", file=sys.stderr)
    return workers, missing


def goals_of(found: dict[str, Any]) -> list[dict[str, Any]]:
    column = 0 if any(name in hardware() for name in ("bf16", "AMX")) else 1
    peers = found["peers"]
    goals = []
    for name, bounds in RATIOS.items():
        goals.append(goal(f"ours / {name}", peers.get(name, {}).get("ours_is", {}).get("ratio"), bounds[column]))
    goals.append(goal("share of the matrix products' rate", found["shares"].get(DEFAULT, {}).get("share"), ">=0.6"))
    quality = peers.get(DEFAULT, {}).get("quality") or {}
    goals.append(goal("mean cosine to float32", quality.get("cosine_mean"), ">=0.9999"))
    int8 = peers.get("ours, int8", {})
    ratio = int8.get("ours_is", {}).get("ratio")
    goals.append(goal("int8 / ours", round(1 / ratio, 3) if ratio else None, ">=1.3"))
    goals.append(goal("int8, recall@10", (int8.get("quality") or {}).get("recall_at_10"), ">=0.92"))
    goals.append(goal("first batch after a start, s", found["first_batch"]["median_s"], "<=3"))
    goals.append(goal("peak memory, 10 x the rows / 1 x", found["memory"]["ratio"], "<=1.1"))
    return goals


def show(found: dict[str, Any]) -> None:
    lengths = found["corpus"]
    print(
        f"{lengths['texts']} texts, {lengths['tokens']} tokens (mean {lengths['mean']}, "
        f"median {lengths['median']}, longest {lengths['longest']}, {lengths['cut']} cut), {found['threads']} threads"
    )
    print(
        f"{'':36}{'tokens/s':>10}{'per CPU s':>11}{'ours is':>9}  {'range':<14}{'cosine':>9}{'lowest':>9}{'recall':>8}"
    )
    for name, entry in found["peers"].items():
        ratio, quality = entry.get("ours_is"), entry.get("quality")
        line = f"{name:36}{entry['tokens_per_s']:>10.0f}{entry['tokens_per_cpu_s']:>11.0f}"
        line += f"{ratio['ratio']:>8.2f}x  {ratio['range'][0]:.2f} - {ratio['range'][1]:.2f}" if ratio else ""
        if quality:
            line = (
                f"{line:72}{quality['cosine_mean']:>9.5f}{quality['cosine_min']:>9.5f}{quality['recall_at_10']:>8.3f}"
            )
        print(line)
    for name, share in found["shares"].items():
        print(f"{name}: {share['share']:.0%} of its matrix products' rate ({share['gflops']:.0f} GFLOP/s)")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--files", type=int, default=4)
    parser.add_argument("--turn-tokens", type=int, default=24_000, help="in a turn of a peer (default 24000)")
    parser.add_argument("--max-length", type=int, default=512, help="tokens read of a text (default 512)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of every peer (default: the cores)")
    parser.add_argument("--memory-rows", type=int, default=2000, help="of the smaller of the two jobs (default 2000)")
    parser.add_argument("--only", nargs="+", default=[], metavar="PEER", help="beside ours")
    parser.add_argument("--text", type=Path, default=ROOT / "runs/aura/input", help="a .txt file, or a folder of them")
    parser.add_argument("--results", type=Path, help="write the document here too")
    parser.add_argument("--tiny", action="store_true", help="48 texts, and no peer is installed for it")
    options = parser.parse_args()
    if options.tiny:
        options.rows, options.files, options.turn_tokens, options.memory_rows = 48, 2, 1000, 20
    place = ROOT / "runs/embed_peers"
    place.mkdir(parents=True, exist_ok=True)
    for old in place.glob("*.npy"):
        old.unlink()
    model = corpus.make_model(place, options.max_length)
    documents = corpus.documents_of(options.text)
    made = corpus.make(
        place, documents, rows=options.rows, files=options.files, model=model, max_length=options.max_length
    )
    workers, missing = start(options, place, model, made)
    try:
        failed = take_turns(workers, options.files, options.turn_tokens)
    finally:
        for worker in workers:
            worker.stop()
    workers = [worker for worker in workers if worker.peer.name not in failed]
    python = python_of_image(install=not options.tiny)
    found = {
        "corpus": made.lengths,
        "threads": options.threads,
        "peers": summary.figures(workers, made),
        "without": missing | failed,
        "shares": summary.shares(workers, made),
        "whole_jobs": jobs.whole_jobs(python, place, made, model, options.threads),
        "first_batch": jobs.first_batch(python, place, made, model, options.threads, 1 if options.tiny else 3),
        "memory": jobs.memory(python, place, documents, model, options.threads, options.memory_rows),
    }
    show(found)
    publish("embed_peers", found, goals_of(found), conditions=f"{options.threads} threads", path=options.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
