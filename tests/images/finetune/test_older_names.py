"""What transformers 4 needs of a directory that transformers 5 wrote, which the latter must read as before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_model
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune.artifacts.older_names import add_older_names

SCALED = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def read(path: Path) -> dict[str, object]:
    value: dict[str, object] = json.loads(path.read_text())
    return value


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(3, 203)[None]).logits
    return found


@pytest.mark.parametrize("kind", ["llama", "scaled", "qwen3", "mistral", "gemma3"])
def test_a_completed_directory_is_the_same_model(kind: str, tmp_path: Path) -> None:
    changes = {"rope_parameters": SCALED} if kind == "scaled" else {}
    tiny_model.build(tmp_path, "llama" if kind == "scaled" else kind, **changes)
    before = logits(tmp_path)
    add_older_names(tmp_path)
    assert torch.equal(logits(tmp_path), before)


def test_the_base_of_the_positions_has_its_older_name(tmp_path: Path) -> None:
    """transformers 4 takes 10,000 where it finds no rope_theta, and computes other logits without a word."""
    tiny_model.build(tmp_path, rope_parameters=SCALED)
    assert "rope_theta" not in read(tmp_path / "config.json"), "the library writes it itself: this is superfluous"
    add_older_names(tmp_path)
    config = read(tmp_path / "config.json")
    assert config["rope_theta"] == 500_000.0
    assert config["rope_scaling"] == SCALED
    assert config["torch_dtype"] == config["dtype"] == "float32"


def test_the_tokenizer_has_a_class_and_special_tokens_that_transformers_4_knows(tmp_path: Path) -> None:
    tokenizer = tiny_model.make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    tokenizer.save_pretrained(tmp_path)
    expected = tokenizer("<tool>barco").input_ids
    add_older_names(tmp_path)
    config = read(tmp_path / "tokenizer_config.json")
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["additional_special_tokens"] == ["<tool>"] and "extra_special_tokens" not in config
    assert AutoTokenizer.from_pretrained(tmp_path)("<tool>barco").input_ids == expected
