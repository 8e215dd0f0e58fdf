"""infinity's engine with its torch back end. It takes a whole file at once and batches by length."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
from infinity_emb import AsyncEmbeddingEngine, EngineArgs
from infinity_emb.transformer.embedder.sentence_transformer import SentenceTransformerPatched


class Peer:
    def __init__(self, task: dict[str, Any]) -> None:
        self.gate: Any = None
        compute = SentenceTransformerPatched.encode_core

        def encode_core(model: Any, features: Any) -> Any:
            output = compute(model, features)
            if self.gate is not None:
                self.gate.passed(int(features["attention_mask"].sum()))
            return output

        SentenceTransformerPatched.encode_core = encode_core
        self.engine = AsyncEmbeddingEngine.from_args(
            EngineArgs(
                model_name_or_path=task["model"],
                engine="torch",
                device="cpu",
                dtype="float32",
                batch_size=32,
                model_warmup=False,
                bettertransformer=False,
                lengths_via_tokenize=True,
            )
        )
        self.about = {"precision": "float32", "batch": 32}

    def embed(self, texts: list[str], gate: Any) -> np.ndarray:
        self.gate = gate
        return asyncio.run(self._embed(texts))

    async def _embed(self, texts: list[str]) -> np.ndarray:
        async with self.engine:
            vectors, _ = await self.engine.embed(sentences=texts)
        return np.asarray(vectors, np.float32)


def load(task: dict[str, Any]) -> Peer:
    return Peer(task)
