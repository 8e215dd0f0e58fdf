"""Exported models: other libraries read them and compute the same."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from letters import Letters
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from aura.artifacts.export import load_final_model, publish, write_final_model, write_hf_directory
from aura.artifacts.sample import sample
from aura.model.decoder import Aura, ModelConfig

WORDS = Letters()


def model_of(*, tied: bool = False, theta: float = 10_000.0) -> Aura:
    shape = ModelConfig(
        vocab_size=WORDS.vocab_size, embed_size=48, num_layers=3, num_heads=4, seq_length=40, ff_size=100,
        dropout=0.1, rope_theta=theta, tie_embeddings=tied,
    )  # fmt: skip
    model = Aura(shape, seed=2)
    with torch.no_grad():  # as after training: norms that are not one, logits that differ
        for number, parameter in enumerate(model.parameters()):
            parameter.mul_(1.5).add_(
                0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            )
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "model"
    write_hf_directory(model_of(), WORDS, folder)  # type: ignore[arg-type]
    return folder


@pytest.mark.parametrize(("tied", "theta"), [(False, 10_000.0), (True, 500_000.0)])
def test_transformers_computes_the_same_logits(tmp_path: Path, tied: bool, theta: float) -> None:
    model = model_of(tied=tied, theta=theta)
    write_hf_directory(model, WORDS, tmp_path)  # type: ignore[arg-type]
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    assert theirs.dtype == torch.float32
    assert sum(p.numel() for p in theirs.parameters()) == model.config.parameters
    tokens = torch.randint(0, WORDS.vocab_size, (3, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, others = model(tokens), theirs.eval()(tokens).logits
    torch.testing.assert_close(ours, others, rtol=0, atol=1e-5)
    assert ours.std() > 0.3  # logits of nothing would agree too


def test_transformers_computes_the_same_loss(folder: Path) -> None:
    tokens = torch.randint(0, WORDS.vocab_size, (2, 33), generator=torch.Generator().manual_seed(0))
    theirs = AutoModelForCausalLM.from_pretrained(folder)(input_ids=tokens, labels=tokens).loss
    ours = model_of().loss(tokens[:, :-1], tokens[:, 1:]) / 64
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)


def test_transformers_generates_the_text_that_sampling_generates(folder: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("</s>la mar", return_tensors="pt", add_special_tokens=False).input_ids
    made = theirs.generate(ids, max_new_tokens=20, do_sample=False, suppress_tokens=[WORDS.pad_id])
    text = sample(model_of(), WORDS, "la mar", max_new_tokens=20, temperature=0)
    assert WORDS.decode(made[0, 1:].tolist()).removesuffix("</s>") == text
    assert text.startswith("la mar") and len(text) > 6


def test_special_tokens_come_from_the_tokenizer(folder: Path) -> None:
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == 1
    generation = GenerationConfig.from_pretrained(folder)
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (0, 1, 2)


def test_every_file_is_readable_by_all_and_no_temporary_file_remains(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not [name for name in names if name.startswith(".")]
    ours = ("config.json", "generation_config.json", "model.safetensors")
    assert [oct((folder / name).stat().st_mode & 0o777) for name in ours] == ["0o644"] * 3


def test_weights_are_plain_safetensors_with_llama_names(folder: Path) -> None:
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        names = set(file.keys())
        assert file.get_tensor("model.layers.2.mlp.up_proj.weight").shape == (100, 48)
    assert len(names) == 3 + 9 * 3


def test_a_second_export_gives_the_same_bytes(folder: Path) -> None:
    before = (folder / "model.safetensors").read_bytes()
    write_hf_directory(model_of(), WORDS, folder)  # type: ignore[arg-type]
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("tied", [False, True])
def test_the_final_model_loads_with_weights_only(tmp_path: Path, tied: bool) -> None:
    model = model_of(tied=tied)
    write_final_model(model, 1234, tmp_path / "final_model.pt")
    state = torch.load(tmp_path / "final_model.pt", weights_only=True)
    assert set(state) == {"model_state_dict", "model_config", "step"} and state["step"] == 1234
    assert state["model_config"] == dataclasses.asdict(model.config)
    again, step = load_final_model(tmp_path / "final_model.pt")
    tokens = torch.arange(20)[None]
    assert step == 1234 and torch.equal(again(tokens), model(tokens))


def test_a_failed_write_leaves_only_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"old")

    def half(beside: Path) -> None:
        beside.write_bytes(b"ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        publish(path, half)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
