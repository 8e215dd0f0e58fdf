"""The names by which transformers 4 knows what transformers 5 writes, beside the new ones.

Without them an inference image with transformers 4 computes positions with its default `rope_theta` and answers wrongly
without a word, or finds no tokenizer. Both versions read the result alike.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def add_older_names(folder: Path) -> None:
    """Complete config.json and tokenizer_config.json of a model directory. Raises OSError."""
    _change(folder / "config.json", _model)
    _change(folder / "tokenizer_config.json", _tokenizer)


def _change(path: Path, change: Any) -> None:
    if path.exists():
        document = json.loads(path.read_text("utf-8"))
        change(document)
        path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _model(config: dict[str, Any]) -> None:
    if "dtype" in config:
        config["torch_dtype"] = config["dtype"]
    rope = config.get("rope_parameters") or {}
    # Gemma 3 has one of these for each kind of layer, which transformers 4 names in a way of its own.
    if "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            config["rope_scaling"] = rope


def _tokenizer(config: dict[str, Any]) -> None:
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
