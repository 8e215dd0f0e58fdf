"""What is merged and written is the model that was trained, for every kind of adapter and base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_model
import torch
from transformers import AutoModelForCausalLM

from estiba.errors import ConfigError
from finetune.artifacts.merge import write_adapter, write_merged
from finetune.config import FinetuneConfig
from finetune.model.adapters import add_adapters, load_trainable_state, quantization_config, trainable_state
from finetune.model.base import find_base

CPU = torch.device("cpu")


def trained(folder: Path, kind: str = "llama", dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """A base with adapters whose weights are far from zero, as after a long training."""
    tiny_model.build(folder, kind, dtype=dtype, hidden_size=64, head_dim=16, intermediate_size=128)
    config = FinetuneConfig(lora_rank=4, **settings)
    quantization = quantization_config(config, CPU, torch.float32)
    base = find_base(str(folder), folder)
    model = add_adapters(base.load(dtype=torch.float32, quantization=quantization, device=CPU), config, "base")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(3, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found: torch.Tensor = model(ids, use_cache=False).logits.float()
    return found


def divergence(expected: torch.Tensor, found: torch.Tensor) -> float:
    """KL(expected || found) a token, in nats."""
    first, second = expected.log_softmax(-1), found.log_softmax(-1)
    return float((first.exp() * (first - second)).sum(-1).mean())


def test_four_bit_layers_without_an_adapter_are_written_in_full(tmp_path: Path) -> None:
    model = trained(tmp_path / "base", method="qlora", lora_targets=("q_proj", "down_proj"))
    (tmp_path / "merged").mkdir()
    write_merged(model, tmp_path / "merged", dtype=torch.float32)
    merged, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert divergence(logits(model), logits(merged)) <= 1e-6


@pytest.mark.parametrize(
    "settings",
    [{}, {"rslora": True}, {"dora": True}, {"lora_alpha": 3.0}, {"lora_targets": ("q_proj", "down_proj")}],
    ids=["lora", "rslora", "dora", "alpha", "targets"],
)
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_the_merged_model_has_the_logits_of_base_plus_adapter(
    tmp_path: Path, kind: str, settings: dict[str, Any]
) -> None:
    model = trained(tmp_path / "base", kind, **settings)
    expected = logits(model)
    (tmp_path / "merged").mkdir()
    write_merged(model, tmp_path / "merged", dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (logits(merged) - expected).abs().max() <= 1e-4 * expected.abs().max()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert (logits(base) - expected).abs().max() > 0.01 * expected.abs().max()
    assert not any(tensor.isnan().any() for tensor in merged.state_dict().values())


def test_a_base_in_four_bits_is_dequantised_before_the_merge(tmp_path: Path) -> None:
    model = trained(tmp_path / "base", method="qlora")
    expected = logits(model)
    for dtype, most in ((torch.float32, 1e-6), (torch.bfloat16, 0.002)):
        folder = tmp_path / str(dtype)
        folder.mkdir()
        write_merged(model, folder, dtype=dtype)
        merged = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        assert merged.dtype == dtype
        assert divergence(expected, logits(merged)) <= most
        assert "quantization_config" not in json.loads((folder / "config.json").read_text())


def test_large_models_are_written_in_shards_that_load_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained(tmp_path / "base")
    monkeypatch.setattr("finetune.artifacts.merge.SHARD_BYTES", 40_000)
    (tmp_path / "merged").mkdir()
    write_merged(model, tmp_path / "merged", dtype=torch.float32)
    shards = sorted(path.name for path in (tmp_path / "merged").glob("*.safetensors"))
    assert len(shards) > 3 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (logits(merged) - logits(model)).abs().max() <= 1e-4 * logits(model).abs().max()


def test_an_untied_head_is_written(tmp_path: Path) -> None:
    tiny_model.build(tmp_path / "base", tie_word_embeddings=False)
    base = find_base(str(tmp_path / "base"), tmp_path)
    model = base.load(dtype=torch.float32)
    (tmp_path / "merged").mkdir()
    write_merged(model, tmp_path / "merged", dtype=torch.float32)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(model))


def test_nothing_that_is_written_names_a_path_of_this_machine(tmp_path: Path) -> None:
    model = trained(tmp_path / "base")
    (tmp_path / "merged").mkdir()
    write_merged(model, tmp_path / "merged", dtype=torch.float32)
    write_adapter(model, tmp_path / "merged/adapter")
    for path in (tmp_path / "merged").rglob("*.json"):
        assert str(tmp_path) not in path.read_text(), path.name
    settings = json.loads((tmp_path / "merged/adapter/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "base"
    assert settings["target_modules"] == sorted(settings["target_modules"])


def test_adapters_are_restored_whole_or_not_at_all(tmp_path: Path) -> None:
    model = trained(tmp_path / "base")
    state = {name: tensor.clone() for name, tensor in trainable_state(model).items()}
    expected = logits(model)
    other = trained(tmp_path / "other", lora_alpha=8.0)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    load_trainable_state(other, state)
    assert torch.equal(logits(other), expected)
    state.pop(next(iter(state)))
    with pytest.raises(Exception, match="other trained tensors"):
        load_trainable_state(other, state)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_an_adapter_on_one_of_two_tied_matrices_is_refused(tmp_path: Path, target: str) -> None:
    with pytest.raises(ConfigError, match="are one matrix"):
        trained(tmp_path / "base", lora_targets=(target,))
