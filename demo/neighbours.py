"""Show the results of the demo's job: counts, speed, and the passages nearest to its questions.

    python neighbours.py OUTPUT_DIRECTORY [QUESTIONS_FILE]

Runs inside the embed image (numpy and pyarrow are there); reads only the output files. Exit status 1, with
the reason, if they are not the output of a finished job.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

NEIGHBOURS = 3
LINE_CHARS = 110


class OutputError(Exception):
    """The output is not that of a finished job; the message says why."""


@dataclass
class Passages:
    """Rows with a vector. Shapes: N rows, D embedding width."""

    rows: list[dict[str, Any]]
    """package, title, texto of each."""
    vectors_ND: np.ndarray
    """float32, unit length."""


def read_vectors(path: Path) -> tuple[Passages, Counter[str]]:
    """The rows of one output file that have a vector, and how many rows have each status."""
    table = pq.read_table(path)
    missing = {"texto", "embeddings", "status", "package", "title"} - set(table.column_names)
    if missing:
        raise OutputError(f"{path.name} has no column {', '.join(sorted(missing))}; delete the output and run again")
    row_status = [str(status) for status in table.column("status").to_pylist()]
    statuses = Counter(row_status)
    has_vector = table.column("embeddings").is_valid()
    wrong = sum((status == "ok") != has for status, has in zip(row_status, has_vector.to_pylist(), strict=True))
    if wrong:
        raise OutputError(f"{path.name}: {wrong} rows have a status that contradicts their vector ({dict(statuses)})")
    table = table.filter(has_vector)
    vectors = table.column("embeddings").combine_chunks()
    if not isinstance(vectors, pa.FixedSizeListArray):
        raise OutputError(f"{path.name}: embeddings are {vectors.type}, expected a fixed-size list")
    matrix = vectors.flatten().to_numpy(zero_copy_only=False).astype(np.float32).reshape(len(table), -1)
    return Passages(table.select(["package", "title", "texto"]).to_pylist(), matrix), statuses


def check_vectors(passages: Passages) -> None:
    """Raise OutputError unless every vector is finite and of unit length."""
    norms_N = np.linalg.norm(passages.vectors_ND, axis=1)
    wrong = int((~np.isfinite(norms_N) | (np.abs(norms_N - 1) > 1e-3)).sum())
    if wrong:
        raise OutputError(f"{wrong} of {len(norms_N)} vectors are not of unit length")


def nearest(question_D: np.ndarray, passages: Passages, count: int) -> list[tuple[float, dict[str, Any]]]:
    """The `count` passages with the highest cosine, best first."""
    cosines_N = passages.vectors_ND @ question_D
    best = np.argsort(-cosines_N, kind="stable")[:count]
    return [(float(cosines_N[index]), passages.rows[index]) for index in best]


def read_all(output: Path, questions_file: str) -> tuple[Passages, Passages, Counter[str], int]:
    """Questions, passages, statuses and number of files. Raises OutputError if questions or passages are missing."""
    paths = sorted(output.rglob("*.parquet"))
    if not paths:
        raise OutputError(f"{output} holds no parquet files")
    questions: Passages | None = None
    others: list[Passages] = []
    statuses: Counter[str] = Counter()
    for path in paths:
        passages, more = read_vectors(path)
        statuses += more
        if path.name == questions_file:
            questions = passages
        else:
            others.append(passages)
    if questions is None or not others:
        raise OutputError(f"{output} has no {questions_file}, or no other file")
    rows = [row for passages in others for row in passages.rows]
    return questions, Passages(rows, np.concatenate([passages.vectors_ND for passages in others])), statuses, len(paths)


def find_number(results: Any, name: str) -> float | None:
    """The first number called `name` anywhere in a JSON document."""
    if isinstance(results, dict):
        if isinstance(results.get(name), int | float):
            return float(results[name])
        results = list(results.values())
    if isinstance(results, list):
        for value in results:
            if (number := find_number(value, name)) is not None:
                return number
    return None


def show(output: Path, questions_file: str) -> None:
    """Print the counts and the neighbours. Raises OutputError."""
    questions, passages, statuses, files = read_all(output, questions_file)
    check_vectors(passages)
    try:
        results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OutputError(f"results.json cannot be read: {error}") from None
    width = passages.vectors_ND.shape[1]
    breakdown = ", ".join(f"{count:,} {status}" for status, count in statuses.most_common())
    speed = find_number(results, "tokens_per_s")
    print(
        f"{files} files, {sum(statuses.values()):,} rows ({breakdown}), vectors of {width} numbers, all of unit length"
    )
    if speed:
        print(f"{speed:,.0f} tokens/s")
    for row, question_D in zip(questions.rows, questions.vectors_ND, strict=True):
        print(f"\n{row['texto']}")
        for cosine, passage in nearest(question_D, passages, NEIGHBOURS):
            text = textwrap.shorten(passage["texto"], LINE_CHARS, placeholder=" …")
            print(f"  {cosine:.2f}  {passage['package']}: {passage['title']}\n        {text}")


def main(arguments: list[str]) -> int:
    """Command line; exit status 0, 1 for output that cannot be shown, 2 for wrong usage."""
    if not 1 <= len(arguments) <= 2:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        show(Path(arguments[0]), arguments[1] if len(arguments) > 1 else "questions.parquet")
    except (OutputError, pa.ArrowInvalid) as error:
        print(f"neighbours: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
