"""SentenceTransformer.encode on a whole file with its default batch of 32, as the original calls it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from sentence_transformers import SentenceTransformer


class Peer:
    def __init__(self, task: dict[str, Any]) -> None:
        self.backend = task["options"].get("backend", "torch")
        self.model = load_model(task, self.backend)
        self.about = {"backend": self.backend, "batch": 32, **engine_of(self.model, self.backend)}
        self.forward = self.model.forward

    def embed(self, texts: list[str], gate: Any) -> np.ndarray:
        def forward(features: Any, **more: Any) -> Any:
            output = self.forward(features, **more)
            gate.passed(int(features["attention_mask"].sum()))
            return output

        self.model.forward = forward
        return self.model.encode(texts, show_progress_bar=False, normalize_embeddings=True)


def load_model(task: dict[str, Any], backend: str) -> Any:
    """The model; for ONNX and OpenVINO, converted by optimum the first time, and kept."""
    if backend == "torch":
        return SentenceTransformer(task["model"], device="cpu")
    kwargs: dict[str, Any] = {}
    if backend == "onnx":
        import onnxruntime

        kwargs = {"provider": "CPUExecutionProvider", "session_options": onnxruntime.SessionOptions()}
        kwargs["session_options"].intra_op_num_threads = task["threads"]
    if backend == "openvino":
        kwargs = {"ov_config": {"INFERENCE_NUM_THREADS": task["threads"]}}
    converted = Path(task["converted"]) / backend
    if not (converted / "done").exists():
        made = SentenceTransformer(task["model"], device="cpu", backend=backend, model_kwargs=dict(kwargs))
        made.save_pretrained(str(converted))
        (converted / "done").touch()
    return SentenceTransformer(str(converted), device="cpu", backend=backend, model_kwargs=kwargs)


def engine_of(model: Any, backend: str) -> dict[str, str]:
    if backend != "openvino":
        return {"precision": "float32"}
    module = model[0]
    compiled = getattr(getattr(module, "auto_model", None) or module.model, "request", None)
    try:
        precision = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()  # type: ignore[union-attr]
    except Exception:
        precision = "as OpenVINO chooses"
    return {"precision": precision}


def load(task: dict[str, Any]) -> Peer:
    return Peer(task)
