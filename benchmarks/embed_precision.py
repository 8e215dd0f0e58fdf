# environment: torch
# needs: demo
"""The stored precisions of embed's vectors: bytes on disk, and which neighbours a search still finds.

    make bench/embed_precision              # after `make demo`, whose passages and model it uses
    python benchmarks/embed_precision.py --rows 6000 --queries 500

Embeds the demo's Spanish passages once, in float32. Recall@10: of the ten passages nearest to a passage by the cosine
of the float32 vectors, the share that a search over the stored vectors finds, query and passages stored alike, exact
search (Hamming distance for binary). "rescored" takes the 40 nearest by the stored vectors and orders them by the
float32 query against the stored passages, as vector stores do. Bytes: of the column in parquet, written as the job
writes it, beside float32 as pyarrow writes it by default. For comparison: int8 with one scale for all vectors (127
times the value), and sentence-transformers' int8, whose ranges come from the whole corpus, which a job that resumes has
not seen.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from document import goal, publish

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "images/embed"), str(ROOT / "shared")]
NEAREST, RESCORED = 10, 40
WINDOW = 1024
PRECISIONS = ("float32", "float16", "int8", "binary")


def texts_of(folder: Path, rows: int) -> list[str]:
    files = sorted(folder.rglob("*.parquet"))
    texts = [text for file in files for text in pq.read_table(file, columns=["texto"])["texto"].to_pylist() if text]
    texts = list(dict.fromkeys(texts))
    return texts[:: max(1, len(texts) // rows)][:rows]


def embed(model: Path, texts: list[str]) -> np.ndarray:
    from embed.config import EmbedConfig  # type: ignore[import-not-found]
    from embed.model import Encoder  # type: ignore[import-not-found]

    encoder = Encoder(EmbedConfig(model=str(model), device="cpu"))
    windows = [texts[start : start + WINDOW] for start in range(0, len(texts), WINDOW)]
    return np.concatenate([encoder.encode(encoder.tokenize(window)).vectors for window in windows])


def decoded(values: np.ndarray, precision: str) -> np.ndarray:
    """As the README says: float32 vectors whose inner product orders as the stored ones do."""
    if precision == "binary":  # the inner product of signs falls as the Hamming distance grows
        return np.unpackbits(values, axis=1).astype(np.float32) * 2 - 1
    vectors = values.astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def nearest(vectors: np.ndarray, queries: np.ndarray, count: int) -> np.ndarray:
    scores = vectors[queries] @ vectors.T
    scores[np.arange(len(queries)), queries] = -np.inf
    return np.argsort(-scores, axis=1, kind="stable")[:, :count]


def recall(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.mean([len(set(a) & set(b)) / NEAREST for a, b in zip(found, expected, strict=True)]))


def rescored(vectors: np.ndarray, stored: np.ndarray, queries: np.ndarray) -> np.ndarray:
    candidates = nearest(stored, queries, RESCORED)
    scores = np.einsum("qd,qcd->qc", vectors[queries], stored[candidates])
    best = np.argsort(-scores, axis=1, kind="stable")[:, :NEAREST]
    return np.take_along_axis(candidates, best, axis=1)


def column_bytes(vectors: np.ndarray, precision: str, *, as_the_job: bool) -> float:
    """Bytes of the column for each row."""
    from embed.artifacts.outputs import writer_options  # type: ignore[import-not-found]
    from embed.config import EmbedConfig  # type: ignore[import-not-found]
    from embed.data.precision import vector_array, vector_fields  # type: ignore[import-not-found]

    config = EmbedConfig(embedding_dtype=precision)
    array = vector_array(vectors, precision)
    schema = pa.schema(vector_fields(config, vectors.shape[1], 0))
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, schema, **(writer_options(schema, config) if as_the_job else {})) as writer:
        writer.write_table(pa.table([array], schema=schema))
    metadata = pq.read_metadata(pa.BufferReader(sink.getvalue()))
    groups = [metadata.row_group(index).column(0).total_compressed_size for index in range(metadata.num_row_groups)]
    return round(sum(groups) / len(vectors), 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, default=ROOT / "runs/demo/input")
    parser.add_argument("--model", type=Path, default=ROOT / "runs/demo/model")
    parser.add_argument("--rows", type=int, default=6000)
    parser.add_argument("--queries", type=int, default=500)
    options = parser.parse_args()
    if not options.input.is_dir() or not options.model.is_dir():
        print(f"there is no {options.input} or no {options.model}; run `make demo` first", file=sys.stderr)
        return 2
    from sentence_transformers.util.quantization import quantize_embeddings

    from embed.data.precision import stored  # type: ignore[import-not-found]

    texts = texts_of(options.input, options.rows)
    vectors = embed(options.model, texts)
    queries = np.random.default_rng(0).choice(len(vectors), min(options.queries, len(vectors)), replace=False)
    expected = nearest(vectors, queries, NEAREST)
    results: dict[str, Any] = {"rows": len(vectors), "dimensions": vectors.shape[1]}
    for precision in PRECISIONS:
        found = decoded(stored(vectors, precision), precision)
        results[precision] = {
            "recall@10": round(recall(nearest(found, queries, NEAREST), expected), 4),
            "rescored": round(recall(rescored(vectors, found, queries), expected), 4),
            "bytes_per_row": column_bytes(vectors, precision, as_the_job=True),
        }
        print(f"{precision}: {results[precision]}")
    results["float32"]["plain_bytes_per_row"] = column_bytes(vectors, "float32", as_the_job=False)
    others = {
        "int8, one scale": np.rint(vectors * 127),
        "int8, ranges of the corpus": quantize_embeddings(vectors, "int8").astype(np.float32),
    }
    for name, values in others.items():
        results[name] = {"recall@10": round(recall(nearest(values, queries, NEAREST), expected), 4)}
        print(f"{name}: {results[name]}")
    goals = [goal("recall@10 of int8", results["int8"]["recall@10"], ">=0.98")]
    publish("embed_precision", results, goals)
    return 0


if __name__ == "__main__":
    sys.exit(main())
