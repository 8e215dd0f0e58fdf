"""What is left when training ends: a Hugging Face directory, and the guide's own two files.

    hf_directory(model, tokenizer, folder)      # AutoModelForCausalLM.from_pretrained(folder) gives the same logits
    final_model(model, step, folder / "final_model.pt")     # and model_config.json beside it

Every file is written beside its name, brought to disk, then renamed: a name there is holds a whole file.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from aura.model import NORM_EPS, Aura, Shape

if TYPE_CHECKING:
    from aura.tokenizer import Tokenizer

FILE_MODE = 0o644
"""Readable by all: a container writes as root what a person reads as somebody else."""


def hf_directory(model: Aura, tokenizer: Tokenizer, folder: Path) -> None:
    """Model and tokenizer as transformers and everything that reads its format (llama.cpp, vLLM) expect them.

    Weights are float32, as trained. config.json is written last: what looks for it finds all the rest.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    tensors = llama_tensors(model)
    # transformers refuses safetensors whose header does not say which framework wrote them.
    write_whole(folder / "model.safetensors", lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    write_json(folder / "generation_config.json", {"_from_model_config": True, **ids})
    write_json(folder / "config.json", llama_config(model.shape) | ids)


def final_model(model: Aura, step: int, path: Path) -> None:
    """The guide's final_model.pt, which torch.load(weights_only=True) takes, and model_config.json in its folder."""
    config = model_config(model.shape)
    state = {"model_state_dict": _on_cpu(model.state_dict()), "model_config": config, "step": step}
    path.parent.mkdir(parents=True, exist_ok=True)

    def save(beside: Path) -> None:
        with beside.open("wb") as file:  # not by its path, which torch.save writes into the file
            torch.save(state, file)

    write_whole(path, save)
    write_json(path.parent / "model_config.json", config)


def load_final_model(path: Path) -> tuple[Aura, int]:
    """The model of a final_model.pt, in evaluation mode on the CPU, and its step."""
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    model = Aura(Shape(**state["model_config"]), seed=0)
    model.load_state_dict(state["model_state_dict"])
    return model.eval(), int(state["step"])


def model_config(shape: Shape) -> dict[str, Any]:
    """The shape as plain numbers: Shape(**model_config(shape)) == shape."""
    return dataclasses.asdict(shape)


def llama_config(shape: Shape) -> dict[str, Any]:
    """config.json of transformers' LlamaForCausalLM."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.embed_size,
        "intermediate_size": shape.ff_width,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_heads,
        "head_dim": shape.head_size,
        "max_position_embeddings": shape.seq_length,
        "rms_norm_eps": NORM_EPS,
        "rope_theta": shape.rope_theta,  # transformers before 5
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "tie_word_embeddings": shape.tie_embeddings,
        "use_cache": True,
        "dtype": "float32",
        "torch_dtype": "float32",  # transformers before 5
    }


def llama_tensors(model: Aura) -> dict[str, Tensor]:
    """The parameters by Llama's names, our joint matrices taken apart; contiguous, on the CPU, no two share memory."""
    width, ff = model.shape.embed_size, model.shape.ff_width
    state = _on_cpu(model.state_dict())
    tensors = {"model.embed_tokens.weight": state["embedding"], "model.norm.weight": state["norm.weight"]}
    if "head" in state:
        tensors["lm_head.weight"] = state["head"]
    for number in range(model.shape.num_layers):
        ours, theirs = f"layers.{number}.", f"model.layers.{number}."
        q, k, v = state[ours + "qkv"].split(width)
        gate, up = state[ours + "gate_up"].split(ff)
        tensors |= {
            theirs + "input_layernorm.weight": state[ours + "attention_norm.weight"],
            theirs + "self_attn.q_proj.weight": q,
            theirs + "self_attn.k_proj.weight": k,
            theirs + "self_attn.v_proj.weight": v,
            theirs + "self_attn.o_proj.weight": state[ours + "out"],
            theirs + "post_attention_layernorm.weight": state[ours + "ff_norm.weight"],
            theirs + "mlp.gate_proj.weight": gate,
            theirs + "mlp.up_proj.weight": up,
            theirs + "mlp.down_proj.weight": state[ours + "down"],
        }
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file beside `path`, bring it to disk, and give it its name. Nothing is left of a failure."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(beside)
        beside.chmod(FILE_MODE)
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_json(path: Path, value: Any) -> None:
    """`write_whole` of a JSON document a person can read."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_whole(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def _on_cpu(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in state.items()}
