"""Models that are read straight into shards, against transformers' own loading."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_model
import torch
from ranks import on_ranks
from safetensors.torch import load_file, save_file
from sharded_models import INPUTS
from transformers import AutoModelForCausalLM, LlamaConfig

from estiba.errors import ConfigError
from estiba.storage import open_store
from multinode.weights import Weights, names_of


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A folder with models of all kinds, and what three ranks computed with each."""
    root = tmp_path_factory.mktemp("sharded")
    models = {kind: str(tiny_model.build(root / kind, kind)) for kind in tiny_model.KINDS}
    return root, on_ranks(3, "sharded_models:logits_and_gradients", models, str(root / "out"))


@pytest.mark.parametrize("kind", tiny_model.KINDS)
def test_a_model_in_shards_computes_and_learns_what_the_whole_one_does(
    sharded: tuple[Path, list[dict[str, Any]]], kind: str
) -> None:
    """Three ranks, which divide none of its tensors evenly. Tied weights get the gradients of both uses."""
    root, results = sharded
    folder = root / kind
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    ids = torch.tensor(INPUTS)
    logits = model(input_ids=ids).logits
    torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).backward()
    for result in (one[kind] for one in results):
        assert torch.allclose(torch.tensor(result["logits"]), logits[0, -1], atol=1e-5)
        expected = {name: float(parameter.grad.norm()) for name, parameter in model.named_parameters()}
        assert result["norms"].keys() == expected.keys()
        for name, norm in expected.items():
            assert result["norms"][name] == pytest.approx(norm, rel=1e-4, abs=1e-6), name
        assert result["local"] < result["total"] * 0.4
    written, original = load_file(root / "out" / kind / "model.safetensors"), load_file(folder / "model.safetensors")
    assert written.keys() == original.keys()
    assert all(torch.equal(written[name], tensor.float()) for name, tensor in original.items())


def test_a_rank_needs_memory_for_its_shard_and_little_more_while_it_loads(tmp_path: Path) -> None:
    """The limit is the shard and 1 GB; the model here is smaller, so the margin is too."""
    config = LlamaConfig(
        vocab_size=20000, hidden_size=1024, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tensors = {name: torch.zeros(parameter.shape, dtype=torch.bfloat16) for name, parameter in model.named_parameters()}
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    del tensors
    for result in on_ranks(3, "sharded_models:peak_while_loading", str(tmp_path)):
        assert result["shard"] <= result["whole"] / 3 + 1e6
        assert result["grew"] <= result["shard"] + 200e6, result
        assert result["grew"] < result["whole"] * 0.8, result


def test_weights_that_do_not_fit_the_configuration_are_named(tmp_path: Path) -> None:
    folder = tiny_model.build(tmp_path / "model")
    weights = Weights(open_store(str(folder)))
    with pytest.raises(ConfigError, match=r"lack model\.layers\.3\.mlp\.experts"):
        names_of(weights, {"model.embed_tokens.weight": 0, "model.layers.3.mlp.experts": 0}, "model")
    assert names_of(weights, {"embed_tokens.weight": 0}, "model") == {
        "embed_tokens.weight": "model.embed_tokens.weight"
    }


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "has neither model.safetensors nor"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 100), "not a whole safetensors file"),
        (
            lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1]),
            "not a whole safetensors file",
        ),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text(
                '{"weight_map": {"a": "b.safetensors"}}'
            ),
            "b.safetensors: is named by",
        ),
    ],
)
def test_a_model_without_whole_weights_is_refused(tmp_path: Path, damage: object, says: str) -> None:
    folder = tiny_model.build(tmp_path / "model")
    damage(folder)  # type: ignore[operator]
    with pytest.raises(ConfigError, match=says):
        Weights(open_store(str(folder)))


def test_weights_in_several_files_are_found_by_their_index(tmp_path: Path) -> None:
    folder = tiny_model.build(tmp_path / "model")
    shutil.copytree(folder, tmp_path / "divided")
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    (tmp_path / "divided/model.safetensors").unlink()
    for file, members in files.items():
        save_file({name: tensors[name] for name in members}, tmp_path / "divided" / file)
    index = {"weight_map": {name: file for file, members in files.items() for name in members}}
    (tmp_path / "divided/model.safetensors.index.json").write_text(json.dumps(index))
    weights = Weights(open_store(str(tmp_path / "divided")))
    for name, tensor in tensors.items():
        target = torch.empty(tensor.shape[0] - 1, *tensor.shape[1:])
        weights.read_into(name, target, 1)
        assert torch.equal(target, tensor[1:].float())
