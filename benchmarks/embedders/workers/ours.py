"""This project's Encoder, with its defaults or with the settings in `options`. A file is one window."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from embed.config import EmbedConfig  # type: ignore[import-not-found]
from embed.data.rows import CALIBRATION_TEXTS, COMPARED_TEXTS  # type: ignore[import-not-found]
from embed.model import Encoder  # type: ignore[import-not-found]


class Ours:
    def __init__(self, task: dict[str, Any]) -> None:
        config = EmbedConfig(model=task["model"], device="cpu", **task["options"])
        texts = json.loads(Path(task["files"][0]).read_text("utf-8"))
        self.encoder = Encoder(config, texts[: COMPARED_TEXTS + CALIBRATION_TEXTS])

    @property
    def about(self) -> dict[str, Any]:
        return {"engine": self.encoder.info.engine, "token_budget": self.encoder.token_budget}

    def embed(self, texts: list[str], gate: Any) -> np.ndarray:
        window = self.encoder.tokenize(texts)
        self.encoder.choose_engine(window)
        encoded = self.encoder.encode(window, on_batch=lambda batch: gate.passed(batch.tokens, may_stop=False))
        return encoded.vectors


def load(task: dict[str, Any]) -> Ours:
    return Ours(task)
