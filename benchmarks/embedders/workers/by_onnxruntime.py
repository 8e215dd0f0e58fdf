"""A careful loop over ONNX Runtime: texts by descending number of tokens, 32 at a time, without transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from by_sentence_transformers import load_model  # type: ignore[import-not-found]
from tokenizers import Tokenizer

BATCH = 32


class Peer:
    def __init__(self, task: dict[str, Any]) -> None:
        path = Path(task["converted"]) / "onnx/onnx/model.onnx"
        if not path.exists():
            load_model(task, "onnx")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = task["threads"]
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.inputs = {item.name for item in self.session.get_inputs()}
        self.tokenizer = Tokenizer.from_file(f"{task['model']}/tokenizer.json")
        self.tokenizer.enable_truncation(task["max_length"])
        self.tokenizer.no_padding()
        self.about = {"precision": "float32", "batch": BATCH}

    def embed(self, texts: list[str], gate: Any) -> np.ndarray:
        encodings = self.tokenizer.encode_batch_fast(texts)
        lengths = np.array([len(each.ids) for each in encodings])
        order = np.argsort(-lengths, kind="stable")
        vectors: Any = None
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            mask = np.arange(lengths[rows[0]]) < lengths[rows][:, None]
            ids = np.zeros(mask.shape, np.int64)
            ids[mask] = np.concatenate([encodings[row].ids for row in rows])
            given = {"input_ids": ids, "attention_mask": mask.astype(np.int64), "token_type_ids": np.zeros_like(ids)}
            hidden_BTD = self.session.run(None, {name: given[name] for name in self.inputs})[0]
            pooled_BD = (hidden_BTD * mask[:, :, None]).sum(1) / mask.sum(1)[:, None]
            pooled_BD = pooled_BD / np.linalg.norm(pooled_BD, axis=1, keepdims=True)
            if vectors is None:
                vectors = np.zeros((len(texts), pooled_BD.shape[1]), np.float32)
            vectors[rows] = pooled_BD
            gate.passed(int(mask.sum()))
        return vectors


def load(task: dict[str, Any]) -> Peer:
    return Peer(task)
