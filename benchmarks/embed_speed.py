# environment: host
# needs: embed demo
"""The encoder against `SentenceTransformer.encode` in float32: the same vectors, and how much sooner.

    make bench/embed_speed              # after `make demo`, whose passages and model it uses
    python benchmarks/embed_speed.py --rows 2000 --rounds 5

Runs in estiba/embed:local, no network. Rounds in turn, ours and theirs, on the same texts in the order of the corpus;
medians. Ours reads the texts in windows of 512 rows, as a file's row groups would give them; theirs gets the whole
list, with its default batch of 32. Goals: cosine of every row >= 0.9999, and no slower.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from document import goal, publish

ROOT = Path(__file__).resolve().parent.parent

INSIDE = """
import json, statistics, sys, time
from pathlib import Path
import numpy as np, pyarrow.parquet as pq
from sentence_transformers import SentenceTransformer
from embed.config import EmbedConfig
from embed.model import Encoder
rows, rounds = {rows}, {rounds}
texts = [t for f in sorted(Path("/input").rglob("*.parquet")) for t in pq.read_table(f)["texto"].to_pylist() if t]
texts = texts[:: max(1, len(texts) // rows)][:rows]
encoder = Encoder(EmbedConfig(model="/model", device="cpu"))
theirs = SentenceTransformer("/model", device="cpu")
def ours():
    parts = [encoder.encode(encoder.tokenize(texts[i : i + 512])) for i in range(0, len(texts), 512)]
    return np.concatenate([p.vectors for p in parts]), sum(int(p.n_tokens.sum()) for p in parts)
encoder.encode(encoder.tokenize(texts[:64])); theirs.encode(texts[:64])
seconds = {{"ours": [], "theirs": []}}
for _ in range(rounds):
    began = time.perf_counter(); a, tokens = ours(); seconds["ours"].append(time.perf_counter() - began)
    began = time.perf_counter(); b = theirs.encode(texts); seconds["theirs"].append(time.perf_counter() - began)
cosine = (a * b).sum(axis=1)
print("FOUND " + json.dumps({{"rows": len(texts), "tokens": tokens, "seconds": seconds,
    "cosine_min": float(cosine.min()), "cosine_mean": float(cosine.mean()),
    "ratio": statistics.median(t / o for o, t in zip(seconds["ours"], seconds["theirs"])),
    "tokens_per_s": tokens / statistics.median(seconds["ours"])}}))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--image", default="estiba/embed:local")
    options = parser.parse_args()
    demo = ROOT / "runs/demo"
    if not (demo / "input").is_dir() or not (demo / "model").is_dir():
        print("there is no runs/demo/input and runs/demo/model; run `make demo` first", file=sys.stderr)
        return 2
    command = [
        "docker",
        "run",
        "--rm",
        "--network",
        "none",
        "-v",
        f"{demo}/input:/input:ro",
        "-v",
        f"{demo}/model:/model:ro",
    ]
    program = INSIDE.format(rows=options.rows, rounds=options.rounds)
    log = subprocess.run(
        [*command, options.image, "python", "-c", program], stdout=subprocess.PIPE, text=True, check=True
    )
    found = json.loads(next(line for line in log.stdout.splitlines() if line.startswith("FOUND ")).split(" ", 1)[1])
    print(
        f"{found['rows']} rows, {found['tokens']} tokens: {found['ratio']:.2f} x as fast as SentenceTransformer.encode "
        f"({found['tokens_per_s']:.0f} tokens/s), cosine at least {found['cosine_min']:.6f}"
    )
    goals = [
        goal("lowest cosine", found["cosine_min"], ">=0.9999"),
        goal("speed ratio", round(found["ratio"], 3), ">=1"),
    ]
    publish("embed_speed", found, goals)
    return 0


if __name__ == "__main__":
    sys.exit(main())
