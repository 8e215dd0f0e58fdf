"""One embedder in its own process: load the model, then embed the corpus file by file as its turns come.

    python worker.py '{"module": "ours", "model": ..., "files": [...], "vectors": ..., "threads": 2, "options": {}}'

A module has `load(task)`, which returns a peer with `about` (names and versions) and `embed(texts, gate)`.
"""

from __future__ import annotations

import importlib
import json
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from gate import Gate  # type: ignore[import-not-found]

LIBRARIES = (
    "torch",
    "sentence-transformers",
    "transformers",
    "openvino",
    "optimum",
    "optimum-intel",
    "optimum-onnx",
    "onnxruntime",
    "fastembed",
    "infinity-emb",
    "tokenizers",
)


def versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def main() -> None:
    task: dict[str, Any] = json.loads(sys.argv[1])
    gate = Gate()
    peer = importlib.import_module(task["module"]).load(task)
    files = [json.loads(Path(name).read_text("utf-8")) for name in task["files"]]
    peer.embed(files[0][:: max(1, len(files[0]) // 64)], gate)  # short and long texts, to warm up
    gate.ready({**peer.about, "versions": versions()})
    vectors = []
    for texts in files:
        vectors.append(peer.embed(texts, gate))
        if len(vectors) == len(files) and vectors[0] is not None:
            np.save(task["vectors"], np.concatenate(vectors))
        gate.file_done()


if __name__ == "__main__":
    main()
