"""A plain loop over transformers: 32 texts at a time in the order of the file, mean pooling, unit length."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

BATCH = 32


class Peer:
    def __init__(self, task: dict[str, Any]) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(task["model"])
        self.model = AutoModel.from_pretrained(task["model"]).eval()
        self.max_length = task["max_length"]
        self.about = {"precision": "float32", "batch": BATCH}

    def embed(self, texts: list[str], gate: Any) -> np.ndarray:
        parts = []
        for start in range(0, len(texts), BATCH):
            batch = self.tokenizer(
                texts[start : start + BATCH],
                padding=True,
                truncation=True,
                max_length=self.max_length,
                return_tensors="pt",
            )
            with torch.inference_mode():
                hidden_BTD = self.model(**batch).last_hidden_state
            mask_BT1 = batch["attention_mask"].unsqueeze(-1)
            pooled_BD = (hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1)
            parts.append(torch.nn.functional.normalize(pooled_BD, dim=1).numpy())
            gate.passed(int(batch["attention_mask"].sum()))
        return np.concatenate(parts)


def load(task: dict[str, Any]) -> Peer:
    return Peer(task)
