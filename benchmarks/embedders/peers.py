"""Who is compared."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

REFERENCE = "sentence-transformers"
DEFAULT = "ours"


@dataclass(frozen=True, kw_only=True)
class Peer:
    name: str
    module: str
    """Of embedders/workers."""
    environment: str = "bench"
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def is_ours(self) -> bool:
        return self.module == "ours"


PEERS = (
    Peer(name=DEFAULT, module="ours"),
    Peer(name="ours, torch float32", module="ours", options={"engine": "torch"}),
    Peer(name="ours, openvino float32", module="ours", options={"engine": "openvino", "dtype": "float32"}),
    Peer(name="ours, openvino bfloat16", module="ours", options={"engine": "openvino"}),
    Peer(name="ours, int8", module="ours", options={"dtype": "int8"}),
    Peer(name=REFERENCE, module="by_sentence_transformers"),
    Peer(
        name="sentence-transformers, ONNX",
        module="by_sentence_transformers",
        environment="onnx",
        options={"backend": "onnx"},
    ),
    Peer(
        name="sentence-transformers, OpenVINO",
        module="by_sentence_transformers",
        environment="openvino",
        options={"backend": "openvino"},
    ),
    Peer(name="transformers, unsorted", module="by_transformers"),
    Peer(name="ONNX Runtime", module="by_onnxruntime", environment="onnx"),
    Peer(name="fastembed", module="by_fastembed", environment="fastembed"),
    Peer(name="infinity", module="by_infinity", environment="infinity"),
)

NOT_TO_BE_HAD = {"text-embeddings-inference": "no Python package of it; it comes as a container image or from source"}


def matrices(engine: str, tokens: int) -> Peer:
    """The matrix products alone, by an engine of ours as its `info` names it: "torch 2.13.0, float32"."""
    kind, _, precision = engine.partition(", ")
    options = {"engine": kind.split(" ")[0], "precision": precision, "tokens": tokens}
    return Peer(name=f"matrix products, {options['engine']} {precision}", module="matrix_products", options=options)
