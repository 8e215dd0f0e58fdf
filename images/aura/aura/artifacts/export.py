"""The trained model as files: a Hugging Face directory, and the guide's final_model.pt and model_config.json.

Every file is published whole: written under a temporary name, synced, then renamed.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from aura.model.decoder import NORM_EPS, Aura, ModelConfig
from aura.tokenizer.loading import Tokenizer
from estiba.checkpoint.exports import save_pt, verify_file, write_digest
from estiba.storage import sync_directory

FILE_MODE = 0o644
"""World-readable: a container may write as root and another user may read."""


def write_hf_directory(model: Aura, tokenizer: Tokenizer, folder: Path) -> None:
    """Write model and tokenizer in the format that transformers, llama.cpp and vLLM read.

    Weights are float32, as trained. config.json is written last: if it exists, so do the other files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    tensors = llama_tensors(model)
    # transformers rejects safetensors whose metadata does not name the framework.
    publish(folder / "model.safetensors", lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    write_digest(folder / "model.safetensors")
    write_json(folder / "generation_config.json", {"_from_model_config": True, **ids})
    write_json(folder / "config.json", llama_config(model.config) | ids)


def write_final_model(model: Aura, step: int, path: Path) -> None:
    """Write the guide's final_model.pt, for torch.load(weights_only=True)."""
    config = dataclasses.asdict(model.config)
    save_pt({"model_state_dict": _on_cpu(model.state_dict()), "model_config": config, "step": step}, path)


def load_final_model(path: Path) -> tuple[Aura, int]:
    """Load a final_model.pt. Returns the model, in evaluation mode on the CPU, and its step."""
    verify_file(path)
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    model = Aura(ModelConfig(**state["model_config"]), seed=0)
    model.load_state_dict(state["model_state_dict"])
    return model.eval(), int(state["step"])


def llama_config(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json for transformers' LlamaForCausalLM."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_size,
        "intermediate_size": config.ff_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_heads,
        "head_dim": config.head_size,
        "max_position_embeddings": config.seq_length,
        "rms_norm_eps": NORM_EPS,
        "rope_theta": config.rope_theta,  # transformers before 5
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "tie_word_embeddings": config.tie_embeddings,
        "use_cache": True,
        "dtype": "float32",
        "torch_dtype": "float32",  # transformers before 5
    }


def llama_tensors(model: Aura) -> dict[str, Tensor]:
    """Return parameters under Llama's names, fused matrices split, as contiguous CPU tensors that share no memory."""
    width, ff = model.config.embed_size, model.config.ff_width
    state = _on_cpu(model.state_dict())
    tensors = {"model.embed_tokens.weight": state["embedding"], "model.norm.weight": state["norm.weight"]}
    if "head" in state:
        tensors["lm_head.weight"] = state["head"]
    for number in range(model.config.num_layers):
        ours, llamas = f"layers.{number}.", f"model.layers.{number}."
        q, k, v = state[ours + "qkv"].split(width)
        gate, up = state[ours + "gate_up"].split(ff)
        tensors |= {
            llamas + "input_layernorm.weight": state[ours + "attention_norm.weight"],
            llamas + "self_attn.q_proj.weight": q,
            llamas + "self_attn.k_proj.weight": k,
            llamas + "self_attn.v_proj.weight": v,
            llamas + "self_attn.o_proj.weight": state[ours + "out"],
            llamas + "post_attention_layernorm.weight": state[ours + "ff_norm.weight"],
            llamas + "mlp.gate_proj.weight": gate,
            llamas + "mlp.up_proj.weight": up,
            llamas + "mlp.down_proj.weight": state[ours + "down"],
        }
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}


def publish(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary path, sync the file, rename it to `path`. On failure the old file stays."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(temporary)
        temporary.chmod(FILE_MODE)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    publish(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _on_cpu(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in state.items()}
